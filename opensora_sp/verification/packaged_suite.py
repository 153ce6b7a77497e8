"""Where the conformance suite lies: in a package of its own, as it is larger than the program."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from opensora_sp import __version__
from opensora_sp.base import access
from opensora_sp.base.errors import UserError

PACKAGE = "opensora_sp_conformance"


def packaged_suite() -> Path:
    """The suite's folder: the one beside this program, as in a checkout, or the installed one.

    Raises UserError where there is none. Imports neither torch nor the package itself.
    """
    spec = find_spec(PACKAGE)
    installed = [] if spec is None else spec.submodule_search_locations or []
    for folder in (Path(__file__).resolve().parents[2] / PACKAGE, *map(Path, installed)):
        # A folder of that name may be anything; the manifest shows that it is the suite.
        if access.is_file(folder / "manifest.json"):
            return folder
    raise UserError(
        f"the conformance suite is not installed: it is a package of its own, {PACKAGE} "
        f"{__version__}; install it (pip install 'opensora_sp[conformance]', or its wheel beside "
        "this program's), or give --reference DIR"
    )
