"""How OpenMP threads wait: they look for work for about 0.1 ms, and then they sleep.

It has to be set before torch is loaded, because OpenMP reads the variables once.
"""

import os
from collections.abc import MutableMapping

# libgomp, which torch's own builds use, looks so many times for work before it sleeps. The passes
# between the products of a step follow one another within that time, and waking a thread takes
# longer than some of them: docs/speed.md. It does not look where it has more threads than cores.
_CHOICE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}
# Variables that control how long a waiting thread spins. Where one is set, the user has decided.
_WAIT_CHOICES = (*_CHOICE, "KMP_BLOCKTIME", "KMP_LIBRARY")


def let_waiting_threads_sleep(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make OpenMP threads that wait for long sleep, unless the user has chosen how they wait.

    By default they spin sixty times as long. Where cores are shared, with other programs or by a
    container's quota, a spinning thread can block the thread that it waits for.
    """
    if not any(name in environ for name in _WAIT_CHOICES):
        environ.update(_CHOICE)
