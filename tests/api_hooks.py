"""What tests/api_cases.py tells Schemathesis: ids of videos that are there, and bodies.

Drawn ids are unknown to any server. So half of the requests name a video of API_CASES_IDS. A third
of the bodies are as they were drawn from /openapi.json. A third are drawn, but with a small size
and few steps, so that what is taken is soon made. A third are legal bodies, three quarters of them
with one field that may not be.
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
VALUES: tuple[Any, ...] = ("", "a", "4", "64x48", "0x0", "9" * 400, "\0", "a" * 20_000)
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
    """Another body, in two thirds of the requests that have one."""
    if case.method.upper() != "POST":
        return case
    choice = _random.randrange(3)
    if choice == 1 and isinstance(case.body, dict):
        large = ("resolution", "aspect_ratio", "seconds", "num_sampling_steps", "loop")
        drawn = {name: value for name, value in case.body.items() if name not in large}
        case.body = drawn | SMALL | ({} if "images" in case.path else SHORT)
    if choice == 2:
        case.body = SMALL | ({} if "images" in case.path else SHORT)
        if _random.random() < 0.75:
            case.body = case.body | {_random.choice(FIELDS.split()): _random.choice(VALUES)}
        case.media_type = "application/json"
    return case
