"""Help: what a command prints for --help, the flags that people use, and for --help all, every one.

Imports the flag table at most, so that help is there at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from opensora_sp.base.launcher import speaks

Help = Literal["short", "all"]


def help_asked(argv: Sequence[str]) -> Help | None:
    """Which help a command line asks for; None where it asks for none."""
    for place, word in enumerate(argv):
        if word in ("-h", "--help"):
            return "all" if argv[place + 1 : place + 2] == ["all"] else "short"
    return None


def say(text: str) -> int:
    """Print an answer on standard output, from rank 0 alone; returns the exit code 0."""
    if speaks():
        sys.stdout.write(text)
    return 0


def program_help(program: str, asked: Help) -> str:
    """The help of a program that takes the flag table; its name as in `PROGRAMS`."""
    from opensora_sp.request.flags.docs import help_text

    return help_text(program, whole=asked == "all")
