"""Measure generation under the name of the vendor's script: `opensora-sp benchmark` is the same.

`python scripts/benchmark_open_sora.py ...`, also with torchrun in the place of python
"""

import sys
from pathlib import Path

# In the place of this folder, whose file names must not be importable as modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from opensora_sp.cli.benchmark import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
