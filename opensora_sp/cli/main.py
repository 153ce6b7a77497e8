"""The one command in front: opensora-sp COMMAND, or python -m opensora_sp COMMAND.

A command is imported when it is asked for, so that help and a mistyped name are answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opensora_sp import __version__
from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import on_any_screen
from opensora_sp.base.value_types import shown
from opensora_sp.cli.console import refuse
from opensora_sp.cli.help import help_asked, program_help, say


@dataclass(frozen=True)
class Command:
    """One command.

    module: its `main` takes the words after the command. before: words put in front of them.
    program: where it takes the flag table, the program's name there. operands: how many words it
    takes and what they are, where it takes nothing else.
    """

    summary: str
    module: str
    before: tuple[str, ...] = ()
    program: str | None = None
    operands: tuple[int, str] | None = None


COMMANDS: Mapping[str, Command] = {
    "generate": Command("make videos and images from prompts", "infer", program="infer"),
    "plan": Command(
        "say whether a request fits a device, and what it costs", "plan", program="plan"
    ),
    "benchmark": Command("measure generation and write a report", "benchmark", program="benchmark"),
    "calibrate": Command(
        "find out which denoising steps need not be computed", "calibrate", program="calibrate"
    ),
    "compare": Command(
        "print two benchmark reports side by side",
        "benchmark",
        ("--compare",),
        operands=(2, "A.json B.json"),
    ),
    "quality": Command("compare outputs with those of a reference run", "quality"),
    "verify": Command("run the conformance suite on this machine", "verify"),
    "parity": Command("compare all ranks with one rank", "verify", ("--parity",)),
    "doctor": Command(
        "look whether this machine is fit to run the program", "verify", ("--doctor",)
    ),
    "serve": Command("keep the models loaded and make what comes over HTTP", "serve"),
    "work": Command("make the jobs of a queue that many machines share", "work"),
    "submit": Command("send requests to a server", "client.submit"),
    "jobs": Command("list the jobs of a server", "client.jobs"),
    "cancel": Command("cancel jobs of a server", "client.cancel"),
    "fetch": Command("download what a server has made", "client.fetch"),
    "download": Command("fetch the published checkpoints, or check what is there", "download"),
    "convert": Command("bring a checkpoint of another form into the published layout", "convert"),
    "completion": Command("print what makes bash or zsh complete commands and flags", "completion"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code (2: refused, with one line on stderr)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None or _answered_here(command, argv[1:]):
        return _answer(argv)
    module = importlib.import_module(f"opensora_sp.cli.{command.module}")
    code: int = module.main([*command.before, *argv[1:]])
    return code


def _answered_here(command: Command, rest: Sequence[str]) -> bool:
    """Whether a command line is answered without the command: by help, or by a refusal."""
    if command.operands is not None:
        return len(rest) != command.operands[0] or help_asked(rest) is not None
    return command.program is not None and help_asked(rest) is not None


@on_any_screen
def _answer(argv: Sequence[str]) -> int:
    try:
        return say(_text(argv))
    except UserError as error:
        return refuse(error, same_everywhere=True)


def _text(argv: Sequence[str]) -> str:
    """The help or the version that is asked for. Raises UserError for everything else."""
    if not argv:
        raise UserError(f"a command is needed, one of {', '.join(COMMANDS)} (opensora-sp --help)")
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help", "help"):
        return overview()
    if name == "--version":
        return f"opensora_sp {__version__}\n"
    if name.startswith("-"):
        raise UserError(
            f"{shown(name)}: the command comes first, such as opensora-sp generate "
            f"{name.partition('=')[0]} … (opensora-sp --help lists the commands)"
        )
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{shown(name)} is not a command{meant} (opensora-sp --help lists them)")
    command, asked = COMMANDS[name], help_asked(rest)
    if command.operands is None:
        assert command.program is not None
        assert asked is not None
        return program_help(command.program, asked)
    count, operands = command.operands
    usage = f"opensora-sp {name} {operands}"
    if asked is not None:
        return f"usage: {usage}\n\nTo {command.summary}.\n"
    raise UserError(f"opensora-sp {name} takes {count} files, not {len(rest)}: {usage}")


def overview() -> str:
    """What `opensora-sp --help` prints."""
    width = max(map(len, COMMANDS)) + 4
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: opensora-sp COMMAND [flags]",
            "       torchrun --nproc_per_node N --no-python opensora-sp COMMAND [flags]",
            "       python -m opensora_sp COMMAND [flags]",
            "",
            "Open-Sora 1.2 on one or several accelerators.",
            "",
            "commands:",
            *lines,
            "",
            "opensora-sp COMMAND --help shows the flags that most people use, --help all every one",
            "opensora-sp --version prints the version.",
            "",
            "examples:",
            '  opensora-sp generate --prompt "a red ball rolls to the left"',
            "  opensora-sp plan --device-memory 24GB --resolution 720p --num-frames 16s",
            "  opensora-sp doctor",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
