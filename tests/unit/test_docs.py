"""The documentation against the repository: links, the glossary, and the table of places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".git", "build", "dist"}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A linked file of the package, and the names in code font behind it, up to the next link.
PLACE = re.compile(r"\]\(\.\./(opensora_sp/[^)]+)\)((?:[,\s]*`[^`]+`)*)")


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
