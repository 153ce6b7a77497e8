"""Generate videos: check the request without torch, then hand the job to the main path."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from opensora_sp import __version__
from opensora_sp.cli.flag_docs import help_text
from opensora_sp.cli.threads import apply_cpu_threads
from opensora_sp.errors import UserError
from opensora_sp.request import Job
from opensora_sp.settings import (
    build_job,
    check_request,
    parse_command_line,
    print_config,
    resolve,
)

REFUSED = 2  # exit code of a request that cannot be run
HEAD_START_S = 1.0  # in which rank 0 says what is wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code (2: refused, with one line on stderr)."""
    try:
        prepared = prepare(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        # Every rank finds the same fault in the same command line: one of them says it.
        if _rank() == "0":
            print(f"error: {_one_line(error)}", file=sys.stderr)
        else:
            # torchrun ends all ranks when the first one fails: let rank 0 be the first.
            time.sleep(HEAD_START_S)
        return REFUSED
    if isinstance(prepared, str):
        if _rank() == "0":
            sys.stdout.write(prepared)
        return 0
    return _run(prepared)


def prepare(argv: Sequence[str]) -> Job | str:
    """The job that a command line asks for, or the text that answers it. Imports no torch.

    Raises UserError.
    """
    command = parse_command_line(argv)
    if command.help:
        return help_text("infer")
    if command.version:
        return f"opensora_sp {__version__}\n"
    values = resolve(command, program="infer")
    if command.print_config:
        check_request(values, world_size=_world_size())
        return print_config(values)
    return build_job(values, world_size=_world_size())


def _run(job: Job) -> int:
    if _rank() == "0" and job.settings.verbose > 0:
        for note in job.notes:
            print(f"note: {_one_line(note)}", file=sys.stderr)
    apply_cpu_threads(job.settings.cpu_threads, job.settings.device)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        from opensora_sp.jobs import run_job

        return run_job(job)
    except UserError as error:
        # Here the ranks differ: what one of them finds (its device, its disk) the others may not.
        who = "" if _rank() == "0" else f"rank {_rank()}: "
        print(f"error: {who}{_one_line(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        if _rank() == "0":
            print("stopped: nothing unfinished is left behind", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """Leave through every `with` block, so that files that are not whole are removed."""
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise SystemExit(128 + number)


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


if __name__ == "__main__":
    sys.exit(main())
