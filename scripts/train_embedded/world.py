"""The world that the embedded model learns: coloured shapes that move over quiet backgrounds.

A `Scene` says what is there and how it moves; `render` draws it, `captions.describe` tells it.
Everything is drawn from a `numpy.random.Generator`: one seed is one scene on every machine.

Lengths are fractions of the frame's shorter side, places are fractions of its height and width,
directions point as the eye sees them (up is up).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.12, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.08),
    "purple": (0.75, 0.12, 0.85),
    "cyan": (0.08, 0.80, 0.88),
}
# Almost without colour, so that what has one is an object.
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.04, 0.04, 0.05),
    "gray": (0.42, 0.42, 0.43),
    "white": (0.92, 0.92, 0.91),
    "navy": (0.07, 0.10, 0.20),
    "beige": (0.82, 0.77, 0.68),
}
SHAPES = ("circle", "square", "triangle", "ring")
ROUND = ("circle", "ring")  # nobody sees these spin
# (right, up) of each direction.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "up-right": (1, 1),
    "up": (0, 1),
    "up-left": (-1, 1),
    "left": (-1, 0),
    "down-left": (-1, -1),
    "down": (0, -1),
    "down-right": (1, -1),
}
OTHER_MOTIONS = ("still", "bounce", "grow", "spin")
MOTIONS = (*DIRECTIONS, *OTHER_MOTIONS)
PANS = ("left", "right", "up", "down")  # where the camera turns; the picture goes the other way

EDGE = 2.2  # pixels over which an edge fades
# Turns in a chunk of frames, least and most. A square that turns by an eighth from one key frame to
# the next has no direction any more: a chunk has four such steps.
TURNS, CHUNK = (0.18, 0.3), 17


@dataclass(frozen=True)
class Thing:
    """One object. `at`: (across, down) where it starts; `travel`: how far it goes in the clip.

    `diameter` and `travel` are in shorter sides; `turns` and `swings` count over the whole clip.
    Of what grows, `travel` is by how many times.
    """

    colour: str
    shape: str
    motion: str
    diameter: float
    at: tuple[float, float]
    travel: float = 0.0
    turns: float = 0.0
    swings: float = 0.0


@dataclass(frozen=True)
class Scene:
    """What one clip shows; `to` differs from `background` where it is a gradient, along `axis`."""

    height: int
    width: int
    frames: int
    things: tuple[Thing, ...]
    background: str
    to: str
    axis: str = "down"
    pan: str | None = None
    pan_travel: float = 0.0


def held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether a combination is kept from training, one direction of every coloured shape."""
    places = (list(COLOURS).index(colour), SHAPES.index(shape), MOTIONS.index(motion))
    return (2 * places[0] + 3 * places[1] + places[2]) % len(DIRECTIONS) == 0


def draw_scene(
    rng: np.random.Generator,
    size: tuple[int, int],
    frames: int,
    *,
    things: int | None = None,
    motion: str | None = None,
    training: bool = True,
) -> Scene:
    """A scene of the given size; `training` leaves out the combinations that are held out.

    `things` None: mostly one object, sometimes two. `motion` None: drawn for each object. A clip of
    one frame moves nothing.
    """
    count = things or (2 if rng.random() < 0.1 else 1)
    background = str(rng.choice(list(BACKGROUNDS)))
    to, axis = background, "down"
    if rng.random() < 0.3:
        to = str(rng.choice([name for name in BACKGROUNDS if name != background]))
        axis = str(rng.choice(["down", "across"]))
    drawn: list[Thing] = []
    for index in range(count):
        colours = [name for name in COLOURS if name not in {thing.colour for thing in drawn}]
        slot = None if count == 1 else index
        while True:
            thing = _draw_thing(rng, size, frames, colours, slot, motion)
            if not training or not held_out(thing.colour, thing.shape, thing.motion):
                break
        drawn.append(thing)
    scene = Scene(size[0], size[1], frames, tuple(drawn), background, to, axis)
    if frames > 1 and count == 1 and drawn[0].motion == "still" and rng.random() < 0.35:
        scene = _panned(rng, scene)
    return scene


