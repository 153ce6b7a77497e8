"""Which step kernels compute a video: a rule of the request alone. Imports no torch.

Plain ones multiply a step's modulation into the activations. Folded ones multiply it into the
weights, which costs the same for every size and saves more the larger the video is. Both are
exact; they round differently, so a video's kernels are part of its identity.
"""

from __future__ import annotations

from typing import Literal

from opensora_sp.request.engine_settings import StepKernels
from opensora_sp.request.request import Request

Chosen = Literal["plain", "folded"]

# Tokens of a step, of both guidance branches; measured at the published width:
# docs/decisions/0011-folded-step.md.
FOLD_FROM = 4096


def chosen_kernels(setting: StepKernels, *, frames: int, patches: int, guided: bool) -> Chosen:
    """The kernels for T latent frames of S patches, of the whole video on whatever many ranks.

    Ranks and batches do not count, so that a video is computed alike on all of them.
    """
    if setting != "auto":
        return setting
    return "folded" if frames * patches * (2 if guided else 1) >= FOLD_FROM else "plain"


def kernels_of(request: Request, setting: StepKernels) -> Chosen:
    """The kernels for a request's clips, which all have one shape."""
    rows, columns = request.patch_grid
    return chosen_kernels(
        setting,
        frames=request.latent_shape[0],
        patches=rows * columns,
        guided=request.cfg_scale != 1,
    )
