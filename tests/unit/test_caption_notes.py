"""Notes where the model is told something else than the prompt says, and what it is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from opensora_sp.cli.infer import main
from opensora_sp.request.caption_notes import captions, check_captions, lost_words
from opensora_sp.request.embedded import EMBEDDED
from opensora_sp.request.prompts import caption_for_clip
from opensora_sp.request.request import Request

RUN = ["--num-frames", "image", "--image-size", "32", "48", "--num-sampling-steps", "1"]
RUN += ["--device", "cpu", "--dtype", "fp32"]


def lost(prompt: str) -> list[str]:
    return lost_words(prompt, caption_for_clip(prompt, 0))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("一只红色的球向左滚动", ["一只红色的球向左滚动"]),
        ("a 红 ball and 球", ["红", "球"]),
        ("赤いボール", ["赤"]),
        ("look at http://example.com/a now", ["http", "example", "com", "a"]),
        ("a ball #123 on a hill", ["123"]),
        ("a ball by @painter on a hill", ["painter"]),
        ("a 3x4 grid", ["3x4"]),
        ("a 1920×1080 screen", ["1920", "1080"]),
        ("page 3 of a book", ["page", "3"]),
        ("cat.png on a table", ["cat", "png"]),
        ("a robot r2d2 and a b2b fair", ["r2d2", "b2b"]),
        ("the number 1234567 on a wall", ["1234567"]),
        ("free shipping on a box", ["free", "shipping"]),
        ("download a cat", ["download"]),
        ("click on it now", ["click", "on", "it"]),
        ("a <b>ball", ["b"]),
        ("one<br>two balls", ["one", "br", "two"]),
        ("20%cats and dogs", ["cats"]),
        ("at 192.168.10.1 in a room", ["192", "168", "10", "1"]),
    ],
)
def test_words_that_cleaning_drops(prompt: str, words: list[str]) -> None:
    assert lost(prompt) == words


@pytest.mark.parametrize(
    "prompt",
    [
        "A RED Ball, (rolling) to the left... !!",
        "  two   spaces\nand lines ",
        "it’s a “cat” — isn't it? 50% [dim] {bright}",
        "this-is-my-cute-cat_here",
        "f/2.8, 35mm; 4k",
        "a%20red+ball",
        "salt &amp; pepper &#39;n&#39; a cat",
        "cafÃ© in München, ÉTÉ",
        "a ball. aesthetic score: 6.5. camera motion: pan left.",
        "<person> waves",
        "",
        "...",
        "🔴 ball",
    ],
)
def test_nothing_is_said_of_punctuation_case_and_escapes(prompt: str) -> None:
    assert lost(prompt) == []


def embedded_tokenizer() -> Any:
    from opensora_sp.models.text_pieces import load_pieces

    return load_pieces(EMBEDDED / "t5")


@pytest.mark.parametrize("limit", [2, 7, 12])
def test_the_end_that_is_not_read_is_the_end_of_the_caption(limit: int) -> None:
    pieces, prompt = embedded_tokenizer(), "a red ball rolls to the left of a blue square slowly"
    (one,) = check_captions(Request(prompt=prompt, aes=None), pieces, limit)
    read = "".join(pieces.encode(prompt, out_type=str)[: limit - 1]).replace("\u2581", " ")
    assert one.unread
    assert one.caption.endswith(one.unread)
    whole = one.caption.removesuffix(one.unread).strip()
    # What is cut in the middle of a word is not read as that word.
    assert read.strip().startswith(whole)
    assert " " not in read.strip().removeprefix(whole).strip()
    assert f"the last {len(one.unread.split())} words are not read" in one.notes()[0]


def test_exactly_full_is_not_cut() -> None:
    pieces, prompt = embedded_tokenizer(), "a red ball rolls to the left"
    tokens = len(pieces.encode(prompt)) + 1
    request = Request(prompt=prompt, aes=None)
    assert check_captions(request, pieces, tokens)[0].unread == ""
    assert check_captions(request, pieces, tokens - 1)[0].unread == "left"


def test_words_without_letters_in_the_vocabulary() -> None:
    pieces = embedded_tokenizer()
    request = Request(prompt="a red ball 🔴 and привет, a zebra", aes=6.5)
    (one,) = check_captions(request, pieces, 300)
    assert one.unknown == ["🔴", "привет,"]
    assert not one.lost
    assert "'🔴', 'привет,'" in one.notes()[0]
    assert check_captions(Request(prompt="a red ball"), pieces, 300)[0].notes() == []
    assert check_captions(request, pieces, 5)[0].unknown == []  # it is not read at all


def test_every_text_of_a_prompt_is_looked_at_and_no_other() -> None:
    request = Request(prompt="|0|a ball|2|猫|7|球", loop=4, num_frames=34)
    found = check_captions(request)
    assert [(one.clip, list(one.lost)) for one in found] == [(0, []), (2, ["猫"])]
    assert "the text from clip 2 on" in found[1].notes()[0]
    scores = " aesthetic score: 6.5."
    assert captions(request) == [f"a ball{scores}", f"a ball{scores}", scores.strip()]
    assert captions(Request(prompt="a", aes=None, loop=4)) == ["a"]


def run(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main([*RUN, "--text-cache", str(folder / "cache"), *argv]) == 0
    return capsys.readouterr().err.splitlines()


@pytest.mark.slow
def test_a_run_says_it_once_cached_or_not_and_writes_it_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    long = "a red ball rolls to the left " * 50
    prompts = ["--prompt", "一只猫", long, "a red ball", "--num-sample", "2"]
    for number in range(2):
        out = tmp_path / str(number)
        said = run(tmp_path, capsys, *prompts, "--sheet", "--save-dir", str(out))
        notes = [line for line in said if line.startswith("note: prompt ")]
        assert len(notes) == 2
        assert "'一只猫'" in notes[0]
        assert "told 'aesthetic score: 6.5.'" in notes[0]
        assert "--llm-refine" in notes[0]
        assert "words are not read" in notes[1]
        written = Image.open(out / "sample_0000-0.png").info
        assert '"captions": ["aesthetic score: 6.5."]' in " ".join(map(str, written.values()))
        sheet = (out / "sheet.html").read_text(encoding="utf-8")
        assert sheet.count("the model is told") == 6
        assert re.search(r"the model is told[^\w]+(<[^>]*>)*aesthetic score: 6.5.", sheet)
    assert not any(
        "note: prompt" in line for line in run(tmp_path, capsys, *prompts, "--save-dir", str(out))
    )  # nothing is left to make


def test_a_long_list_is_summed_up_and_all_of_it_is_there_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "list.json"
    file.write_text(json.dumps([f"{'球' * n} ball" for n in range(1, 14)]), encoding="utf-8")
    argv = ["--prompt-path", str(file), "--batch-size", "13"]
    said = run(tmp_path, capsys, *argv, "--save-dir", str(tmp_path / "1"))
    assert sum(line.startswith("note: prompt ") for line in said) == 10
    assert any("3 more notes" in line and "--verbose 2" in line for line in said)
    said = run(tmp_path, capsys, *argv, "--save-dir", str(tmp_path / "2"), "--verbose", "2")
    assert sum(line.startswith("note: prompt ") for line in said) == 13
    assert "sample_0003.png is told: 'ball aesthetic score: 6.5.'" in said
    quiet = run(tmp_path, capsys, *argv, "--save-dir", str(tmp_path / "3"), "--verbose", "0")
    assert not any("prompt" in line for line in quiet)
