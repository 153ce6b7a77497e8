"""Prompts: scores, texts per loop, JSON at the end."""

import json
from pathlib import Path
from typing import Any

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.request.prompts import (
    append_scores,
    caption_for_clip,
    parse_prompt_json,
    prompt_for_loop,
    split_loops,
)


@pytest.fixture(scope="module")
def cases(suite_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((suite_dir / "prompts.json").read_text("utf-8"))
    return loaded


def test_conformance_of_loops(cases: dict[str, Any]) -> None:
    case = cases["prompt_by_loop"]
    got = {clip: prompt_for_loop(case["prompt"], int(clip)) for clip in case["by_loop"]}
    assert got == case["by_loop"]


def test_conformance_of_scores(cases: dict[str, Any]) -> None:
    for case in cases["score_suffix"]:
        got = append_scores(case["prompt"], case["aes"], case["flow"], case["camera"])
        assert got == case["out"]


def test_conformance_of_json(cases: dict[str, Any]) -> None:
    for case in cases["prompt_json"]:
        got = parse_prompt_json(case["raw"])
        assert (got.prompt, got.reference_path, got.mask_strategy) == (
            case["prompt"],
            case["reference"],
            case["mask_strategy"],
        )


def test_json_wins_over_the_flags_key_by_key() -> None:
    got = parse_prompt_json(
        'a cat{"mask_strategy": ""}', reference_path="flag.png", mask_strategy="0"
    )
    assert (got.reference_path, got.mask_strategy) == ("flag.png", "")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ('a {"reference_path": "x"} {"mask_strategy": "0"}', "second '{'"),
        ('a {"reference_path": "x{y"}', "second '{'"),
        ("a {b}", "not readable JSON"),
        ('a {"reference_path": "x"} and more', "not readable JSON"),
        ('a {"refernce_path": "x"}', "unknown key 'refernce_path'"),
        ('a {"reference_path": ["x"]}', "must be a string"),
        ('a {"mask_strategy": 0}', "must be a string"),
        ('a {"mask_strategy": "0", "mask_strategy": "1"}', "twice"),
    ],
)
def test_bad_json_is_refused(raw: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse_prompt_json(raw)
    assert "\n" not in str(caught.value)


def test_loops_need_the_mark_and_any_order_works() -> None:
    assert split_loops("a |1| b") == {0: "a |1| b"}
    assert prompt_for_loop("|0|a|3|d|1|b", 2) == "b"
    assert split_loops("|0|a| 2\x1c|b") == {0: "a", 2: "b"}


@pytest.mark.parametrize("prompt", ["|0|a|x|b", "|0|a|1", "|0|a | b", "|0|a|-1|b", "|0|a|0|b"])
def test_bad_loops_are_refused(prompt: str) -> None:
    with pytest.raises(UserError, match=r"\|0\|text"):
        split_loops(prompt)


def test_scores_look_for_their_own_label_only() -> None:
    assert append_scores("motion score: 1.", 6.5, 2, "none") == (
        "motion score: 1. aesthetic score: 6.5. camera motion: none."
    )
    assert append_scores("a", 0.0, 0.04) == "a aesthetic score: 0.0. motion score: 0.0."


def test_a_clips_caption_is_its_segment_scored_then_cleaned() -> None:
    prompt = "|0| A  Cat, aesthetic score: 9.0.|2|a (dog) "
    assert caption_for_clip(prompt, 1, 6.5) == "a cat, aesthetic score: 9.0."
    assert caption_for_clip(prompt, 2, 6.5, None, "Pan Left") == (
        "a dog aesthetic score: 6.5. camera motion: pan left."
    )
