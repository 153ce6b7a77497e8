"""How OpenMP threads wait: they sleep instead of spinning.

It has to be set before torch is loaded, because OpenMP reads the variable once.
"""

import os
from collections.abc import MutableMapping

WAIT_VARIABLE = "OMP_WAIT_POLICY"
# Variables that control how long a waiting thread spins. Where one is set, the user has decided.
_WAIT_CHOICES = (WAIT_VARIABLE, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def let_waiting_threads_sleep(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make waiting OpenMP threads sleep, unless the user has chosen how they wait.

    By default they spin. Where cores are shared, with other programs or by a container's quota, a
    spinning thread can block the thread that it waits for.
    """
    if not any(name in environ for name in _WAIT_CHOICES):
        environ[WAIT_VARIABLE] = "PASSIVE"
