"""Writing in a thread: order, the bound on what waits, and errors, as if there were no thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from opensora_sp.base.errors import UserError
from opensora_sp.engine.timing import Clock
from opensora_sp.jobs.finishing import Finishing
from opensora_sp.media.background import Background, BackgroundSink
from opensora_sp.media.sinks import Collector

WITHIN_S = 10.0


class Gated:
    """A sink that writes when it is let. It fails at its `fails_at`-th piece."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.open, self.begun = threading.Event(), threading.Event()
        self.pieces: list[int] = []
        self.fails_at = fails_at

    def write(self, frames: Any) -> None:
        self.begun.set()
        assert self.open.wait(WITHIN_S)
        if len(self.pieces) == self.fails_at:
            raise UserError("cannot write there")
        self.pieces.append(int(frames[0, 0, 0, 0]))


def piece(number: int) -> Any:
    return np.full((1, 1, 10, 1), number, dtype=np.uint8)  # 10 bytes


def nothing() -> None: ...


def test_pieces_are_written_in_order_from_copies() -> None:
    background, sink = Background(10_000), Collector()
    frames = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    through = BackgroundSink(sink, background, nothing)
    for number in range(200):
        frames[:] = number
        through.write(frames)
    background.wait()
    assert [int(part[0, 0, 0, 0]) for part in sink.parts] == list(range(200))
    assert background.seconds > 0


def test_no_more_waits_than_may() -> None:
    background, sink = Background(25), Gated()
    through, given = BackgroundSink(sink, background, nothing), list[int]()

    def give() -> None:
        for number in range(4):
            through.write(piece(number))
            given.append(number)

    giver = threading.Thread(target=give)
    giver.start()
    assert sink.begun.wait(WITHIN_S)
    giver.join(0.3)
    assert given == [0, 1]  # one in work and one that waits are 20 bytes of 25
    sink.open.set()
    giver.join(WITHIN_S)
    background.wait()
    assert sink.pieces == given == [0, 1, 2, 3]


def test_a_piece_above_the_bound_passes_alone() -> None:
    background, sink = Background(1), Collector()
    BackgroundSink(sink, background, nothing).write(piece(7))
    background.wait()
    assert len(sink.parts) == 1


def test_an_error_comes_back_and_nothing_is_written_after_it() -> None:
    background, sink = Background(10), Gated(fails_at=1)
    through = BackgroundSink(sink, background, nothing)
    sink.open.set()

    def give() -> None:
        for number in range(9):
            through.write(piece(number))

    with pytest.raises(UserError, match="cannot write there"):
        give()
    with pytest.raises(UserError, match="cannot write there"):
        background.wait()
    assert sink.pieces == [0]


def test_what_is_abandoned_is_not_begun() -> None:
    background, sink = Background(100), Gated()
    through = BackgroundSink(sink, background, nothing)
    for number in range(3):
        through.write(piece(number))
    assert sink.begun.wait(WITHIN_S)
    threading.Timer(0.2, sink.open.set).start()
    background.abandon()
    assert sink.pieces == [0]  # it was in work, and was waited for


@contextmanager
def file(said: list[str]) -> Iterator[None]:
    """As an output: it appears when the block ends well."""
    try:
        yield
    except BaseException:
        said.append("removed")
        raise
    said.append("there")


@pytest.mark.parametrize("fails_at", [None, 1])
def test_a_batch_is_completed_beside_the_next(fails_at: int | None) -> None:
    clock, said, sink = Clock(torch.device("cpu")), list[str](), Gated(fails_at)
    finishing, background, files = Finishing(clock), Background(1000), ExitStack()
    files.enter_context(file(said))
    through = BackgroundSink(sink, background, finishing.settle)
    for number in range(2):
        through.write(piece(number))
    finishing.begin(background, files, lambda: said.append("done"))
    finishing.check()
    assert said == []  # the main thread goes on before the file is there
    sink.open.set()
    following, other = Collector(), Background(1000)
    after = BackgroundSink(following, other, finishing.settle)
    if fails_at is None:
        after.write(piece(5))
        assert said == ["there", "done"]
    else:
        with pytest.raises(UserError, match="cannot write there"):
            after.write(piece(5))
        assert said == ["removed"]
        assert not following.parts
    other.abandon()
    assert clock.beside.keys() == {"encode, beside the rest"}


def test_a_failure_is_heard_at_the_next_step() -> None:
    clock, said, sink = Clock(torch.device("cpu")), list[str](), Gated(fails_at=0)
    finishing, background, files = Finishing(clock), Background(1000), ExitStack()
    files.enter_context(file(said))
    BackgroundSink(sink, background, nothing).write(piece(0))
    finishing.begin(background, files, nothing)
    sink.open.set()

    def steps() -> None:
        for _ in range(1000):
            finishing.check()
            threading.Event().wait(0.01)

    with pytest.raises(UserError, match="cannot write there"):
        steps()
    assert said == ["removed"]
    assert clock.failed_in == "write"
    finishing.settle()  # it is said once
