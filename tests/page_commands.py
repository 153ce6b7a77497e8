"""The commands of the documentation: which there are, what they need, and whether they run.

    python tests/page_commands.py [README.md docs/debugging.md ...] [--list]

runs every command of these pages (of all, without) that needs nothing beside a CPU, page by page,
in a copy of the repository, and ends with 1 if one fails. `--list` says what would be done with
each. tests/unit/test_page_commands.py holds what needs no run: each command is accepted by the
program's own parser, or is a form with placeholders, or says behind `#` what it needs.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from opensora_sp.cli import serve, verify, work  # noqa: E402
from opensora_sp.cli.client import submit  # noqa: E402
from opensora_sp.cli.main import COMMANDS  # noqa: E402
from opensora_sp.request.flags.table import all_flags  # noqa: E402
from opensora_sp.request.settings import (  # noqa: E402
    check_request,
    parse_command_line,
    resolve,
)

LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "samples", "*.egg-info")
SKIPPED = {".git", "build", "dist"}
# Pages of single lines that were tried, and of what changed: nobody is to type them.
NO_COMMANDS = {"CHANGELOG.md", "docs/bad_inputs.md", "docs/cases.md"}
FENCE = re.compile(r"^ *```(\w*)")
VARIABLES = re.compile(r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S*)\s+)+")
ASSIGNMENT = re.compile(r"""([A-Z]+)=("[^"]*"|\$\(.*\)|[^\s"$]+)""")
# What a command may need beside a CPU and an installation, as it is written behind its `#`.
NEEDS = (
    *("GCU", "GPU", "weights", "network", "Postgres", "root", "long", "another shell"),
    *("a server", "several nodes", "MPI", "Slurm", "accelerate", "ColossalAI", "atheris"),
    *("schemathesis", "fails on purpose", "Open-Sora's", "your own"),
)
# What runs somewhere else, by its first words.
ELSEWHERE = {
    "scripts/test.sh": "the suite itself",
    "python -m pytest": "the suite itself",
    ".venv/bin/python -m pytest": "the suite itself",
    "scripts/demo.sh": "makes an environment: by hand, before a release",
    "pip": "changes the environment: by hand, before a release",
    "python -m venv": "changes the environment: by hand, before a release",
    "tools/bin/": "by hand, at a release",
    "source": "of a shell",
    "git": "of a shell",
    "export": "of a shell",
    "opensora-sp serve": "tests/server",
    "opensora-sp work": "tests/server/test_groups.py",
    "curl": "tests/server",
    **{f"opensora-sp {one}": "tests/server" for one in ("submit", "jobs", "fetch", "cancel")},
    **{
        f"python tests/{one}.py": "long: before a release"
        for one in ("fault_matrix", "properties", "fuzz", "api_cases", "machine_faults")
    },
    "python -m scripts.train_embedded": "long: makes the embedded model",
}
COMMAND_WORDS = (
    *("opensora-sp", "torchrun", "python", "pip", "accelerate", "colossalai", "mpirun", "srun"),
    *("curl", "modelscope", "export", "source", "git", "./TopsRider_{filename}.run"),
)
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*\d?(?:[./:]\S+)?")


@dataclass(frozen=True)
class Command:
    """One command of a page: its text with $NAME filled in, and what its comment says."""

    page: str
    line: int
    text: str
    comment: str

    @property
    def words(self) -> list[str]:
        """Its words, without variables in front and without where its output goes."""
        return shlex.split(without_variables(self.text.partition(" > ")[0]))

    @property
    def needs(self) -> list[str]:
        """What it needs beside a CPU, by its comment."""
        return [need for need in NEEDS if re.search(rf"\b{re.escape(need)}\b", self.comment)]

    @property
    def is_form(self) -> bool:
        """Whether it has placeholders, so that nobody can run it as it stands."""
        return "…" in self.text or any(
            PLACEHOLDER.fullmatch(word) or word.startswith("[-") for word in self.words
        )

    @property
    def elsewhere(self) -> str | None:
        """Where it runs, if not by this file."""
        text = " ".join(self.words)
        return next((why for first, why in ELSEWHERE.items() if text.startswith(first)), None)


def pages() -> list[Path]:
    """Every page of the repository."""
    found = [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(p in SKIPPED or p.startswith(".venv") for p in path.relative_to(ROOT).parts)
    ]
    assert len(found) > 15
    return found


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page's bash blocks, and of its indented blocks as far as they are known."""
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    named: dict[str, str] = {}
    weights = re.search(r'^WEIGHTS="(.*)"$', (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert weights is not None
    named["WEIGHTS"] = weights[1]
    language: str | None = None
    held, start = "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if (fence := FENCE.match(line)) is not None:
            language = fence[1] if language is None else None
            continue
        whole = language in ("bash", "sh")
        if not whole and (language is not None or not line.startswith("    ")) and not held:
            continue
        start = start if held else number
        held += line.strip()
        if held.endswith("\\"):
            held = held[:-1]
            continue
        text, held = held, ""
        if text and (whole or is_command(text)):
            command, comment = without_comment(text)
            filled = re.sub(r"\$(\w+)", lambda match: named[match[1]], command)
            if (given := ASSIGNMENT.fullmatch(command)) is not None:
                # What a command gives is not known here: a placeholder of the name.
                named[given[1]] = given[1] if given[2].startswith("$(") else given[2].strip('"')
            elif filled:
                yield Command(name, start, filled, comment)


def is_command(text: str) -> bool:
    """Whether a line of an indented block is a command, and not output or a list."""
    words = without_variables(text).split()
    return bool(words) and (
        words[0] in COMMAND_WORDS or words[0].startswith(("scripts/", ".venv/bin/", "tools/bin/"))
    )


def without_variables(text: str) -> str:
    """A command without the variables that are set for it alone."""
    return VARIABLES.sub("", text, count=1) if VARIABLES.match(text) else text


def without_comment(text: str) -> tuple[str, str]:
    """A line's command, and what stands behind a `#` after a space."""
    for match in re.finditer(r"(?:^|\s)#\s", text):
        before = text[: match.start()]
        if before.count('"') % 2 == 0 and before.count("'") % 2 == 0:
            return before.rstrip(), text[match.end() :].strip()
    return text, ""


def accept(words: list[str]) -> None:
    """Refuse a command that does not exist, by the program's own reading of its words."""
    ranks = 1
    if words[0] == "torchrun":
        ranks, words = after_torchrun(words)
    if words[0] == "opensora-sp":
        accept_own(words[1], words[2:], ranks)
    elif words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), words[0]
    elif words[0] in ("python", ".venv/bin/python"):
        accept_python(words[1:], ranks)
    elif words[:2] == ["pip", "install"]:
        files = [words[at + 1] for at, word in enumerate(words) if word == "-c"]
        assert all((ROOT / file).is_file() for file in files)
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    else:
        assert words[0] in COMMAND_WORDS or words[0].startswith("tools/bin/"), words[0]


def after_torchrun(words: list[str]) -> tuple[int, list[str]]:
    """The number of ranks, and the command that they run."""
    ranks = words[words.index("--nproc_per_node") + 1]
    if "--no-python" in words:
        rest = words[words.index("--no-python") + 1 :]
    else:
        script = next(at for at, word in enumerate(words) if word.endswith(".py") or word == "-m")
        rest = ["python", *words[script:]]
    return int(ranks) if ranks.isdigit() else 1, rest


def accept_python(words: list[str], ranks: int) -> None:
    """A module or a script that is there; of the vendor's names, with flags that are taken."""
    if words[0] == "-m":
        assert find_spec(words[1]) is not None, words[1]
    elif words[0] in ("scripts/demo_open_sora.py", "launch/infer.py"):
        accept_own("generate", words[1:], ranks)
    else:
        assert (ROOT / words[0]).is_file(), words[0]


def accept_own(name: str, rest: list[str], ranks: int) -> None:
    """Refuse what `opensora-sp NAME` does not take, as far as it can be told without files."""
    command = COMMANDS[name]
    if command.program is not None:
        values = resolve(parse_command_line(rest), program=command.program)
        check_request(values, world_size=ranks)
        return
    module = import_module(f"opensora_sp.cli.{command.module}")
    if module is verify:
        verify.parser_of().parse_args([*command.before, *rest])
    elif module in (serve, work, submit):
        _, others = module.parser().parse_known_args(rest)
        resolve(parse_command_line(others))
    elif command.operands is not None:
        assert len(rest) == command.operands[0]
    else:
        module.parser().parse_args(rest)


def unknown_flags(words: list[str]) -> set[str]:
    """The flags of a form that its command does not have."""
    if "--no-python" in words:
        words = words[words.index("--no-python") + 1 :]
    if words[0] != "opensora-sp":
        return set()
    command = COMMANDS[words[1]]
    module = import_module(f"opensora_sp.cli.{command.module}")
    known = {flag.name for flag in all_flags()}
    if command.program is None and command.operands is None:
        parser = verify.parser_of() if module is verify else module.parser()
        own = {word for action in parser._actions for word in action.option_strings}
        known = own | known if module in (serve, work, submit) else own
    known |= {"--queue"} if words[1] == "generate" else set()  # it goes to the queue before them
    return set(re.findall(r"--[a-z][\w-]*", " ".join(words[2:]))) - known


def unmarked(command: Command) -> list[str]:
    """What a command's words need that its comment does not name."""
    text = " ".join(command.words)
    if command.is_form or text.startswith("pip "):
        return []
    needs = {"--device gcu": "GCU", "TopsRider": "GCU", "--device cuda": "GPU"}
    needs |= {"--no-engine": "Postgres", "weights/": "weights", "--check weights": "weights"}
    needs |= {"download weights": "network"}
    return [need for word, need in needs.items() if word in text and need not in command.comment]


def fate(command: Command) -> str:
    """What is done with a command: run, or why it is not."""
    if command.needs:
        return f"needs {', '.join(command.needs)}"
    return command.elsewhere or ("a form" if command.is_form else "run")


def main() -> int:
    """Run the commands of some pages, or list them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--list", action="store_true", help="say what is done with each")
    given = parser.parse_args()
    chosen = [path.resolve() for path in given.pages] or [
        path for path in pages() if path.name != "README.zh-CN.md"
    ]
    found = [
        one
        for path in chosen
        if not path.is_relative_to(ROOT) or path.relative_to(ROOT).as_posix() not in NO_COMMANDS
        for one in commands(path)
    ]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        if not given.list:
            home = prepared(Path(folder))
        for command in found:
            what = fate(command)
            if given.list or what != "run":
                print(f"{command.page}:{command.line}: {what}: {command.text}", flush=True)
                continue
            started = time.monotonic()
            done = run(command, home)
            seconds = time.monotonic() - started
            verdict = "ok" if done.returncode == 0 else f"FAILED with {done.returncode}"
            print(f"{command.page}:{command.line}: {verdict}, {seconds:.0f} s: {command.text}")
            if done.returncode != 0:
                failed += 1
                print(done.stdout[-2000:])
            sys.stdout.flush()
    if not given.list:
        print(f"{failed} failed" if failed else "all that were run ended with 0")
    return 1 if failed else 0


def prepared(folder: Path) -> Path:
    """A copy of the repository, with the files that commands name and a folder of commands."""
    home = folder / "repository"
    shutil.copytree(ROOT, home, ignore=LEFT_OUT)
    (home / "prompts.txt").write_text("a red ball\na blue square\n", encoding="utf-8")
    bin_ = home / "bin"
    bin_.mkdir()
    command = bin_ / "opensora-sp"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m opensora_sp "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return home


def run(command: Command, home: Path) -> subprocess.CompletedProcess[str]:
    """One command by bash, in the copy of the repository."""
    path = f"{home / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENSORA_SP")}
    return subprocess.run(
        ["bash", "-c", command.text],
        cwd=home,
        env=kept | {"PATH": path, "PYTHONPATH": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())
