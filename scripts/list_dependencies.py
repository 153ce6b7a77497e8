"""Lists every package that the project brings, with its licence: docs/dependencies.md.

    python scripts/list_dependencies.py > docs/dependencies.md

Follows pyproject.toml's requirements, and those of the packages themselves, through what is
installed beside the Python that runs this. A licence is what a package's own metadata says, as an
SPDX expression where it has one. Nothing is fetched. Needs Python 3.11 and `packaging`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Licences that ask something of whoever passes the package itself on, beyond keeping its notice.
SHARED_ALIKE = re.compile(r"\b(A?GPL|LGPL|MPL|EPL|CDDL|EUPL)\b|Mozilla|GNU", re.IGNORECASE)
INTRODUCTION = """# Dependencies and their licences

Made by `python scripts/list_dependencies.py > docs/dependencies.md` from what was installed: one
row for each package that a group of pyproject.toml brings, directly or through others. A licence is
what the package's own metadata says. A package stands in the first group that brings it.

`kernels` and CUDA builds of torch bring further packages of NVIDIA and Triton, which are listed
where they are installed. The wheel of `av` says BSD-3-Clause of itself. It also holds FFmpeg, which
is under the LGPL or the GPL by how it is built, and x264 and x265, which are under the GPL.
"""


def main() -> int:
    """Print the page."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"always": project["dependencies"], **project["optional-dependencies"]}
    order = ["always", *(name for name in groups if name not in ("always", "dev")), "dev"]
    listed: set[str] = set()
    print(INTRODUCTION)
    asks = []
    for group in order:
        found, missing = closure(groups[group])
        rows = sorted(set(found) - listed)
        listed |= set(rows)
        print("## Always" if group == "always" else f"## Extra `{group}`")
        print()
        if rows:
            print("| Package | Version | Licence |\n| --- | --- | --- |")
        for name in rows:
            about = found[name]
            terms = licence(about)
            print(f"| {about.metadata['Name']} | {about.version} | {terms} |")
            if SHARED_ALIKE.search(terms):
                asks.append(f"{about.metadata['Name']} ({terms}; {group})")
        if missing:
            print(f"\nNot installed when this was made: {', '.join(sorted(missing))}.")
        elif not rows:
            print("Nothing beyond the groups above.")
        print()
    print("## Licences that ask more than a notice\n")
    print("Of whoever passes these packages on; using them asks nothing.\n")
    print("\n".join(f"- {one}" for one in asks))
    return 0


def closure(requirements: Iterable[str]) -> tuple[dict[str, Distribution], set[str]]:
    """What the requirements bring, by name, and the names that are asked for but not installed."""
    found: dict[str, Distribution] = {}
    missing: set[str] = set()
    seen: set[tuple[str, str]] = set()
    left = [(Requirement(text), "") for text in requirements]
    while left:
        wanted, extra = left.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        try:
            found[name] = distribution(wanted.name)
        except PackageNotFoundError:
            missing.add(name)
            continue
        for one in {"", *wanted.extras}:
            if (name, one) not in seen:
                seen.add((name, one))
                left += [(Requirement(text), one) for text in found[name].requires or ()]
    return found, missing


def licence(about: Distribution) -> str:
    """What a package says of its licence, in one line."""
    metadata: Any = about.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    own = " ".join((metadata.get("License") or "").split())
    if 0 < len(own) <= 60 and own != "UNKNOWN":
        return own
    classes = [
        text.rpartition("::")[2].strip()
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    return ", ".join(classes) or "none named in its metadata"


if __name__ == "__main__":
    sys.exit(main())
