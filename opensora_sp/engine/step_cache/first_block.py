"""First-block cache: compute the blocks when the first pair's residual has changed enough."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache:
    """Reuse the residual while the first pair of blocks says that little has changed.

    The policy is known as first-block cache; TeaCache uses a like signal, taken before the blocks.

    threshold: the relative change since the last computed step from which on the blocks are
        computed again. 0 computes every step. The larger it is, the more steps are reused and the
        further the video is from the exact one. Raises UserError for what is not such a number.
    """

    threshold: float

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not math.isfinite(self.threshold) or self.threshold < 0:
            raise UserError(
                f"threshold {shown(self.threshold)} of FirstBlockCache is not a number from 0 on: "
                "0.1 reuses some steps, 0 none"
            )

    @property
    def name(self) -> str:
        """As "first-block 0.1"."""
        return f"first-block {self.threshold:g}"

    def reuse(self, step: int, t: float, change: float) -> bool:
        """Whether the change is below the threshold; a change that is NaN is not."""
        return change < self.threshold
