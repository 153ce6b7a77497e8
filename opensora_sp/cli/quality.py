"""Command: compare outputs with a reference run: PSNR, SSIM, motion, the error of latents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora_sp.base import access
from opensora_sp.base.errors import UserError, printable
from opensora_sp.base.screen import note, on_any_screen, result
from opensora_sp.cli.console import refuse, world_size
from opensora_sp.cli.parser import RefusingParser


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code.

    0: compared; 2: refused, with one line; 130: Ctrl-C.
    """
    try:
        asked = parser().parse_args(argv)
        _check(asked)
        _compare(asked)
    except UserError as error:
        return refuse(error, same_everywhere=True)
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = RefusingParser(
        prog="opensora-sp quality",
        usage="opensora-sp quality A B [--floor C ...] [--out FILE] [--plot FILE]",
        description="Says how far B is from A, the reference: two videos, two pictures, two files "
        "of saved latents, or two folders with outputs of equal names, as two runs make. PSNR, "
        "SSIM, PSNR of motion, relative error of latents.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=96),
    )
    made.add_argument("a", type=Path, metavar="A", help="the reference")
    made.add_argument("b", type=Path, metavar="B", help="what is compared with it")
    made.add_argument(
        "--floor",
        type=Path,
        metavar="C",
        nargs="+",
        action="extend",
        default=[],
        help="the same request computed another harmless way (bf16, more ranks): the noise floor",
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="write every figure as JSON")
    made.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the figures by frame (.svg or .png)"
    )
    return made


def _check(asked: argparse.Namespace) -> None:
    """What is wrong with the command line itself. Raises UserError."""
    from opensora_sp.media.line_plot import check_plot_path
    from opensora_sp.request.preflight import check_save_dir

    if world_size() > 1:
        raise UserError("quality compares files in one process: run it without torchrun")
    written = {"--out": asked.out, "--plot": asked.plot}
    inputs = {access.absolute(path) for path in (asked.a, asked.b, *asked.floor)}
    for flag, path in written.items():
        if path is None:
            continue
        if access.is_dir(path):
            raise UserError(f"{flag} {path} is a directory: give the name of a file")
        if access.absolute(path) in inputs:
            raise UserError(f"{flag} {path} is one of the compared files: give another name")
        if access.exists(path) and not access.is_file(path):
            raise UserError(f"{flag} {path} is no regular file: give another name")
        check_save_dir(str(path.parent), flag)
    if asked.plot is not None:
        check_plot_path(asked.plot, "--plot")
        if asked.out is not None and access.absolute(asked.out) == access.absolute(asked.plot):
            raise UserError(f"--out and --plot are both {asked.out}: give two names")


def _compare(asked: argparse.Namespace) -> None:
    from opensora_sp.benchmark.quality import plot, table
    from opensora_sp.benchmark.quality.comparison import prepare, report, write_report

    comparison = prepare(asked.a, asked.b, asked.floor)
    for said in dict.fromkeys(said for facts in comparison.facts for said in facts.notes):
        note(said)
    for line in table.opening_lines(comparison):
        _say(line)
    found = []
    rows = table.RowPrinter(comparison)
    alone = len(comparison.pairs.pairs) == 1
    for one in comparison.measured():
        found.append(one)
        for line in table.pair_lines(comparison, one) if alone else rows.lines(one):
            _say(line)
    if not alone:
        for line in table.summary_lines(comparison, found):
            _say(line)
    if asked.out is not None:
        write_report(asked.out, report(comparison, found))
        result(asked.out)
    if asked.plot is not None:
        plot.write(asked.plot, comparison, found)
        result(asked.plot)


def _say(line: str) -> None:
    print(printable(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