def _draw_thing(
    rng: np.random.Generator,
    size: tuple[int, int],
    frames: int,
    colours: list[str],
    slot: int | None,
    wanted: str | None,
) -> Thing:
    """One object; of two, each keeps to its own half of the longer side."""
    shape = str(rng.choice([s for s in SHAPES if wanted != "spin" or s not in ROUND]))
    # Directions are eight, and what is asked for most.
    motions = list(DIRECTIONS) if rng.random() < 0.72 else list(OTHER_MOTIONS)
    motion = str(rng.choice([wanted] if wanted else motions)) if frames > 1 else "still"
    if motion == "spin" and shape in ROUND:
        motion = "still"
    diameter = float(rng.uniform(0.42, 0.56) if slot is None else rng.uniform(0.38, 0.44))
    thing = Thing(str(rng.choice(colours)), shape, motion, diameter, (0.5, 0.5))
    growth = float(rng.uniform(1.7, 2.3)) if motion == "grow" else 1.0
    if growth > 1:
        thing = replace(thing, diameter=1.25 * diameter / growth, travel=growth)
        diameter *= 1.25
    short = min(size)
    extents = [size[1] / short, size[0] / short]  # across, down, in shorter sides
    low, room = [0.0, 0.0], [extents[0] - diameter, extents[1] - diameter]
    if slot is not None:
        along = 0 if size[1] >= size[0] else 1
        room[along] = extents[along] / 2 - diameter
        low[along] = slot * extents[along] / 2
    return _placed(rng, thing, frames, extents, low, room)


def _placed(
    rng: np.random.Generator,
    thing: Thing,
    frames: int,
    extents: list[float],
    low: list[float],
    room: list[float],
) -> Thing:
    """The object with a path that stays in the frame: room is what its centre may move in."""
    right, up = DIRECTIONS.get(thing.motion, (0, 0))
    steps = (right, -up)
    travel = thing.travel
    margin = thing.diameter * max(1.0, travel) / 2  # of the object at its largest
    if steps != (0, 0):
        longest = min(room[axis] for axis in (0, 1) if steps[axis])
        travel = min(float(rng.uniform(0.55, 1.0)) * longest, 1.0)
    turns = 0.0
    if thing.motion == "spin":
        turns = float(rng.uniform(*TURNS) * rng.choice([-1, 1])) * frames / CHUNK
    swings = 0.0
    if thing.motion == "bounce":
        travel, swings = float(rng.uniform(0.6, 1.0)) * room[1], float(rng.uniform(0.9, 1.6))
    place = []
    for axis in (0, 1):
        # Slack is the freedom left by the path; a path leftwards starts at its right end.
        slack = room[axis] - travel * abs(steps[axis])
        start = margin + low[axis] + float(rng.uniform(0.0, 1.0)) * slack
        start += travel if steps[axis] < 0 else 0.0
        place.append(start / extents[axis])
    if thing.motion == "bounce":  # starts in the air
        place[1] = (low[1] + room[1] + thing.diameter / 2 - travel) / extents[1]
    return replace(thing, at=(place[0], place[1]), travel=travel, turns=turns, swings=swings)


