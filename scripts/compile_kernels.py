"""Compiles the Triton kernels for NVIDIA GPUs, without one, and prints what they use as a table.

    python scripts/compile_kernels.py [--arch 80 90] [--dtype bf16 fp32]

It needs the package triton, which brings ptxas and cuobjdump. The exit code is 1
where a kernel spills registers to memory. The widths are those of STDiT3-XL/2.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD, CHANNELS = 72, 1152


@dataclass(frozen=True)
class Variant:
    """A kernel with the constants of one use of it."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int


@dataclass(frozen=True)
class Usage:
    """What one program of a compiled kernel takes: registers a thread, and bytes."""

    registers: int
    spilled: int
    shared: int


def variants() -> Iterator[Variant]:
    """Every kernel as the models call it."""
    from opensora_sp.models.kernels import triton_norms as norms

    for name, turned in (("q/k norm", False), ("q/k norm, rotary", True)):
        constants = {"width": HEAD, "block": 128, "per_program": norms.ROWS, "turned": turned}
        yield Variant(name, norms.norm_rotary_kernel, constants, norms.HEAD_WARPS)
    for name, added, bias, modulated in (
        ("LayerNorm", False, False, False),
        ("LayerNorm, modulated", False, False, True),
        ("bias, LayerNorm", False, True, False),
        ("residual, LayerNorm, modulated", True, False, True),
    ):
        flags = {"has_added": added, "has_bias": bias, "modulated": modulated}
        constants = {"width": CHANNELS, "block": 2048, **flags}
        yield Variant(name, norms.residual_norm_kernel, constants, norms.WARPS)


def compiled(variant: Variant, dtype: str, arch: int) -> Any:
    """The kernel for a GPU of this compute capability, by Triton and its ptxas."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
    pointers = ("q", "k", "q_weight", "k_weight", "x", "out", "added", "bias", "shift", "scale")
    kinds |= dict.fromkeys(pointers, f"*{dtype}")
    signature = {
        name: "constexpr" if name in variant.constants else kinds.get(name, "i32")
        for name in variant.kernel.arg_names
    }
    # As Triton finds them when the models call: tensors and strides are multiples of 16.
    aligned = [
        place
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("stride")
    ]
    source = ASTSource(
        variant.kernel,
        signature,
        constexprs=variant.constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": variant.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def usage(cubin: bytes) -> Usage:
    """Registers, spilled bytes and shared memory, as cuobjdump reads them in the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)
    found = {name: int(number) for name, number in fields}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"])


def main() -> int:
    """Compile everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = ("bf16", "fp16", "fp32")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], metavar="NUMBER")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=kinds)
    arguments = parser.parse_args()
    try:
        import triton
    except ImportError:
        print("error: the package triton is not installed: pip install triton", file=sys.stderr)
        return 2
    print(
        f"Triton {triton.__version__}. A cell: registers a thread / bytes spilled / bytes of shared"
    )
    print("memory, of which the system takes 1024 on sm_90.\n")
    targets = list(itertools.product(arguments.arch, arguments.dtype))
    titles = [f"sm_{arch} {dtype}" for arch, dtype in targets]
    print("| kernel | warps | " + " | ".join(titles) + " |")
    print("|---|---|" + "---|" * len(titles))
    spills = 0
    for variant in variants():
        cells = []
        for arch, dtype in targets:
            found = usage(compiled(variant, dtype, arch).asm["cubin"])
            spills += found.spilled
            cells.append(f"{found.registers} / {found.spilled} / {found.shared}")
        print(f"| {variant.name} | {variant.warps} | " + " | ".join(cells) + " |", flush=True)
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
