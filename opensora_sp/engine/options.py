"""What every call of one pipeline shares, and the function of the caller that sees each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opensora_sp.media.fetch import Remote
from opensora_sp.request.request import CheckFinite

if TYPE_CHECKING:
    from torch import Tensor

# on_step_end(step, t, latents) → True to end the generation. See `Pipeline.generate`.
StepEnd = Callable[[int, float, "Tensor | None"], "bool | None"]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How every call of one pipeline generates. None of it changes the content.

    check_finite: where to look for NaN and infinity. allow_remote: which addresses references may
    be fetched from. show_progress: say on rank 0 what is being done.
    """

    check_finite: CheckFinite = "steps"
    allow_remote: Remote = False
    show_progress: bool = False
