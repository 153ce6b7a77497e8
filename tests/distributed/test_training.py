"""Training the embedded model on two ranks: what one rank makes of the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opensora_sp.parallel.session import open_session


def _train(rank: int, world: int, init_file: str, directory: str) -> dict[str, torch.Tensor]:
    from training import small_training

    from scripts.train_embedded import flow

    for module, name, value in small_training():
        setattr(module, name, value)
    with open_session("cpu") as session:
        flow.train(Path(directory), 3, 2, session)
    state: dict[str, Any] = torch.load(Path(directory) / "flow.pt", weights_only=True)
    return {**state["average"], **{f"model.{n}": w for n, w in state["model"].items()}}


def test_two_ranks_learn_what_one_learns(
    tmp_path: Path, embedded_dir: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    from training import write_clips

    made = []
    for world in (1, 2):
        write_clips(tmp_path / str(world), embedded_dir)
        made.append(run_ranks(_train, world, str(tmp_path / str(world)))[0])
    one, two = made
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6, msg=name)
