"""What tests/api_cases.py tells Schemathesis: ids of videos that are there, and bodies.

Drawn ids are unknown to any server, and the description at /openapi.json has no bodies. So half of
the requests name a video of API_CASES_IDS, and requests that write have a legal body, three
quarters of them with one field that may not be.
"""

from __future__ import annotations

import hashlib
import os
import random
from typing import Any

import schemathesis

IDS = os.environ["API_CASES_IDS"].split(",")
SMALL = {"prompt": "a red ball", "size": "48x32"}
SHORT = {"num_frames": 17, "num_inference_steps": 2}  # of a video
FIELDS = "prompt seconds size seed n model priority fps image x num_frames num_inference_steps"
FIELDS += " guidance_scale loop aspect_ratio resolution mask_strategy response_format user"
VALUES: tuple[Any, ...] = ("", "a", "4", "64x48", "0x0", "9" * 400, "\0", "\ud800", "a" * 20_000)
VALUES += (0, 1, -1, 17, 2**63, 10**30, 1.5, 1e300, True, None, [], ["a"], {}, {"a": {"b": [1]}})
_random = random.Random(0)


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """A video that is there, in half of the requests that name one, by what was drawn."""
    digest = hashlib.sha256(repr(path_parameters).encode()).digest()
    if isinstance(path_parameters, dict) and digest[0] % 2:
        known = IDS[digest[1] % len(IDS)]
        return {name: known if "id" in name else one for name, one in path_parameters.items()}
    return path_parameters


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """A body, where one is needed."""
    if case.method.upper() == "POST":
        case.body = SMALL | ({} if "images" in case.path else SHORT)
        if _random.random() < 0.75:
            case.body = case.body | {_random.choice(FIELDS.split()): _random.choice(VALUES)}
        case.media_type = "application/json"
    return case
