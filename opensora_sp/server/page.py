"""The page for people: templates and static files of the package, nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles

from opensora_sp import __version__
from opensora_sp.server.words import LANGUAGES, WORDS

_HERE = Path(__file__).parent
# A shape is a size that the embedded model has learnt; of the size table it is an aspect ratio,
# height to width.
# Each: its value, the class of its little picture, what it is called.
_EMBEDDED_SHAPES = (
    ("144x96", "r3x2", "landscape"),
    ("96x144", "r2x3", "portrait"),
    ("144x144", "r1x1", "square"),
    ("256x144", "r16x9", "wide"),
)
_PUBLISHED_SHAPES = (
    ("9:16", "r16x9", "16:9"),
    ("16:9", "r9x16", "9:16"),
    ("1:1", "r1x1", "1:1"),
    ("3:4", "r4x3", "4:3"),
    ("4:3", "r3x4", "3:4"),
)
_QUALITIES = ("144p", "240p", "360p", "480p", "720p")
# Frames and seconds.
_EMBEDDED_LENGTHS = ((1, ""), (17, "0.7"), (34, "1.4"), (51, "2.1"))
_PUBLISHED_LENGTHS = ((1, ""), (51, "2"), (102, "4"), (204, "8"), (408, "16"))
# Name, keyboard, least, most, step, value.
_NUMBERS = (
    ("num_inference_steps", "numeric", 1, 1000, 1, 30),
    ("guidance_scale", "decimal", 0, 30, "any", 7),
    ("seed", "numeric", 0, "", 1, 42),
    ("aesthetic_score", "decimal", 0, "", "any", 6.5),
    ("motion_score", "decimal", 0, "", "any", ""),
    ("loop", "numeric", 1, 100, 1, 1),
    ("fps", "numeric", 1, 120, 1, 24),
)
_MOTIONS = (
    "static",
    "pan left",
    "pan right",
    "tilt up",
    "tilt down",
    "zoom in",
    "zoom out",
)


def add_page(app: FastAPI, *, embedded: bool, asks_token: bool) -> None:
    """Serve the page at / and its files under /static."""
    app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        language = pick_language(
            request.query_params.get("lang", ""), request.headers.get("accept-language", "")
        )
        return HTMLResponse(page_text(language, embedded=embedded, asks_token=asks_token))


def page_text(language: str, *, embedded: bool, asks_token: bool) -> str:
    """The page as HTML. embedded: what can be chosen is what the embedded model was trained on."""
    words = WORDS[language]
    shapes = _EMBEDDED_SHAPES if embedded else _PUBLISHED_SHAPES
    return _template().render(
        t=words,
        language=language,
        languages=LANGUAGES,
        shapes=[(value, shape, words.get(name, name)) for value, shape, name in shapes],
        qualities=() if embedded else _QUALITIES,
        lengths=_EMBEDDED_LENGTHS if embedded else _PUBLISHED_LENGTHS,
        numbers=_NUMBERS,
        motions=_MOTIONS,
        own_size="144x96" if embedded else "426x240",
        version=__version__,
        asks_token=asks_token,
        said=script_words(language),
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
    )
    return templates.get_template("index.html")


def pick_language(asked: str, accepted: str) -> str:
    """The page's language: what the address asks for, or the browser's first that is there."""
    if asked in LANGUAGES:
        return asked
    for part in accepted.split(","):
        tag = part.split(";")[0].strip().lower()
        for language in LANGUAGES:
            if tag == language or tag.startswith(f"{language}-"):
                return language
    return "en"


def script_words(language: str) -> dict[str, Any]:
    """The words that the script needs."""
    return {key[3:]: text for key, text in WORDS[language].items() if key.startswith("js_")}
