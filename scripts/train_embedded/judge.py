"""What a clip shows: colour by segmentation, shape by moments, motion by the centroid's track.

    python -m scripts.train_embedded.judge CLIP.mp4 ...     what is seen in each
    python -m scripts.train_embedded.judge --validate 500   the judge itself, judged on true renders

It knows nothing of models or prompts; it looks at pixels. Objects have colours, backgrounds
almost none, which is what segmentation rests on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from scripts.train_embedded.world import COLOURS, DIRECTIONS, SHAPES, draw_scene, render
from scripts.train_embedded.world import distance as outline

Floats = NDArray[np.floating]

COLOURED = 0.32  # chroma (largest minus smallest channel) from which a pixel is an object's
FAINT = 0.2  # chroma that no background has
SECOND = 0.2  # share of the largest colour's area from which another one is a second object
MOVED = 0.12  # shorter sides
GROWN = 1.6  # times the area
TURNED = 0.12  # turns
SIDES = {"square": 4, "triangle": 3}
HARMONICS = (3, 4)


@dataclass(frozen=True)
class Seen:
    """One object of a clip. `path`: its centre in each frame, pixels [F, 2] (across, down)."""

    colour: str
    shape: str
    motion: str
    path: Floats


def look(frames: NDArray[np.uint8]) -> list[Seen]:
    """The objects of a clip uint8 [F,H,W,3], the largest first; none where nothing has a colour."""
    video = frames.astype(np.float32) / 255
    chroma = video.max(-1) - video.min(-1)
    colour = nearest_colour(video)
    names = list(COLOURS)
    strong = chroma > COLOURED
    areas = np.array([(strong & (colour == index)).sum() for index in range(len(names))])
    if areas.max() < 12 * len(frames):
        return []
    order = [i for i in np.argsort(-areas) if areas[i] >= SECOND * areas.max()][:2]
    seen = []
    for index in order:
        own = colour == index
        full = float(np.median(chroma[strong & own]))
        cover = np.where(own, np.clip((chroma - FAINT) / (full - FAINT), 0, 1), 0)
        seen.append(_object(names[index], cover))
    return seen


def nearest_colour(video: Floats) -> NDArray[np.intp]:
    """The index of the colour whose hue is nearest, for every pixel of [..., 3]."""
    hue = _hue(video)
    hues = np.array([float(_hue(np.array(colour))) for colour in COLOURS.values()])
    away = np.abs((hue[..., None] - hues + 0.5) % 1 - 0.5)
    nearest: NDArray[np.intp] = away.argmin(-1)
    return nearest


def _hue(rgb: Floats) -> Floats:
    """The angle of a colour around the gray axis, in turns."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    angle: Floats = np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    return angle / (2 * math.pi)


@dataclass(frozen=True)
class Moments:
    """One frame's cover: area, centre, spread, and the complex harmonics that tell corners."""

    area: float
    centre: complex
    spread: float
    harmonics: tuple[complex, ...]
    whole: bool  # not cut by the frame's border


def moments(cover: Floats) -> Moments:
    """Of a cover [H, W] in 0..1; all but area and centre do not depend on size and place."""
    rows, columns = np.indices(cover.shape)
    area = max(float(cover.sum()), 1e-6)
    place = columns + 1j * rows
    centre = complex((cover * place).sum() / area)
    away = place - centre
    spread = float((cover * np.abs(away) ** 2).sum()) / area**2
    harmonics = tuple(complex((cover * away**n).sum()) / area ** (1 + n / 2) for n in HARMONICS)
    border = np.concatenate([cover[0], cover[-1], cover[:, 0], cover[:, -1]])
    return Moments(area, centre, spread, harmonics, float(border.sum()) < 1.5)


def features(one: Moments) -> Floats:
    """What tells shapes apart, whichever way they are turned, each about as telling."""
    third, fourth = (abs(value) for value in one.harmonics)
    return np.array([one.spread / 0.025, third / 0.02, fourth / 0.006])


@cache
def _prototypes() -> dict[str, Floats]:
    """The features of each shape, drawn at a middling size with soft edges."""
    rows, columns = np.indices((64, 64)) - 31.5
    found = {}
    for shape in SHAPES:
        cover = np.clip(0.5 - outline(shape, columns, rows, 17.0) / 2.5, 0, 1)
        found[shape] = features(moments(cover))
    return found


