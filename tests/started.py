"""This Python, started in another folder, as a person starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def start(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python *words` in cwd, without the variables of a rank; what it said and how it ended."""
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
