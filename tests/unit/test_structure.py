"""The house rules, held by reading the source: what may import what, and where.

Each rule has one test that lists every place that breaks it, as `file:line: what`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from opensora_sp.parallel.backend_table import DEVICES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "opensora_sp"

# Request, planner and command line answer within a moment: they never wait for torch.
TORCH_FREE = ("opensora_sp/request", "opensora_sp/planner", "opensora_sp/cli")
COLLECTIVE_CALLERS = ("opensora_sp/parallel/exchange.py", "opensora_sp/parallel/control.py")
COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
}
# gloo, nccl and eccl do not all have these, or not in every supported torch.
UNPORTABLE_COLLECTIVES = {"all_to_all", "gather", "scatter", "gather_object", "scatter_object_list"}
GLOBAL_STATE = re.compile(
    r"_*([a-z]+_)*(group|groups|pg|mesh|session|world_size|rank|local_rank|current_device)",
    re.IGNORECASE,
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def sources(*folders: str) -> tuple[Path, ...]:
    """Every Python file below these folders of the repository."""
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def package_files() -> tuple[Path, ...]:
    files = sources("opensora_sp")
    assert len(files) > 5, f"no sources found below {PACKAGE}"
    return files


@dataclass(frozen=True)
class Import:
    """One imported name: the module or member it names, and what it is called in this file."""

    line: int
    name: str
    alias: str
    meaning: str  # what the alias stands for: `import a.b` makes `a` mean `a`


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file, those inside functions too."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for item in node.names:
                alias = item.asname or item.name.split(".")[0]
                meaning = item.name if item.asname else alias
                found.append(Import(node.lineno, item.name, alias, meaning))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its target"
            for item in node.names:
                name = f"{node.module}.{item.name}"
                found.append(Import(node.lineno, name, item.asname or item.name, name))
    return tuple(found)


def within(name: str, package: str) -> bool:
    """Whether a dotted name is ``package`` or lies in it."""
    return name == package or name.startswith(package + ".")


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` of an attribute chain, None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return None


@cache
def uses(path: Path) -> tuple[tuple[int, str, ast.AST], ...]:
    """(line, full dotted name, node) of every name and attribute chain, imports resolved."""
    meanings = {item.alias: item.meaning for item in imports(path)}
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name | ast.Attribute) and (name := dotted(node)):
            head, dot, rest = name.partition(".")
            found.append((node.lineno, meanings.get(head, head) + dot + rest, node))
    return tuple(found)


def mentions(path: Path, package: str) -> list[str]:
    """Where a file imports a package or reaches it as an attribute."""
    lines = {item.line for item in imports(path) if within(item.name, package)}
    lines |= {line for line, name, _ in uses(path) if within(name, package)}
    return [f"{relative(path)}:{line}: {package}" for line in sorted(lines)]


def collective_calls(path: Path) -> list[tuple[int, str]]:
    """(line, name) of every call of a torch.distributed collective."""
    called = {id(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
    return [
        (line, name.rpartition(".")[2])
        for line, name, node in uses(path)
        if id(node) in called
        and within(name, "torch.distributed")
        and name.rpartition(".")[2] in COLLECTIVES
    ]


def refuse(found: Iterable[str], rule: str) -> None:
    places = list(found)
    assert not places, rule + ":\n  " + "\n  ".join(places)


def test_torch_distributed_stays_in_parallel() -> None:
    outside = [p for p in package_files() if not relative(p).startswith("opensora_sp/parallel/")]
    found = [
        place
        for path in (*outside, *sources("launch"))
        for place in mentions(path, "torch.distributed")
    ]
    refuse(found, "only opensora_sp/parallel imports torch.distributed")


def test_collectives_are_called_in_two_files_only() -> None:
    found = [
        f"{relative(path)}:{line}: {name}"
        for path in package_files()
        if relative(path) not in COLLECTIVE_CALLERS
        for line, name in collective_calls(path)
    ]
    refuse(found, f"collectives are called only in {' and '.join(COLLECTIVE_CALLERS)}")
    # The rule above is worth something only while it recognises the calls that are there.
    assert any(collective_calls(ROOT / name) for name in COLLECTIVE_CALLERS)


def test_only_collectives_that_every_backend_has() -> None:
    found = [
        f"{relative(path)}:{line}: {name}"
        for path in package_files()
        for line, name in collective_calls(path)
        if name in UNPORTABLE_COLLECTIVES
    ]
    refuse(found, "gloo, nccl and eccl do not all have this collective")


def test_groups_and_ranks_are_arguments() -> None:
    found: list[str] = []
    for path in package_files():
        # Groups of flags are no process groups.
        flags = relative(path).startswith(("opensora_sp/cli/", "opensora_sp/request/flags/"))
        scopes = [] if flags else ast.walk(tree(path))
        found += [
            f"{relative(path)}:{line}: {name}"
            for scope in scopes
            for name, line in assigned(scope)
            if GLOBAL_STATE.fullmatch(name)
        ]
        found += [
            f"{relative(path)}:{node.lineno}: global {', '.join(node.names)}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Global)
        ]
    refuse(found, "no process group, size, rank or device lives in a module or class")


def assigned(scope: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that hold something when the module or class is made; dataclass fields do not."""
    if not isinstance(scope, ast.Module | ast.ClassDef):
        return
    for node in scope.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign) and isinstance(scope, ast.Module):
            targets = [node.target]
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    yield name.id, node.lineno


