"""The plan of a request on N ranks: peaks by stage, cost, and whether it fits, by which mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from opensora_sp.base import geometry
from opensora_sp.media.background import HELD_CHUNKS
from opensora_sp.parallel.decode_plan import decoded_frames, plan_decode
from opensora_sp.parallel.mesh import Mesh, plan_mesh
from opensora_sp.planner.cost import Workload, step_flops, step_traffic
from opensora_sp.planner.devices import usable
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape, decoding_peak, denoising_peak, encoding_peak, text_peak
from opensora_sp.request import sizes
from opensora_sp.request.memory_modes import MEMORY_MODES, SMALLEST, MemoryMode
from opensora_sp.request.runtime import Runtime

# Of the decoder, fitted to its convolutions: a frame and a chunk's latent frame, per latent cell;
# the spatial one's attention looks from every cell at every other.
_FRAME_FLOPS, _FRAME_ATTENTION, _LATENT_FLOPS = 605.5e6, 2048, 478.8e6
_PROCESS = 1.5e9  # Python, torch and their libraries on the host
MOST_RANKS = 64
DURATIONS = ("image", "2s", "4s", "8s", "16s")
RESOLUTIONS = ("144p", "240p", "360p", "480p", "720p")


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
    def flops(self) -> float:
        """FLOPs of the busiest rank for one batch of videos."""
        return _cost(self.shape, self.mesh, self.mode, self.models, self.options)[0]

    @property
    def sent(self) -> float:
        """Bytes that the busiest rank sends for one batch of videos."""
        return _cost(self.shape, self.mesh, self.mode, self.models, self.options)[1]

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
    """What a person fixed. None leaves it to the plan."""

    memory: MemoryMode | None = None
    serial_guidance: bool = False
    vae_decode: str = "auto"
    t5_on_cpu: bool = False
    t5_int8: bool = False
    chunks: int = 2
    guidance: int | None = None
    sequence: int | None = None

    def runtime(self, mode: MemoryMode) -> Runtime:
        """The runtime of a mode."""
        return Runtime.of(mode, serial_guidance=self.serial_guidance, chunks=self.chunks)


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
    vae = models.vae_weights(encoder=shape.encodes) * item
    layer = models.t5_layer_bytes(item, int8=options.t5_int8)
    text = models.t5_other_weights * item + models.t5_layers * layer * (not offload.layers)
    stages = []
    if not options.t5_on_cpu:
        passing = layer if offload.layers else 0
        stages.append(Stage("text", text, text_peak(models, item, passing, options.t5_int8)))
    beside = transformer if offload.transformer_stays else 0
    if shape.encodes:
        stages.append(Stage("references", vae + beside, encoding_peak(shape, runtime, models)))
    # A VAE that stays is there from the second video on.
    denoising = denoising_peak(shape, mesh, runtime, models)
    stages.append(Stage("denoise", transformer + vae * offload.vae_stays, denoising))
    sharing = decoding_ranks(shape, mesh, options)
    stages.append(Stage("decode", vae + beside, decoding_peak(shape, runtime, models, sharing)))
    return stages


def decoding_ranks(shape: Shape, mesh: Mesh, options: Options) -> int:
    """How many ranks decode a video, as `ModelSet.shares_decode` decides it."""
    if options.vae_decode == "rank0":
        return 1
    shares = options.vae_decode == "shared" or shape.num_frames > shape.micro_batch
    return mesh.size if shares else 1


def _host(shape: Shape, mode: MemoryMode, models: ModelSizes, options: Options) -> int:
    """Host memory of the leading rank: weights that wait there, noise, frames, the process."""
    frames, height, width = shape.latent
    weights = 0
    if mode.offload.uses_host_memory:
        weights = models.transformer_weights + models.vae_weights(encoder=shape.encodes)
    text = 0
    if options.t5_on_cpu or mode.offload.layers:
        layer = models.t5_layer_bytes(shape.itemsize, int8=options.t5_int8)
        text = models.t5_other_weights * shape.itemsize + models.t5_layers * layer
    # T5 has given its memory back before the others are loaded.
    noise = 3 * 4 * 4 * shape.batch * frames * height * width
    chunk = min(shape.micro_frames or shape.num_frames, shape.num_frames)
    written = HELD_CHUNKS * shape.batch * chunk * shape.pixels * 3
    return int(_PROCESS + max(weights * shape.itemsize, text) + noise + written)


@lru_cache(maxsize=256)
def _cost(
    shape: Shape, mesh: Mesh, mode: MemoryMode, models: ModelSizes, options: Options
) -> tuple[float, float]:
    """FLOPs and bytes sent by the busiest rank, for one batch of videos."""
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
    flops = shape.steps * max(step_flops(work, mesh, rank) for rank in ranks)
    sent = shape.steps * max(
        sum(size for _, size in step_traffic(work, mesh, rank, runtime).values()) for rank in ranks
    )
    decoded = decode_flops(shape, decoding_ranks(shape, mesh, options))
    text = 2 * models.t5_layers * models.t5_layer_weights * models.tokens
    return flops + decoded + text * shape.batch, float(sent)


def decode_flops(shape: Shape, ranks: int) -> float:
    """FLOPs of the rank that decodes most of a batch of videos, when `ranks` share it."""
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
    frame = cells * (_FRAME_FLOPS + _FRAME_ATTENTION * cells)
    busiest = max(
        count * frame + latents * cells * _LATENT_FLOPS
        for count, latents in zip(decoded_frames(rounds), chunks, strict=True)
    )
    return shape.batch * busiest
