"""What a contact sheet shows of a run, picked from the frames as they stream past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.media.contact_sheet import Picture, SheetEntry, chosen_frames, picture, write_sheet
from opensora_sp.request.caption_notes import captions
from opensora_sp.request.conditions import dropped_frames
from opensora_sp.request.request import Request, Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opensora_sp.media.sinks import Sink

MOST_WIDE = 640  # pixels of a kept frame


def total_frames(request: Request) -> int:
    """Frames of the whole output: every later clip drops those it repeats."""
    repeated = min(dropped_frames(request), request.num_frames)
    return request.num_frames + (request.loop - 1) * (request.num_frames - repeated)


class PickingSink:
    """A sink that keeps the first, the middle and the last frame of those it passes on.

    count: how many frames will come. frames: what was kept so far, [h,w,3] uint8 by index, at
    most `MOST_WIDE` pixels wide. Whoever keeps `frames` does not keep the sink or its encoder.
    """

    def __init__(self, sink: Sink | None, count: int) -> None:
        self.frames: dict[int, NDArray[np.uint8]] = {}
        self._sink = sink
        self._chosen = chosen_frames(count)
        self._seen = 0

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3], the next F frames."""
        for index in self._chosen:
            if 0 <= index - self._seen < len(frames):
                self.frames[index] = thumbnail(frames[index - self._seen])
        self._seen += len(frames)
        if self._sink is not None:
            self._sink.write(frames)


def thumbnail(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy of a frame [H,W,3], scaled to `MOST_WIDE` pixels where it is wider."""
    import numpy as np
    from PIL import Image

    height, width, _ = frame.shape
    if width <= MOST_WIDE:
        return frame.copy()
    size = (MOST_WIDE, max(1, round(height * MOST_WIDE / width)))
    return np.array(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


@dataclass
class _Watched:
    """One output. frames: its picked ones by index until it is done; pictures: those on the page.

    Never the sink itself: it holds the output's encoder, which is to end with the output.
    """

    task: Task
    frames: dict[int, NDArray[np.uint8]]
    pictures: dict[int, Picture] = field(default_factory=dict)
    seconds: float | None = None


@dataclass
class RunSheet:
    """The contact sheet of a run, filled output by output on the leading rank.

    Of a finished output it keeps what the page will hold, and nothing else.
    """

    _watched: list[_Watched] = field(default_factory=list)

    def watch(self, task: Task, sink: Sink) -> Sink:
        """Put the task on the sheet; what is written to the sink that returns goes on to `sink`."""
        picked = PickingSink(sink, total_frames(task.request))
        self._watched.append(_Watched(task, picked.frames))
        return picked

    @staticmethod
    def joined(sheets: Sequence[RunSheet], order: Sequence[Path]) -> RunSheet:
        """One sheet of several ranks' outputs, in the order of the whole run's."""
        every = [watched for sheet in sheets for watched in sheet._watched]
        return RunSheet(sorted(every, key=lambda watched: order.index(watched.task.output)))

    def took(self, batch: Sequence[Task], seconds: float) -> None:
        """Note how long a finished batch took, for each of its tasks; their frames are complete."""
        for watched in self._watched:
            if watched.task in batch:
                watched.seconds = seconds
                watched.pictures = {i: picture(frame) for i, frame in watched.frames.items()}
                watched.frames = {}

    @property
    def is_empty(self) -> bool:
        """Whether no output is on it."""
        return not self._watched

    def forget(self, batch: Sequence[Task]) -> None:
        """Take the tasks of a batch that is begun anew, or not made at all, off the sheet."""
        self._watched = [watched for watched in self._watched if watched.task not in batch]

    def write(
        self,
        path: Path,
        description: Mapping[str, Any],
        timings: Mapping[str, float | None],
    ) -> None:
        """Write the page, whole or not at all.

        description: of the run, as its files carry it; its "request" is replaced by what all
        requests share, and what differs stands beside each output. timings: seconds by stage.
        Raises UserError where it cannot be written.
        """
        requests = [watched.task.request for watched in self._watched]
        shared = _shared(requests)
        write_sheet(
            path,
            entries=[_entry(watched, shared) for watched in self._watched],
            settings={k: None if v == "" else v for k, v in shared.items()}
            | {k: v for k, v in description.items() if k != "request"},
            timings=timings,
        )


def _shared(requests: Sequence[Request]) -> dict[str, Any]:
    """The fields, without the prompt, that are the same for every request."""
    each = [request.public_dict() for request in requests]
    return {
        name: value
        for name, value in each[0].items()
        if name != "prompt" and all(other[name] == value for other in each)
    }


def _entry(watched: _Watched, shared: Mapping[str, Any]) -> SheetEntry:
    request = watched.task.request
    height, width = request.decoded_size
    details: dict[str, Any] = {"size": f"{width}×{height}"}
    if not request.is_image:
        frames = total_frames(request)
        details["frames"] = frames
        details["length"] = f"{frames / request.save_fps:.2f} s"
    if watched.seconds is not None:
        details["made in"] = f"{watched.seconds:.1f} s"
    own = request.public_dict()
    details |= {name: own[name] for name in own if name != "prompt" and name not in shared}
    details["the model is told"] = " | ".join(captions(request))
    kept = sorted(watched.pictures.items())
    return SheetEntry(
        output=watched.task.output,
        prompt=request.prompt,
        frames=[frame for _, frame in kept],
        labels=[_label(index, request) for index, _ in kept],
        details=details,
    )


def _label(index: int, request: Request) -> str:
    if request.is_image:
        return "image"
    return f"frame {index}, {index / request.save_fps:.2f} s"
