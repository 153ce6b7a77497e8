"""Command: a warm server on this machine, with a queue that survives, an API and a page."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import on_any_screen
from opensora_sp.base.value_types import shown
from opensora_sp.cli.console import refuse
from opensora_sp.cli.help import help_asked, say
from opensora_sp.cli.parser import RefusingParser

if TYPE_CHECKING:
    from opensora_sp.server.settings import GroupSettings, Operations, ServiceSettings

MOST_BATCH_JOBS = 64


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is asked to end; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if help_asked(words) is not None:
            return say(parser().format_help())
        settings, with_engine = _settings(words)

        def tell(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        if settings.group.shared:
            from opensora_sp.server.shared_service import serve_shared

            return serve_shared(settings, tell, with_engine=with_engine)
        from opensora_sp.server.service import serve

        return serve(settings, tell)
    except UserError as error:
        return refuse(error, same_everywhere=True)


def parser() -> argparse.ArgumentParser:
    """Its own flags; those of the engine are of the flag table."""
    parser = RefusingParser(
        prog="opensora-sp serve",
        description=(
            "Keeps the models loaded and makes videos that come over HTTP: an API that the openai "
            "client speaks, and a page. Flags of generate that say how the engine runs (--device, "
            "--dtype, --memory, --ckpt-path-dit ...), and how all that it makes is labelled "
            "(--label, --label-producer ...), are taken too."
        ),
        add_help=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument(
        "--save-dir", type=Path, default=Path("samples/server"), metavar="DIR",
        help="where jobs, outputs and the queue are kept (default samples/server)",
    )  # fmt: skip
    add_queue(parser, brief=True)
    parser.add_argument(
        "--no-engine", action="store_true",
        help="with --queue: a gateway alone; opensora-sp work makes the videos",
    )  # fmt: skip
    parser.add_argument(
        "--batch-jobs", type=int, default=1, metavar="N",
        help="make up to N jobs of one shape together that stand one behind the other (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE",
        help="NAME:TOKEN a line; needed where --host is not this machine alone",
    )  # fmt: skip
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="let scripts of other sites' pages use the API, one origin each, such as "
        "http://localhost:8080 (default: none)",
    )  # fmt: skip
    add_engine(parser)
    parser.add_argument(
        "--limit", action="append", default=[], metavar="NAME=NUMBER",
        help="what clients may ask for at most, one each: queued=1000, queued_each=200 (with one "
        "token), body_bytes=536870912, body_seconds=120, connections=4000 ...",
    )  # fmt: skip
    add_operations(parser)
    parser.add_argument("--log-prompts", action="store_true", help="prompts may be logged")
    parser.add_argument(
        "--keep-days", default="0", metavar="D",
        help="remove jobs that ended so many days ago (default 0: never)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-gb", default="0", metavar="G",
        help="remove the oldest ended jobs beyond so many GB of all (default 0: never)",
    )  # fmt: skip
    return parser


def add_queue(parser: argparse.ArgumentParser, *, brief: bool = False) -> None:
    """Flags of a queue that many gateways and groups share. brief: the help names --queue alone."""
    parser.add_argument(
        "--queue", metavar="URL",
        help="a Postgres database that many gateways and groups share, with --save-dir a folder "
        "that all of them see: postgresql+psycopg://USER@HOST:5432/DATABASE (the variable "
        "OPENSORA_SP_QUEUE gives it too)",
    )  # fmt: skip
    parser.add_argument(
        "--group-name", default="", metavar="NAME",
        help=argparse.SUPPRESS
        if brief
        else "what this group is called (default: the machine's name and a number)",
    )  # fmt: skip
    parser.add_argument(
        "--lease-seconds", metavar="S",
        help=argparse.SUPPRESS
        if brief
        else "a group without a sign of life for so long loses its job to another (default 15)",
    )  # fmt: skip


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Flags of the engine that are not of the flag table."""
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks of the engine")
    parser.add_argument(
        "--serves", default="", metavar="NAMES",
        help="configurations that --memory auto and T5's place are chosen for: 720p-16s,480p-2s "
        "(default: the largest trained size, 720p-16s; the embedded model's own)",
    )  # fmt: skip
    parser.add_argument(
        "--warmup", default="", metavar="NAMES",
        help="make one step of these configurations before jobs are taken: 720p-16s,480p-2s",
    )  # fmt: skip
    parser.add_argument(
        "--other-labels", action="store_true",
        help="with --label: a request may ask for another label, or for none (default: refused)",
    )  # fmt: skip


