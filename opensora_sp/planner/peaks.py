"""Peak bytes of each stage on one rank: what lives at once where the code holds most.

The formulas follow the code line by line and are held to it by tests that count every tensor
(`tests/unit/test_planner.py`). They count tensors: fused attention, no workspaces of libraries.
"""

from __future__ import annotations

from dataclasses import dataclass

from opensora_sp.base import geometry
from opensora_sp.parallel.layout import Layout, share
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.planner.models import ModelSizes
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.step_kernels import FOLD_FROM, chosen_kernels

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
# Values that a block makes on its way, per token and channel. Half precision needs more: norms of
# queries and keys and the rotary embedding pass through float32.
_ATTEND = {2: 10.03, 4: 6.02}
_ALONG_TIME = {2: 13.0, 4: 10.0}
_NORM = 2
# The same with folded step kernels, which write over what they have read.
_FOLDED_ATTEND, _FOLDED_ALONG_TIME = 4.06, 6.06
# Of the VAEs, per pixel (in units of the last upsampled width) and per latent cell.
_PIXEL_WIDTHS, _PIXEL_MORE = 3, 8
_TEMPORAL_CELL, _TEMPORAL_MORE = 6160, 512
_ENCODED_PIXEL = 670


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a request decides its cost. height, width: pixels given to the model."""

    height: int
    width: int
    num_frames: int
    batch: int = 1
    guided: bool = True
    steps: int = 30
    dtype: str = "bf16"
    micro_batch: int = 4
    micro_frames: int = geometry.MICRO_FRAME_SIZE
    encodes: bool = False  # references, or more than one loop
    left_out: int = 0  # of the steps
    held: int = 0  # velocities that fill the steps left out

    @property
    def latent(self) -> tuple[int, int, int]:
        """(T, H, W) of the latents."""
        return geometry.latent_shape(self.num_frames, self.height, self.width, self.micro_frames)

    @property
    def computed(self) -> int:
        """Steps that are computed."""
        return self.steps - self.left_out

    @property
    def itemsize(self) -> int:
        """Bytes of one value of the run's dtype."""
        return ITEMSIZE[self.dtype]

    @property
    def pixels(self) -> int:
        """Of a decoded frame."""
        _, height, width = self.latent
        return height * width * geometry.SPATIAL_FACTOR**2


def denoising_peak(
    shape: Shape, mesh: Mesh, runtime: Runtime, models: ModelSizes, rank: int = 0
) -> int:
    """Most bytes beside the weights that stay: activations, text keys and values, passing layers.

    X is the residual stream of one CFG branch on this rank, h branches advance together. Rank 0
    of a sequence group needs most: uneven splits give it the longer part.

    A part of `runtime.tokens` tokens counts as full. Real parts are whole frames or positions and
    may be a little shorter, but then a smaller video could seem to need more than a larger one.
    """
    frames, height, width = shape.latent
    layout = Layout(frames=frames, size=(height, width), ranks=mesh.sequence)
    place, item, c = mesh.place(rank), shape.itemsize, models.channels
    branches = 2 if shape.guided and mesh.guidance == 1 else 1
    together = 1 if runtime.serial_guidance else branches
    patches = share(layout.patch_count, mesh.sequence, place.sequence)
    count = shape.batch * frames
    x = count * patches * c * item

    row = c * item
    folded = _is_folded(shape, runtime)
    part = _at_once(count * patches, shape.batch, runtime.tokens) * row
    rest = (1 + (1 if folded else 2) * models.mlp_ratio) * part
    along = _ALONG_TIME[item] * _at_once(patches * count, count, runtime.tokens) * row
    one_part = runtime.tokens is None or count * patches <= runtime.tokens
    norm = float(_NORM * x if one_part else x + (_NORM + 1) * part)
    if folded:  # sample by sample, and the norm of all at once
        rest /= shape.batch
        along = _FOLDED_ALONG_TIME * _at_once(patches * frames, frames, runtime.tokens) * row
        norm = float(x)
    attend_values = _FOLDED_ATTEND if folded else _ATTEND[item]

    if mesh.sequence == 1:
        attend = _attending(count, layout.patch_count, row, runtime.tokens, attend_values)
        most = max(
            2 * together * x + max(attend, rest),
            (2 * together - 1) * x + max(along, norm),
        )
    else:
        parts = _Parts(x, together, rest, along, norm, attend_values)
        most = _with_exchange(layout, shape, mesh, runtime, models, rank, parts)
    if folded and runtime.step_kernels == "auto":
        # Or a video that is just too small to be folded would seem to need more than a larger one.
        most = max(most, _largest_plain(shape, together, row))
    kept = 2 * models.depth * shape.batch * models.tokens * 2 * c * item * branches
    kept += patches * c * item  # positions
    kept += (
        count * patches * (64 + 64 * (branches > together) + 32 * branches)
    )  # latents, velocities
    kept += count * patches * 64 * shape.held  # float32, 16 values a patch
    passing = 3 * models.pair_weights * item if runtime.offload.layers else 0
    if folded:  # a pair of blocks, for each group of frames: kept ones are another
        passing += models.folded_weights * item * (2 if shape.encodes else 1)
    return int(most + kept + passing)


