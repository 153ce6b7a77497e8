"""Command: cancel jobs of a server, and delete those that have ended."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from opensora_sp.base.screen import on_any_screen, result
from opensora_sp.cli.client.connection import check_id, connect, video_path
from opensora_sp.cli.client.flags import client_parser, each, run_client


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Cancel; returns 0, 1 where one of them was not there, or 2 with one line."""
    return run_client(argv, lambda _: parser().format_help(), _cancel)


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = client_parser(
        "cancel",
        "ID [ID ...] [flags]",
        "Stops jobs of a server that are queued or being made, and removes them and their files. "
        "A job that has ended is removed too.",
    )
    made.add_argument("id", nargs="+", metavar="ID", help="as opensora-sp jobs shows it")
    return made


def _cancel(words: list[str]) -> int:
    asked = parser().parse_args(words)
    ids = [check_id(one) for one in asked.id]
    server = connect(asked.server, asked.token_file)

    def cancel(job_id: str) -> None:
        server.call("DELETE", video_path(job_id))
        result(job_id)

    return each(ids, cancel)


if __name__ == "__main__":
    sys.exit(main())
