#!/usr/bin/env python3
"""Fetch or check the published checkpoints, from a checkout: `opensora-sp download` is the same.

`python scripts/download_weights.py DIR` or `python scripts/download_weights.py --check DIR...`
"""

import sys
from pathlib import Path

# In the place of this folder, whose file names must not be importable as modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from opensora_sp.cli.download import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