def _is_folded(shape: Shape, runtime: Runtime) -> bool:
    """Whether a step of this shape is computed from folded weights."""
    frames, height, width = shape.latent
    patches = Layout(frames=frames, size=(height, width), ranks=1).patch_count
    chosen = chosen_kernels(
        runtime.step_kernels, frames=frames, patches=patches, guided=shape.guided
    )
    return chosen == "folded"


def _largest_plain(shape: Shape, together: int, row: int) -> float:
    """What the largest video needs on one rank whose kernels are still plain."""
    x = FOLD_FROM // (2 if shape.guided else 1) * shape.batch * row
    item = shape.itemsize
    return x * max(2 * together + _ATTEND[item], 2 * together - 1 + _ALONG_TIME[item])


@dataclass(frozen=True)
class _Parts:
    """Bytes of one CFG branch: X; branches together; the most that each step of a block makes.

    attend_values: values a token and channel that spatial attention makes.
    """

    x: int
    together: int
    rest: float
    along: float
    norm: float
    attend_values: float


def _with_exchange(
    layout: Layout,
    shape: Shape,
    mesh: Mesh,
    runtime: Runtime,
    models: ModelSizes,
    rank: int,
    parts: _Parts,
) -> float:
    """X, what is under way for the other branches, and this branch's exchange at its worst."""
    x, together = parts.x, parts.together
    row = models.channels * shape.itemsize
    count = shape.batch * shape.latent[0]
    chunks = max(1, min(runtime.chunks, shape.latent[0])) if together == 1 else 1
    before = [branch * count for branch in range(together)] if chunks == 1 else [0]
    sequence = mesh.place(rank).sequence
    mine = max(share(count, mesh.sequence, sequence, start) for start in before)
    whole = mine * layout.patch_count * row  # this rank's frames, complete
    chunk_whole = -(-mine // chunks) * layout.patch_count * row
    attend = _attending(
        -(-mine // chunks), layout.patch_count, row, runtime.tokens, parts.attend_values
    )
    waiting = (1 - 1 / chunks) * (x + whole)
    own = max(
        waiting + max(2 * chunk_whole + x / chunks, chunk_whole + attend),
        x + (1 - 1 / chunks) * whole + parts.rest,
        max(parts.along, parts.norm, x + whole),
    )
    return together * x + (together - 1) * (x + whole) + own


def _attending(frames: int, patches: int, row: int, tokens: int | None, values: float) -> float:
    """What spatial attention makes beside its input, of `frames` whole frames."""
    return values * _at_once(frames * patches, patches, tokens) * row


def _at_once(total: int, least: int, tokens: int | None) -> int:
    """Most tokens of `total` that a part can have, which has at least `least`."""
    return total if tokens is None else min(total, max(tokens, least))


def text_peak(models: ModelSizes, item: int, passing: int, int8: bool) -> int:
    """One caption through T5, beside the weights that stay.

    passing: bytes of a layer where layers pass through; int8: a matrix is widened for its product.
    """
    scores = 2 * models.t5_heads * models.tokens**2 * 4
    wide = models.tokens * models.t5_hidden * item // 2
    # The largest matrix is widened when the scores are gone, their bias is not.
    matrix = models.t5_hidden * models.t5_width * item + scores // 2 + 7 * wide
    return max(scores + wide, matrix if int8 else 0) + 2 * passing


def decoding_peak(shape: Shape, runtime: Runtime, models: ModelSizes, ranks: int = 1) -> int:
    """One chunk through both VAEs on the leading rank, beside the weights.

    ranks: how many share it. Then its own frames of a round are here as bytes while it decodes,
    and afterwards those of all ranks beside them.
    """
    frames = min(shape.num_frames, shape.micro_frames)
    group = min(runtime.group(shape.micro_batch), frames)
    cells = shape.latent[1] * shape.latent[2]
    width = models.vae_widths[min(1, len(models.vae_widths) - 1)]
    spatial = group * shape.pixels * (_PIXEL_WIDTHS * width + _PIXEL_MORE) * shape.itemsize
    latents = -(-frames // geometry.TIME_FACTOR)
    temporal = (_TEMPORAL_CELL * latents + _TEMPORAL_MORE) * models.filters // 128
    alone = max(spatial, temporal * cells * shape.itemsize)
    if ranks == 1:
        return alone
    frame = shape.batch * shape.pixels * 3
    a_round = min(ranks * shape.micro_frames, shape.num_frames)
    return frames * frame + max(alone, a_round * frame)


def encoding_peak(shape: Shape, runtime: Runtime, models: ModelSizes) -> int:
    """One chunk of a reference through both VAEs, beside the weights; 0 where none is."""
    if not shape.encodes:
        return 0
    group = min(runtime.group(shape.micro_batch), shape.num_frames)
    values = _ENCODED_PIXEL * models.vae_widths[0] // 128
    return group * shape.pixels * values * shape.itemsize
