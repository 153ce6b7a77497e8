"""How OpenMP's threads wait. Decided before torch is loaded, which reads the variable once."""

import os
from collections.abc import MutableMapping

WAIT_VARIABLE = "OMP_WAIT_POLICY"
# Any of these says how long a thread spins while it waits: then a person has decided it.
_WAIT_CHOICES = (WAIT_VARIABLE, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def let_waiting_threads_sleep(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP threads give their core away while they wait, unless a person said otherwise.

    By default they spin. Where a core is shared, with other programs or by a container's quota,
    a spinning thread keeps the very thread that it waits for from running.
    """
    if not any(name in environ for name in _WAIT_CHOICES):
        environ[WAIT_VARIABLE] = "PASSIVE"
