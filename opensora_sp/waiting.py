"""Threads that wait give their core away. Imports no torch, and has to run before torch is loaded.

OpenMP threads otherwise spin while they wait for each other. Where a core is missing, because of
other work or of a container's quota, they spin for peers that cannot run.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Whoever sets one of these has decided how threads wait.
_DECIDED = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY", "GOMP_SPINCOUNT")


def let_waiting_threads_sleep(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set OMP_WAIT_POLICY to PASSIVE, unless the environment says how threads wait."""
    if not any(name in environ for name in _DECIDED):
        environ["OMP_WAIT_POLICY"] = "PASSIVE"
