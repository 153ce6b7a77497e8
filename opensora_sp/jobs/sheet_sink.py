"""Collection of a contact sheet's frames, from the frames on their way to the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.media.contact_sheet import Picture, SheetEntry, chosen_frames, picture, write_sheet
from opensora_sp.request.caption_notes import captions
from opensora_sp.request.conditions import total_frames
from opensora_sp.request.request import Request, Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opensora_sp.media.sinks import Sink

MOST_WIDE = 640  # pixels; a wider frame is scaled down


class PickingSink:
    """A sink that passes frames on, and keeps the first, the middle and the last of them.

    count: how many frames will come. frames: the kept ones by index, uint8 [h,w,3], at most
    `MOST_WIDE` pixels wide. A reference to `frames` does not keep the sink or its encoder alive.
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
    """One output. frames: the picked frames until it is done. pictures: those for the page.

    It does not hold the sink, which would keep the output's encoder alive.
    """

    task: Task
    frames: dict[int, NDArray[np.uint8]]
    pictures: dict[int, Picture] = field(default_factory=dict)
    seconds: float | None = None


@dataclass
class RunSheet:
    """The contact sheet of a run, filled output by output on the leading rank.

    Of a finished output it keeps only what the page needs.
    """

    _watched: list[_Watched] = field(default_factory=list)

    def watch(self, task: Task, sink: Sink) -> Sink:
        """Add a task to the sheet. Returns a sink that passes frames on to `sink`."""
        picked = PickingSink(sink, total_frames(task.request))
        self._watched.append(_Watched(task, picked.frames))
        return picked

    @staticmethod
    def joined(sheets: Sequence[RunSheet], order: Sequence[Path]) -> RunSheet:
        """One sheet from the sheets of several ranks. order: the outputs of the whole run."""
        every = [watched for sheet in sheets for watched in sheet._watched]
        return RunSheet(sorted(every, key=lambda watched: order.index(watched.task.output)))

    def took(self, batch: Sequence[Task], seconds: float) -> None:
        """Store the seconds of a finished batch for each of its tasks, and make their pictures."""
        for watched in self._watched:
            if watched.task in batch:
                watched.seconds = seconds
                watched.pictures = {i: picture(frame) for i, frame in watched.frames.items()}
                watched.frames = {}

    @property
    def is_empty(self) -> bool:
        """Whether the sheet has no output."""
        return not self._watched

    def forget(self, batch: Sequence[Task]) -> None:
        """Remove the tasks of a batch that is started again, or not made, from the sheet."""
        self._watched = [watched for watched in self._watched if watched.task not in batch]

    def write(
        self,
        path: Path,
        description: Mapping[str, Any],
        timings: Mapping[str, float | None],
    ) -> None:
        """Write the page, whole or not at all.

        description: the metadata of the run's files. Instead of its "request" the page shows the
        fields that all requests share; the other fields are beside each output. timings: seconds by
        stage. Raises UserError where the page cannot be written.
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
    """The fields, except the prompt, that all requests share."""
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
    pictures = sorted(watched.pictures.items())
    return SheetEntry(
        output=watched.task.output,
        prompt=request.prompt,
        frames=[frame for _, frame in pictures],
        labels=[_label(index, request) for index, _ in pictures],
        details=details,
    )


def _label(index: int, request: Request) -> str:
    if request.is_image:
        return "image"
    return f"frame {index}, {index / request.save_fps:.2f} s"
