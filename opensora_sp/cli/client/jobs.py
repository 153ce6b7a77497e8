"""Command: list the jobs of a server."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import on_any_screen, one_line
from opensora_sp.cli.client.connection import ID, Connection, connect
from opensora_sp.cli.client.flags import client_parser, run_client

_PAGE = 100
MOST = 10_000


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """List; returns 0, or 2 with one line."""
    return run_client(argv, lambda _: parser().format_help(), _jobs)


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = client_parser(
        "jobs", "[flags]", "Lists the jobs of a server, newest first: how far each of them is."
    )
    made.add_argument(
        "--limit", type=int, default=20, metavar="N", help="at most so many (default 20)"
    )
    made.add_argument("--json", action="store_true", help="as the API describes them")
    return made


def _jobs(words: list[str]) -> int:
    asked = parser().parse_args(words)
    if not 0 < asked.limit <= MOST:
        raise UserError(f"--limit {asked.limit} is not a number of jobs from 1 to {MOST}")
    videos = listed(connect(asked.server, asked.token_file), asked.limit)
    if asked.json:
        print(json.dumps(videos, indent=1))
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in table(videos, width):
        print(line)
    return 0


def listed(server: Connection, most: int) -> list[dict[str, Any]]:
    """The newest jobs, read page by page."""
    videos: list[dict[str, Any]] = []
    while len(videos) < most:
        after = f"&after={videos[-1]['id']}" if videos else ""
        page = server.call("GET", f"/v1/videos?limit={min(_PAGE, most - len(videos))}{after}")
        data = page.get("data")
        if not isinstance(data, list) or not all(_is_job(one) for one in data):
            raise UserError(f"{server.server} answers, but not as opensora-sp serve does")
        videos += data
        if not data or page.get("has_more") is not True:
            break
    return videos[:most]


def _is_job(one: object) -> bool:
    return isinstance(one, dict) and bool(ID.fullmatch(str(one.get("id"))))


def table(videos: Sequence[Mapping[str, Any]], width: int | None) -> list[str]:
    """A line for each job; prompts are cut to the width, in columns of the screen."""
    lines = [f"{'ID':<30}  {'STATUS':<11}  {'%':>3}  {'ETA':>6}  PROMPT"]
    for video in videos:
        eta = video.get("eta_s")
        left = f"{eta:.0f} s" if isinstance(eta, (int, float)) else "-"
        status = one_line(video.get("status", ""))[:11]
        percent = one_line(video.get("progress", 0))[:3]
        head = f"{video['id']}  {status:<11}  {percent:>3}  {left:>6}  "
        error = video.get("error")
        said = one_line(video.get("prompt", ""))
        if isinstance(error, Mapping):
            said = one_line(f"{said} ({error.get('message', '')})")
        lines.append(head + (said if width is None else cut(said, max(8, width - len(head)))))
    return lines


def cut(text: str, columns: int) -> str:
    """The text in so many columns at most. Chinese characters take two columns each."""
    used, kept = 0, ""
    for character in text:
        used += 0 if unicodedata.combining(character) else _columns(character)
        if used > columns:
            while kept and sum(map(_columns, kept)) >= columns:
                kept = kept[:-1]
            return kept + "…"
        kept += character
    return kept


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


if __name__ == "__main__":
    sys.exit(main())
