"""A pair of blocks at the published width, and the ways to compute it that are measured in turns.

All of a pair compute both CFG branches of one video on the same random weights, tokens and text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracle_stdit3  # noqa: E402

from opensora_sp.base.geometry import latent_shape  # noqa: E402
from opensora_sp.benchmark.count.forward import ForwardSize  # noqa: E402
from opensora_sp.engine.blocks import Local, Stream, run_blocks  # noqa: E402
from opensora_sp.models import folded_step  # noqa: E402
from opensora_sp.models.folded_step import FoldedStep  # noqa: E402
from opensora_sp.models.kernels.cpu_half import computes_natively  # noqa: E402
from opensora_sp.models.kernels.folded import has_gelu_product, linear_gelu  # noqa: E402
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config  # noqa: E402
from opensora_sp.models.step_kernels import PlainStep, StepKernels  # noqa: E402
from opensora_sp.parallel.layout import Layout  # noqa: E402
from opensora_sp.request.runtime import Runtime  # noqa: E402
from opensora_sp.request.sizes import resolve_frames, resolve_size  # noqa: E402
from scripts.gpu_day.weights import random_transformer  # noqa: E402

PLAIN, FOLDED, FLOOR = "plain", "folded", "its products and attention alone"
ORACLE = "Open-Sora 1.2's operations"
REST = "folded, all but its products and attention"
TIME, RATE = 500.0, 24.0
# A step has 28 pairs, so what is shared by the branches in the first of them is left out.
RUNTIME = Runtime(share_first=False)

Compute = Callable[[], Tensor]


def size_of(name: str) -> tuple[int, int, int]:
    """(frames, height, width) of a size such as "144p 2s", 9:16. Raises ValueError or UserError."""
    resolution, duration = name.split()
    return resolve_frames(duration), *resolve_size(resolution, "9:16")


def forward_size(name: str, config: STDiT3Config) -> ForwardSize:
    """A guided forward of a size such as "144p 2s", in bf16, to be counted."""
    video_frames, height, width = size_of(name)
    frames, *cells = latent_shape(video_frames, height, width)
    return ForwardSize(
        frames=frames,
        size=(cells[0], cells[1]),
        pixels=(height, width),
        config=config,
        text=config.model_max_length,
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair's weights and inputs. x [1,T,S,C] of either branch; two texts [L,C]."""

    name: str
    model: STDiT3
    x: Tensor
    texts: tuple[Tensor, Tensor]
    pixels: tuple[int, int]

    @classmethod
    def of(cls, size: str, dtype: torch.dtype, config: STDiT3Config) -> Pair:
        """A pair for a size such as "144p 2s", 9:16."""
        video_frames, *pixels = size_of(size)
        frames, *cells = latent_shape(video_frames, *pixels)
        patches = Layout(frames=frames, size=(cells[0], cells[1]), ranks=1).patch_count
        width, length = config.hidden_size, config.model_max_length
        draw = torch.Generator().manual_seed(0)
        torch.manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(dtype)

        return cls(
            name=size,
            model=random_transformer(config, torch.device("cpu"), dtype),
            x=drawn(1, frames, patches, width),
            texts=(drawn(length, width), drawn(length, width)),
            pixels=(pixels[0], pixels[1]),
        )

    @property
    def tokens(self) -> int:
        """Of one branch."""
        return self.x.shape[1] * self.x.shape[2]


def through_blocks(pair: Pair, kernels: Callable[[], StepKernels]) -> Compute:
    """The program's own loop over the pair: the outputs of both branches [2,T,S,C]."""
    model = pair.model
    fps = torch.full((1,), RATE)
    tables = model.tables(torch.full((1,), TIME), fps).grouped([[True]])
    blocks = [block for each in model.pairs for block in each]
    # Keys and values of the text are computed once a video.
    text = [[[block.cross_attn.key_value(each)] for block in blocks] for each in pair.texts]

    def compute() -> Tensor:
        streams = [Stream(pair.x.clone(), tables, branch) for branch in text]
        return torch.cat(run_blocks(model, streams, Local(), RUNTIME, kernels=kernels()))

    return compute


