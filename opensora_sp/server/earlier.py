"""Files of earlier jobs that a new one goes on from. A client gives ids, never paths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensora_sp.base.value_types import shown
from opensora_sp.server.board import Board, Entry
from opensora_sp.server.job_store import JobStore
from opensora_sp.server.protocol import BadRequest
from opensora_sp.server.uploads import picture_or_video

# Continue the output of an earlier job; take the files that came with one.
EXTEND, REUSE = "extend_video_id", "files_of_video_id"

Upload = tuple[str, str, str]


def files_of_earlier_jobs(
    store: JobStore,
    board: Board,
    sees: Callable[[Entry], bool],
    job_id: str,
    fields: dict[str, Any],
    uploads: list[Upload],
) -> list[Upload]:
    """The uploads of a new job, with what its fields ask for of earlier ones.

    The files become the new job's own, so that the earlier one may be deleted. sees: whose jobs the
    caller may use. Raises BadRequest for an id that is not there or has no such file, and QueueLost
    where a shared queue would have to be asked and does not answer.
    """
    found = list(uploads)
    for name in (EXTEND, REUSE):
        asked = fields.get(name)
        if asked in (None, ""):
            continue
        entry = board.get(asked) if isinstance(asked, str) else None
        if isinstance(asked, str) and board.others and (entry is None or entry.live):
            entry = board.seek(asked)  # another gateway may know more of it already
        if entry is None or not sees(entry):
            raise BadRequest(f"{name} {shown(asked)} is not one of the videos", name)
        if name == REUSE:
            for field, file in entry.spec.shown.get("files", []):
                source = store.uploads(entry.spec.id) / Path(file).name
                path = _own(source, store, job_id, found, name)
                found.append((field, str(path), picture_or_video(path)))
            continue
        output = store.output(entry.spec.id)
        if output is None:
            raise BadRequest(f"{name} {shown(asked)} is {entry.status}: it has no video", name)
        path = _own(output, store, job_id, found, name)
        kind = picture_or_video(path)
        found.append(("image" if kind == "picture" else "extend", str(path), kind))
    return found


def _own(file: Path, store: JobStore, job_id: str, uploads: list[Upload], name: str) -> Path:
    """A file under a name of the new job's; a link where the file system has them.

    name: the field that asks for it. Raises BadRequest where the earlier job is deleted just now.
    """
    folder = store.uploads(job_id)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(uploads)}{file.suffix}"
    try:
        os.link(file, path)
    except OSError:
        try:
            shutil.copyfile(file, path)
        except FileNotFoundError:
            raise BadRequest(f"{name}: the files of that video are gone", name) from None
    return path
