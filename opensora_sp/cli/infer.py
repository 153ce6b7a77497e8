"""Generate videos: check the request without torch, then hand the job to the main path."""

import sys
from collections.abc import Callable, Sequence

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import on_any_screen
from opensora_sp.cli.console import refuse
from opensora_sp.cli.program import Program, run_program
from opensora_sp.request.request import Job
from opensora_sp.request.settings import Values


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code (2: refused, with one line on stderr)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word.partition("=")[0] == "--queue" for word in words):
        from opensora_sp.cli import on_queue

        try:
            return on_queue.run(words)
        except UserError as error:
            return refuse(error, same_everywhere=True)
    return run_program(Program("infer", _plan), words)


def _plan(job: Job, _: Values) -> Callable[[], int]:
    def work() -> int:
        from opensora_sp.jobs.open import open_engine
        from opensora_sp.jobs.run import run_job

        with open_engine(job) as engine:
            return run_job(engine, job)

    return work


if __name__ == "__main__":
    sys.exit(main())
