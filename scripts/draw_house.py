"""Draws the rooms of opensora_sp from its code: scripts/draw_house.py [--check]

Writes docs/images/house.svg (rooms by floor, how many imports run between them) and, between the
marks in docs/architecture.md, what every file is for, from the first line of its docstring.
--check writes nothing and ends with 1 where either is not what the code says now.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "opensora_sp"
PICTURE = ROOT / "docs" / "images" / "house.svg"
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- files: written by scripts/draw_house.py -->", "<!-- end of files -->"

# As in pyproject.toml: from the top; a room imports only from floors below its own.
FLOORS = (
    ("cli", "server"),
    ("benchmark", "verification"),
    ("jobs",),
    ("engine", "planner"),
    ("request",),
    ("parallel", "models", "media"),
    ("base",),
)
WIDTH, ROOM_HEIGHT, GAP, MARGIN = 1000, 74, 46, 20
COLOURS = ("#dbe9f6", "#e3f0dc", "#f9ebd2", "#f6dede", "#e7e0f2", "#dcefee", "#ececec")


def main() -> int:
    """Write both, or compare both with what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it is old")
    check = parser.parse_args().check
    old = []
    for path, content in ((PICTURE, picture()), (PAGE, page())):
        if path.read_text(encoding="utf-8") == content:
            continue
        old.append(path.relative_to(ROOT).as_posix())
        if not check:
            path.write_text(content, encoding="utf-8")
    if check and old:
        print(
            f"{', '.join(old)}: not of this code; run python scripts/draw_house.py",
            file=sys.stderr,
        )
        return 1
    return 0


def rooms() -> list[str]:
    """The rooms that are there, from the top."""
    return [room for floor in FLOORS for room in floor if (PACKAGE / room).is_dir()]


def files(room: str) -> list[Path]:
    """A room's Python files, those of its inner rooms last."""
    found = sorted((PACKAGE / room).rglob("*.py"), key=lambda p: (len(p.parts), p.as_posix()))
    return [path for path in found if path.name != "__init__.py"]


def imports() -> Counter[tuple[str, str]]:
    """(from room, to room) → how many imports, also those inside functions."""
    found: Counter[tuple[str, str]] = Counter()
    for room in rooms():
        for path in files(room):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                for name in names:
                    parts = (name or "").split(".")
                    if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] != room:
                        found[room, parts[1]] += 1
    return found


def first_line(path: Path) -> str:
    """The first sentence of a file's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def page() -> str:
    """docs/architecture.md with its file map made anew."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    lines = []
    for room in rooms():
        lines += [f"### {room}/", "", first_line(PACKAGE / room / "__init__.py") + ".", ""]
        lines += ["| File | What it is for |", "|---|---|"]
        for path in files(room):
            name = path.relative_to(PACKAGE / room).as_posix()
            lines.append(
                f"| [{name}](../{path.relative_to(ROOT).as_posix()}) | {first_line(path)} |"
            )
        lines.append("")
    return before + START + "\n\n" + "\n".join(lines) + END + after


def picture() -> str:
    """The house as SVG: floors, rooms, files; an arrow for the imports between two rooms."""
    places = boxes()
    height = max(y + h for _, y, _, h in places.values()) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#667"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for (here, there), count in sorted(imports().items()):
        if here in places and there in places:
            parts.append(arrow(places[here], places[there], count))
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    for room, (x, y, width, box_height) in places.items():
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{box_height}" rx="6" '
            f'fill="{COLOURS[floor_of[room]]}" stroke="#445"/>'
            f'<text x="{x + 10}" y="{y + 20}" font-weight="bold">{escape(room)}/</text>'
        )
        for number, line in enumerate(wrapped(room, width)):
            parts.append(
                f'<text x="{x + 10}" y="{y + 38 + 15 * number}" font-size="11" fill="#333">'
                f"{escape(line)}</text>"
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def wrapped(room: str, width: float) -> list[str]:
    """A room's files by name, in lines that fit its box."""
    lines, line = [], ""
    for path in files(room):
        word = path.relative_to(PACKAGE / room).with_suffix("").as_posix()
        longer = f"{line}  {word}" if line else word
        if line and len(longer) * 6.1 > width - 20:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]


def boxes() -> dict[str, tuple[float, float, float, float]]:
    """Room → x, y, width, height."""
    found: dict[str, tuple[float, float, float, float]] = {}
    y = float(MARGIN)
    for floor in FLOORS:
        there = [room for room in floor if (PACKAGE / room).is_dir()]
        width = (WIDTH - 2 * MARGIN - GAP * (len(there) - 1)) / max(1, len(there))
        tallest = max([ROOM_HEIGHT, *(36 + 15 * len(wrapped(r, width)) for r in there)])
        for place, room in enumerate(there):
            found[room] = (MARGIN + place * (width + GAP), y, width, tallest)
        y += tallest + GAP
    return found


def arrow(
    here: tuple[float, float, float, float], there: tuple[float, float, float, float], count: int
) -> str:
    """A line from the lower edge of one box to the upper edge of another; thicker for more."""
    x1, y1 = here[0] + here[2] / 2, here[1] + here[3]
    x2, y2 = there[0] + there[2] / 2, there[1]
    # Arrows of rooms above each other would lie on one line: each leaves and arrives apart.
    x1 += (x2 - x1) * 0.15 + (y2 - y1) * 0.12
    x2 += (x1 - x2) * 0.15 + (y2 - y1) * 0.08
    thick = min(4.0, 0.6 + count**0.5 / 4)
    return (
        f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="#667" '
        f'stroke-width="{thick:.1f}" stroke-opacity="0.55" marker-end="url(#end)"/>'
    )


if __name__ == "__main__":
    sys.exit(main())
