"""Open-Sora 1.2 on more than one accelerator. See README.md for the file map."""

from opensora_sp.base.waiting import let_waiting_threads_sleep

__version__ = "0.1.0"

# Here, because every way into the program passes here before it imports torch.
let_waiting_threads_sleep()
