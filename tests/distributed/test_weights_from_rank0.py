"""Only the leading rank has the checkpoints: the same weights everywhere, or one clear end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks

from opensora_sp.base.errors import SharedFault
from opensora_sp.engine.loading import load_transformer
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.parallel.agreement import checksum
from opensora_sp.parallel.session import open_session
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.request import Checkpoints, Request

NOWHERE = Path("/nowhere")
ABSENT = Checkpoints(dit=NOWHERE, t5=NOWHERE, vae2d=NOWHERE, vae3d=NOWHERE)


def handed_out(rank: int, world: int, init_file: str) -> tuple[str, Any]:
    """Checksum of this rank's transformer, and the frames that it helped to make."""
    request = Request(prompt="a ball", height=32, width=48, num_frames=17, steps=1)
    with open_session("cpu") as session:
        pipeline = Pipeline.load(
            embedded_checkpoints() if rank == 0 else ABSENT,
            session=session,
            dtype="bf16",
            weights_from="rank0",
        )
        video = pipeline.generate(request).videos[0]
        return checksum(pipeline.models.transformer.state_dict().values()), video


def test_every_rank_has_the_leading_ones_weights() -> None:
    results = run_ranks(handed_out, 3)
    checkpoints = embedded_checkpoints()
    config = Pipeline.load(checkpoints).models.config
    own = load_transformer(checkpoints.dit, config, torch.bfloat16)
    assert {digest for digest, _ in results} == {checksum(own.state_dict().values())}
    assert results[0][1].std() > 0
    assert all(video is None for _, video in results[1:])


def missing(rank: int, world: int, init_file: str) -> str:
    with open_session("cpu") as session:
        try:
            Pipeline.load(ABSENT, session=session, weights_from="rank0")
        except SharedFault as fault:
            return str(fault)
    return "nothing"


def test_what_the_leading_rank_lacks_is_told_to_all() -> None:
    said = run_ranks(missing, 2)
    assert said[0] == said[1]
    assert "/nowhere" in said[0]
