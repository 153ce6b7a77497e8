"""What the programs that take the whole flag table share: parse, check, run, end."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opensora_sp import __version__
from opensora_sp.base.cpu_threads import VARIABLE, apply_cpu_threads
from opensora_sp.base.errors import JobEnded, Stopped, UserError
from opensora_sp.base.launcher import check_store, join, launcher_keeps_store
from opensora_sp.base.rank_log import rank_log
from opensora_sp.base.screen import note
from opensora_sp.cli.console import rank, refuse, world_size
from opensora_sp.cli.help import help_asked, program_help
from opensora_sp.cli.stopping import stoppable
from opensora_sp.parallel.watchdog.orphans import watch_launcher
from opensora_sp.parallel.watchdog.signals import leave
from opensora_sp.planner.devices import parse_memory
from opensora_sp.planner.requests import plan_job
from opensora_sp.request.request import Job
from opensora_sp.request.settings import (
    Values,
    build_job,
    check_request,
    parse_command_line,
    print_config,
    resolve,
)


@dataclass(frozen=True)
class Program:
    """One program of the flag table.

    plan: from the checked job and the flags' values to what runs; it may refuse, imports no torch
    and returns the function that does the work and returns the exit code.
    """

    name: str
    plan: Callable[[Job, Values], Callable[[], int]]


@dataclass(frozen=True)
class Prepared:
    """A checked job and what will do it."""

    job: Job
    work: Callable[[], int]


def run_program(program: Program, argv: Sequence[str] | None) -> int:
    """Run one command line; returns its exit code (2: refused, with one line on stderr)."""
    watch_launcher()
    try:
        prepared = prepare(program, sys.argv[1:] if argv is None else argv)
        if isinstance(prepared, str):
            if rank() == "0":
                sys.stdout.write(prepared)
            return 0
    except UserError as error:
        return refuse(error, same_everywhere=True)
    return run_prepared(prepared)


def prepare(program: Program, argv: Sequence[str]) -> Prepared | str:
    """What a command line asks for, or the text that answers it. Imports no torch.

    Raises UserError.
    """
    if (asked := help_asked(argv)) is not None:
        return program_help(program.name, asked)
    command = parse_command_line(argv)
    if command.version:
        return f"opensora_sp {__version__}\n"
    values = resolve(command, program=program.name)
    if command.print_config:
        check_request(values, world_size=world_size())
        return print_config(values, program.name)
    job = build_job(values, world_size=world_size(), leading=rank() == "0")
    _require_room(job)
    return Prepared(job, program.plan(job, values))


def _require_room(job: Job) -> None:
    """Refuse what does not fit --device-memory; without it the device is asked, after torch."""
    settings = job.engine
    if settings.device_memory is not None and rank() == "0":
        memory = parse_memory(settings.device_memory)
        if not settings.no_plan:
            plan_job(job, world_size(), memory)


def run_prepared(prepared: Prepared) -> int:
    """Join the other ranks and do the work; returns the exit code. Never returns after JobEnded."""
    job = prepared.job
    launch = join()
    try:
        check_store(launch, kept_by_launcher=launcher_keeps_store())
    except UserError as error:
        return refuse(error, same_everywhere=False)
    if launch.rank == 0 and job.settings.verbose > 0:
        for each in (*launch.notes, *job.notes):
            note(each)
        for line in job.failed:
            note(f"{line}; the other prompts are made")
    engine = job.engine
    checkpoints = engine.checkpoints
    threads = apply_cpu_threads(
        engine.cpu_threads,
        engine.device,
        transformer=None if checkpoints is None else checkpoints.dit,
    )
    if launch.rank == 0 and job.settings.verbose > 1:
        note(f"CPU threads of a rank: {threads or os.environ.get(VARIABLE, 'as torch chooses')}")
    with stoppable():
        try:
            with rank_log(engine.log_dir):
                return prepared.work()
        except JobEnded as ended:  # all ranks know, and one of them has said why
            leave(ended.code)
        except UserError as error:
            # Here the ranks may differ: what one finds (its device) the others need not.
            return refuse(error, same_everywhere=False)
        except Stopped as stopped:
            print("stopped: the same command goes on from what is saved", file=sys.stderr)
            return 128 + stopped.number
