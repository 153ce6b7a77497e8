"""Plan a request, from a checkout that need not be installed.

`python launch/plan.py --device-memory 48GB --resolution 720p --num-frames 16s --ranks 2`
"""

import sys
from pathlib import Path

# In the place of this folder, whose file names must not be importable as modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from opensora_sp.cli.plan import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
