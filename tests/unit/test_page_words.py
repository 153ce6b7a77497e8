"""The words of the page: both languages say everything, and nothing is said outside of them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jinja2")

from opensora_sp.server import words as page_words
from opensora_sp.server.page import page_text
from opensora_sp.server.words import LANGUAGES, WORDS

SERVER = Path(page_words.__file__).parent


def test_both_languages_have_every_word_and_the_same_places_for_values() -> None:
    for language in LANGUAGES:
        assert WORDS[language].keys() == WORDS["en"].keys()
        for key, text in WORDS[language].items():
            assert text.strip(), (language, key)
            places = [
                sorted(re.findall(r"{\w+}", one[key])) for one in (WORDS["en"], WORDS[language])
            ]
            assert places[0] == places[1], (language, key)


def test_the_script_asks_for_words_that_are_there_and_for_all_of_them() -> None:
    script = "".join(path.read_text() for path in sorted((SERVER / "static").glob("*.js")))
    there = {key[3:] for key in WORDS["en"] if key.startswith("js_")}
    # say("key"), say(test ? "key" : "other") and say(`stem_${end}`)
    asked = set(re.findall(r'say\("(\w+)"', script))
    asked |= {key for pair in re.findall(r'say\(\w+ \? "(\w+)" : "(\w+)"', script) for key in pair}
    asked |= set(re.findall(r'name = say\([^?]*\? "(\w+)" : "(\w+)"', script)[0])
    stems = tuple(re.findall(r"`(\w+_)\${", script))
    assert asked <= there
    said_whole = {"queued", "in_progress", "completed", "failed", "text", "denoising", "decoding"}
    said_whole |= {"ready", "starting", "draining", "stopped"}
    unused = {key for key in there - asked - said_whole if not key.startswith(stems)}
    assert unused == set()


class Text(HTMLParser):
    """Every text and spoken attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_data(self, data: str) -> None:
        self.found.append(data.strip())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            v or "" for k, v in attrs if k in ("aria-label", "placeholder", "title", "alt")
        ]


def test_the_templates_have_no_text_of_their_own() -> None:
    for template in (SERVER / "templates").glob("*.html"):
        bare = re.sub(r"{{.*?}}|{%.*?%}", "", template.read_text(), flags=re.DOTALL)
        reader = Text()
        reader.feed(bare)
        # The name of the package, before its version.
        assert {text for text in reader.found if text} <= {"opensora_sp"}, template.name


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_is_made_for_both_models_in_every_language(language: str, embedded: bool) -> None:
    text = page_text(language, embedded=embedded, asks_token=True)
    assert f'<html lang="{language}">' in text
    assert ('name="resolution"' in text) != embedded
    # Strict rules for content: no script, style or handler in the page.
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", text)
