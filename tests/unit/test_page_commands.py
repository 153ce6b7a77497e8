"""Every command of every page: accepted as it stands, or a form, or marked with what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import (
    NO_COMMANDS,
    ROOT,
    Command,
    accept,
    commands,
    fate,
    pages,
    unknown_flags,
    unmarked,
)

ALL = [
    command
    for page in pages()
    if page.relative_to(ROOT).as_posix() not in NO_COMMANDS and page.name != "README.zh-CN.md"
    for command in commands(page)
]


def test_the_pages_have_commands() -> None:
    assert len(ALL) > 120
    assert len({command.page for command in ALL}) > 20
    assert sum(fate(command) == "run" for command in ALL) > 40


@pytest.mark.parametrize("command", ALL, ids=lambda one: f"{one.page}:{one.line}")
def test_a_command_is_accepted_and_says_what_it_needs(command: Command) -> None:
    assert not unmarked(command)
    if command.is_form or "Open-Sora's" in command.comment:
        assert not unknown_flags(command.words)
    else:
        accept(command.words)


def test_commands_are_found_and_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        """
```bash
opensora-sp --version    # quick
opensora-sp plan --device-memory 24GB \\
    --resolution 144p --num-frames 2s
opensora-sp generate --prompt x --device cuda    # GPU
```

    opensora-sp plan --no-such-flag
    opensora-sp plan --ranks N
    not a command
"""
    )
    found = list(commands(page))
    assert [fate(one) for one in found] == ["run", "run", "needs GPU", "run", "a form"]
    assert found[1].line == 4
    done = subprocess.run(
        [sys.executable, "tests/page_commands.py", str(page)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("page.md:")]
    assert [line.split(": ")[1].split()[0].strip(",") for line in lines] == [
        *("ok", "ok", "needs", "FAILED", "a"),
    ]
    assert "'--no-such-flag' is not a flag" in done.stdout
