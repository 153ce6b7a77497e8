"""What the client's commands share: their parser's flags, and how their words are read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import one_line
from opensora_sp.cli.client.connection import DEFAULT_SERVER
from opensora_sp.cli.console import refuse
from opensora_sp.cli.help import help_asked, say
from opensora_sp.cli.parser import RefusingParser

FAILED = 1


def client_parser(name: str, usage: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that say which server is meant."""
    made = RefusingParser(
        prog=f"opensora-sp {name}",
        usage=f"opensora-sp {name} {usage}",
        description=description,
        add_help=False,
        allow_abbrev=False,
    )
    made.add_argument(
        "--server", metavar="URL",
        help=f"default OPENSORA_SP_SERVER, or {DEFAULT_SERVER}",
    )  # fmt: skip
    made.add_argument(
        "--token-file", type=Path, metavar="FILE",
        help="a file whose first token lets one in; default OPENSORA_SP_TOKEN",
    )  # fmt: skip
    return made


def run_client(
    argv: Sequence[str] | None, help_text: Callable[[bool], str], work: Callable[[list[str]], int]
) -> int:
    """Run a client's command: help, the work, or a refusal in one line with exit code 2.

    help_text: told whether all of it is asked for.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        asked = help_asked(words)
        return say(help_text(asked == "all")) if asked is not None else work(words)
    except UserError as error:
        return refuse(error, same_everywhere=True)
    except KeyboardInterrupt:
        return 130


def each(job_ids: Sequence[str], work: Callable[[str], Any]) -> int:
    """Do the work for every job; one that is refused is said, and the others are done."""
    from opensora_sp.cli.client.connection import Refused

    code = 0
    for job_id in job_ids:
        try:
            work(job_id)
        except Refused as error:
            if error.status == 401:
                raise
            print(f"error: {job_id}: {one_line(error)}", file=sys.stderr, flush=True)
            code = FAILED
    return code
