"""Command: print a script that makes bash or zsh complete commands, flags, values and file names.

    opensora-sp completion bash > ~/.local/share/bash-completion/completions/opensora-sp
    opensora-sp completion zsh > DIR/_opensora-sp        # DIR is in zsh's $fpath

The script is made by shtab, which is installed with opensora_sp[completion].
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import on_any_screen
from opensora_sp.base.value_types import shown
from opensora_sp.cli.console import refuse
from opensora_sp.cli.help import help_asked, say
from opensora_sp.cli.main import COMMANDS

SHELLS = ("bash", "zsh")
_HELP = (
    "usage: opensora-sp completion bash > "
    "~/.local/share/bash-completion/completions/opensora-sp\n"
    "       opensora-sp completion zsh > DIR/_opensora-sp     (DIR in zsh's $fpath)\n\n"
    "Prints what makes a shell complete commands, flags, values and file names.\n"
    "Needs shtab: pip install 'opensora_sp[completion]'\n"
)
# What a value's name in the help says of what completes it.
_FILES = ("FILE", "FILE|NAME", "FILE|DIR", "VIDEO", "A.json B.json", "A", "B", "C")
_DIRECTORIES = ("DIR", "NEW_DIR")


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Print the script; returns 0, or 2 with one line for another shell or without shtab."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return say(_HELP if help_asked(argv) is not None else _script(argv))
    except UserError as error:
        return refuse(error, same_everywhere=True)


def _script(argv: Sequence[str]) -> str:
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UserError(
            f"completion {shown(' '.join(argv))} is not one shell of {', '.join(SHELLS)}: "
            "opensora-sp completion bash"
        )
    try:
        import shtab
    except ImportError:
        raise UserError(
            "completion needs shtab, which is not installed: pip install 'opensora_sp[completion]'"
        ) from None
    script: str = shtab.complete(parser(), shell=argv[0])
    return script if script.endswith("\n") else script + "\n"


def parser() -> argparse.ArgumentParser:
    """All commands and their flags, for a shell to look at; it parses no command line."""
    whole = argparse.ArgumentParser(prog="opensora-sp")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        each = commands.add_parser(name, help=command.summary)
        if command.program is not None:
            _add_table(each, command.program)
        elif command.module in _PARSERS:
            _PARSERS[command.module](each, command.before)
        elif command.operands is not None:
            _completed(each.add_argument("file", nargs=command.operands[0]), "FILE")
        else:
            each.add_argument("shell", choices=SHELLS)
    return whole


def _add_table(
    target: argparse.ArgumentParser, program: str, only: Sequence[str] | None = None
) -> None:
    from opensora_sp.request.flags.table import all_flags

    for flag in all_flags():
        if flag.program not in (None, program) or flag.name == "--help":
            continue
        if only is not None and flag.key not in only:
            continue
        said = flag.help.replace("%", "%%")
        if flag.nargs == 0:
            target.add_argument(flag.name, action="store_true", help=said)
            continue
        choices = _choices(flag.kind.metavar)
        more: dict[str, Any] = {"choices": choices} if choices else {}
        action = target.add_argument(flag.name, nargs=flag.nargs, help=said, **more)
        _completed(action, flag.kind.metavar)


def _choices(metavar: str) -> list[str] | None:
    """The words of a value's name such as {fp32,fp16,bf16}, and of true or false."""
    if metavar == "BOOL":
        return ["true", "false"]
    if metavar.startswith("{") and metavar.endswith("}"):
        return metavar[1:-1].split(",")
    return None


def _completed(action: argparse.Action, metavar: str) -> None:
    """Tell shtab whether a value is a file or a directory."""
    import shtab

    if metavar in _FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif metavar in _DIRECTORIES:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


def _copy(source: argparse.ArgumentParser, target: argparse.ArgumentParser) -> None:
    """Add what one parser takes to another."""
    for action in source._actions:
        if "--help" in action.option_strings:
            continue
        target._add_action(action)
        _completed(action, action.metavar if isinstance(action.metavar, str) else "")


def _verify(target: argparse.ArgumentParser, before: Sequence[str]) -> None:
    from opensora_sp.cli import verify

    _copy(verify.parser_of(verify.examination(before)), target)


def _download(target: argparse.ArgumentParser, _: Sequence[str]) -> None:
    from opensora_sp.cli import download

    _copy(download.parser(), target)


def _convert(target: argparse.ArgumentParser, _: Sequence[str]) -> None:
    from opensora_sp.cli import convert

    _copy(convert.parser(), target)


def _quality(target: argparse.ArgumentParser, _: Sequence[str]) -> None:
    from opensora_sp.cli import quality

    _copy(quality.parser(), target)


def _serve(target: argparse.ArgumentParser, _: Sequence[str]) -> None:
    from opensora_sp.cli import serve

    _copy(serve.parser(), target)


def _work(target: argparse.ArgumentParser, _: Sequence[str]) -> None:
    from opensora_sp.cli import work

    _copy(work.parser(), target)


def _submit(target: argparse.ArgumentParser, _: Sequence[str]) -> None:
    from opensora_sp.cli.client import submit
    from opensora_sp.cli.client.forms import SUBMITTED

    _copy(submit.parser(), target)
    _add_table(target, "infer", only=SUBMITTED)


def _client(target: argparse.ArgumentParser, _: Sequence[str], name: str) -> None:
    module = importlib.import_module(f"opensora_sp.cli.client.{name}")
    _copy(module.parser(), target)


_PARSERS: Mapping[str, Callable[[argparse.ArgumentParser, Sequence[str]], None]] = {
    "verify": _verify,
    "download": _download,
    "convert": _convert,
    "quality": _quality,
    "serve": _serve,
    "work": _work,
    "client.submit": _submit,
    **{f"client.{name}": partial(_client, name=name) for name in ("jobs", "cancel", "fetch")},
}
