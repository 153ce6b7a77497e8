"""Measure generation: the same request, checks and code as generate, run several times."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import on_any_screen
from opensora_sp.benchmark.options import BenchmarkOptions, check_baseline_request
from opensora_sp.benchmark.report.compare import compare_lines
from opensora_sp.benchmark.report.files import read_finished
from opensora_sp.benchmark.sweep import run_sweep
from opensora_sp.cli.console import rank, refuse, world_size
from opensora_sp.cli.help import help_asked, say
from opensora_sp.cli.program import Program, run_program
from opensora_sp.models.configs import read_dit
from opensora_sp.request.request import Job, Request
from opensora_sp.request.setting import from_flags
from opensora_sp.request.settings import (
    CommandLine,
    Values,
    check_request,
    parse_command_line,
    resolve,
    size_of,
)


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code.

    0: measured, compared, swept or counted; 1: points of a sweep failed; 2: refused, with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = None if help_asked(argv) else parse_command_line(argv)
        if command is not None and "compare" in command.program_control:
            return _compare(command)
        if command is not None and "sweep" in command.program_control:
            return _sweep(command, argv)
        if command is not None and "count" in command.program_control:
            return _count(command)
        if command is not None and "markdown" in command.program_control:
            raise UserError("--markdown is how --count prints: give --count too, or leave it out")
        if command is not None and "count_ranks" in command.written:
            raise UserError(
                "--count-ranks is what --count counts: give --count too, or leave it out"
            )
    except UserError as error:
        return refuse(error, same_everywhere=True)
    return run_program(Program("benchmark", _plan), argv)


def _plan(job: Job, values: Values) -> Callable[[], int]:
    for name in ("llm_refine", "sheet"):
        if values[name]:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} belongs to generate: the benchmark measures generation alone"
            )
    if values["replicas"] not in (None, 1):
        raise UserError(
            f"--replicas {values['replicas']} belongs to generate: the benchmark measures one "
            "video on all ranks"
        )
    job = with_own_names(job)
    options = BenchmarkOptions.from_values(values)
    check_baseline_request(job, options)

    def work() -> int:
        from opensora_sp.benchmark.runner import run_benchmark

        return run_benchmark(job, options)

    return work


def with_own_names(job: Job) -> Job:
    """The job with outputs called benchmark_0000 and so on, unless somebody named them.

    Measuring makes its outputs anew each time: under generate's names it would replace generate's.
    """
    if not job.settings.default_names:
        return job
    tasks = tuple(
        replace(
            task,
            output=task.output.with_name(f"benchmark{task.output.name.removeprefix('sample')}"),
        )
        for task in job.tasks
    )
    return replace(job, tasks=tasks)


def _compare(command: CommandLine) -> int:
    paths = command.program_control["compare"]
    assert isinstance(paths, list)
    if others := sorted(command.written):
        raise UserError(
            f"--compare only reads two reports: leave --{others[0].replace('_', '-')} out"
        )
    reports = [read_finished(Path(str(path)), "--compare") for path in paths]
    if rank() == "0":
        for line in compare_lines(reports[0], reports[1], (str(paths[0]), str(paths[1]))):
            print(line)
    return 0


def _sweep(command: CommandLine, argv: Sequence[str]) -> int:
    if world_size() > 1:
        raise UserError("--sweep starts torchrun for every point itself: run it with plain python")
    return run_sweep(command, argv)


def _count(command: CommandLine) -> int:
    values = resolve(command, program="benchmark")
    check_request(values, world_size=values["count_ranks"])
    height, width = size_of(values)
    request = Request(**from_flags(Request, values), prompt="", height=height, width=width)
    if (dit := values["ckpt_path_dit"]) is not None:
        read_dit(Path(dit))

    from opensora_sp.benchmark.count.command import count_request, count_text

    counted = count_request(request, values)
    return say(count_text(counted, as_markdown="markdown" in command.program_control))


if __name__ == "__main__":
    sys.exit(main())
