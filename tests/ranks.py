"""Run one function on several gloo ranks of this machine and collect what each returns.

The ranks are forked from one server process that has imported torch and the package already (see
preloaded.py), so that a test on eight ranks costs eight forks and not eight imports of torch.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
DEADLINE_S = 300.0
# After the first failure the others get this long to fail by themselves, so that the report can
# say which of them did.
GRACE_S = 1.0


class RankFailure(AssertionError):  # noqa: N818 (it reads as a finding of the test)
    """One or more ranks raised, died or did not finish; the message holds what is known of each."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = DEADLINE_S
) -> list[Any]:
    """Call ``fn(rank, world_size, init_file, *args)`` in ``world_size`` processes.

    ``fn`` must be a top-level function of a module file; arguments and results must pickle.
    ``init_file`` is a path for ``init_method=f"file://{init_file}"``. For ``env://`` the
    variables that torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ...) are there too.
    The current environment of the test is handed on.

    Returns what the ranks returned, in rank order. Raises RankFailure when a rank fails or the
    time is over, with the traceback of the rank that failed first; no process is left behind.
    """
    context = rank_context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        call = _describe_call(fn, args)
        settings = environments(world_size)
        processes: list[BaseProcess] = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, str(folder), call, settings[rank]),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, timeout_s)
        finally:
            _kill(processes)
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]


def rank_context() -> ForkServerContext:
    """Where ranks are forked from: a process that has the slow imports behind it."""
    context = multiprocessing.get_context("forkserver")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the server reads it once, when it starts
    context.set_forkserver_preload(["preloaded"])
    # Before Python 3.12.9 the server hears of our sys.path by its environment alone, and what it
    # cannot import is passed over without a word.
    with _on_path(TESTS, TESTS.parent):
        forkserver.ensure_running()
    return context


@contextmanager
def _on_path(*folders: Path) -> Iterator[None]:
    """These folders are first on the path of interpreters that start inside."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on.

    It lies below the range from which systems take the ports of outgoing connections, so that
    none of those can take it between this call and its use.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 20000 and 32000")


def _describe_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, str, str, bytes]:
    """Module name, file, function and arguments: a test module need not be importable by name."""
    file = sys.modules[fn.__module__].__file__
    if file is None or "." in fn.__qualname__:
        raise TypeError(f"{fn.__qualname__} is not a top-level function of a module file")
    return fn.__module__, file, fn.__qualname__, pickle.dumps(args)


def environments(world_size: int) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun would set it."""
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    return [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    call: tuple[str, str, str, bytes],
    environment: dict[str, str],
) -> None:
    log = os.open(_log(Path(folder), rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(environment)
    try:
        import torch

        torch.set_num_threads(1)
        module_name, file, function, arguments = call
        # Registered before the arguments are read: they may be instances of its classes.
        fn = getattr(_load_module(module_name, file), function)
        init_file = str(Path(folder) / "store")
        result = fn(rank, world_size, init_file, *pickle.loads(arguments))
        _result(Path(folder), rank).write_bytes(pickle.dumps(result))
    except BaseException:
        error = f"{time.monotonic()}\n{traceback.format_exc()}"
        _error(Path(folder), rank).write_text(error)
        sys.stdout.flush()
        # Not sys.exit: leftover gloo threads may wait for peers when an interpreter closes down.
        os._exit(1)


def _load_module(name: str, file: str) -> Any:
    module = sys.modules.get(name)
    if module is not None and getattr(module, "__file__", None) == file:
        return module
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _wait(processes: list[BaseProcess], folder: Path, timeout_s: float) -> None:
    """Return when every process has ended well; raise RankFailure otherwise."""
    end = time.monotonic() + timeout_s
    failed = False
    while any(process.exitcode is None for process in processes):
        left = end - time.monotonic()
        if left <= 0:
            break
        wait([p.sentinel for p in processes if p.exitcode is None], timeout=left)
        if not failed and any(process.exitcode not in (None, 0) for process in processes):
            failed = True
            end = min(end, time.monotonic() + GRACE_S)
    if any(process.exitcode != 0 for process in processes):
        when = "a moment after that" if failed else f"at the limit of {timeout_s:g} s"
        raise RankFailure(_report(processes, folder, when))


def _report(processes: list[BaseProcess], folder: Path, when: str) -> str:
    raised: list[tuple[float, int, str]] = []
    silent: list[str] = []
    for rank, process in enumerate(processes):
        if _error(folder, rank).exists():
            stamp, _, text = _error(folder, rank).read_text().partition("\n")
            raised.append((float(stamp), rank, text))
        elif process.exitcode is None:
            silent.append(f"rank {rank} was still running {when} and was killed")
        elif process.exitcode != 0:
            silent.append(f"rank {rank} died with exit code {process.exitcode}")
    raised.sort()
    lines = [f"rank {rank} failed first:\n{text}" for _, rank, text in raised[:1]]
    lines += [f"then rank {rank}: {text.strip().splitlines()[-1]}" for _, rank, text in raised[1:]]
    lines += silent
    for rank in range(len(processes)):
        if _log(folder, rank).exists() and (said := _log(folder, rank).read_text(errors="replace")):
            lines.append(f"rank {rank} printed, at the end:\n{said[-2000:]}")
    return "\n".join(lines)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.exitcode is None:
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.result"


def _error(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.error"


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"
