"""The disk fills in mid-run: lost insurance is a note, a lost output is one line."""

from __future__ import annotations

import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command import SMALL, infer, run, saved, stages
from ranks import RankFailure, run_ranks

from opensora_sp.jobs import records as manifest
from opensora_sp.jobs import run as jobs
from opensora_sp.jobs.saved_latents import StateFiles
from opensora_sp.media import writer as media

FLAGS = ["--prompt", "one", "two", "--num-frames", "17", "--num-sampling-steps", "3"]
FLAGS += ["--save-every", "1", "--text-cache", "off"]
WRITING = threading.RLock()


@contextmanager
def full(size: int) -> Iterator[None]:
    """Every write of this process beyond `size` bytes of a file fails, as on a full disk.

    Outputs are written in a thread of their own: other writers of the process wait meanwhile.
    """
    with WRITING:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal SIGXFSZ
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def one_at_a_time(write: Callable[..., Any]) -> Callable[..., Any]:
    """The same, not while another thread finds its disk full."""

    def alone(*arguments: Any, **named: Any) -> Any:
        with WRITING:
            return write(*arguments, **named)

    return alone


def on_full_disk(
    rank: int, world: int, init_file: str, argv: list[str], what: str, errors: str
) -> int:
    """`main(argv)` where one kind of file finds no room. errors: its folder for standard error."""
    import sys

    def without_room(write: Callable[..., Any], size: int) -> Callable[..., Any]:
        def limited(self: Any, *arguments: Any, **named: Any) -> Any:
            if getattr(self, "path", Path()).name == "probe.mp4":
                return write(self, *arguments, **named)
            with full(size):
                return write(self, *arguments, **named)

        return limited

    setattr(jobs, "write_record", one_at_a_time(manifest.write_record))  # noqa: B010
    StateFiles._write = one_at_a_time(StateFiles._write)  # type: ignore[method-assign]
    for name in ("__init__", "write", "_close"):
        setattr(media.VideoWriter, name, one_at_a_time(getattr(media.VideoWriter, name)))
    if what == "states":
        StateFiles._write = without_room(StateFiles._write, 1000)  # type: ignore[method-assign]
    elif what == "records":
        write_record = manifest.write_record

        def limited(*arguments: Any) -> None:
            with full(100):
                write_record(*arguments)

        setattr(jobs, "write_record", limited)  # noqa: B010
    elif what == "outputs":
        media.VideoWriter.write = without_room(  # type: ignore[method-assign]
            media.VideoWriter.write, 40
        )
        close = media.VideoWriter._close
        media.VideoWriter._close = without_room(close, 40)  # type: ignore[method-assign]
    with open(Path(errors) / f"{rank}", "w", encoding="utf-8") as said:
        sys.stderr = said
        try:
            return infer(rank, world, init_file, argv)
        finally:
            said.flush()


def notes(folder: Path) -> list[str]:
    said = [line for path in folder.iterdir() for line in path.read_text().splitlines()]
    return [line for line in said if not line.startswith("note: 32x48")]


@pytest.fixture(scope="module", params=[1, 2])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A number of ranks, and the folder of a run of theirs that finds room for everything."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(request.param, folder, *FLAGS)
    return request.param, folder


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("states", r"note: the state is not saved, .*sample_0000\.mp4\.step\.safetensors: .+"),
        ("records", r"note: the record of .*sample_0000\.mp4 is not written: .+"),
    ],
)
def test_lost_insurance_is_one_note(
    what: str, said: str, whole: tuple[int, Path], tmp_path: Path
) -> None:
    world, made = whole
    errors = tmp_path / "errors"
    errors.mkdir()
    folder = tmp_path / "full"
    argv = [*SMALL, *FLAGS, "--save-dir", str(folder)]
    codes = run_ranks(on_full_disk, world, argv, what, str(errors))
    assert codes == [0] * world
    for name in ("sample_0000.mp4", "sample_0001.mp4"):
        assert (folder / name).read_bytes() == (made / name).read_bytes()
    (line,) = notes(errors)
    assert re.fullmatch(said, line)
    assert not list(folder.rglob("*.tmp"))
    if what == "states":
        assert saved(folder) == {}
        assert set(stages(folder).values()) == {"done"}


@pytest.mark.parametrize("world", [1, 2])
def test_a_lost_output_is_one_line(world: int, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    errors.mkdir()
    folder = tmp_path / "full"
    argv = [*SMALL, *FLAGS, "--save-dir", str(folder)]
    try:
        codes = run_ranks(on_full_disk, world, argv, "outputs", str(errors))
        assert codes[0] == 2
    except RankFailure:  # several ranks leave at once, without a result
        assert world > 1
    (line,) = notes(errors)
    assert line.startswith("error: ")
    assert "sample_0000.mp4" in line
    assert not list(folder.glob("*.mp4"))
    assert not list(folder.rglob("*.tmp"))
    # The latents were saved before: with room again only the decoding is left to do.
    assert stages(folder)["sample_0000.mp4"] == "latents saved"
    assert all(torch.isfinite(tensor).all() for tensor in saved(folder).values())
    assert run(world, folder, *FLAGS)


def test_a_full_log_is_a_note(tmp_path: Path) -> None:
    logs, errors = tmp_path / "logs", tmp_path / "errors"
    logs.mkdir()
    errors.mkdir()
    for rank in (0, 2):  # the leading one and another
        (logs / f"rank-{rank}.log").symlink_to("/dev/full")  # as a disk that is full
    argv = [*SMALL, *FLAGS, "--save-dir", str(tmp_path / "made"), "--log-dir", str(logs)]
    codes = run_ranks(on_full_disk, 3, argv, "nothing", str(errors))
    assert codes == [0] * 3
    assert len(list((tmp_path / "made").glob("*.mp4"))) == 2
    assert sorted(notes(errors)) == [
        f"note: --log-dir: {logs}/rank-{rank}.log takes no more (No space left on device): the "
        "run goes on without"
        for rank in (0, 2)
    ]
    assert (logs / "rank-1.log").stat().st_size > 0
