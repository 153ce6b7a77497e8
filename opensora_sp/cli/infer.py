"""Generate videos: check the request without torch, then hand the job to the main path."""

import sys
from collections.abc import Sequence

from opensora_sp import __version__
from opensora_sp.cli.console import one_line, rank, refuse, world_size
from opensora_sp.cli.flag_docs import help_text
from opensora_sp.cli.stopping import leave, stoppable
from opensora_sp.cli.threads import apply_cpu_threads
from opensora_sp.errors import JobEnded, Stopped, UserError
from opensora_sp.request import Job
from opensora_sp.settings import (
    build_job,
    check_request,
    parse_command_line,
    print_config,
    resolve,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code (2: refused, with one line on stderr)."""
    try:
        prepared = prepare(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return refuse(error, same_everywhere=True)
    if isinstance(prepared, str):
        if rank() == "0":
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
        check_request(values, world_size=world_size())
        return print_config(values)
    return build_job(values, world_size=world_size())


def _run(job: Job) -> int:
    if rank() == "0" and job.settings.verbose > 0:
        for note in job.notes:
            print(f"note: {one_line(note)}", file=sys.stderr)
    apply_cpu_threads(job.settings.cpu_threads, job.settings.device)
    with stoppable():
        try:
            from opensora_sp.jobs import run_job

            return run_job(job)
        except JobEnded as ended:  # all ranks know, and one of them has said why
            leave(ended.code)
        except UserError as error:
            # Here the ranks may differ: what one finds (its device) the others need not.
            return refuse(error, same_everywhere=False)
        except Stopped as stopped:
            print("stopped: the same command goes on from what is saved", file=sys.stderr)
            return 128 + stopped.number


if __name__ == "__main__":
    sys.exit(main())
