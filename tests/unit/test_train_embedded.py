"""The embedded model's world, the judge of its clips, and a recipe that can be stopped."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import small_training, write_clips

from opensora_sp.parallel.session import alone
from scripts.train_embedded.captions import FACTS, OBJECTS, TRAINED, UNTRAINED, caption, facts
from scripts.train_embedded.judge import as_uint8, look, validate
from scripts.train_embedded.latents import key_frames, standing
from scripts.train_embedded.state import save_state
from scripts.train_embedded.world import Scene, Thing, centres, draw_scene, held_out, render


def scene(motion: str, *, shape: str = "square", travel: float = 0.6) -> Scene:
    thing = Thing("blue", shape, motion, 0.45, (0.5, 0.5), travel=travel)
    return Scene(64, 112, 17, (thing,), "gray", "black")


@pytest.mark.slow
def test_judge_is_right_about_true_renders_and_only_about_them() -> None:
    shares = validate(40)
    for name in ("colour", "shape", "motion"):
        assert shares[name] >= 0.99, shares
        assert shares[f"{name}, wrong caption"] <= 0.5, shares


def test_judge_looks_at_the_clip_it_is_given() -> None:
    clip = as_uint8(render(scene("left")))
    assert (look(clip)[0].colour, look(clip)[0].motion) == ("blue", "left")
    assert look(clip[::-1])[0].motion == "right"
    assert look(clip[..., ::-1])[0].colour == "red"
    assert look(np.full_like(clip, 90)) == []
    away = look(clip)[0].path - (centres(scene("left"), scene("left").things[0]) - 0.5)
    assert np.abs(away).max() < 0.2, "pixels from the true path"


def test_spinning_does_not_change_the_shape() -> None:
    thing = Thing("red", "triangle", "spin", 0.5, (0.5, 0.5), turns=0.6)
    seen = look(as_uint8(render(Scene(64, 96, 17, (thing,), "white", "white"))))
    assert (seen[0].shape, seen[0].motion) == ("triangle", "spin")


def test_held_out_combinations_are_never_trained() -> None:
    rng = np.random.default_rng(0)
    things = [t for _ in range(300) for t in draw_scene(rng, (64, 96), 17).things]
    assert not any(held_out(t.colour, t.shape, t.motion) for t in things)
    free = [draw_scene(rng, (64, 96), 17, training=False).things[0] for _ in range(100)]
    assert any(held_out(t.colour, t.shape, t.motion) for t in free)
    assert not set(TRAINED) & set(UNTRAINED)


def test_a_seed_is_a_scene_and_its_caption() -> None:
    first, second, other = (
        (s := draw_scene(rng, (72, 96), 17), caption(s, rng))
        for rng in (np.random.default_rng(seed) for seed in (3, 3, 4))
    )
    assert first == second
    assert first != other
    assert first[0].things[0].colour in first[1] or "magenta" in first[1] or "turquoise" in first[1]


def test_facts_are_what_the_caption_tells() -> None:
    told = {name for name, is_told in zip(FACTS, facts(scene("left")), strict=True) if is_told}
    assert told == {"blue", "square", "blue square", "left"}
    panned = replace(scene("still"), pan="up")
    told = {name for name, is_told in zip(FACTS, facts(panned), strict=True) if is_told}
    assert told == {"blue", "square", "blue square", "pan up"}


@pytest.mark.parametrize(
    ("frames", "keys"), [(1, [0]), (17, [0, 4, 8, 12, 16]), (20, [0, 4, 8, 12, 16, 19])]
)
def test_key_frames_end_each_group(frames: int, keys: list[int]) -> None:
    assert key_frames(frames) == keys


def test_objects_stand_where_they_are_drawn() -> None:
    red = Thing("red", "square", "right", 0.5, (0.25, 0.5), travel=1.0)
    blue = Thing("blue", "circle", "still", 0.5, (0.75, 0.25))
    scene = Scene(64, 128, 5, (red, blue), "black", "black")
    stands = standing(scene, [0, 4]).view(2, 4, 8)
    square, circle = OBJECTS.index("red square"), OBJECTS.index("blue circle")
    assert (stands[0, 1:3, 1:3] == square).all(), "its patches in the first frame"
    assert (stands[1, 2:3, 5:7] == square).all(), "and where it went"
    assert (stands[0, 0:2, 5:7] == circle).all()
    colours = torch.from_numpy(render(scene, [0, 4])).mean(-1)
    empty = colours.view(2, 4, 16, 8, 16).amax((2, 4)) < 0.1
    assert (stands[empty] == -1).all()
    assert empty.any()


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_dir: Path
) -> None:
    from scripts.train_embedded import flow

    for module, name, value in small_training():
        monkeypatch.setattr(module, name, value)
    for name, stops in (("whole", [4]), ("stopped", [2, 4])):
        directory = tmp_path / name
        write_clips(directory, embedded_dir)
        for steps in stops:
            flow.train(directory, steps, 2, alone("cpu"))
    whole, stopped = (
        torch.load(tmp_path / name / "flow.pt", weights_only=True) for name in ("whole", "stopped")
    )
    start = flow.Models().state_dict()
    for part in ("model", "average"):
        for name, weight in whole[part].items():
            torch.testing.assert_close(stopped[part][name], weight, rtol=1e-5, atol=1e-7, msg=name)
    moved = [not torch.equal(start[name], weight) for name, weight in whole["model"].items()]
    assert sum(moved) > len(moved) / 2, "the training changes the weights"


@pytest.mark.slow
def test_a_killed_training_of_the_vae_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.train_embedded import vae

    sizes = ((32, 32),)
    phases = tuple(vae.Phase(name, 2, 1, 1e-3) for name in ("pictures", "motion", "details"))
    for name, value in {
        "PHASES": phases, "SIZES": sizes, "LARGE": sizes, "LARGEST": sizes[0], "SAVE_EVERY": -1.0,
        "fit_normalisation": partial(vae.fit_normalisation, pictures=8), "psnr": lambda *_: 0.0,
    }.items():  # fmt: skip
        monkeypatch.setattr(vae, name, value)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    vae.train(whole, torch.device("cpu"))

    def save_and_die(path: Path, state: dict[str, Any]) -> None:
        save_state(path, state)
        if path.name == "vae.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(vae, "save_state", save_and_die)
    for _ in range(sum(phase.steps for phase in phases)):
        with pytest.raises(KeyboardInterrupt):
            vae.train(killed, torch.device("cpu"))
    ends = [torch.load(path / "vae.pt", weights_only=True) for path in (whole, killed)]
    assert ends[0]["model"].keys() == ends[1]["model"].keys()
    for name, weight in ends[0]["model"].items():
        torch.testing.assert_close(ends[1]["model"][name], weight, rtol=1e-5, atol=1e-7, msg=name)
    encoder = torch.load(whole / "vae_encoder.pt", weights_only=True)["model"]
    moved = {name for name, weight in encoder.items() if not weight.equal(ends[0]["model"][name])}
    assert moved, "the later phases train the decoders"
    assert not [name for name in moved if "encoder" in name], "and nothing but them"


def test_the_shipped_model_makes_states_that_make_the_shipped_model(
    tmp_path: Path, embedded_dir: Path
) -> None:
    from scripts.train_embedded.export import export
    from scripts.train_embedded.restore import restore

    restore(embedded_dir, tmp_path / "states", step=7, again=True)
    export(tmp_path / "states", tmp_path / "model")
    made = {path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*.*")}
    assert {Path("dit/model.safetensors"), Path("t5/spiece.model")} < made
    for name in made:
        if name.suffix == ".bin":  # archives differ with torch's version
            ours, shipped = (
                torch.load(d / name, weights_only=True) for d in (tmp_path / "model", embedded_dir)
            )
            assert ours.keys() == shipped.keys()
            assert all(torch.equal(ours[key], shipped[key]) for key in ours)
        else:
            assert (tmp_path / "model" / name).read_bytes() == (embedded_dir / name).read_bytes(), (
                name
            )
    with pytest.raises(SystemExit, match=r"flow\.pt"):
        restore(embedded_dir, tmp_path / "states", step=7, again=True)


def test_a_frames_place_knows_that_chunks_follow_at_once() -> None:
    from scripts.train_embedded.flow import places_of

    times, starts = places_of(10).T
    frames = (times + 1) / 2 * 33
    torch.testing.assert_close(
        frames, torch.tensor([0.0, 4, 8, 12, 16, 17, 21, 25, 29, 33]), rtol=0, atol=1e-4
    )
    assert starts.nonzero().flatten().tolist() == [0, 5]


def test_a_training_goes_on_from_one_file(tmp_path: Path, embedded_dir: Path) -> None:
    from scripts.train_embedded.export import export_flow
    from scripts.train_embedded.restore import restore

    restore(embedded_dir, tmp_path / "states", step=7)
    state = torch.load(tmp_path / "states" / "flow.pt", weights_only=True)
    state["average"] = {n: w + 1 if n.startswith("dit.") else w for n, w in state["model"].items()}
    torch.save(state, tmp_path / "states" / "flow.pt")
    export_flow(tmp_path / "states", tmp_path / "flow.safetensors")
    restore(embedded_dir, tmp_path / "others", step=0, flow=tmp_path / "flow.safetensors")
    again = torch.load(tmp_path / "others" / "flow.pt", weights_only=True)
    assert again["step"] == 7
    for name in ("dit.final_layer.linear.weight", "t5.shared.weight"):
        expected = state["average"][name].bfloat16().float()
        torch.testing.assert_close(again["model"][name].float(), expected, rtol=0, atol=0)
        assert torch.equal(again["average"][name], again["model"][name])


@pytest.mark.slow
def test_training_goes_on_from_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_dir: Path
) -> None:
    from scripts.train_embedded import flow
    from scripts.train_embedded.restore import restore

    for module, name, value in [*small_training(), (flow, "READERS_ALONE", 2)]:
        monkeypatch.setattr(module, name, value)
    restore(embedded_dir, tmp_path, step=7, again=False)
    write_clips(tmp_path, embedded_dir)
    shipped = torch.load(tmp_path / "flow.pt", weights_only=True)["model"]
    flow.train(tmp_path, 8, 1, alone("cpu"))
    state = torch.load(tmp_path / "flow.pt", weights_only=True)
    assert (state["begun"], state["step"]) == (7, 8)
    moved = {n.split(".")[0] for n, w in state["model"].items() if not torch.equal(w, shipped[n])}
    assert moved == {"t5", "dit", "places", "facts", "stands"}


def test_muon_keeps_the_singular_vectors_and_evens_the_values_out() -> None:
    from scripts.train_embedded.muon import orthogonal

    matrices = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ orthogonal(matrices) @ vh.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(values, torch.diag_embed(diagonal), rtol=0, atol=1e-4)


def test_muon_moves_what_one_weight_holds_as_if_each_were_a_weight() -> None:
    from scripts.train_embedded.muon import Muon

    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(30, 10, generator=generator)
    tall = torch.randn(20, 8, generator=generator)
    parts = [part.clone() for part in whole.chunk(3)]
    optimizers = [
        Muon([whole, tall], lr=0.1, pieces={whole: 3}),
        Muon([*parts, turned := tall.T.contiguous()], lr=0.1),
    ]
    before = whole.clone()
    for _ in range(2):
        whole.grad, tall.grad = whole.clone(), tall.sin()
        for part in parts:
            part.grad = part.clone()
        turned.grad = turned.sin()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(whole, torch.cat(parts))
    torch.testing.assert_close(tall, turned.T)
    assert not torch.allclose(whole, before)


def test_every_weight_has_one_optimizer() -> None:
    from scripts.train_embedded.flow import Models, make_optimizers

    models = Models()
    held = [w for o in make_optimizers(models) for group in o.param_groups for w in group["params"]]
    assert len({id(w) for w in held}) == len(held)
    assert {id(w) for w in held} == {id(w) for w in models.parameters()}
