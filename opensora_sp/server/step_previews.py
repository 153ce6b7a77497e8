"""Previews of a video while it is denoised: a small strip of frames in the job's folder.

Rank 0 writes it, at most every second and at most so often that writing takes 2 % of the time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from opensora_sp.models.latent_colours import LatentColours

FRAMES = 8
LEAST_SECONDS = 1.0
# So many times what the last preview took passes before the next one.
REST = 50.0
log = logging.getLogger(__name__)


class StepPreviews:
    """The previews of the jobs of one batch; the engine's `Previews`.

    files: where each job's strip is written. colours: the map from latents to RGB, on rank 0 alone;
    where it is None nothing is ever due. seen: called after the strips of a step were written.
    """

    def __init__(
        self,
        files: Sequence[Path],
        colours: LatentColours | None,
        seen: Callable[[], None] = lambda: None,
    ) -> None:
        self._files, self._colours, self._seen = files, colours, seen
        self._next = 0.0

    def due(self) -> bool:
        """On rank 0, whether it is time for another one; elsewhere never."""
        return self._colours is not None and time.monotonic() >= self._next

    def show(self, latents: Tensor | None) -> None:
        """Write the strips of an estimate [B,4,T,H,W], which is None on other ranks than rank 0."""
        if self._colours is None or latents is None:
            return
        began = time.monotonic()
        every = max(1, -(-latents.shape[2] // FRAMES))
        try:
            for path, one in zip(self._files, latents[:, :, ::every], strict=True):
                write_strip(path, self._colours(one).numpy())
            self._seen()
        except (UserError, OSError) as error:  # a job is not to fail for its preview
            log.warning("a preview was not written: %s", error)
        ended = time.monotonic()
        self._next = began + max(LEAST_SECONDS, REST * (ended - began))


def write_strip(path: Path, frames: Any) -> None:
    """Write frames, uint8 [n,h,w,3], side by side as one WebP; nothing where the folder is gone."""
    from PIL import Image

    if not path.parent.is_dir():
        return  # deleted meanwhile: nothing is to come back
    count, height, width, _ = frames.shape
    strip = frames.transpose(1, 0, 2, 3).reshape(height, count * width, 3)
    with atomic_output(path) as temporary:
        Image.fromarray(strip).save(temporary, "WEBP", quality=80, method=0)


def fitted_colours(engine: Any, request: Any) -> LatentColours | None:
    """The map from latents to RGB of the engine's VAE, on rank 0; None elsewhere.

    It loads the VAE, which the first job needs anyway. Where that fails, jobs have no previews.
    """
    if not engine.whole.leads:
        return None
    from opensora_sp.models.latent_colours import LatentColours

    models = engine.pipeline.models
    try:
        with models.arithmetic():
            colours = LatentColours.fit(models.vae(request))
        models.to_device(None)  # where models take turns it does not stay on the device for this
        return colours
    except (RuntimeError, UserError) as error:
        log.warning("there are no previews, as no colours could be fitted to the VAE: %s", error)
        return None