def _object(colour: str, cover: Floats) -> Seen:
    """The object that covers [F, H, W]."""
    all_moments = [moments(frame) for frame in cover]
    largest = max(one.area for one in all_moments)
    there = [one.area > 0.1 * largest for one in all_moments]
    clear = [one for one, is_there in zip(all_moments, there, strict=True) if is_there]
    whole = [one for one in clear if one.whole] or clear
    look = np.median([features(one) for one in whole], axis=0)
    away = {shape: float(np.abs(look - own).sum()) for shape, own in _prototypes().items()}
    shape = min(away, key=lambda name: away[name])
    short = min(cover.shape[1:])
    path = np.array([(one.centre.real, one.centre.imag) for one in all_moments])
    motion = _motion(clear, path[there] / short, shape)
    return Seen(colour, shape, motion, path)


def _motion(clear: Sequence[Moments], path: Floats, shape: str) -> str:
    """The motion of frames that show the object; path [F, 2] in shorter sides."""
    if len(clear) < 3:
        return "still"
    part = max(1, len(clear) // 8)
    first, last = path[:part].mean(0), path[-part:].mean(0)
    areas = [one.area for one in clear]
    if np.mean(areas[-part:]) > GROWN * np.mean(areas[:part]) and all(one.whole for one in clear):
        return "grow"
    away = last - first
    swing = float(np.abs(np.diff(path[:, 1])).sum())
    if np.ptp(path[:, 1]) > MOVED and swing > 1.25 * abs(away[1]) + MOVED and abs(away[0]) < MOVED:
        return "bounce"
    if float(np.hypot(*away)) > MOVED:
        angle = math.atan2(-away[1], away[0]) / (2 * math.pi)
        return list(DIRECTIONS)[round(angle * 8) % 8]
    if shape in SIDES and abs(_turns(clear, SIDES[shape])) > TURNED:
        return "spin"
    return "still"


def _turns(clear: Sequence[Moments], sides: int) -> float:
    """Turns between the first frame and the last."""
    which = HARMONICS.index(sides)
    phases = np.unwrap([np.angle(one.harmonics[which]) for one in clear])
    return float(phases[-1] - phases[0]) / sides / (2 * math.pi)


def as_uint8(video: Floats) -> NDArray[np.uint8]:
    """Pixels in 0..1 as they are stored."""
    return np.rint(video * 255).clip(0, 255).astype(np.uint8)


def validate(count: int, seed: int = 21) -> dict[str, float]:
    """How often the judge is right about true renders, and about another scene's caption."""
    rng = np.random.default_rng(seed)
    sizes = ((64, 96), (96, 64), (96, 96), (96, 160), (144, 144))
    told, seen = [], []
    for index in range(count):
        scene = draw_scene(rng, sizes[index % len(sizes)], 17, things=1, training=False)
        thing = scene.things[0]
        found = look(as_uint8(render(scene)))
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
        motion = opposite[scene.pan] if scene.pan else thing.motion
        told.append((thing.colour, thing.shape, motion))
        seen.append((found[0].colour, found[0].shape, found[0].motion) if found else ("", "", ""))
    wrong = told[1:] + told[:1]
    result = {}
    for place, name in enumerate(("colour", "shape", "motion")):
        result[name] = float(
            np.mean([t[place] == s[place] for t, s in zip(told, seen, strict=True)])
        )
        result[f"{name}, wrong caption"] = float(
            np.mean([t[place] == s[place] for t, s in zip(wrong, seen, strict=True)])
        )
    return result


def main() -> None:
    """Look at clips, or validate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("clips", nargs="*", help="video files")
    parser.add_argument("--validate", type=int, metavar="N", help="judge N true renders")
    arguments = parser.parse_args()
    if arguments.validate:
        for name, share in validate(arguments.validate).items():
            print(f"{name}: {share:.1%}")
    for clip in arguments.clips:
        import av

        with av.open(clip) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        found = look(np.stack(frames))
        print(clip, "; ".join(f"{o.colour} {o.shape}, {o.motion}" for o in found) or "nothing")


if __name__ == "__main__":
    main()
