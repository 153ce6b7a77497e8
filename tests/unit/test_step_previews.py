"""Previews while denoising: the estimate, its colours, when it is gathered, what is written."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from opensora_sp.engine.clean_estimate import CleanEstimate
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.sampling import sample
from opensora_sp.media.sinks import Collector
from opensora_sp.models.latent_colours import LatentColours
from opensora_sp.request.request import Request
from opensora_sp.request.step_times import timesteps
from opensora_sp.server.step_previews import FRAMES, StepPreviews, fitted_colours


def test_the_estimate_of_a_straight_flow_is_the_clean_latents_at_every_step() -> None:
    clean, noise = torch.randn(2, 1, 3, 4, 5)
    times = timesteps(5, height=240, width=426, frames=51)
    estimate = CleanEstimate(lambda z, t, generate: clean - noise)
    seen = []

    def on_step(step: int, z: Tensor) -> None:
        following = times[step + 1] if step + 1 < len(times) else 0.0
        seen.append(estimate.clean(z, following))

    sample(noise, times, estimate, on_step=on_step)
    assert len(seen) == 5
    for one in seen:
        torch.testing.assert_close(one, clean)


def test_frames_that_are_kept_are_estimated_as_they_are() -> None:
    z = torch.randn(1, 3, 4, 5)
    estimate = CleanEstimate(lambda z, t, generate: torch.ones_like(z))
    estimate(z, 1000.0, torch.tensor([[False, True, True]]))
    moved = estimate.clean(z, 500.0) - z
    torch.testing.assert_close(moved[:, 0], torch.zeros(1, 4, 5))
    torch.testing.assert_close(moved[:, 1:], torch.full((1, 2, 4, 5), 0.5))


class LinearVAE:
    """A VAE whose decoder is linear: 8 x 8 pixels of one colour a cell."""

    config = SimpleNamespace(temporal=SimpleNamespace(embed_dim=4))
    weight = torch.tensor([[0.2, 0, 0], [0, 0.1, 0], [0, 0, 0.3], [0.1, 0.1, 0]])

    def decode(self, z: Tensor, frames: int) -> Tensor:
        cells = torch.einsum("bcthw,cr->brthw", z, self.weight) + 0.1
        return cells.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


def test_colours_are_exact_for_a_linear_decoder() -> None:
    vae: Any = LinearVAE()
    colours = LatentColours.fit(vae)
    torch.testing.assert_close(colours.weight, vae.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(colours.bias, torch.full((3,), 0.1), atol=1e-5, rtol=0)
    cell = torch.tensor([1.0, 0, 0, 0]).reshape(4, 1, 1, 1)
    assert colours(cell).flatten().tolist() == [166, 140, 140]  # (0.3 + 1) * 127.5, ...


def test_the_vae_makes_room_once_its_colours_are_fitted() -> None:
    moved: list[Any] = []
    models = SimpleNamespace(
        arithmetic=nullcontext, vae=lambda _: LinearVAE(), to_device=moved.append
    )
    engine = SimpleNamespace(
        whole=SimpleNamespace(leads=True), pipeline=SimpleNamespace(models=models)
    )
    assert fitted_colours(engine, None) is not None
    assert moved == [None]


class Watcher:
    """Wants a preview after every second step."""

    def __init__(self) -> None:
        self.asked, self.shown = 0, list[Tensor | None]()

    def due(self) -> bool:
        self.asked += 1
        return self.asked % 2 == 0

    def show(self, latents: Tensor | None) -> None:
        self.shown.append(latents)


def test_a_run_shows_estimates_that_resemble_the_video_and_gathers_no_other_latents() -> None:
    pipeline = Pipeline.load(dtype="fp32")
    request = Request(prompt="a red ball", height=32, width=48, num_frames=17, steps=4)
    watcher, given = Watcher(), []
    sink = Collector()

    def on_step_end(step: int, t: float, latents: Tensor | None) -> None:
        given.append(latents)

    latents = pipeline.generate_to(
        [request], [sink], on_step_end=on_step_end, previews=watcher
    ).latents[0]
    assert given == [None] * 4
    assert len(watcher.shown) == 2
    assert latents is not None
    last = watcher.shown[-1]
    assert last is not None
    torch.testing.assert_close(last, latents)  # after the last step nothing is left to estimate

    colours = LatentColours.fit(pipeline.models.vae(request))
    # Half way the estimate resembles the video already, which the noisy latents do not.
    assert all(alike(colours, one, sink) > 0.6 for one in watcher.shown)


def alike(colours: LatentColours, latents: Tensor | None, sink: Collector) -> float:
    """How well the colours of the last latent frame go with those of the last frame, up to 1."""
    assert latents is not None
    shown = colours(latents[0])[-1].float()
    assert sink.frames is not None
    cells = torch.as_tensor(sink.frames[-1]).float().reshape(4, 8, 6, 8, 3).mean((1, 3))
    return float(torch.corrcoef(torch.stack([shown.flatten(), cells.flatten()]))[0, 1])


def test_a_strip_is_written_at_most_every_second_and_only_on_rank_0(tmp_path: Path) -> None:
    colours = LatentColours(torch.zeros(4, 3), torch.tensor([1.0, -1.0, -1.0]))
    seen: list[int] = []
    files = [tmp_path / "a.webp", tmp_path / "gone" / "b.webp"]
    previews = StepPreviews(files, colours, lambda: seen.append(1))
    assert previews.due()
    previews.show(torch.zeros(2, 4, 30, 6, 10))
    assert not previews.due()
    strip = Image.open(files[0])
    assert strip.size == (10 * -(-30 // -(-30 // FRAMES)), 6)
    red, green, blue = strip.convert("RGB").getpixel((3, 3))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15
    assert not files[1].parent.exists()  # a job that was deleted does not come back
    assert seen == [1]
    other = StepPreviews(files, None, lambda: pytest.fail("it wrote"))
    assert not other.due()
    other.show(None)


def test_previews_rest_a_second_and_fifty_times_what_the_last_one_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = [100.0]
    monkeypatch.setattr("opensora_sp.server.step_previews.time.monotonic", lambda: moment[0])
    colours = LatentColours(torch.zeros(4, 3), torch.zeros(3))
    took = [0.0]

    def seen() -> None:
        moment[0] += took[0]

    previews = StepPreviews([tmp_path / "a.webp"], colours, seen)
    for took[0], rest in ((0.0, 1.0), (0.1, 5.0)):
        began = moment[0]
        previews.show(torch.zeros(1, 4, 1, 6, 10))
        moment[0] = began + rest - 0.01
        assert not previews.due()
        moment[0] = began + rest + 0.01
        assert previews.due()
