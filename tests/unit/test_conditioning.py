"""Conditioning strategies: parsing, alignment, placement."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_sp.base.errors import UserError
from opensora_sp.engine.clips import apply_strategy
from opensora_sp.request.mask_strategy import (
    Group,
    Placement,
    align_to,
    parse_mask_strategy,
    plan_strategy,
)


@pytest.fixture(scope="module")
def cases(suite_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((suite_dir / "prompts.json").read_text("utf-8"))
    return loaded


def test_conformance_of_parsing(cases: dict[str, Any]) -> None:
    for text, expected in cases["mask_strategy_parse"].items():
        groups = [list(dataclasses.astuple(group)) for group in parse_mask_strategy(text)]
        assert groups == expected, text


def test_conformance_of_alignment(cases: dict[str, Any]) -> None:
    for value, align, maximum, expected in cases["align_to"]:
        assert align_to(value, align, maximum) == expected, (value, align, maximum)


def test_conformance_of_placement(cases: dict[str, Any]) -> None:
    for case in cases["apply_mask_strategy"]:
        lengths, frames = case["reference_frames"], case["latent_frames"]
        references = [
            (100.0 * number + 1 + torch.arange(length)).view(1, length, 1, 1).expand(4, -1, 2, 3)
            for number, length in enumerate(lengths)
        ]
        z = torch.zeros(4, frames, 2, 3)
        groups = parse_mask_strategy(case["mask_strategy"])
        plan = plan_strategy(groups, case["loop"], lengths, frames, case["align"])
        mask = apply_strategy(z, references, plan)
        expected = torch.tensor(case["filled"]).view(1, frames, 1, 1).expand_as(z)
        assert torch.equal(z, expected), case
        assert mask.tolist() == case["mask"], case


@pytest.mark.parametrize(
    "text",
    [
        *("x", "0,1.5", ";", "0;", "0,,0", "0,0,0,0,1,0,0", "-1", "0,-1", "0,0,0,0,-2"),
        *("0,0,0,0,1,1.1", "0,0,0,0,1,-0.1", "0,0,0,0,1,nan"),
    ],
)
def test_malformed_strategies_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="groups are loop,ref") as caught:
        parse_mask_strategy(text)
    assert "\n" not in str(caught.value)


def test_white_space_around_numbers_is_fine() -> None:
    assert parse_mask_strategy(" 1, 2 ; 0") == [Group(loop=1, ref=2), Group()]
    assert parse_mask_strategy("  ") == []


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="reference 2 in clip 1"):
        plan_strategy([Group(loop=1, ref=2)], 1, [1, 1], 15, 5)
    with pytest.raises(UserError, match=r"target_start -16 .* 15 latent frames"):
        plan_strategy([Group(target_start=-16)], 0, [1], 15, None)
    with pytest.raises(UserError, match=r"ref_start -2 .* 1 latent frames"):
        plan_strategy([Group(ref_start=-2)], 0, [1], 15, 5)
    # A group for another clip may ask for a reference that does not exist yet.
    assert plan_strategy([Group(loop=1, ref=2)], 0, [1], 15, 5) == []


def test_lengths_are_cut_to_the_reference_and_to_the_clip() -> None:
    def plan(group: Group) -> Placement:
        (placement,) = plan_strategy([group], 0, [7], 10, None)
        return placement

    assert plan(Group(length=99)) == Placement(0, 0, 0, 7, 0.0)
    assert plan(Group(ref_start=5, length=4)) == Placement(0, 5, 0, 2, 0.0)
    assert plan(Group(target_start=-3, length=4)) == Placement(0, 0, 7, 3, 0.0)
    assert plan(Group(ref_start=8)).length == 0
    assert plan(Group(target_start=12)).length == 0


def test_apply_touches_only_the_placed_frames_and_later_groups_win() -> None:
    noise = torch.randn(4, 6, 2, 2, generator=torch.Generator().manual_seed(0))
    z, first, second = noise.clone(), torch.full((4, 3, 2, 2), 7.0), torch.full((4, 2, 2, 2), 9.0)
    plan = [Placement(0, 0, 1, 3, 0.0), Placement(1, 1, 3, 1, 0.25), Placement(0, 5, 6, 0, 0.0)]
    mask = apply_strategy(z, [first, second.to(torch.float64)], plan)
    assert mask.tolist() == [1, 0, 0, 0.25, 1, 1]
    assert torch.equal(z[:, [0, 4, 5]], noise[:, [0, 4, 5]])
    assert (z[:, 1:3] == 7).all()
    assert (z[:, 3] == 9).all()
    with pytest.raises(ValueError, match="reference 0 has latents"):
        apply_strategy(z, [torch.zeros(4, 3, 2, 1)], plan)
