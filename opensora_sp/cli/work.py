"""Command: a group without a gateway, which makes the jobs of a queue that many groups share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import on_any_screen
from opensora_sp.cli.console import refuse
from opensora_sp.cli.help import help_asked, say
from opensora_sp.cli.parser import RefusingParser
from opensora_sp.cli.serve import add_engine, add_operations, add_queue, group_of, operations_of


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run the group until it is asked to end; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if help_asked(words) is not None:
            return say(parser().format_help())
        found, engine = parser().parse_known_args(words)
        operations = operations_of(found)
        group = group_of(found, engine, operations)
        if not group.shared:
            raise UserError(
                "work needs --queue URL, the database that its gateways and other groups share; "
                "on one machine opensora-sp serve starts the engine itself"
            )
        from opensora_sp.server.shared_service import work

        return work(group, operations, lambda text: print(text, file=sys.stderr, flush=True))
    except UserError as error:
        return refuse(error, same_everywhere=True)


def parser() -> argparse.ArgumentParser:
    """Its own flags; those of the engine are of the flag table."""
    parser = RefusingParser(
        prog="opensora-sp work",
        description=(
            "Keeps the models loaded and makes the jobs of a queue that gateways "
            "(opensora-sp serve --queue) and other groups share. Flags of generate that say how "
            "the engine runs (--device, --dtype, --memory, --ckpt-path-dit ...) are taken too."
        ),
        add_help=False,
    )
    parser.add_argument(
        "--save-dir", type=Path, default=Path("samples/server"), metavar="DIR",
        help="the folder that all gateways and groups of the queue see (default samples/server)",
    )  # fmt: skip
    add_queue(parser)
    add_engine(parser)
    add_operations(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