def test_validation_and_help_never_load_heavy_libraries() -> None:
    names = [
        relative(path).removesuffix(".py").replace("/", ".")
        for path in sources(*TORCH_FREE)
        if path.name != "__init__.py"
    ]
    heavy = ("torch", "transformers", "diffusers", "accelerate", "av", "ftfy", "bs4")
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {heavy} if heavy in sys.modules]\n"
        "    assert not loaded, f'importing {name} loads {loaded}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", ["transfer_to_gcu"])
def test_vendor_shims_are_not_used(word: str) -> None:
    found = [
        relative(path)
        for path in sources("opensora_sp", "launch", "scripts")
        if word in path.read_text(encoding="utf-8")
    ]
    refuse(found, f"{word} patches torch behind everybody's back")


def test_devices_are_reached_by_their_type() -> None:
    found = [
        place
        for path in package_files()
        if relative(path) != "opensora_sp/parallel/backend.py"
        for device in DEVICES
        for place in mentions(path, f"torch.{device}")
    ]
    refuse(found, "use getattr(torch, device.type), so that every device is served")


def test_the_top_of_the_package_is_its_rooms() -> None:
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert len(folders) <= 13
    assert files <= {"__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("script", ["draw_house.py", "draw_sharding.py"])
def test_the_drawings_are_of_this_code(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# Who reads JSON or YAML beside the two readers of base/, and why its bytes are the program's own.
OWN_BYTES = {
    "opensora_sp/base/outside_json.py": "the reader",
    "opensora_sp/base/outside_yaml.py": "the reader",
    "opensora_sp/verification/weights.py": "a file of the package",
    "opensora_sp/request/sizes.py": "a file of the package",
    "opensora_sp/benchmark/report/schema_check.py": "a file of the package",
    "opensora_sp/benchmark/profile.py": "a trace that torch wrote in this process just before",
    "opensora_sp/jobs/identity.py": "text that json.dumps made in the same line",
    "opensora_sp/server/settings.py": "an argument that the server gives to its own ranks",
}


def test_json_and_yaml_from_outside_pass_the_readers() -> None:
    readers = re.compile(
        r"json\.(load|loads|JSONDecoder)|yaml\.(\w*load\w*|compose\w*|parse|scan|\w*Loader)"
    )
    found = {
        f"{relative(path)}:{node.lineno}: {name}": relative(path)
        for path in package_files()
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.Attribute, ast.ImportFrom))
        for name in (
            [dotted(node) or ""]
            if isinstance(node, ast.Attribute)
            else [f"{node.module}.{item.name}" for item in node.names]
        )
        if readers.fullmatch(name)
    }
    assert not [place for place, file in found.items() if file not in OWN_BYTES]
    assert set(found.values()) == set(OWN_BYTES), "a file of the list reads nothing"
