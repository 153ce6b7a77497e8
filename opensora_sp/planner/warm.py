"""What an engine that keeps its models can make: chosen once for the sizes that it is to serve.

`open_warm` chooses the memory mode and the place of T5; `warm_plan` and `shortfall` then judge each
request, and `fewer_frames` and `smaller_size` find what fits instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from opensora_sp.base import geometry
from opensora_sp.base.errors import UserError
from opensora_sp.planner.devices import GB
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.plan import RESOLUTIONS, Options, Plan, TextPlace, make_plan, text_on_host
from opensora_sp.request import sizes
from opensora_sp.request.memory_modes import MEMORY_MODES, MemoryMode, memory_mode

_PATCH = geometry.SPATIAL_FACTOR * geometry.PATCH  # pixels: a side is cut into whole patches


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is before the models are loaded.

    device: its type. by_rank: bytes that tensors can have on each rank's device; empty where the
    backend cannot tell. host: free bytes of host memory on the leading rank's node, or None.
    """

    device: str
    by_rank: tuple[float, ...] = ()
    host: float | None = None

    @property
    def memory(self) -> float | None:
        """Bytes that every rank has."""
        return min(self.by_rank, default=None)


@dataclass(frozen=True, kw_only=True)
class WarmEngine:
    """What was chosen when an engine was opened. ranks: of one video; chunks: as in `Options`.

    tries: whether what does not fit is tried all the same (--no-plan).
    """

    room: Room
    ranks: int
    mode: MemoryMode
    text: TextPlace
    chunks: int = 2
    tries: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` reads it."""
        fields = asdict(self) | {"mode": self.mode.name, "room": asdict(self.room)}
        return {name: fields[name] for name in ("room", "ranks", "mode", "text", "chunks", "tries")}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> WarmEngine:
        """What `to_dict` made. Raises ValueError, TypeError or KeyError for anything else."""
        room = dict(found["room"])
        if found["text"] not in get_args(TextPlace):
            raise ValueError(f"text {found['text']!r}")
        return cls(
            room=Room(**room | {"by_rank": tuple(float(one) for one in room["by_rank"])}),
            ranks=int(found["ranks"]),
            mode=memory_mode(found["mode"]),
            text=found["text"],
            chunks=int(found["chunks"]),
            tries=bool(found["tries"]),
        )


def open_warm(
    served: Mapping[str, Shape],
    room: Room,
    ranks: int,
    models: ModelSizes,
    options: Options,
    *,
    tries: bool = False,
) -> WarmEngine:
    """The fastest mode in which all served sizes fit, and the place of T5 in it.

    served: shapes by name. Raises UserError, with what is short, where no mode fits all of them.
    """
    modes = list(MEMORY_MODES.values()) if options.memory is None else [options.memory]
    for mode in modes:
        text = text_place(served.values(), room, ranks, mode, models, options)
        engine = WarmEngine(
            room=room, ranks=ranks, mode=mode, text=text, chunks=options.chunks, tries=tries
        )
        if tries or all(shortfall(engine, s, models, options) is None for s in served.values()):
            return engine
    name, short = next(
        (name, short)
        for name, shape in served.items()
        if (short := shortfall(engine, shape, models, options)) is not None
    )
    raise UserError(
        f"--serves {name} does not fit in any memory mode that is allowed: {short}; give smaller "
        f"sizes with --serves (480p-2s,720p-image), more ranks, or --no-plan, which tries it"
    )


def text_place(
    served: Iterable[Shape],
    room: Room,
    ranks: int,
    mode: MemoryMode,
    models: ModelSizes,
    options: Options,
) -> TextPlace:
    """Where T5 is between jobs: the fastest place that leaves room for every served size.

    On the device where the mode keeps it there and it fits beside the others; else in host memory,
    where that holds it; else nowhere, and it is loaded again for a prompt that is new.
    """
    if options.t5_on_cpu:
        return "cpu"
    shapes = list(served)

    def fits(place: TextPlace) -> bool:
        engine = WarmEngine(room=room, ranks=ranks, mode=mode, text=place, chunks=options.chunks)
        return all(shortfall(engine, shape, models, options) is None for shape in shapes)

    # Where nobody knows the device's memory, T5 does not claim what the others may need.
    known = room.memory is not None
    if mode.offload.text_encoder_stays and known and fits("device"):
        return "device"
    return "host" if room.device != "cpu" and fits("host") else "reload"


def warm_plan(engine: WarmEngine, shape: Shape, models: ModelSizes, options: Options) -> Plan:
    """The plan of one request on the engine as it is open."""
    options = replace(options, memory=engine.mode, warm=engine.text, chunks=engine.chunks)
    return make_plan(shape, engine.ranks, engine.mode, models, options)


def shortfall(engine: WarmEngine, shape: Shape, models: ModelSizes, options: Options) -> str | None:
    """What a request needs and what there is, in words; None where it fits."""
    room, plan = engine.room, warm_plan(engine, shape, models, options)
    if room.memory is not None and plan.peak > room.memory:
        stage = max(plan.stages, key=lambda stage: stage.total)
        return (
            f"{stage.name} needs {_gb(stage.total)} GB on a rank in memory mode {engine.mode}, of "
            f"{_gb(room.memory)} GB that tensors can have"
        )
    # Every rank has weights that wait, the leading one T5 as well.
    text = text_on_host(shape, plan.mode, models, plan.options)
    needed = engine.ranks * plan.host - (engine.ranks - 1) * text
    # On a CPU that is the memory that was looked at above.
    if room.device != "cpu" and room.host is not None and needed > room.host:
        return (
            f"{_gb(needed)} GB of host memory are needed in memory mode {engine.mode}, of "
            f"{_gb(room.host)} GB that are free"
        )
    return None


def _gb(size: float) -> str:
    return f"{size / GB:.3g}"


def fewer_frames(
    engine: WarmEngine, shape: Shape, models: ModelSizes, options: Options
) -> int | None:
    """The most frames, fewer than the shape's, that fit at its size."""
    return _most(
        shape.num_frames - 1, lambda n: replace(shape, num_frames=n), engine, models, options
    )


def smaller_size(
    engine: WarmEngine, shape: Shape, models: ModelSizes, options: Options
) -> tuple[int, int] | None:
    """The largest (height, width) of the same ratio that fits at the shape's length.

    Of the trained sizes where the shape has one of the table's, else in whole patches.
    """
    table = _table_sizes(shape.height, shape.width)
    if table:
        fitting = [
            size
            for size in table
            if shortfall(engine, _sized(shape, size), models, options) is None
        ]
        return max(fitting, key=lambda size: size[0] * size[1], default=None)
    steps = max(shape.height, shape.width) // _PATCH
    found = _most(steps - 1, lambda n: _sized(shape, _scaled(shape, n)), engine, models, options)
    return None if found is None else _scaled(shape, found)


def _most(
    most: int,
    shape_of: Callable[[int], Shape],
    engine: WarmEngine,
    models: ModelSizes,
    options: Options,
) -> int | None:
    """The largest number from 1 to `most` whose shape fits; larger shapes never need less."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if shortfall(engine, shape_of(middle), models, options) is None:
            low = middle
        else:
            high = middle - 1
    return low or None


def _sized(shape: Shape, size: tuple[int, int]) -> Shape:
    return replace(shape, height=size[0], width=size[1])


def _scaled(shape: Shape, patches: int) -> tuple[int, int]:
    """The size whose longer side has so many patches."""
    longer = max(shape.height, shape.width)

    def side(whole: int) -> int:
        return max(_PATCH, whole * patches * _PATCH // longer // _PATCH * _PATCH)

    return side(shape.height), side(shape.width)


def _table_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Smaller trained sizes of the ratio that this one has in the table."""
    ratios = {
        ratio
        for name in sizes.resolutions()
        for ratio, size in sizes.aspect_ratios(name).items()
        if size == (height, width)
    }
    found = [
        sizes.aspect_ratios(name)[ratio]
        for name in RESOLUTIONS
        for ratio in sorted(ratios)
        if ratio in sizes.aspect_ratios(name)
    ]
    return [size for size in found if size[0] * size[1] < height * width]
