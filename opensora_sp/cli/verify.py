"""Command: prove on this machine that the program computes what Open-Sora 1.2 computes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from opensora_sp.errors import UserError

DTYPES = ("fp32", "fp16", "bf16")


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as every command of the program does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if everything held, 1 if not, 2 for a mistake in the request."""
    try:
        return _verify(_parser().parse_args(argv))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="verify.py",
        description=(
            "Runs the conformance suite through the production classes on this machine. Under "
            "torchrun the transformer and sampler cases run sharded over the ranks."
        ),
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="a conformance suite; default: the one inside the package",
    )
    parser.add_argument("--device", choices=("gcu", "cuda", "cpu"), help="default: the first there")
    parser.add_argument("--backend", choices=("eccl", "nccl", "gloo"), help="default: the device's")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="fp32 (default) runs every part; others only the transformer's, by relative RMS",
    )
    return parser


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.reference is not None and not arguments.reference.is_dir():
        raise UserError(f"--reference {arguments.reference}: no such directory")
    from opensora_sp.parallel.session import open_session

    with open_session(arguments.device, arguments.backend) as session:
        return _conformance(arguments, session)


def _conformance(arguments: argparse.Namespace, session: object) -> int:
    import torch

    from opensora_sp.parallel.session import Session
    from opensora_sp.pipeline import DTYPES as TORCH_DTYPES
    from opensora_sp.verification.conformance import EMBEDDED_SUITE, run_suite
    from opensora_sp.verification.suite import table

    assert isinstance(session, Session)
    # TF32 convolutions are the default on CUDA and 1000 times coarser than the limits.
    torch.backends.cudnn.allow_tf32 = False
    suite = arguments.reference or EMBEDDED_SUITE
    checks = list(run_suite(suite, session, TORCH_DTYPES[arguments.dtype]))
    failed = session.share(sum(check.failed for check in checks) if session.leads else None)
    if session.leads:
        ranks = f"{session.world_size} rank{'s' * (session.world_size > 1)}"
        print(
            f"{suite}: {arguments.dtype} on {ranks}, {session.device.type}/{session.backend.name}"
        )
        for line in table(checks):
            print(line)
        held = sum(check.ok for check in checks)
        skips = len(checks) - held - failed
        print(f"{held} held, {failed} failed, {skips} skipped", flush=True)
    return 1 if failed or (session.leads and not checks) else 0
