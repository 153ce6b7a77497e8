"""What a job costs the ranks: peak memory of each, and bytes by collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opensora_sp.benchmark.memory_meter import MemoryMeter, peak_host_bytes

if TYPE_CHECKING:
    from opensora_sp.parallel.session import Session


class Costs:
    """Measured from here on, on one rank. whole: the session of all ranks."""

    def __init__(self, whole: Session) -> None:
        self._whole, self._before = whole, whole.ledger.snapshot()
        self._meter = MemoryMeter(whole.device)
        self._meter.reset()

    def of_all_ranks(self) -> tuple[Sequence[int | None], dict[str, int]]:
        """Peak bytes of every rank, and bytes sent by collective over all ranks. Collective.

        A peak is of the rank's device, or of its process where the device counts none.
        """
        sent = {kind: e.bytes_sent for kind, e in self._whole.ledger.since(self._before).items()}
        peak = self._meter.peak_device_bytes()
        mine = (peak_host_bytes() if peak is None else peak, sent)
        every = self._whole.control.all_gather_object(mine)
        total: Counter[str] = Counter()
        for _, one in every:
            total.update(one)
        return [one for one, _ in every], {kind: total[kind] for kind in sorted(total)}