def add_operations(parser: argparse.ArgumentParser) -> None:
    """Flags for those who run a server or a group."""
    parser.add_argument(
        "--log-format", default="text", metavar="FORMAT",
        help="text (default), or json: one object a line on standard error",
    )  # fmt: skip
    parser.add_argument(
        "--log-level", default="info", metavar="LEVEL",
        help="debug (with every request), info (default) or warning",
    )  # fmt: skip
    parser.add_argument(
        "--drain", default="save", metavar="HOW",
        help="what SIGTERM does with the job that is made: save it (default) or finish it",
    )  # fmt: skip
    parser.add_argument(
        "--drain-seconds", default="600", metavar="S",
        help="with --drain finish: how long it may take before it is saved (default 600)",
    )  # fmt: skip


def _number(flag: str, text: str, most: float, least: float = 0.0) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= most:  # also refuses nan
        raise UserError(f"{flag} {shown(text)} is not a number from {least:g} to {most:g}")
    return value


def operations_of(found: argparse.Namespace) -> Operations:
    """How the server is to be run; the logs are written so from here on. Raises UserError."""
    from opensora_sp.server.logs import FORMATS, LEVELS, set_level, write_json
    from opensora_sp.server.settings import Operations

    def one_of(flag: str, value: str, allowed: Sequence[str]) -> str:
        if value not in allowed:
            raise UserError(f"{flag} {shown(value)} is not one of {', '.join(allowed)}")
        return value

    operations = Operations(
        log_format=one_of("--log-format", found.log_format, FORMATS),
        log_level=one_of("--log-level", found.log_level, LEVELS),
        log_prompts=getattr(found, "log_prompts", False),
        drain=one_of("--drain", found.drain, ("save", "finish")),
        drain_seconds=_number("--drain-seconds", found.drain_seconds, 86_400),
        keep_days=_number("--keep-days", getattr(found, "keep_days", "0"), 36_500),
        keep_gb=_number("--keep-gb", getattr(found, "keep_gb", "0"), 1e6),
    )
    set_level(operations.log_level)
    if operations.log_format == "json":
        write_json()  # from here on, what is refused is logged so too
    return operations


def _settings(words: Sequence[str]) -> tuple[ServiceSettings, bool]:
    """What was asked for, checked before anything is started, and whether there is to be an engine.

    Raises UserError.
    """
    from opensora_sp.server.settings import (
        LOCAL_HOSTS,
        ServiceSettings,
        read_limits,
        read_origins,
        read_tokens,
    )

    found, engine = parser().parse_known_args(list(words))
    operations = operations_of(found)
    if not 0 < found.port < 65536:
        raise UserError(f"--port {found.port} is not a port from 1 to 65535")
    if found.host not in LOCAL_HOSTS and found.token_file is None:
        raise UserError(
            f"--host {found.host} lets other machines in, which needs --token-file FILE; "
            "--host 127.0.0.1 serves this machine alone"
        )
    if found.host not in LOCAL_HOSTS:
        try:
            socket.getaddrinfo(found.host, found.port, type=socket.SOCK_STREAM)
        except (OSError, ValueError):
            raise UserError(
                f"--host {shown(found.host)} is no address of this machine, such as 0.0.0.0"
            ) from None
    origins = read_origins(found.allow_origin)
    tokens = {} if found.token_file is None else read_tokens(found.token_file)
    group = group_of(found, engine, operations)
    if found.no_engine and not group.shared:
        raise UserError("--no-engine belongs to --queue: without it nobody would make the videos")
    limits = read_limits(found.limit)
    settings = ServiceSettings(
        found.host, found.port, group, tokens, origins, limits=limits, operations=operations
    )
    return settings, not found.no_engine


