"""What is said about a scene, in many phrasings; some are kept from training.

Captions pass through the program's own score suffixes and cleaning, as a person's prompt does.
"""

from __future__ import annotations

import numpy as np

from opensora_sp.request.prompts import caption_for_clip
from scripts.train_embedded.world import COLOURS, MOTIONS, PANS, SHAPES, Scene, Thing

SHAPE_WORDS = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle",),
    "ring": ("ring", "hoop"),
}
COLOUR_WORDS = {
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "purple": ("purple", "magenta"),
    "cyan": ("cyan", "turquoise"),
}
_VERBS = (
    ("moves", "moving"),
    ("slides", "sliding"),
    ("drifts", "drifting"),
    ("travels", "traveling"),
    ("glides", "gliding"),
    ("flies", "flying"),
    ("rolls", "rolling"),
    ("goes", "going"),
)
_WAYS = {
    "left": ("left", "to the left", "leftwards", "from right to left", "toward the left"),
    "right": ("right", "to the right", "rightwards", "from left to right", "toward the right"),
    "up": ("up", "upwards", "to the top", "toward the top"),
    "down": ("down", "downwards", "to the bottom", "toward the bottom"),
    "up-left": ("up and to the left", "to the upper left", "diagonally up left", "up left"),
    "up-right": ("up and to the right", "to the upper right", "diagonally up right", "up right"),
    "down-left": ("down and to the left", "to the lower left", "diagonally down left", "down left"),
    "down-right": (
        "down and to the right",
        "to the lower right",
        "diagonally down right",
        "down right",
    ),
}
_OTHER = {
    "still": (
        ("stays still", "standing still"),
        ("does not move", "not moving"),
        ("rests", "resting"),
    ),
    "bounce": (("bounces", "bouncing"), ("bounces up and down", "bouncing up and down")),
    "grow": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("grows larger", "growing larger"),
    ),
    "spin": (("spins", "spinning"), ("rotates", "rotating"), ("turns around", "turning around")),
}
_BACKGROUND_WORDS = {
    "black": ("black", "dark"),
    "gray": ("gray",),
    "white": ("white", "bright"),
    "navy": ("navy", "dark blue"),
    "beige": ("beige",),
}
# {a} the object with its article, {does} and {doing} its motion, {on} the background or nothing.
TRAINED = (
    "{a} {does}{on}",
    "{a} {doing}{on}",
    "a video of {a} {doing}{on}",
    "{a} that {does}{on}",
    "an animation of {a} that {does}{on}",
    "a simple clip: {a} {does}{on}",
    "there is {a} {doing}{on}",
    "{a} slowly {does}{on}",
    "{a} is {doing}{on}",
    "we see {a}. it {does}{on}",
    "{a}, {doing}{on}",
)
UNTRAINED = (
    "a short movie in which {a} {does}{on}",
    "look how {a} {does}{on}",
    "{on}, {a} is slowly {doing}",
    "{doing}{on}: {a}",
    "the camera sees {a}, which {does}{on}",
    "{a} can be seen {doing}{on}",
)
STILLS = (
    "{a}{on}",
    "a picture of {a}{on}",
    "an image of {a}{on}",
    "there is {a}{on}",
    "{a}{on}, a still",
)


def describe(scene: Scene, rng: np.random.Generator, templates: tuple[str, ...] = TRAINED) -> str:
    """One caption of a scene: words only, without scores."""
    on = _on(scene, rng) if rng.random() < 0.6 else ""
    if scene.frames == 1:
        names = " and ".join(_name(thing, rng) for thing in scene.things)
        return str(rng.choice(STILLS)).format(a=names, on=on)
    if len(scene.things) == 1 or len({thing.motion for thing in scene.things}) == 1:
        return _one(scene.things, rng, str(rng.choice(templates)), on)
    clauses = []
    for thing in scene.things:
        does, doing = motion_words(thing.motion, rng)
        clauses.append(f"{_name(thing, rng)} {does if rng.random() < 0.6 else doing}")
    return " and ".join(clauses) + on


def _one(things: tuple[Thing, ...], rng: np.random.Generator, template: str, on: str) -> str:
    """A sentence about one object, or about two that do the same."""
    names = " and ".join(_name(thing, rng) for thing in things)
    does, doing = motion_words(things[0].motion, rng)
    return template.format(a=names, does=does, doing=doing, on=on).strip(" ,")


def motion_words(motion: str, rng: np.random.Generator) -> tuple[str, str]:
    """("moves left", "moving left") or the like."""
    if motion in _OTHER:
        choices = _OTHER[motion]
        return choices[int(rng.integers(len(choices)))]
    verb, verbing = _VERBS[int(rng.integers(len(_VERBS)))]
    way = str(rng.choice(_WAYS[motion]))
    return f"{verb} {way}", f"{verbing} {way}"


def _name(thing: Thing, rng: np.random.Generator) -> str:
    colour, shape = rng.choice(COLOUR_WORDS[thing.colour]), rng.choice(SHAPE_WORDS[thing.shape])
    size = ""
    if thing.diameter > 0.51 and rng.random() < 0.4:
        size = "large " if rng.random() < 0.5 else "big "
    elif thing.diameter < 0.46 and rng.random() < 0.4:
        size = "small "
    return f"{'the' if rng.random() < 0.1 else 'a'} {size}{colour} {shape}"


def _on(scene: Scene, rng: np.random.Generator) -> str:
    first, last = (str(rng.choice(_BACKGROUND_WORDS[n])) for n in (scene.background, scene.to))
    over = str(rng.choice(["on", "over", "against"]))
    if scene.background == scene.to:
        return f" {over} a {first} background"
    return f" {over} a background that fades from {first} to {last}"


# Which colour is which object's is a fact of its own: two objects are told by it.
OBJECTS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
FACTS = (*COLOURS, *SHAPES, *MOTIONS, *(f"pan {way}" for way in PANS), *OBJECTS)


def facts(scene: Scene) -> list[bool]:
    """Which of FACTS a caption of the scene tells; a picture's tells no motion."""
    told = {fact for thing in scene.things for fact in (thing.colour, thing.shape)}
    told |= {f"{thing.colour} {thing.shape}" for thing in scene.things}
    if scene.frames > 1:
        told |= {thing.motion for thing in scene.things}
    if scene.pan:
        told = (told - {"still"}) | {f"pan {scene.pan}"}
    return [fact in told for fact in FACTS]


def caption(scene: Scene, rng: np.random.Generator, templates: tuple[str, ...] = TRAINED) -> str:
    """What the text encoder reads: the words, mostly with scores, cleaned like any prompt."""
    aes = round(float(rng.uniform(4.5, 7.5)), 1) if rng.random() < 0.3 else 6.5
    flow = camera = None
    if scene.frames > 1 and rng.random() < 0.15:
        flow = round(10 * max(thing.travel for thing in scene.things), 1)
    if scene.pan and rng.random() < 0.9:
        camera = f"pan {scene.pan}"
    elif scene.frames > 1 and rng.random() < 0.1:
        camera = "static"
    words = describe(scene, rng, templates)
    if scene.pan and camera is None:
        words += f". the camera pans {scene.pan}"
    return caption_for_clip(words, 0, aes if rng.random() < 0.85 else None, flow, camera)
