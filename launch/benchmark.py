"""Measure what infer does, from a checkout that need not be installed.

`python launch/benchmark.py ...` or `torchrun --nproc_per_node N launch/benchmark.py ...`
"""

import sys
from pathlib import Path

# In the place of this folder, whose file names must not be importable as modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from opensora_sp.cli.benchmark import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
