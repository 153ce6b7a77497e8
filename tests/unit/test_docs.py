"""The documentation against the repository: links, commands, the glossary, the table of places."""

from __future__ import annotations

import os
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from opensora_sp.cli import plan, serve, verify, work
from opensora_sp.cli.client import submit
from opensora_sp.cli.main import COMMANDS
from opensora_sp.request.flags.table import all_flags
from opensora_sp.request.settings import check_request, parse_command_line, resolve

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
SKIPPED = {".git", "build", "dist"}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A linked file of the package, and the names in code font behind it, up to the next link.
PLACE = re.compile(r"\]\(\.\./(opensora_sp/[^)]+)\)((?:[,\s]*`[^`]+`)*)")

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def pages() -> list[Path]:
    found = [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(p in SKIPPED or p.startswith(".venv") for p in path.relative_to(ROOT).parts)
    ]
    assert len(found) > 15
    return found


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table of a page whose first heading is this one."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return table


def absent(place: str) -> list[str]:
    """The names of a cell that are not in the file linked before them."""
    return [
        f"{file}: {name}"
        for file, names in PLACE.findall(place)
        for name in re.findall(r"`([^`]+)`", names)
        if not (ROOT / file).is_file()
        or not re.search(rf"\b{re.escape(name)}\b", (ROOT / file).read_text(encoding="utf-8"))
    ]


def test_every_link_of_a_page_leads_to_a_file() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages()
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:|#", target)
        and not (page.parent / target.partition("#")[0]).exists()
    ]
    assert not broken, "\n".join(broken)


def test_every_name_of_the_glossary_is_in_its_file() -> None:
    table = rows("docs/glossary.md", "Term")
    assert len(table) > 60
    assert all(len(row) == 3 for row in table)
    terms = [row[0].lower() for row in table]
    assert terms == sorted(terms)
    wrong = [f"{row[0]}: {one}" for row in table for one in absent(row[2])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("row", rows("docs/architecture.md", "Where is …"), ids=lambda row: row[0])
def test_searching_for_the_field_s_word_finds_the_place(row: list[str]) -> None:
    _, words, place = row
    assert not absent(place)
    ((file, _),) = PLACE.findall(place)
    assert words.lower() in (ROOT / file).read_text(encoding="utf-8").lower()


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return FENCED.sub("", text)


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page's fenced blocks, without comments, $NAME filled in."""
    found: list[list[str]] = []
    named: dict[str, str] = {}
    for _, body in FENCED.findall(read(page)):
        for line in body.replace("\\\n", " ").splitlines():
            filled = re.sub(r"\$(\w+)", lambda match: named[match[1]], line)
            words = shlex.split(filled, comments=True)
            if len(words) == 1 and (given := re.fullmatch(r"([A-Z]+)=(.*)", words[0])):
                named[given[1]] = given[2]
            elif words:
                found.append(words)
    return found


def accept(words: list[str]) -> None:
    """Refuse a command that does not exist, by the program's own reading of its words."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    ranks = 1
    if words[0] == "torchrun":
        assert words[1] == "--nproc_per_node"
        assert words[3] == "--no-python"
        ranks, words = int(words[2]), words[4:]
    if words[0] == "opensora-sp":
        accept_own(words[1], words[2:], ranks)
    elif words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), words[0]
        assert words[1:] == []
    elif words[:2] == ["pip", "install"]:
        files = [words[at + 1] for at, word in enumerate(words) if word == "-c"]
        assert all((ROOT / file).is_file() for file in files)
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert f"\n{extra} = [" in read("pyproject.toml")
    else:
        assert words[0] in ("export", "./TopsRider_{filename}.run"), words[0]


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
    else:
        module.parser().parse_args(rest)


@pytest.mark.parametrize("words", commands("README.md"), ids=lambda words: " ".join(words)[:50])
def test_a_command_of_the_readme_is_accepted(words: list[str]) -> None:
    accept(words)


def test_a_command_of_the_readme_says_what_it_needs_beside_a_cpu() -> None:
    needs = {"gcu": "GCU", "TopsRider": "GCU", "cuda": "GPU", "--no-engine": "Postgres"}
    needs |= {"$WEIGHTS": "weights", "weights/": "weights", "--check": "weights"}
    needs |= {"download weights": "network"}
    lines = [line for _, body in FENCED.findall(read("README.md")) for line in body.splitlines()]
    assert len(lines) > 25
    for line in lines:
        command, _, comment = line.partition("    #")
        if command.startswith(("WEIGHTS=", "pip install ", "export ")):
            continue
        missing = [needs[word] for word in needs if word in command and needs[word] not in comment]
        assert not missing, line


def test_the_two_readmes_are_one_page() -> None:
    """Headings, commands, links, pictures, code and the rows of tables; only words may differ."""
    english, chinese = (read(page) for page in READMES)
    assert re.search("[\u4e00-\u9fff]{20}", re.sub(r"\W", "", chinese))
    parts = {
        "headings": lambda text: re.findall(r"^#+(?= )", without_code(text), re.MULTILINE),
        "languages": lambda text: [language for language, _ in FENCED.findall(text)],
        "links": lambda text: LINK.findall(text.replace(READMES[1], READMES[0])),
        "code": lambda text: sorted(set(INLINE.findall(without_code(text)))),
        "rows": lambda text: re.findall(r"^\|", text, re.MULTILINE),
        "numbers": lambda text: [
            re.findall(r"\d+(?:\.\d+)?", line) for line in re.findall(r"^\|.*", text, re.MULTILINE)
        ],
    }
    for name, of in parts.items():
        assert of(chinese) == of(english), name
    assert commands(READMES[1]) == commands(READMES[0])


def test_a_reader_sees_a_result_within_a_screen() -> None:
    """An animated picture that a slow line loads too, before everything that has to be read."""
    for page in READMES:
        before, _, after = read(page).partition("![")
        assert before.count("\n") < 20, page
        picture = ROOT / after.partition("](")[2].partition(")")[0]
        assert picture.stat().st_size <= 400_000
        with Image.open(picture) as image:
            assert getattr(image, "n_frames", 1) > 10


def test_every_command_and_flag_that_the_readme_names_is_there() -> None:
    known = {f"--{flag.key.replace('_', '-')}" for flag in all_flags()}
    others = [serve, work, submit, *map(import_module, ["opensora_sp.cli.download"])]
    for parser in [verify.parser_of(), *(module.parser() for module in others)]:
        known |= {word for action in parser._actions for word in action.option_strings}
    for script in ("scripts/test.sh",):
        known |= set(re.findall(r"--[a-z][a-z-]+", read(script)))
    for page in READMES:
        code = " ".join(INLINE.findall(without_code(read(page))))
        assert set(re.findall(r"--[a-z][a-z0-9-]+", code)) <= known, page
    for path in pages():
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"^ {4}.*?\bopensora-sp ([a-z]\w*)|`opensora-sp ([a-z]\w*)", text, re.M)
        unknown = {one or other for one, other in named} - set(COMMANDS)
        assert not unknown, f"{path.relative_to(ROOT)}: {unknown}"


def test_the_readme_s_memory_is_what_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    table = rows("README.md", "Mode | Ranks")
    assert len(table) > 3
    for mode, ranks, *peaks in table:
        size = ["--resolution", "720p", "--num-frames", "16s"]
        plan.main([*size, "--device-memory", "48GB", "--memory", mode, "--ranks", ranks])
        found = re.findall(r"(?:text|denoise|decode) +([\d.]+)", capsys.readouterr().out)
        assert [round(float(peak), 1) for peak in found] == [float(peak) for peak in peaks]
