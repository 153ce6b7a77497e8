"""Measure one pair of blocks at the published width, plain and folded, eager and compiled.

    python scripts/measure_compile.py [--size 144 256] [--frames 51] [--dtype fp32 bf16] [--turns 5]

Both CFG branches on one CPU thread. The four take turns; a figure is the least processor time of
the turns, so that other work on the machine counts little. Prints rows for docs/speed.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from opensora_sp.base.geometry import latent_shape, patch_grid
from opensora_sp.engine.blocks import Local, Stream, run_blocks
from opensora_sp.models.compiler import Compiler, directly
from opensora_sp.models.folded_step import FoldedStep
from opensora_sp.models.kernels.cpu_half import arithmetic
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config
from opensora_sp.models.step_kernels import PlainStep

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TEXT = 100  # tokens


def main() -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(144, 256))
    parser.add_argument("--frames", type=int, default=51)
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=list(_DTYPES))
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    print("| dtype | kernels | eager s | compiled s | compile s | graphs | differs by |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that everything is compiled
        for name in arguments.dtype:
            for row in rows(name, tuple(arguments.size), arguments.frames, arguments.turns):
                print("| " + " | ".join(row) + " |", flush=True)
    return 0


def rows(name: str, size: tuple[int, int], frames: int, turns: int) -> list[list[str]]:
    """The rows of one dtype: plain, folded."""
    dtype = _DTYPES[name]
    model = _model(dtype)
    compilers = {"plain": Compiler(torch.device("cpu")), "folded": Compiler(torch.device("cpu"))}
    steps: dict[str, type[PlainStep] | type[FoldedStep]]
    steps = {"plain": PlainStep, "folded": FoldedStep}
    with arithmetic(torch.device("cpu"), dtype):
        pair = _pair(model, size, frames)
        spent: dict[tuple[str, str], float] = {}
        results: dict[tuple[str, str], Tensor] = {}
        for turn in range(turns + 1):
            for kind, step in steps.items():
                for way, run in (("eager", directly), ("compiled", compilers[kind])):
                    started = time.process_time()
                    results[kind, way] = pair(step(None, run))
                    seconds = time.process_time() - started
                    if turn:  # the first compiles
                        spent[kind, way] = min(seconds, spent.get((kind, way), seconds))
    made = []
    for kind, compiler in compilers.items():
        if compiler.trouble is not None:
            raise SystemExit(compiler.trouble)
        eager, compiled = (results[kind, way].float() for way in ("eager", "compiled"))
        made.append(
            [
                *(name, kind, f"{spent[kind, 'eager']:.2f}", f"{spent[kind, 'compiled']:.2f}"),
                *(f"{compiler.seconds:.0f}", str(compiler.graphs)),
                f"{float((eager - compiled).norm() / eager.norm()):.1e}",
            ]
        )
    return made


def _pair(
    model: STDiT3, size: tuple[int, int], frames: int
) -> Callable[[PlainStep | FoldedStep], Tensor]:
    time_frames, *cells = latent_shape(frames, *size)
    grid = patch_grid(*cells)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype)

    x = drawn(1, time_frames, grid[0] * grid[1], model.config.hidden_size)
    tables = model.tables(torch.tensor([500.0]), torch.tensor([24.0])).grouped([[True]])
    texts = [model.text_kv([drawn(_TEXT, model.config.caption_channels)]) for _ in range(2)]

    def compute(kernels: PlainStep | FoldedStep) -> Tensor:
        streams = [Stream(x.clone(), tables, text) for text in texts]
        return torch.cat(run_blocks(model, streams, Local(), kernels=kernels))

    return compute


def _model(dtype: torch.dtype) -> STDiT3:
    generator = torch.Generator().manual_seed(0)
    model = STDiT3(STDiT3Config(depth=1, caption_channels=64))
    for name, weight in model.state_dict().items():
        if name == "rope.freqs":
            continue
        noise = torch.randn(weight.shape, generator=generator)
        scale = 0.1 if weight.ndim == 1 or "table" in name else weight[0].numel() ** -0.5
        weight.copy_(1 + 0.1 * noise if "norm" in name else scale * noise)
    frequencies = model.rope.freqs
    model.to(dtype)
    model.rope.freqs = frequencies
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    sys.exit(main())
