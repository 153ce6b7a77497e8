"""The commands as a shell would start them, without the seconds that an interpreter needs to start.

Each copy is a process of its own with its own environment, standard output and exit code, forked
from one that has torch and the libraries behind it. What only a fresh interpreter can show (that
nothing heavy is imported, how it reads its encoding, what a launcher does) needs a real start.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ranks import rank_context


class Copies:
    """Copies of one command, one for each environment, from when they start to when they end.

    All append to the files `out` and `err`. program: infer, benchmark, ... of opensora_sp.cli.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        out: Path,
        err: Path | None = None,
        program: str = "infer",
    ) -> None:
        context = rank_context()
        ends = str(out), str(err or out)
        for path in (out, err or out):
            path.touch()
        self._processes: list[BaseProcess] = [
            context.Process(target=_command, args=(list(argv), dict(own), *ends, program))
            for own in environments
        ]
        for process in self._processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes."""
        return [process.pid for process in self._processes if process.pid is not None]

    def codes(self) -> list[int | None]:
        """The exit codes, None for a copy that still runs; a copy that a signal ended has -N."""
        return [process.exitcode for process in self._processes]

    def finish(self, timeout_s: float = 240.0) -> list[int | None]:
        """Wait until all have ended, or kill those that have not; the exit codes."""
        end = time.monotonic() + timeout_s
        while running := [p.sentinel for p in self._processes if p.exitcode is None]:
            if not wait(running, timeout=max(0.0, end - time.monotonic())):
                break
        codes = self.codes()
        self.kill()
        return codes

    def kill(self) -> None:
        """End those that are left."""
        for process in self._processes:
            process.kill()
            process.join()


def _command(
    argv: list[str], environment: dict[str, str], out: str, err: str, program: str
) -> None:
    for path, number in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [f"launch/{program}.py", *argv]
    code = import_module(f"opensora_sp.cli.{program}").main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
