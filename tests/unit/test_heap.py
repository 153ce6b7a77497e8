"""Memory that a CPU computation frees is used again by it, and given back afterwards."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opensora_sp.base import heap
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.working_memory import decoding_bytes, step_bytes
from opensora_sp.parallel.mesh import legal_meshes
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape, decoding_peak, denoising_peak
from opensora_sp.request.memory_modes import MEMORY_MODES
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime

CPU = torch.device("cpu")
USES = 6
# Prints whether memory is kept; the page faults of using 64 MB six times within the block; the MB
# that the process has afterwards of 640 that it freed in it; and the faults of the same uses then.
# What is used is a page larger: where it does not begin with a page, its first and last one are its
# neighbours' too, and 64 MB of whole pages are its own.
FAULTS = f"""
import resource
import torch
from opensora_sp.base.heap import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({USES}):
        torch.ones(16 * 2**20 + 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

before = resident()
with freed_memory_kept(torch.device("cpu"), NEEDED) as kept:
    held = [torch.ones(16 * 2**20) for _ in range(10)]
    del held
    inside = faults()
print(kept, inside, round(resident() - before), faults())
"""
PAGES = 64 * 2**20 // 4096
glibc = pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")


def found(needed: float = 1e9, **environ: str) -> tuple[bool, int, int, int]:
    """What FAULTS prints."""
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS.replace("NEEDED", str(needed))],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, *numbers = ran.stdout.split()
    inside, left, after = map(int, numbers)
    return kept == "True", inside, left, after


@glibc
def test_freed_memory_is_used_again_without_page_faults_and_given_back() -> None:
    kept, inside, left, after = found()
    assert kept
    assert inside < PAGES * USES // 2  # aligned blocks do not always fit where one was
    assert left < 100  # of 640
    assert after >= PAGES  # it has to come from the system again


@glibc
@pytest.mark.parametrize(
    ("needed", "environ"),
    [
        (1e18, {}),
        (1e9, {"MALLOC_MMAP_MAX_": "65536"}),
        (1e9, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}),
    ],
)
def test_memory_is_not_kept_without_room_or_where_the_user_decided(
    needed: float, environ: dict[str, str]
) -> None:
    kept, inside, *_ = found(needed, **environ)
    assert not kept
    assert inside >= PAGES * USES


def test_it_is_for_cpus_alone_and_ends_with_the_last_of_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, int] | str] = []
    library = SimpleNamespace(
        mallopt=lambda parameter, value: calls.append((parameter, value)),
        malloc_trim=lambda pad: calls.append("trim"),
    )
    monkeypatch.setattr(heap, "_glibc", lambda: library)
    monkeypatch.setattr(heap, "_user_decided", lambda environ: False)
    with heap.freed_memory_kept(torch.device("meta"), 1) as kept:
        assert not kept
    assert calls == []
    with heap.freed_memory_kept(CPU, 1) as outer:
        with heap.freed_memory_kept(CPU, 1) as inner:
            assert outer
            assert inner
        assert "trim" not in calls
    assert calls[-3:] == [(-3, 32 * 2**20), (-1, 64 * 2**20), "trim"]
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.freed_memory_kept(CPU, 1) as kept:
        assert not kept


def test_denoising_and_decoding_keep_what_they_free(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    pipeline = Pipeline.load(dtype="fp32")

    def keep_freed(on: bool) -> bool:
        open_now = [name for name, since in began.items() if since]
        stages.append(f"{open_now[-1]} {on}")
        return True

    began: dict[str, bool] = {}

    @contextmanager
    def around(name: str) -> Iterator[None]:
        began[name] = True
        yield
        began[name] = False

    pipeline.models.clock._around = around
    monkeypatch.setattr(heap, "keep_freed", keep_freed)
    monkeypatch.setattr(heap, "_user_decided", lambda environ: False)
    request = Request(prompt="a red ball", height=32, width=48, num_frames=17, steps=1)
    pipeline.generate(request)  # several groups of frames, which use the same memory
    assert stages[:2] == ["denoise True", "denoise False"]
    assert stages[2:] == ["decode True", "decode False"]


SIZES = [(144, 256, 51), (240, 424, 102), (720, 1280, 408), (1024, 1024, 1)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_the_bounds_are_above_what_the_planner_counts(
    size: tuple[int, int, int], dtype: str
) -> None:
    models = ModelSizes()
    height, width, frames = size
    request = Request(prompt="x", height=height, width=width, num_frames=frames)
    shape = Shape(height=height, width=width, num_frames=frames, dtype=dtype)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for mesh, mode in itertools.product(
        [mesh for ranks in (1, 2, 8) for mesh in legal_meshes(ranks, guided=True)],
        MEMORY_MODES.values(),
    ):
        runtime = Runtime.of(mode)
        set_of: Any = SimpleNamespace(
            dtype=kind,
            config=SimpleNamespace(hidden_size=models.channels),
            mesh=lambda _, mesh=mesh: mesh,
        )
        steps = step_bytes(set_of, request, 1)
        kept = 2 * models.depth * models.tokens * 2 * models.channels * kind.itemsize * 2
        assert (
            steps
            > denoising_peak(shape, mesh, runtime, models)
            - kept
            - (3 * models.pair_weights + 2 * models.folded_weights) * kind.itemsize
        )
    vae: Any = SimpleNamespace(
        config=SimpleNamespace(micro_batch_size=4),
        spatial_vae=SimpleNamespace(pixel_width=models.vae_widths[1]),
        dtype=kind,
    )
    assert decoding_bytes(request, vae) > decoding_peak(shape, Runtime(), models)
