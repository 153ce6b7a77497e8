"""How a command ends that cannot be run: one line, from rank 0 above torchrun's banner, code 2."""

import os
import sys
import time

from opensora_sp.errors import SharedFault, UserError
from opensora_sp.screen import one_line

REFUSED = 2
# torchrun ends all ranks when the first one has ended: rank 0 is to be heard before that.
HEAD_START_S = 1.0


def rank() -> str:
    """This process's rank as torchrun says; "0" alone."""
    return os.environ.get("RANK", "0")


def world_size() -> int:
    """Ranks of the run; 1 where the environment holds no such number."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def refuse(error: UserError, *, same_everywhere: bool) -> int:
    """Say why on standard error and return the exit code.

    same_everywhere: every rank finds the same fault, or was told of it, so rank 0 alone speaks.
    """
    if rank() == "0":
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return REFUSED
    time.sleep(HEAD_START_S)
    if not same_everywhere and not isinstance(error, SharedFault):
        print(f"error: rank {rank()}: {one_line(error)}", file=sys.stderr, flush=True)
    return REFUSED
