"""The plan of a request on N ranks: peaks by stage, cost, and whether it fits, by which mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from opensora_sp.base import geometry
from opensora_sp.media.background import HELD_CHUNKS
from opensora_sp.parallel.decode_plan import decoded_frames, has_several_groups, plan_decode
from opensora_sp.parallel.mesh import Mesh, plan_mesh
from opensora_sp.planner.cost import Workload, step_flops, step_traffic
from opensora_sp.planner.devices import usable
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape, decoding_peak, denoising_peak, encoding_peak, text_peak
from opensora_sp.request import sizes
from opensora_sp.request.engine_settings import StepKernels
from opensora_sp.request.memory_modes import MEMORY_MODES, SMALLEST, MemoryMode
from opensora_sp.request.runtime import Runtime

# Of the decoder, fitted to its convolutions: a frame and a chunk's latent frame, per latent cell;
# the spatial one's attention looks from every cell at every other.
_FRAME_FLOPS, _FRAME_ATTENTION, _LATENT_FLOPS = 605.5e6, 2048, 478.8e6
_PROCESS = 1.5e9  # Python, torch and their libraries on the host
MOST_RANKS = 64
DURATIONS = ("image", "2s", "4s", "8s", "16s")
RESOLUTIONS = ("144p", "240p", "360p", "480p", "720p")
# Where T5 is between two jobs of a warm engine: on the device; in host memory, from which its
# layers are copied to the device as they are used; on the CPU, which computes it; or nowhere, and
# it is loaded again for the next prompt.
TextPlace = Literal["device", "host", "cpu", "reload"]


@dataclass(frozen=True)
class Stage:
    """Bytes on the busiest rank's device: weights that stay through the stage, and the rest."""

    name: str
    weights: int
    peak: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.peak


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of the busiest rank, for one clip of a batch: FLOPs of each stage, and bytes sent."""

    text: float
    denoise: float
    decode: float
    sent: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A shape on a mesh in one memory mode."""

    shape: Shape
    mesh: Mesh
    mode: MemoryMode
    stages: Sequence[Stage]
    host: int
    models: ModelSizes
    options: Options

    @property
    def cost(self) -> Cost:
        """What the busiest rank computes and sends for one batch of videos."""
        return _cost(self.shape, self.mesh, self.mode, self.models, self.options)

    @property
    def flops(self) -> float:
        """FLOPs of the busiest rank for one batch of videos."""
        return self.cost.text + self.cost.denoise + self.cost.decode

    @property
    def sent(self) -> float:
        """Bytes that the busiest rank sends for one batch of videos."""
        return self.cost.sent

    @property
    def peak(self) -> int:
        """Bytes of the stage that needs most."""
        return max(stage.total for stage in self.stages)

    def fits(self, memory: float) -> bool:
        """Whether a device with so many bytes has room for every stage."""
        return self.peak <= usable(memory)

    def seconds(self, flop_rate: float, link_rate: float | None) -> float:
        """Predicted seconds of a video at a device's FLOP/s and a link's bytes per second."""
        return self.flops / flop_rate + (self.sent / link_rate if link_rate else 0.0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person fixed. None leaves it to the plan.

    warm: where T5 is between the jobs of an engine that keeps its models; None is a run of its own,
    in which T5 comes first and is gone before the other models are loaded.
    """

    memory: MemoryMode | None = None
    serial_guidance: bool = False
    vae_decode: str = "auto"
    t5_on_cpu: bool = False
    t5_int8: bool = False
    step_kernels: StepKernels = "auto"
    chunks: int = 2
    guidance: int | None = None
    sequence: int | None = None
    warm: TextPlace | None = None

    def runtime(self, mode: MemoryMode) -> Runtime:
        """The runtime of a mode."""
        return Runtime.of(
            mode,
            serial_guidance=self.serial_guidance,
            chunks=self.chunks,
            step_kernels=self.step_kernels,
        )


def make_plan(
    shape: Shape, ranks: int, mode: MemoryMode, models: ModelSizes, options: Options
) -> Plan:
    """The plan of one mode. Raises UserError where the ranks cannot be grouped as asked."""
    mesh = plan_mesh(
        ranks, guided=shape.guided, guidance=options.guidance, sequence=options.sequence
    )
    return Plan(
        shape=shape,
        mesh=mesh,
        mode=mode,
        stages=_stages(shape, mesh, mode, models, options),
        host=_host(shape, mode, models, options),
        models=models,
        options=options,
    )


def plans(shape: Shape, ranks: int, models: ModelSizes, options: Options) -> list[Plan]:
    """From the fastest mode to the smallest, or the one that was asked for."""
    modes = list(MEMORY_MODES.values()) if options.memory is None else [options.memory]
    return [make_plan(shape, ranks, mode, models, options) for mode in modes]


def best(candidates: Sequence[Plan], memory: float) -> Plan | None:
    """The first that fits."""
    return next((plan for plan in candidates if plan.fits(memory)), None)


def smallest_ranks(
    shape: Shape, models: ModelSizes, options: Options, memory: float
) -> tuple[int, Plan] | None:
    """The fewest ranks on which a mode fits, and its plan."""
    free = replace(options, guidance=None, sequence=None, memory=None)
    for ranks in range(1, MOST_RANKS + 1):
        plan = best(plans(shape, ranks, models, free), memory)
        if plan is not None:
            return ranks, plan
    return None


def nearest_request(
    shape: Shape, ranks: int, models: ModelSizes, options: Options, memory: float
) -> tuple[str, Plan] | None:
    """The published size that costs most of those that cost less than this one and fit."""
    found: list[tuple[float, str, Plan]] = []
    asked = make_plan(shape, ranks, SMALLEST, models, options).flops
    for name, size in published_sizes():
        other = replace(shape, height=size[0], width=size[1], num_frames=size[2])
        plan = best(plans(other, ranks, models, options), memory)
        if plan is not None and plan.flops < asked:
            found.append((plan.flops, name, plan))
    if not found:
        return None
    _, name, plan = max(found, key=lambda entry: entry[0])
    return name, plan


def published_sizes() -> Iterator[tuple[str, tuple[int, int, int]]]:
    """("720p 16s", (height, width, frames)) of every size that is trained, 9:16."""
    for resolution in RESOLUTIONS:
        height, width = sizes.resolve_size(resolution, "9:16")
        for duration in DURATIONS:
            yield f"{resolution} {duration}", (height, width, sizes.resolve_frames(duration))


def _stages(
    shape: Shape, mesh: Mesh, mode: MemoryMode, models: ModelSizes, options: Options
) -> list[Stage]:
    runtime, item, offload = options.runtime(mode), shape.itemsize, mode.offload
    layers = models.depth * models.pair_weights if offload.layers else 0
    transformer = (models.transformer_weights - layers) * item
    # A warm engine's VAE keeps the encoder that a job before had a use for.
    vae = models.vae_weights(encoder=shape.encodes or options.warm is not None) * item
    resident = transformer * offload.transformer_stays + vae * offload.vae_stays
    text = _text_stage(item, offload.layers, models, options)
    kept = _kept_text(text, item, models, options)
    stages = []
    if text is not None:
        # A warm engine has the models of the job before beside T5, and T5 beside them afterwards.
        beside_text = resident if options.warm is not None else 0
        stages.append(Stage("text", text.weights + beside_text, text.peak))
    beside = transformer if offload.transformer_stays else 0
    if shape.encodes:
        encoding = encoding_peak(shape, runtime, models)
        stages.append(Stage("references", vae + beside + kept, encoding))
    # A VAE that stays is there from the second video on.
    denoising = denoising_peak(shape, mesh, runtime, models)
    stages.append(Stage("denoise", transformer + vae * offload.vae_stays + kept, denoising))
    sharing = decoding_ranks(shape, mesh, options)
    decoding = decoding_peak(shape, runtime, models, sharing)
    stages.append(Stage("decode", vae + beside + kept, decoding))
    return stages


def _text_stage(item: int, layers: bool, models: ModelSizes, options: Options) -> Stage | None:
    """T5 at work on the device; None where it is computed on the CPU. layers: they are copied."""
    if options.t5_on_cpu or options.warm == "cpu":
        return None
    passes = layers or options.warm == "host"
    layer = models.t5_layer_bytes(item, int8=options.t5_int8)
    weights = models.t5_other_weights * item + models.t5_layers * layer * (not passes)
    peak = text_peak(models, item, layer if passes else 0, options.t5_int8)
    return Stage("text", weights, peak)


def _kept_text(text: Stage | None, item: int, models: ModelSizes, options: Options) -> int:
    """Bytes of T5 that stay on the device while the other models run."""
    if text is None or options.warm not in ("device", "host"):
        return 0
    return models.t5_other_weights * item if options.warm == "host" else text.weights


def decoding_ranks(shape: Shape, mesh: Mesh, options: Options) -> int:
    """How many ranks decode a video, as `ModelSet.shares_decode` decides it."""
    if options.vae_decode == "rank0":
        return 1
    shares = options.vae_decode == "shared" or has_several_groups(
        shape.num_frames, shape.micro_frames, shape.micro_batch
    )
    return mesh.size if shares else 1


def _host(shape: Shape, mode: MemoryMode, models: ModelSizes, options: Options) -> int:
    """Host memory of the leading rank: weights that wait there, noise, frames, the process."""
    frames, height, width = shape.latent
    weights = 0
    if mode.offload.uses_host_memory:
        weights = models.transformer_weights + models.vae_weights(encoder=shape.encodes)
    text = text_on_host(shape, mode, models, options)
    # T5 has given its memory back before the others are loaded, unless the engine is warm.
    waiting = weights * shape.itemsize
    kept = max(waiting, text) if options.warm is None else waiting + text
    noise = 3 * 4 * 4 * shape.batch * frames * height * width
    chunk = min(shape.micro_frames, shape.num_frames)
    written = HELD_CHUNKS * shape.batch * chunk * shape.pixels * 3
    return int(_PROCESS + kept + noise + written)


def text_on_host(shape: Shape, mode: MemoryMode, models: ModelSizes, options: Options) -> int:
    """Bytes of T5 in host memory, on the leading rank alone."""
    if not (options.t5_on_cpu or mode.offload.layers or options.warm in ("cpu", "host")):
        return 0
    layer = models.t5_layer_bytes(shape.itemsize, int8=options.t5_int8)
    return models.t5_other_weights * shape.itemsize + models.t5_layers * layer


@lru_cache(maxsize=256)
def _cost(shape: Shape, mesh: Mesh, mode: MemoryMode, models: ModelSizes, options: Options) -> Cost:
    runtime = options.runtime(mode)
    frames, height, width = shape.latent
    work = Workload(
        frames=frames,
        size=(height, width),
        channels=models.channels,
        depth=models.depth,
        text=models.tokens,
        batch=shape.batch,
        guided=shape.guided,
        itemsize=shape.itemsize,
    )
    ranks = range(mesh.size)
    denoise = shape.computed * max(step_flops(work, mesh, rank) for rank in ranks)
    sent = shape.computed * max(
        sum(size for _, size in step_traffic(work, mesh, rank, runtime).values()) for rank in ranks
    )
    text = 2 * models.t5_layers * models.t5_layer_weights * models.tokens
    return Cost(
        text=float(text * shape.batch),
        denoise=denoise,
        decode=decode_flops(shape, decoding_ranks(shape, mesh, options), models),
        sent=float(sent),
    )


def decode_flops(shape: Shape, ranks: int, models: ModelSizes) -> float:
    """FLOPs of the rank that decodes most of a batch of videos, when `ranks` share it.

    Scaled from the published widths: convolutions with their square, attention with the width.
    """
    lengths = [
        min(shape.micro_frames, shape.num_frames - start)
        for start in range(0, shape.num_frames, shape.micro_frames)
    ]
    rounds = plan_decode(lengths, ranks, shape.micro_batch)
    chunks = [
        sum(
            -(-lengths[part.chunk] // geometry.TIME_FACTOR) for units in rounds for part in units[r]
        )
        for r in range(ranks)
    ]
    cells = shape.latent[1] * shape.latent[2]
    width, filters = models.vae_widths[0] / 128, models.filters / 128
    frame = cells * (_FRAME_FLOPS * width**2 + _FRAME_ATTENTION * width * cells)
    busiest = max(
        count * frame + latents * cells * _LATENT_FLOPS * filters**2
        for count, latents in zip(decoded_frames(rounds), chunks, strict=True)
    )
    return shape.batch * busiest
