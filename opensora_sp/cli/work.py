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
        health_port = _port("--health-port", found.health_port)
        group = group_of(found, engine, operations)
        if not group.shared:
            raise UserError(
                "work needs --queue URL, the database that its gateways and other groups share; "
                "on one machine opensora-sp serve starts the engine itself"
            )
        from opensora_sp.server.shared_service import work

        def tell(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        return work(group, operations, tell, health_port=health_port)
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
    parser.add_argument(
        "--nnodes", type=int, default=1, metavar="N",
        help="nodes of this group; the same command runs on each of them (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--node-rank", type=int, metavar="N",
        help="with --nnodes: which of them this is, from 0 on; 0 takes jobs",
    )  # fmt: skip
    parser.add_argument(
        "--master-addr",
        default="",
        metavar="HOST",
        help="with --nnodes: node 0, as others reach it",
    )
    parser.add_argument(
        "--master-port", type=int, default=29500, metavar="PORT",
        help="with --nnodes: a free port there (default 29500)",
    )  # fmt: skip
    parser.add_argument(
        "--health-port", type=int, default=0, metavar="PORT",
        help="answer /health and /ready there, on every address (default: nowhere)",
    )  # fmt: skip
    add_operations(parser)
    return parser


def _port(flag: str, port: int) -> int:
    if not 0 <= port <= 65535:
        raise UserError(f"{flag} {port} is not a port from 1 to 65535, or 0 for none")
    return port


if __name__ == "__main__":
    sys.exit(main())
