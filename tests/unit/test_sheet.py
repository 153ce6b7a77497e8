"""The contact sheet: everything on it, nothing that is not, and no other file or address."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from opensora_sp.base.errors import UserError
from opensora_sp.media.contact_sheet import SheetEntry, chosen_frames, picture, write_sheet

HOSTILE = "<script>alert(\"1\")</script> & 'quotes' <img src=x> 一只猫 \udcff"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for each, attributes in self.elements if each == tag]


def frame(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def image_of(source: str) -> Image.Image:
    head, data = source.split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def entry(output: Path, frames: list[NDArray[np.uint8]], prompt: str = "a cat") -> SheetEntry:
    labels = [f"frame {index}" for index in range(len(frames))]
    pictures = [picture(each) for each in frames]
    return SheetEntry(output, prompt, pictures, labels, {"seed": 42, "sample": HOSTILE})


def test_everything_given_is_shown_and_nothing_is_fetched(tmp_path: Path) -> None:
    small = [frame(30, 40, seed) for seed in range(3)]
    videos = [tmp_path / "samples" / "a: 100% #1?_0000.mp4", tmp_path / "b.mp4"]
    write_sheet(
        tmp_path / "samples" / "sheet.html",
        entries=[entry(videos[0], small, HOSTILE), entry(videos[1], [frame(900, 1600)])],
        settings={"size": [240, 426], "model": {"dit": HOSTILE, "t5": None}, "loop": True},
        timings={"denoise": 8.0, "decode": 2.0, "write <x>": None},
        title=HOSTILE,
    )
    page = Page(tmp_path / "samples" / "sheet.html")
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object"})
    # Title, heading, prompt, detail of two entries, setting: each as text.
    assert page.text.count(HOSTILE.replace("\udcff", "?")) == 6
    sources = [attributes["src"] for attributes in page.all("img")]
    assert [np.asarray(image_of(s)).tolist() for s in sources[:3]] == [f.tolist() for f in small]
    assert image_of(sources[3]).size == (1280, 720)
    assert [each["alt"] for each in page.all("img")] == ["frame 0", "frame 1", "frame 2", "frame 0"]
    for attributes, video in zip(page.all("a"), videos, strict=True):
        reached = (tmp_path / "samples" / unquote(attributes["href"])).resolve()
        assert reached == video.resolve()
        assert not set(attributes["href"]) & set("#?: ")
    others = [v for _, each in page.elements for k, v in each.items() if k not in ("src", "href")]
    assert not [value for value in others if "//" in value]
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_tables(tmp_path: Path) -> None:
    write_sheet(
        tmp_path / "sheet.html",
        entries=[],
        settings={"size": [240, 426], "model": {"dit": "x", "t5": None}, "loop": True},
        timings={"denoise": 8.0, "decode": 2.0, "write": None},
    )
    page = Page(tmp_path / "sheet.html")
    assert page.rows == [
        ["size", "240, 426"],
        ["model.dit", "x"],
        ["model.t5", "–"],
        ["loop", "yes"],
        ["denoise", "", "8.00 s"],
        ["decode", "", "2.00 s"],
        ["write", "", "not measured"],
    ]
    fills = [each["style"] for each in page.all("span") if each.get("class") == "fill"]
    assert fills == ["width:100.0%", "width:25.0%"]


def test_no_time_at_all(tmp_path: Path) -> None:
    write_sheet(tmp_path / "s.html", entries=[], settings={}, timings={"a": 0.0, "b": None})
    assert [row[2] for row in Page(tmp_path / "s.html").rows] == ["0.00 s", "not measured"]


def test_chosen_frames() -> None:
    chosen = {count: chosen_frames(count) for count in (0, 1, 2, 3, 51)}
    assert chosen == {0: [], 1: [0], 2: [0, 1], 3: [0, 1, 2], 51: [0, 25, 50]}


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_sheet(tmp_path / "file" / "s.html", entries=[], settings={}, timings={})
    with pytest.raises(ValueError, match="0 labels for 1 frames"):
        SheetEntry(tmp_path / "v.mp4", "", [picture(frame(2, 2))], [])
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
