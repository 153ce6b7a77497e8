"""What loading needs of the host beside what it keeps: the files are mapped, not read whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

WEIGHTS, SIDE = 80, 1024  # 2 MiB each in bfloat16, 160 MiB in all

LOAD = """
import sys
from pathlib import Path
import torch
from opensora_sp.models.checkpoint import WeightFiles, load_module

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

with torch.device("meta"):
    module = torch.nn.ModuleList(
        torch.nn.Linear(int(sys.argv[3]), int(sys.argv[3]), bias=False)
        for _ in range(int(sys.argv[2]))
    )
files = WeightFiles.open(Path(sys.argv[1]), "model")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
before = status("VmRSS")
load_module(module, files, dtype=torch.bfloat16, device="cpu")
kept = sum(w.numel() * w.element_size() for w in module.parameters())
print((status("VmHWM") - before) / kept)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_peak_while_loading_is_little_more_than_what_is_kept(tmp_path: Path, form: str) -> None:
    names = [f"{i}.weight" for i in range(WEIGHTS)]
    tensors = {name: torch.ones(SIDE, SIDE, dtype=torch.bfloat16) for name in names}
    if form == "bin":
        torch.save(tensors, tmp_path / "model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), str(WEIGHTS), str(SIDE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 <= float(done.stdout) <= 1.3
