"""Threads of a rank: what the work can use, less on a loaded machine, and none that spins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_sp.base.cpu_threads import (
    apply_cpu_threads,
    available_cores,
    busy_elsewhere,
    choose_threads,
    transformer_width,
)
from opensora_sp.base.waiting import let_waiting_threads_sleep

FULL = 1152
TORCHRUN = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("wanted", "device", "environ", "width", "busy", "expected"),
    [
        (None, "cpu", {}, None, 0, 8),
        (None, "cpu", {}, FULL, 0, 8),
        (None, None, {"LOCAL_WORLD_SIZE": "3", **TORCHRUN}, FULL, 0, 2),
        (None, "cpu", {"LOCAL_WORLD_SIZE": "16", **TORCHRUN}, FULL, 0, 1),
        (None, "cpu", {"OMP_NUM_THREADS": "1"}, FULL, 0, None),
        (None, "cpu", {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, FULL, 0, None),
        (None, "cuda", {"LOCAL_WORLD_SIZE": "2"}, FULL, 0, None),
        (5, "cuda", {"LOCAL_WORLD_SIZE": "2", **TORCHRUN}, FULL, 0, 5),
        # A small model cannot use a second thread; a person may still ask for one.
        (None, "cpu", {}, 192, 0, 1),
        (3, "cpu", {}, 192, 0, 3),
        (None, "cuda", {}, 192, 0, None),
        (None, "cpu", {"OMP_NUM_THREADS": "4"}, 192, 0, None),
        # Beside others it takes its fair share of the cores, at least one.
        (None, "cpu", {}, FULL, 1, 7),
        (None, "cpu", {}, FULL, 8, 4),
        (None, "cpu", {"LOCAL_WORLD_SIZE": "2", **TORCHRUN}, FULL, 4, 2),
        (None, "cpu", {}, FULL, 400, 1),
        (6, "cpu", {}, FULL, 400, 6),
    ],
)
def test_threads_of_a_rank(
    wanted: int | None,
    device: str | None,
    environ: dict[str, str],
    width: int | None,
    busy: int,
    expected: int | None,
) -> None:
    assert choose_threads(wanted, device, environ, 8, width, busy) == expected


def checkpoint(folder: Path, config: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)
    return folder


def test_the_width_is_read_from_the_checkpoint_and_nothing_odd_ends_the_run(tmp_path: Path) -> None:
    assert transformer_width(None) == 0
    good = checkpoint(tmp_path / "good", json.dumps({"hidden_size": FULL}))
    assert transformer_width(good) == FULL
    for odd in ("{", "[1]", "{}", '{"hidden_size": "abc"}', "[" * 100_000, '{"hidden_size": null}'):
        assert transformer_width(checkpoint(tmp_path / "odd", odd)) is None
    assert transformer_width(tmp_path / "absent") is None


def test_what_is_chosen_reaches_the_environment() -> None:
    environ: dict[str, str] = {}
    assert apply_cpu_threads(None, "cpu", environ, None) == 1
    assert environ["OMP_NUM_THREADS"] == "1"
    assert apply_cpu_threads(7, "cpu", environ, None) == 7
    assert environ["OMP_NUM_THREADS"] == "7"


def test_cores_respect_quotas_of_both_kinds_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    root = tmp_path / "root"
    root.mkdir()
    free = available_cores(root, own)
    (root / "cpu.max").write_text("max 100000\n")
    assert available_cores(root, own) == free
    (root / "cpu.max").write_text("50000 100000\n")
    assert available_cores(root, own) == 1
    (root / "cpu.max").unlink()
    # The quota of a group above the process's own.
    own.write_text("0::/pod/worker\n")
    (root / "pod" / "worker").mkdir(parents=True)
    (root / "pod" / "cpu.max").write_text("100000 100000\n")
    assert available_cores(root, own) == 1
    (root / "pod" / "cpu.max").unlink()
    # The first version: a tree of its own for the controller, two files, -1 for no quota.
    own.write_text("4:cpuacct,cpu:/pod\n1:name=systemd:/\n")
    (root / "cpu" / "pod").mkdir(parents=True)
    (root / "cpu" / "pod" / "cpu.cfs_period_us").write_text("100000\n")
    (root / "cpu" / "pod" / "cpu.cfs_quota_us").write_text("-1\n")
    assert available_cores(root, own) == free
    (root / "cpu" / "pod" / "cpu.cfs_quota_us").write_text("60000\n")
    assert available_cores(root, own) == 1
    own.write_text("nonsense\n\n:::\n")
    assert available_cores(root, own) == free


def test_other_programs_are_counted_without_our_own_ranks(tmp_path: Path) -> None:
    load = tmp_path / "loadavg"
    load.write_text("0.20 0.18 0.12 7/80 11206\n")
    assert busy_elsewhere(2, load) == 5
    assert busy_elsewhere(9, load) == 0
    load.write_text("nothing\n")
    assert busy_elsewhere(1, load) == 0
    assert busy_elsewhere(1, tmp_path / "absent") == 0


def test_waiting_threads_sleep_unless_a_person_said_otherwise() -> None:
    for said in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"):
        environ = {said: "x"}
        let_waiting_threads_sleep(environ)
        assert environ == {said: "x"}
    environ = {}
    let_waiting_threads_sleep(environ)
    # libgomp's own count without the second is 0 under PASSIVE.
    assert environ == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}


SPINS = """
import sys, types
class Torch(types.ModuleType):
    pass
import importlib.abc, importlib.machinery, os
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    "enter",
    [
        "from opensora_sp.engine.pipeline import Pipeline",
        "import scripts.train_embedded.flow",
        "import scripts.train_embedded.vae",
        "import runpy, sys; sys.argv = ['x', '--prompt', 'a', '--save-dir', {out!r}]; "
        "runpy.run_path('launch/infer.py', run_name='__main__')",
        "import runpy, sys; sys.argv = ['x']; "
        "runpy.run_path('launch/verify.py', run_name='__main__')",
    ],
)
def test_it_is_decided_before_torch_is_loaded(enter: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    left_out = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONPATH")
    environ = {k: v for k, v in os.environ.items() if k not in left_out}
    for said, expected in ((None, ["5000", "PASSIVE"]), ("ACTIVE", ["None", "ACTIVE"])):
        done = subprocess.run(
            [sys.executable, "-c", SPINS + enter.format(out=str(tmp_path))],
            cwd=root,
            env=environ | {"PYTHONPATH": str(root)} | ({"OMP_WAIT_POLICY": said} if said else {}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split()[-2:] == expected, done.stderr
