"""Command: download what a server has made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import on_any_screen, result
from opensora_sp.cli.client.connection import Connection, check_id, connect, video_path
from opensora_sp.cli.client.flags import client_parser, each, run_client

VARIANTS = ("video", "thumbnail", "spritesheet")


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Download; returns 0, 1 where one of them is not made, or 2 with one line."""
    return run_client(argv, lambda _: parser().format_help(), _fetch)


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = client_parser(
        "fetch",
        "ID [ID ...] [flags]",
        "Downloads what a server has made, as ID.mp4 or ID.png, and prints where it is.",
    )
    made.add_argument("id", nargs="+", metavar="ID", help="as opensora-sp jobs shows it")
    made.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR",
        help="the folder for the files (default: this one)",
    )  # fmt: skip
    made.add_argument(
        "--variant", choices=VARIANTS, default="video", help="the whole file, or a preview of it"
    )
    return made


def _fetch(words: list[str]) -> int:
    asked = parser().parse_args(words)
    ids = [check_id(one) for one in asked.id]
    if access.is_file(asked.output):
        raise UserError(f"-o {asked.output} is a file: give a folder")
    from opensora_sp.request.preflight import check_save_dir

    check_save_dir(str(asked.output), "-o")
    server = connect(asked.server, asked.token_file)
    return each(ids, lambda job_id: fetch(server, job_id, asked.output, variant=asked.variant))


def fetch(
    server: Connection,
    job_id: str,
    folder: Path,
    *,
    exact: Path | None = None,
    variant: str = "video",
) -> None:
    """Download one and say where it is. exact: the file that it becomes, in place of ID.mp4."""
    name = job_id if variant == "video" else f"{job_id}-{variant}"
    path = video_path(job_id, f"/content?variant={variant}")
    result(server.download(path, name, folder, exact))


if __name__ == "__main__":
    sys.exit(main())