def oracle(pair: Pair) -> Compute:
    """The same in the order of operations of Open-Sora 1.2, both branches as one batch."""
    computed = oracle_stdit3.Oracle(pair.model.config, pair.model.state_dict())
    both = torch.cat([pair.x, pair.x])
    shape = (both.shape[0], both.shape[1], both.shape[2])
    now = computed.times(torch.full((2,), TIME), torch.full((2,), RATE))
    text = torch.cat(pair.texts)[None]
    lengths = [len(each) for each in pair.texts]

    def compute() -> Tensor:
        x = both.flatten(1, 2)
        for i in range(pair.model.config.depth):
            for kind in ("spatial", "temporal"):
                name = f"{kind}_blocks.{i}"
                x = computed.block(name, x, shape, now, None, None, text, lengths)
        return x.view(both.shape)

    return compute


def floor(pair: Pair) -> Compute:
    """The matrix products and attentions of both branches, their operands dense and at hand.

    Products write into memory that is there already. On a CPU without instructions for the number
    format they are computed in float32, as the program does.
    """
    config = pair.model.config
    _, frames, patches, channels = pair.x.shape
    tokens, heads, width = frames * patches, config.num_heads, channels // config.num_heads
    dtype = pair.x.dtype if computes_natively(pair.x.dtype) else torch.float32

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    hidden = pair.model.pairs[0][0].mlp.fc1.out_features
    products = [
        (
            drawn(out),
            drawn(tokens, inner),
            drawn(out, inner).t(),
            torch.empty(tokens, out).to(dtype),
        )
        for inner, out in (
            (channels, 3 * channels),  # qkv
            (channels, channels),  # its projection
            (channels, channels),  # the query to the text
            (channels, channels),  # its projection
            (channels, hidden),
            (hidden, channels),
        )
    ]

    def attention(sequences: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = [(sequences, heads, length, width) for length in (queries, keys, keys)]
        q, k, v = (drawn(*shape) for shape in shapes)
        return q, k, v

    spatial = attention(frames, patches, patches)
    temporal = attention(patches, frames, frames)
    text = attention(1, tokens, config.model_max_length)

    def compute() -> Tensor:
        for _ in range(2 * config.depth):  # branches and pairs
            for own in (spatial, temporal):
                for q, k, v in (own, text):
                    F.scaled_dot_product_attention(q, k, v)
                for bias, x, weight, out in products:
                    torch.addmm(bias, x, weight, out=out)
        return pair.x

    return compute


class _Replaced(TorchFunctionMode):
    """Products and attention cost nothing: their results are memory that is there already."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[tuple[Any, ...], Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, or give what lies there."""
        if func is F.linear:
            return self._given(*args[0].shape[:-1], len(args[1]), like=args[0])
        if func is F.scaled_dot_product_attention:
            batch, heads, length, width = args[0].shape  # it lies as flash attention leaves it
            return self._given(batch, length, heads, width, like=args[0]).transpose(1, 2)
        if func is Tensor.addmm_:
            return args[0]
        return func(*args, **(kwargs or {}))

    def _given(self, *shape: int, like: Tensor) -> Tensor:
        key = (shape, like.dtype)
        if key not in self._there:
            # A GELU over and over hardly changes these. Smaller ones become denormal, and slow.
            self._there[key] = torch.rand(shape).add_(3).to(like.dtype)
        return self._there[key]


def rest(pair: Pair) -> Compute:
    """The folded step without its products and attention; what it returns means nothing."""
    folded, replaced = through_blocks(pair, FoldedStep), _Replaced()

    def without_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The GELU by itself; nothing where it is the end of the product."""
        return (F.linear if has_gelu_product(x) else linear_gelu)(x, weight, bias)

    def compute() -> Tensor:
        with replaced, patch.object(folded_step, "linear_gelu", without_product):
            return folded()

    return compute


# The whole ways to compute a pair, and the two parts of the folded one.
WAYS: dict[str, Callable[[Pair], Compute]] = {
    FOLDED: lambda pair: through_blocks(pair, FoldedStep),
    PLAIN: lambda pair: through_blocks(pair, PlainStep),
    ORACLE: oracle,
    FLOOR: floor,
    REST: rest,
}
