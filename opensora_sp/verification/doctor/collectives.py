"""A test of every collective that the program uses, in which every received value is checked.

Each element depends on its sender, its receiver and its place. So parts that arrive swapped,
shifted or from the wrong rank are found. All values are whole numbers up to 250, which bf16 and
uint8 hold exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from opensora_sp.parallel.exchange import Comm, Transfer, broadcast
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import Session
from opensora_sp.verification.doctor.check_result import (
    CheckResult,
    attempt,
    failed,
    passed,
    skipped,
)

AREA = "collectives"
# Of a run's activations, and of its decoded frames.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_EXACT = 251  # a prime below 256, so that the patterns of two ranks differ
_SPEED_BYTES = 8 << 20  # that a rank sends to each other rank, to measure the link
Sizes = Callable[[int, int, int], int]


def _even(sender: int, receiver: int, ranks: int) -> int:
    return 5


def _uneven(sender: int, receiver: int, ranks: int) -> int:
    return 1 + (3 * sender + 5 * receiver) % 7


def _partly_empty(sender: int, receiver: int, ranks: int) -> int:
    return (sender + receiver) % 3 * 4


def _to_one(sender: int, receiver: int, ranks: int) -> int:
    return 6 + sender if receiver == 0 else 0


PATTERNS: dict[str, Sizes] = {
    "even parts": _even,
    "uneven parts": _uneven,
    "some parts empty": _partly_empty,
    "all to rank 0": _to_one,
}


def check_collectives(session: Session) -> list[CheckResult]:
    """Check every collective, on all ranks and on subgroups. Returns this rank's results."""
    if session.world_size == 1:
        line = "torchrun --nproc_per_node N --no-python opensora-sp doctor"
        return [skipped(AREA, "all", f"one process alone; see them with {line}")]
    results = [_attempt_together(session, "barrier", lambda: _barrier(session))]
    results.append(_attempt_together(session, "share an object", lambda: _share(session)))
    results.append(_attempt_together(session, "collect objects", lambda: _collect(session)))
    results += _of_group(session, session.world, "world")
    halves = 2 if session.world_size % 2 == 0 else 1
    comms = session.build(Mesh(guidance=halves, sequence=session.world_size // halves))
    for comm, name in ((comms.sequence, "sequence group"), (comms.guidance, "guidance pair")):
        if 1 < comm.size < session.world_size:
            results += _of_group(session, comm, name)
    results.append(_attempt_together(session, "speed", lambda: _speed(session)))
    return results


def _attempt_together(session: Session, name: str, check: Callable[[], CheckResult]) -> CheckResult:
    """Every rank tries, then all wait: one that failed does not run ahead into the next."""
    result = attempt(AREA, name, check)
    session.control.barrier()
    return result


def _of_group(session: Session, comm: Comm, where: str) -> list[CheckResult]:
    results = []
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for name, check in (("all_to_all_single", _exchanges), ("broadcast", _broadcast)):
            title = f"{name}, {where}, {kind}"
            work = partial(check, session, comm, title, dtype)
            results.append(_attempt_together(session, title, work))
    return results


def pattern(sender: int, receiver: int, count: int, dtype: torch.dtype) -> Tensor:
    """What one rank sends to another: [count], exact in every dtype."""
    place = torch.arange(count)
    return ((17 * sender + 43 * receiver + 5 * place + 1) % _EXACT).to(dtype)


def _exchanges(session: Session, comm: Comm, name: str, dtype: torch.dtype) -> CheckResult:
    """All-to-all with every pattern of sizes. A backend may treat each pattern differently."""
    wrong = [(case, _exchange(session, comm, sizes, dtype)) for case, sizes in PATTERNS.items()]
    bad = [
        f"{case}: what came from rank(s) {', '.join(map(str, senders))} of the group is not what "
        "was sent"
        for case, senders in wrong
        if senders
    ]
    return failed(AREA, name, "; ".join(bad)) if bad else passed(AREA, name, ", ".join(PATTERNS))


def _exchange(session: Session, comm: Comm, sizes: Sizes, dtype: torch.dtype) -> list[int]:
    """The senders whose parts arrived changed."""
    ranks = range(comm.size)
    send_sizes = [sizes(comm.rank, other, comm.size) for other in ranks]
    recv_sizes = [sizes(other, comm.rank, comm.size) for other in ranks]
    parts = [pattern(comm.rank, other, send_sizes[other], dtype) for other in ranks]
    send = torch.cat(parts).to(session.device)
    arrived = Transfer(comm, "doctor", send, send_sizes, recv_sizes, lambda got: got).wait()
    expected = [pattern(other, comm.rank, recv_sizes[other], dtype) for other in ranks]
    pairs = zip(arrived.cpu().split(recv_sizes), expected, strict=True)
    return [sender for sender, (got, sent) in enumerate(pairs) if not got.equal(sent)]


def _broadcast(session: Session, comm: Comm, name: str, dtype: torch.dtype) -> CheckResult:
    """Broadcast from every rank of the group in turn."""
    wrong = []
    for source in range(comm.size):
        expected = pattern(source, 7, 37, dtype)
        own = expected if comm.rank == source else None
        arrived = broadcast(comm, own, (37,), dtype, session.device, source)
        if not arrived.cpu().equal(expected):
            wrong.append(str(source))
    if wrong:
        return failed(AREA, name, f"what rank(s) {', '.join(wrong)} handed out arrived changed")
    return passed(AREA, name)


def _barrier(session: Session) -> CheckResult:
    session.control.barrier()
    return passed(AREA, "barrier")


def _share(session: Session) -> CheckResult:
    for source in range(session.world_size):
        said = session.control.broadcast_object(
            {"from": source} if session.rank == source else None, source
        )
        if said != {"from": source}:
            return failed(AREA, "share an object", f"{said!r} came from rank {source}")
    return passed(AREA, "share an object")


def _collect(session: Session) -> CheckResult:
    everyone = session.control.all_gather_object(("rank", session.rank))
    if everyone != [("rank", rank) for rank in range(session.world_size)]:
        return failed(AREA, "collect objects", f"{everyone!r} were collected")
    return passed(AREA, "collect objects")


def _speed(session: Session) -> CheckResult:
    """Measure the bytes per second that leave a rank in a large all-to-all. It has no limit."""
    count = _SPEED_BYTES // 4
    sizes: Sequence[int] = [count] * session.world_size
    send = torch.zeros(count * session.world_size, device=session.device)
    best = float("inf")
    for _ in range(3):
        session.control.barrier()
        started = time.perf_counter()
        Transfer(session.world, "doctor", send, sizes, sizes, lambda got: got).wait().sum().item()
        best = min(best, max(session.control.all_gather_object(time.perf_counter() - started)))
    speed = _SPEED_BYTES * (session.world_size - 1) / best / 1e9
    return passed(AREA, "speed", f"{speed:.3g} GB/s leave a rank in an all-to-all of 8 MiB parts")
