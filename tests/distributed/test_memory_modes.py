"""Every memory mode gives the same velocity: weights elsewhere, work in parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import conditions, normal, tiny_transformer

from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.models.tiling import tiles
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import alone, open_session
from opensora_sp.request.memory_modes import MEMORY_MODES, Offload
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime

FRAMES, SIZE = 7, (6, 9)  # 15 patches a frame, odd sides
# Tokens at once: parts of a frame, of a few frames, of uneven rests.
TOKENS = (8, 70)


def runtimes() -> dict[str, Runtime]:
    """Every mode, cut as finely as a tiny model needs to be cut at all."""
    named: dict[str, Runtime] = {}
    for name, mode in MEMORY_MODES.items():
        named[name] = Runtime.of(mode)
        for tokens in TOKENS:
            named[f"{name} {tokens}"] = replace(named[name], tokens=tokens)
        named[f"{name} folded"] = replace(named[name], tokens=TOKENS[0], step_kernels="folded")
    return named


def velocity(runtime: Runtime, mesh: Mesh, comms: object) -> torch.Tensor | None:
    layout = Layout(frames=FRAMES, size=SIZE, ranks=mesh.sequence)
    denoiser = parallelize(tiny_transformer(), comms, layout, runtime)  # type: ignore[arg-type]
    z = denoiser.shard(normal(2, 4, FRAMES, *SIZE))
    mask = torch.ones(2, FRAMES, dtype=torch.bool)
    mask[1, 2] = False
    return denoiser.gather(denoiser.prepare(conditions(2))(z, 500.0, mask))


def errors(rank: int, world: int, init_file: str, mesh: Mesh) -> dict[str, float]:
    """How far each mode is from running everything at once on one device, relative."""
    found = {}
    with open_session("cpu") as session, torch.no_grad():
        comms = session.build(mesh) if world > 1 else None
        alone = velocity(Runtime(), Mesh(), None)
        for name, runtime in runtimes().items():
            got = velocity(runtime, mesh, comms)
            assert (got is None) == (rank != 0)
            if got is not None and alone is not None:
                found[name] = float((got - alone).abs().max() / alone.abs().max())
    return found


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(sequence=3), Mesh(guidance=2, sequence=2)])
def test_modes_give_equal_velocities(mesh: Mesh) -> None:
    found = run_ranks(errors, mesh.size, mesh)[0]
    assert len(found) == len(MEMORY_MODES) * (2 + len(TOKENS))
    # Matrix products of fewer rows may round their last bits otherwise; nothing else may differ.
    assert max(found.values()) <= 1e-5, found


def test_offloaded_weights_are_in_host_memory_again() -> None:
    model = tiny_transformer()
    before = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    layers = model.layers(offloaded=True)
    passing = iter(layers)
    for number in range(2):
        spatial, _ = next(passing)
        on_device = spatial.state_dict()["attn.qkv.weight"].data_ptr()
        assert on_device != before[f"spatial_blocks.{number}.attn.qkv.weight"]
    del passing  # left in the middle, as by an error
    after = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    assert after == before


@pytest.mark.parametrize("kernels", ["plain", "folded"])
def test_layer_offload_alone_changes_no_bit(kernels: Literal["plain", "folded"]) -> None:
    runtime = Runtime(serial_guidance=True, step_kernels=kernels)
    with torch.no_grad():
        plain = velocity(runtime, Mesh(), None)
        offload = Offload(models=True, layers=True)
        offloaded = velocity(replace(runtime, offload=offload), Mesh(), None)
    assert plain is not None
    assert offloaded is not None
    assert torch.equal(plain, offloaded)


def test_parts_cover_every_token_once() -> None:
    for shape in [(1, 7, 15), (2, 1, 4), (1, 5, 1)]:
        for tokens in (None, 1, 3, 16, 1000):
            seen = torch.zeros(shape[1:])
            for frames, patches in tiles(shape, tokens):
                part = seen[frames, patches]
                part += 1
                assert tokens is None or part.numel() * shape[0] <= max(tokens, shape[0])
            assert bool((seen == 1).all())


def test_whole_videos_are_equal_in_every_mode() -> None:
    """Text, transformer and VAE of the embedded model; a loop, so that the encoder has a turn."""
    request = Request(prompt="|0|go|1|stop", height=32, width=48, num_frames=34, loop=2, steps=2)
    session = alone("cpu")
    videos = {}
    for name in MEMORY_MODES:
        runtime = Runtime.of(name, serial_guidance=True)
        # One size of parts for all, and whole groups: then not one bit may differ.
        runtime = replace(runtime, tokens=16, vae_frames=None)
        pipeline = Pipeline.load(session=session, dtype="fp32", runtime=runtime)
        videos[name] = pipeline.generate(request).videos[0]
        assert (pipeline.text._encoder is None) == (name != "speed")
    assert videos["speed"] is not None
    assert videos["speed"].std() > 0
    for name, video in videos.items():
        assert np.array_equal(video, videos["speed"]), name  # type: ignore[arg-type]
    # As it is shipped, one frame at a time through the spatial VAE: other kernels, other rounding.
    shipped = Runtime.of("small", serial_guidance=True)
    video = (
        Pipeline.load(session=session, dtype="fp32", runtime=shipped).generate(request).videos[0]
    )
    assert video is not None
    assert np.abs(video.astype(int) - videos["speed"].astype(int)).max() <= 1