def _panned(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same scene seen by a camera that turns; the object crosses the picture."""
    pan = str(rng.choice(PANS))
    thing = scene.things[0]
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[pan]
    short = min(scene.height, scene.width)
    extents = [scene.width / short, scene.height / short]
    room = [extents[0] - thing.diameter, extents[1] - thing.diameter]
    moving = _placed(rng, replace(thing, motion=opposite), scene.frames, extents, [0.0, 0.0], room)
    still = replace(moving, motion="still", travel=0.0)
    return replace(scene, things=(still,), pan=pan, pan_travel=moving.travel)


def progress(scene: Scene) -> Array:
    """Time of every frame, 0 at the first and 1 at the last: [F]."""
    return np.linspace(0.0, 1.0, scene.frames, dtype=np.float32) if scene.frames > 1 else _zero()


def _zero() -> Array:
    return np.zeros(1, dtype=np.float32)


def centres(scene: Scene, thing: Thing) -> Array:
    """Where the object's centre is in each frame, in pixels: [F, 2] as (across, down)."""
    short = min(scene.height, scene.width)
    time = progress(scene)
    right, up = DIRECTIONS.get(thing.motion, (0, 0))
    across = thing.at[0] * scene.width + time * (right * thing.travel * short)
    down = thing.at[1] * scene.height - time * (up * thing.travel * short)
    if thing.motion == "bounce":
        down = down + thing.travel * short * np.abs(np.sin(math.pi * thing.swings * time))
    right, up = DIRECTIONS[scene.pan] if scene.pan else (0, 0)
    across = across - time * (right * scene.pan_travel * short)
    down = down + time * (up * scene.pan_travel * short)
    return np.stack([across, down], axis=1).astype(np.float32)


def render(scene: Scene, only: Sequence[int] | None = None) -> Array:
    """The clip's pixels, [F, H, W, 3] in 0..1; of the frames `only` where they are given."""
    rows = np.arange(scene.height, dtype=np.float32)[:, None] + 0.5
    columns = np.arange(scene.width, dtype=np.float32)[None, :] + 0.5
    chosen = list(range(scene.frames)) if only is None else list(only)
    video = _background(scene, progress(scene)[chosen], rows, columns)
    for thing in scene.things:
        colour = np.array(COLOURS[thing.colour], np.float32)
        for frame, covered in enumerate(cover(scene, thing, chosen)):
            video[frame] += covered[..., None] * (colour - video[frame])
    return video


def cover(scene: Scene, thing: Thing, chosen: Sequence[int]) -> Array:
    """How much of every pixel the object covers in the chosen frames, [F, H, W] in 0..1."""
    rows = np.arange(scene.height, dtype=np.float32)[:, None] + 0.5
    columns = np.arange(scene.width, dtype=np.float32)[None, :] + 0.5
    time = progress(scene)[list(chosen)]
    path = centres(scene, thing)[list(chosen)]
    growth = 1 + (thing.travel - 1) * time if thing.motion == "grow" else np.ones_like(time)
    covers = []
    for frame in range(len(chosen)):
        radius = thing.diameter * min(scene.height, scene.width) / 2 * float(growth[frame])
        x, y = columns - path[frame, 0], rows - path[frame, 1]
        angle = 2 * math.pi * thing.turns * float(time[frame])
        if angle:
            cos, sin = math.cos(angle), math.sin(angle)
            x, y = cos * x + sin * y, cos * y - sin * x
        covers.append(np.clip(0.5 - distance(thing.shape, x, y, radius) / EDGE, 0, 1))
    return np.stack(covers)


def _background(scene: Scene, time: Array, rows: Array, columns: Array) -> Array:
    """[F, H, W, 3]: one colour, or a gradient, which a turning camera slides along."""
    first, last = (np.array(BACKGROUNDS[name], np.float32) for name in (scene.background, scene.to))
    right, up = DIRECTIONS[scene.pan] if scene.pan else (0, 0)
    shift = scene.pan_travel * min(scene.height, scene.width) * time
    if scene.axis == "down":
        place = (rows[None] - (up * shift)[:, None, None]) / scene.height
    else:
        place = (columns[None] + (right * shift)[:, None, None]) / scene.width
    part = np.broadcast_to(place, (len(time), scene.height, scene.width))[..., None]
    video: Array = first + np.clip(part, 0, 1) * (last - first)
    return video.astype(np.float32)


def distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Pixels from the outline of a shape around the origin, negative inside (y points down).

    `radius` is that of a circle; the other shapes are sized to look as large as it.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "triangle":
        # Half the inner radius below the centre of gravity, its tip one outer radius above.
        return np.maximum(y, np.abs(x) * (math.sqrt(3) / 2) - y / 2) - 0.56 * radius
    raise ValueError(f"{shape!r} is none of {', '.join(SHAPES)}")
