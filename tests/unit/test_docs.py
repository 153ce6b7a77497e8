"""The documentation against the repository: links, commands, the glossary, the table of places."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from page_commands import commands, pages
from PIL import Image

from opensora_sp.cli import plan, serve, verify, work
from opensora_sp.cli.client import submit
from opensora_sp.cli.main import COMMANDS
from opensora_sp.request.flags.table import all_flags
from opensora_sp.verification import leading, parity, sharded
from opensora_sp.verification.conformance import LEADING_PARTS, SHARDED_PARTS

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A linked file of the package, and the names in code font behind it, up to the next link.
PLACE = re.compile(r"\]\(\.\./(opensora_sp/[^)]+)\)((?:[,\s]*`[^`]+`)*)")

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


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


def test_every_name_of_the_numerics_is_in_its_file() -> None:
    table = rows("docs/numerics.md", "Operation")
    assert len(table) > 12
    wrong = [f"{row[0]}: {one}" for row in table for one in absent(row[2])]
    assert not wrong, "\n".join(wrong)


def test_the_limits_of_the_numerics_are_those_of_the_code() -> None:
    conformance = {row[0].strip("`"): row[2] for row in rows("docs/numerics.md", "Part")}
    limits = {
        "dit": sharded.FORWARD_LIMIT,
        "dit_bf16": sharded.BF16_LIMIT,
        "sampler": sharded.SAMPLER_LIMIT,
        "vae3d": leading.VAE_LIMIT,
        "t5": leading.TEXT_LIMIT,
        "media": leading.VIDEO_LIMIT,
    }
    for part, limit in limits.items():
        assert limit in numbers(conformance[part]), part
    assert 100 * leading.OFF_PIXELS_LIMIT in numbers(conformance["media"])
    assert sharded.TIMESTEP_LIMIT in numbers(conformance["sampler"])
    assert set(conformance) == {*SHARDED_PARTS, *LEADING_PARTS}
    ranks = {row[0]: numbers(row[1]) for row in rows("docs/numerics.md", "What | Limit")}
    assert ranks["one float32 forward, N ranks against one"] == [parity.FORWARD_LIMIT]
    folded = ranks["folded against plain: float32; half precision"]
    assert folded == [parity.FOLDED_LIMIT, parity.FOLDED_FACTOR]


def numbers(text: str) -> list[float]:
    return [float(one) for one in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?", text)]


def test_what_the_pages_quote_is_what_the_program_says() -> None:
    """Words in quotation marks in the first cell of a table of symptoms."""
    said = " ".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "opensora_sp").rglob("*.py")
    )
    quoted = [
        words
        for page in ("docs/debugging.md", "README.md")
        for line in read(page).splitlines()
        if line.startswith("|")
        for words in re.findall(r'"([a-z][^"]+)"', line.split(" | ")[0])
    ]
    assert len(quoted) > 8
    parts = [words.removeprefix("torch_gcu ") for words in quoted]  # a backend's row has the name
    assert [words for words in parts if words not in said] == []


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
    of_each = [[one.text for one in commands(ROOT / page)] for page in READMES]
    assert len(of_each[0]) > 25
    assert of_each[1] == of_each[0]


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
