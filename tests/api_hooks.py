"""What tests/api_cases.py tells Schemathesis: ids of videos that are there, and bodies that hold.

Drawn ids are unknown to any server, and most drawn bodies are refused at their first field. So half
of the requests name a video of API_CASES_IDS, and half of the bodies keep one drawn field beside
those of a small legal request. Which half is chosen by what was drawn.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import schemathesis

IDS = os.environ["API_CASES_IDS"].split(",")
SMALL = {"prompt": "a red ball", "size": "48x32", "num_frames": 17, "num_inference_steps": 2}


def _chosen(drawn: object) -> int:
    """A number that depends on nothing but what was drawn."""
    return int.from_bytes(hashlib.sha256(repr(drawn).encode()).digest()[:8], "big")


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """A video that is there, in half of the requests that name one."""
    chosen = _chosen(path_parameters)
    if isinstance(path_parameters, dict) and chosen % 2:
        known = IDS[chosen // 2 % len(IDS)]
        return {name: known if "id" in name else one for name, one in path_parameters.items()}
    return path_parameters


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """A legal request with one drawn field, in half of the bodies."""
    chosen = _chosen(body)
    if isinstance(body, dict) and chosen % 2:
        kept = sorted(body)[chosen // 2 % len(body)] if body else ""
        return SMALL | ({kept: body[kept]} if kept and chosen // 64 % 4 else {})
    return body
