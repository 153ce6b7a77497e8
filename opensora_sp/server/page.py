"""The page for people: templates and static files of the package, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles

from opensora_sp import __version__
from opensora_sp.server.words import LANGUAGES, WORDS

_HERE = Path(__file__).parent
# What people choose from: a name, height and width for the embedded model or the size table.
SIZES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "embedded": (("160x96", "160×96"), ("96x160", "96×160"), ("128x128", "128×128")),
    "published": (
        ("144p", "144p"),
        ("240p", "240p"),
        ("360p", "360p"),
        ("480p", "480p"),
        ("720p", "720p"),
    ),
}
RATIOS = ("9:16", "16:9", "1:1", "3:4", "4:3")
LENGTHS: Mapping[str, tuple[str, ...]] = {
    "embedded": ("1", "17", "34", "51"),
    "published": ("1", "51", "102", "204", "408"),
}


def add_page(app: FastAPI, *, embedded: bool, asks_token: bool) -> None:
    """Serve the page at / and its files under /static."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=select_autoescape(default=True)
    )
    app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")
    model = "embedded" if embedded else "published"

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        language = pick_language(
            request.query_params.get("lang", ""), request.headers.get("accept-language", "")
        )
        text = templates.get_template("index.html").render(
            t=WORDS[language],
            language=language,
            languages=LANGUAGES,
            sizes=SIZES[model],
            ratios=RATIOS,
            lengths=LENGTHS[model],
            model=model,
            version=__version__,
            asks_token=asks_token,
            said=script_words(language),
        )
        return HTMLResponse(text)


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
