"""Command: find out which denoising steps need not be computed, and write step schedules."""

import sys
from collections.abc import Callable, Sequence

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import on_any_screen
from opensora_sp.benchmark.calibration.options import (
    EMBEDDED_PROMPTS,
    PROMPTS,
    CalibrationOptions,
    check_calibration,
)
from opensora_sp.cli.console import refuse
from opensora_sp.cli.help import help_asked
from opensora_sp.cli.program import Program, run_program
from opensora_sp.request.request import Job
from opensora_sp.request.settings import Values, parse_command_line, resolve


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code.

    0: schedules are written; 1: no list of steps reaches a level; 2: refused, with one line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if help_asked(argv) is None:
            argv += _own_prompts(argv)
    except UserError as error:
        return refuse(error, same_everywhere=True)
    return run_program(Program("calibrate", _plan), argv)


def _own_prompts(argv: Sequence[str]) -> list[str]:
    """The flag with prompts of this command, where none are given."""
    command = parse_command_line(argv)
    if command.version or command.print_config:
        return []
    values = resolve(command, program="calibrate")
    if values["prompt"] or values["prompt_path"] is not None:
        return []
    prompts = EMBEDDED_PROMPTS if values["ckpt_path_dit"] is None else PROMPTS
    return ["--prompt", *prompts]


def _plan(job: Job, values: Values) -> Callable[[], int]:
    check_calibration(job, values)
    options = CalibrationOptions.from_values(values)

    def work() -> int:
        from opensora_sp.benchmark.calibration.run import run_calibration

        return run_calibration(job, options)

    return work


if __name__ == "__main__":
    sys.exit(main())
