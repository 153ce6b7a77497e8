"""The measurement of one pair of files: frames in step with each other, or latents as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from statistics import fmean
from typing import TYPE_CHECKING, Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import NotJson, parse_json
from opensora_sp.base.wording import plural
from opensora_sp.benchmark.quality.sides import Pair
from opensora_sp.media import metrics
from opensora_sp.media.output_frames import OutputFrames, open_output_frames

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Bytes of frames of one file that are held at once, but at least one frame.
_HELD = 8 << 20
# Containers that keep times in milliseconds give a rate that is a little off.
_RATE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Facts:
    """What is known of a pair before it is measured.

    kind: video, picture or latents. what: size and rate in words. loss: a sentence on the encoders'
    loss; None where both files keep every pixel. differ_in: settings that the files themselves
    name, by name, as A and B have them. notes: what a person should know of the files.
    """

    kind: str
    what: str
    loss: str | None = None
    differ_in: Mapping[str, tuple[Any, Any]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrameQuality:
    """The measures of frames. Per frame: squared_error and ssim; motion: between two frames.

    largest: the largest difference of a pixel's channel, 0 to 255. ssim is NaN for frames with a
    side below 8 pixels.
    """

    squared_error: Sequence[float]
    ssim: Sequence[float]
    motion: Sequence[float]
    largest: int

    @property
    def equal(self) -> bool:
        """Whether every pixel is equal."""
        return self.largest == 0

    @property
    def equal_frames(self) -> int:
        """How many frames are equal."""
        return sum(error == 0 for error in self.squared_error)

    @property
    def psnr(self) -> float:
        """PSNR in dB by the mean squared error of all frames; infinite where equal."""
        return metrics.decibels(fmean(self.squared_error))

    @cached_property
    def psnrs(self) -> list[float]:
        """PSNR of each frame in dB."""
        return [metrics.decibels(error) for error in self.squared_error]

    @property
    def mean_psnr(self) -> float:
        """The mean of the frames' PSNR, over the frames that differ; infinite where none does."""
        found = [value for value in self.psnrs if math.isfinite(value)]
        return fmean(found) if found else math.inf

    @property
    def worst_frame(self) -> int:
        """The index of the frame with the lowest PSNR."""
        return max(range(len(self.squared_error)), key=self.squared_error.__getitem__)

    @property
    def motions(self) -> list[float]:
        """PSNR of the differences between neighbouring frames, in dB."""
        return [metrics.decibels(error) for error in self.motion]

    @property
    def motion_psnr(self) -> float | None:
        """PSNR of all differences between frames; None for a single frame."""
        return metrics.decibels(fmean(self.motion)) if self.motion else None

    @property
    def mean_ssim(self) -> float | None:
        """The mean of the frames' SSIM; None where it is not defined."""
        return fmean(self.ssim) if not math.isnan(self.ssim[0]) else None

    @property
    def worst_ssim_frame(self) -> int:
        """The index of the frame with the lowest SSIM."""
        return min(range(len(self.ssim)), key=self.ssim.__getitem__)


@dataclass(frozen=True)
class LatentQuality:
    """The measures of latents. errors: the relative error of each latent frame.

    largest: the largest absolute difference of a value.
    """

    error: float
    errors: Sequence[float]
    largest: float

    @property
    def equal(self) -> bool:
        """Whether every value is equal."""
        return self.largest == 0

    @property
    def worst_frame(self) -> int:
        """The index of the latent frame with the largest relative error."""
        return max(range(len(self.errors)), key=self.errors.__getitem__)


Quality = FrameQuality | LatentQuality


def signal_to_noise(error: float) -> float:
    """A relative error in dB; infinite for 0."""
    return -20 * math.log10(error) if error > 0 else math.inf


def look(pair: Pair) -> Facts:
    """Whether a pair can be compared, by headers and first frames.

    Raises:
        UserError: a file cannot be read, or kinds, sizes, rates or numbers of frames differ.
    """
    if pair.of_latents:
        return _facts_of_latents(*_latents(pair))
    with ExitStack() as stack:
        a, b = (stack.enter_context(open_output_frames(path)) for path in (pair.a, pair.b))
        if a.kind != b.kind:
            raise UserError(
                f"{pair.a} is a {a.kind}, but {pair.b} is a {b.kind}: compare two of one kind"
            )
        if a.rate and b.rate and abs(b.rate / a.rate - 1) > _RATE_TOLERANCE:
            raise UserError(
                f"{pair.a} has {float(a.rate):.5g} frames a second, but {pair.b} has "
                f"{float(b.rate):.5g}: give two videos of one rate"
            )
        if a.announced and b.announced and a.announced != b.announced:
            raise _other_count(pair, a.announced, b.announced)
        size = _same_size(pair, next(a.frames), next(b.frames))
        return Facts(
            kind=a.kind,
            what=_what(a, size),
            loss=_loss(a, b),
            differ_in=_differences(a.settings, b.settings),
            notes=a.notes + b.notes,
        )


def measure(pair: Pair) -> Quality:
    """Compare a pair that `look` accepted.

    Raises:
        UserError: a file is damaged, or one ends before the other.
    """
    if not pair.of_latents:
        return _frames(pair)
    a, b = (values for _, values in _latents(pair))
    return LatentQuality(
        metrics.relative_error(a, b),
        metrics.relative_errors_by_frame(a, b).tolist(),
        float(abs(b - a).max()),
    )


