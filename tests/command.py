"""The whole command on forked ranks, and what it leaves behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankFailure, run_ranks
from safetensors.torch import load_file

from opensora_sp.jobs.records import FOLDER, read_record

SMALL = ["--image-size", "32", "48", "--device", "cpu", "--dtype", "fp32", "--verbose", "0"]


def infer(rank: int, world: int, init_file: str, argv: list[str], trouble: Any = None) -> int:
    """`main(argv)` on one rank. trouble: (rank, clip, steps, signal) sends it a signal there.

    How often the text encoder was loaded is left as files beside the outputs.
    """
    from opensora_sp.cli.infer import main
    from opensora_sp.jobs.saved_progress import SavedProgress
    from opensora_sp.models.text_encoder import TextEncoder

    watch, load = SavedProgress.watch, TextEncoder.load

    def watched(self: SavedProgress, clip: int, step: int, *rest: Any) -> None:
        if trouble is not None and trouble[:3] == (rank, clip, step):
            if trouble[3] == signal.SIGKILL:
                watch(self, clip, step, *rest)
            os.kill(os.getpid(), trouble[3])
        watch(self, clip, step, *rest)

    def counted(*arguments: Any, **named: Any) -> TextEncoder:
        folder = Path(argv[argv.index("--save-dir") + 1]) / "t5"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{os.getpid()}-{len(list(folder.iterdir()))}").touch()
        return load(*arguments, **named)

    setattr(SavedProgress, "watch", watched)  # noqa: B010
    setattr(TextEncoder, "load", counted)  # noqa: B010
    return main(argv)


def run(world: int, folder: Path, *argv: str, trouble: Any = None, fault: str = "") -> bool:
    """Whether the command came to its end on all ranks; fault as base/faults.py reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENSORA_SP_FAULT", fault)
        try:
            codes = run_ranks(infer, world, [*SMALL, *argv, "--save-dir", str(folder)], trouble)
        except RankFailure:
            if not fault and trouble is None:
                raise
            return False
    return codes == [0] * world


def t5_loads(folder: Path) -> int:
    """How often the runs in a folder have loaded the text encoder, on all ranks together."""
    return len(list(folder.glob("t5/*")))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The latents that are saved in a folder, by the name of the file and the tensor."""
    paths = sorted((folder / FOLDER).glob("*.safetensors"))
    return {f"{p.name}/{k}": v for p in paths for k, v in load_file(p).items()}


def stages(folder: Path) -> dict[str, str]:
    """How far every output has come, by its records."""
    names = [path.name.removesuffix(".json") for path in (folder / FOLDER).glob("*.json")]
    records = {name: read_record(folder / name) for name in sorted(names)}
    return {name: "unreadable" if r is None else r.stage for name, r in records.items()}


def pixels(path: Path) -> np.ndarray[Any, Any]:
    """The frames [F,H,W,3] of an output."""
    import av

    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
