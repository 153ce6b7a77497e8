"""One engine on several ranks makes job after job what a command of its own makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import SMALL, run, stages
from ranks import run_ranks

FLAGS = ["--num-frames", "image", "--num-sampling-steps", "2", "--text-cache", "off"]
# The second list is not guided, so its ranks are grouped in another way.
LISTS = [["--prompt", "a red ball", "a cat", "a dog"], ["--cfg-scale", "1", "--prompt", "a", "b"]]


def jobs_on_one_engine(
    rank: int, world: int, init_file: str, folder: Path, more: list[str]
) -> list[int]:
    from opensora_sp.jobs.open import open_engine
    from opensora_sp.jobs.run import run_job
    from opensora_sp.request.settings import build_job, parse_command_line, resolve

    jobs = []
    for number, argv in enumerate(LISTS):
        argv = [*SMALL, *FLAGS, *more, *argv]
        values = resolve(parse_command_line([*argv, "--save-dir", str(folder / str(number))]))
        jobs.append(build_job(values, world_size=world, leading=rank == 0))
    with open_engine(jobs[0]) as engine:
        return [run_job(engine, job) for job in jobs]


@pytest.mark.parametrize("more", [[], ["--replicas", "2"]], ids=["together", "two replicas"])
def test_jobs_on_one_engine_make_what_their_own_commands_make(
    more: list[str], tmp_path: Path
) -> None:
    codes = run_ranks(jobs_on_one_engine, 2, tmp_path / "one", more)
    assert codes == [[0, 0], [0, 0]]
    for number, argv in enumerate(LISTS):
        own, one = tmp_path / "own" / str(number), tmp_path / "one" / str(number)
        assert run(2, own, *FLAGS, *more, *argv)
        names = [f"sample_{i:04d}.png" for i in range(len(argv) - argv.index("--prompt") - 1)]
        assert stages(one) == dict.fromkeys(names, "done")
        for name in names:
            assert (one / name).read_bytes() == (own / name).read_bytes()