def _frames(pair: Pair) -> FrameQuality:
    import numpy as np

    errors: list[float] = []
    similar: list[float] = []
    motion: list[float] = []
    largest = 0
    last: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
    for a, b in _parts(pair):
        errors += metrics.squared_error(a, b).tolist()
        similar += metrics.ssim(a, b).tolist()
        largest = max(largest, int((np.maximum(a, b) - np.minimum(a, b)).max()))
        if last is not None:
            motion += metrics.motion_squared_error(
                np.stack([last[0], a[0]]), np.stack([last[1], b[0]])
            ).tolist()
        motion += metrics.motion_squared_error(a, b).tolist()
        last = a[-1], b[-1]
    return FrameQuality(errors, similar, motion, largest)


def _parts(pair: Pair) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Frames [F, H, W, 3] of both files, some at a time."""
    import numpy as np

    with ExitStack() as stack:
        a, b = (stack.enter_context(open_output_frames(path)) for path in (pair.a, pair.b))
        held: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        size: tuple[int, int] | None = None
        for count, (x, y) in enumerate(zip_longest(a.frames, b.frames)):
            if x is None or y is None:
                rest = sum(1 for _ in (b if x is None else a).frames) + 1
                raise _other_count(pair, count + (y is None) * rest, count + (x is None) * rest)
            if size not in (None, found := _same_size(pair, x, y)):
                raise UserError(
                    f"{pair.a} and {pair.b} change their size at frame {count}: give videos of "
                    "one size"
                )
            size = found
            held.append((x, y))
            if len(held) * x.nbytes >= _HELD:
                yield np.stack([x for x, _ in held]), np.stack([y for _, y in held])
                held = []
        if held:
            yield np.stack([x for x, _ in held]), np.stack([y for _, y in held])


_Latents = tuple[Mapping[str, str], "NDArray[np.float32]"]


def _latents(pair: Pair) -> tuple[_Latents, _Latents]:
    """What both files say of their latents, and the values [4, T, H, W], which can be compared.

    Latents are small: they are read whole, also to be looked at.
    """
    from opensora_sp.jobs.saved_latents import read_latents

    (about_a, tensor_a), (about_b, tensor_b) = read_latents(pair.a), read_latents(pair.b)
    if tensor_a.shape != tensor_b.shape:
        raise UserError(
            f"{pair.a} holds latents {list(tensor_a.shape)}, but {pair.b} {list(tensor_b.shape)}: "
            "give latents of one size and length"
        )
    for name in ("clip", "step"):
        if about_a.get(name) != about_b.get(name):
            raise UserError(
                f"{pair.a} was saved at {name} {about_a.get(name)}, but {pair.b} at {name} "
                f"{about_b.get(name)}: give latents of one clip and step"
            )
    return (about_a, tensor_a.numpy()), (about_b, tensor_b.numpy())


def _facts_of_latents(a: _Latents, b: _Latents) -> Facts:
    settings = []
    for about, _ in (a, b):
        try:
            settings.append(parse_json(about["identity"]))
        except (KeyError, NotJson):
            settings.append(None)
    _, frames, height, width = a[1].shape
    count = plural(frames, "latent frame")
    return Facts(
        kind="latents",
        what=f"{count} of {height}x{width} cells",
        differ_in=_differences(*settings),
    )


def _same_size(pair: Pair, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[int, int]:
    if a.shape != b.shape:
        raise UserError(
            f"{pair.a} has frames of {a.shape[0]}x{a.shape[1]}, but {pair.b} of "
            f"{b.shape[0]}x{b.shape[1]}: nothing is scaled, so give two of one size"
        )
    return a.shape[0], a.shape[1]


def _other_count(pair: Pair, a: int, b: int) -> UserError:
    return UserError(
        f"{pair.a} has {plural(a, 'frame')}, but {pair.b} has {b}: give two videos of one length"
    )


def _what(a: OutputFrames, size: tuple[int, int]) -> str:
    height, width = size
    if a.kind == "picture":
        return f"a picture of {height}x{width}"
    count = "a video" if a.announced is None else plural(a.announced, "frame")
    rate = "" if a.rate is None else f" at {float(a.rate):.5g} a second"
    return f"{count} of {height}x{width}{rate}"


def _loss(a: OutputFrames, b: OutputFrames) -> str | None:
    if a.exact and b.exact:
        return None
    one, two = (a.encoding, b.encoding)
    if a.exact != b.exact:
        lossy, name = ("B", two) if a.exact else ("A", one)
        return f"{lossy} alone is encoded with loss ({name}), whose error the figures hold too"
    if one == two:
        return (
            f"both are encoded with loss ({one}): the figures hold the encoder's error too, and "
            "the same encoder settings are assumed"
        )
    return f"both are encoded with loss (A: {one}, B: {two}), whose errors the figures hold too"


def _differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]] | None:
    """Settings that differ, by name; None where one of the files names none."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return None
    one, two = _flat(a), _flat(b)
    return {
        name: (one.get(name), two.get(name))
        for name in {**one, **two}
        if one.get(name) != two.get(name)
    }


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, those of the request and of the versions among the others."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name in ("request", "versions", "models"):
            prefix = "" if name == "request" else f"{name} "
            found |= {f"{prefix}{inner}": each for inner, each in value.items()}
        elif name != "captions":  # the prompt's, clip by clip
            found[name] = value
    return found