def group_of(
    found: argparse.Namespace, engine: Sequence[str], operations: Operations
) -> GroupSettings:
    """The group that is asked for. engine: words that are no flags of ours. Raises UserError."""
    from opensora_sp.server.durable import sqlite_url
    from opensora_sp.server.queue_url import QUEUE_VARIABLE, parse_queue_url
    from opensora_sp.server.served import check_names, engine_of_settings
    from opensora_sp.server.settings import GroupSettings, require_packages
    from opensora_sp.server.shared_queue import LEASE_SECONDS

    if not 0 < found.nproc <= 64:
        raise UserError(f"--nproc {found.nproc} is not a number of ranks from 1 to 64")
    batch_jobs: int = getattr(found, "batch_jobs", 1)
    if not 0 < batch_jobs <= MOST_BATCH_JOBS:
        raise UserError(
            f"--batch-jobs {batch_jobs} is not a number of jobs from 1 to {MOST_BATCH_JOBS}"
        )
    serves, warmup = _names(found.serves), _names(found.warmup)
    check_names("--serves", serves)
    check_names("--warmup", warmup)
    _require_engine_flags(engine)
    require_packages()
    queue = sqlite_url(found.save_dir)
    sharing: dict[str, Any] = {}
    if (address := found.queue or os.environ.get(QUEUE_VARIABLE)) is not None:
        queue = parse_queue_url(address)
        require_packages("psycopg")
        if batch_jobs > 1:
            raise UserError(
                f"--batch-jobs {batch_jobs} does not go with --queue: groups that share a queue "
                "make one job at a time"
            )
        sharing = {
            "group_name": _group_name(found.group_name),
            "parent": secrets.token_hex(8),
            "lease_s": LEASE_SECONDS
            if found.lease_seconds is None
            else _number("--lease-seconds", found.lease_seconds, 3600, 3),
        }
        sharing |= _nodes(found)
    elif found.group_name or found.lease_seconds is not None:
        flag = "--group-name" if found.group_name else "--lease-seconds"
        raise UserError(f"{flag} belongs to --queue: without it there is one group")
    group = GroupSettings(
        save_dir=found.save_dir.resolve(),
        queue=queue,
        arguments=tuple(engine),
        warmup=warmup,
        ranks=found.nproc * sharing.get("nodes", 1),
        batch_jobs=batch_jobs,
        serves=serves,
        log_format=operations.log_format,
        log_level=operations.log_level,
        other_labels=found.other_labels,
        **sharing,
    )
    first = group.first_job()
    if (first.engine.replicas or 1) != 1:
        raise UserError("--replicas belongs to generate: a server makes each video on all ranks")
    engine_of_settings(group, first)
    return group


def _nodes(found: argparse.Namespace) -> dict[str, Any]:
    """The nodes of a group, as `work` was told. Raises UserError."""
    nodes: int = getattr(found, "nnodes", 1)
    node: int | None = getattr(found, "node_rank", None)
    if nodes == 1:
        if node:
            raise UserError(
                f"--node-rank {node} needs --nnodes N: without it this is a group of one node"
            )
        return {}
    if not 1 < nodes <= 64:
        raise UserError(f"--nnodes {nodes} is not a number of nodes from 1 to 64")
    if node is None:  # two nodes 0 would wait for each other
        raise UserError(
            f"--nnodes {nodes} needs --node-rank N on each node: 0 to {nodes - 1}, 0 on node 0"
        )
    if not 0 <= node < nodes:
        raise UserError(f"--node-rank {node} is not one of {nodes} nodes: give 0 to {nodes - 1}")
    if not found.group_name:  # each node would make up another one
        raise UserError(f"--nnodes {nodes} needs --group-name NAME, the same on each node")
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,253}", found.master_addr):
        raise UserError(
            f"--master-addr {shown(found.master_addr)} is not the address of node 0, which "
            f"--nnodes {nodes} needs"
        )
    if not 0 < found.master_port <= 65535:
        raise UserError(f"--master-port {found.master_port} is not a port from 1 to 65535")
    return {
        "nodes": nodes,
        "node": node,
        "master": f"{found.master_addr}:{found.master_port}",
    }


def _group_name(text: str) -> str:
    """The name of a group, or one that no other has. Raises UserError."""
    if not text:
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:40]
        return f"{host}-{secrets.token_hex(3)}"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise UserError(
            f"--group-name {shown(text)} is not 1 to 64 letters, digits, dots, hyphens and _"
        )
    return text


def _names(text: str) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _require_engine_flags(words: Sequence[str]) -> None:
    """Raise UserError for a flag that says what to make, not how the engine runs."""
    from opensora_sp.request.engine_settings import engine_keys
    from opensora_sp.request.settings import parse_command_line

    command = parse_command_line(words)
    known = engine_keys() | {"label", "label_producer", "label_certificate", "label_key"}
    if command.version:
        raise UserError("--version belongs to opensora-sp itself: opensora-sp --version")
    for key in (*command.written, *command.program_control):
        if key not in known:
            raise UserError(
                f"--{key.replace('_', '-')} belongs to a job, not to the server: send it with the "
                "request"
            )
    if command.config is not None or command.print_config:
        flag = "--config" if command.config is not None else "--print-config"
        raise UserError(f"{flag} is taken by generate; give the engine's flags themselves")


if __name__ == "__main__":
    sys.exit(main())
