"""Command: send requests to a server, and wait for what they become where that is asked for."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import note, on_any_screen, one_line, result
from opensora_sp.cli.client.connection import Connection, Refused, check_id, connect, video_path
from opensora_sp.cli.client.fetch import fetch
from opensora_sp.cli.client.flags import FAILED, client_parser, each, run_client

LOOK_SECONDS = 0.5
_USUAL = (
    *("prompt", "prompt_path", "resolution", "aspect_ratio", "num_frames", "image", "extend"),
    *("num_sampling_steps", "seed"),
)


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Submit; returns 0, 1 where a job that was waited for failed, or 2 with one line."""
    return run_client(argv, help_text, _submit)


def help_text(whole: bool) -> str:
    """The command's own flags, then those of generate that go with a request, or the usual ones."""
    from opensora_sp.request.flags.docs import help_entries

    keys: Sequence[str] = _USUAL
    if whole:
        from opensora_sp.cli.client.forms import SUBMITTED

        keys = SUBMITTED
    lines = ["", "what to make, as for generate:", *help_entries(keys)]
    if not whole:
        lines += ["", "opensora-sp submit --help all lists every flag."]
    return parser().format_help() + "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Its own flags; the others are of the flag table."""
    made = client_parser(
        "submit",
        "--prompt P [P ...] [flags]",
        "Sends requests to a server and prints the ids of their jobs. Files that they name are "
        "sent along.",
    )
    made.add_argument(
        "--priority", type=int, metavar="N", help="from 1, which is first, to 1000 (default 100)"
    )
    made.add_argument(
        "--wait", action="store_true", help="show how far they are, until all have ended"
    )
    made.add_argument(
        "-o", "--output", type=Path, metavar="FILE|DIR",
        help="wait, and download to this file (one job) or into this folder",
    )  # fmt: skip
    return made


def _submit(words: list[str]) -> int:
    from opensora_sp.cli.client.forms import forms_of
    from opensora_sp.server.protocol import MOST_PRIORITY

    own, rest = parser().parse_known_args(words)
    if own.priority is not None and not 1 <= own.priority <= MOST_PRIORITY:
        raise UserError(
            f"--priority {own.priority} is not a whole number from 1 to {MOST_PRIORITY}"
        )
    forms = forms_of(rest, {} if own.priority is None else {"priority": str(own.priority)})
    exact = _exact(own.output, len(forms))
    if own.output is not None:  # a job may take hours before its file is written
        from opensora_sp.request.preflight import check_output, check_save_dir

        check_save_dir(str(own.output if exact is None else exact.parent), "-o")
        if exact is not None:
            check_output(exact)
    server = connect(own.server, own.token_file)
    waits = own.wait or own.output is not None
    ids = []
    for form in forms:
        video = server.call("POST", "/v1/videos", form)
        job_id = check_id(str(video.get("id")))
        ids.append(job_id)
        _say_notes(video)
        if not waits:
            result(job_id)
    if not waits:
        return 0
    try:
        return _wait(server, ids, own.output, exact)
    except KeyboardInterrupt:
        note(f"the jobs go on; opensora-sp fetch {' '.join(ids)} downloads them")
        raise


def _say_notes(video: Mapping[str, Any]) -> None:
    """What the server says of the prompt, such as words that the model does not read."""
    found = video.get("notes")
    for line in found if isinstance(found, list) else []:
        note(line)


def _exact(output: Path | None, count: int) -> Path | None:
    """The one file that is meant by -o; None where it is a folder."""
    if output is None or access.is_dir(output) or not output.suffix:
        return None
    if count > 1:
        raise UserError(f"-o {output} is one file for {count} jobs: give a folder")
    return output


def _wait(server: Connection, ids: Sequence[str], output: Path | None, exact: Path | None) -> int:
    """Until every job has ended; each is downloaded when it has, where that is asked for."""
    line, code, left = ProgressLine(len(ids)), 0, list(ids)
    while left:
        videos = [_standing(server, job_id) for job_id in left]
        for job_id, video in zip(tuple(left), videos, strict=True):
            if video.get("status") not in ("completed", "failed"):
                continue
            left.remove(job_id)
            line.clear()
            if video["status"] == "failed":
                error = video.get("error")
                said = error.get("message") if isinstance(error, Mapping) else "it failed"
                print(f"error: {job_id}: {one_line(said)}", file=sys.stderr, flush=True)
                code = FAILED
            elif output is None:
                result(job_id)
            else:
                code |= each([job_id], partial(fetch, server, folder=output, exact=exact))
        if left:
            line.show(videos)
            time.sleep(LOOK_SECONDS)
    line.clear()
    return code


def _standing(server: Connection, job_id: str) -> Mapping[str, Any]:
    """A job as the server shows it; one that somebody has deleted counts as failed."""
    try:
        return server.call("GET", video_path(job_id))
    except Refused as error:
        if error.status != 404:
            raise
        return {"status": "failed", "error": {"message": str(error)}}


class ProgressLine:
    """How far the jobs are, in one line of a terminal; nothing where the screen is none."""

    def __init__(self, count: int) -> None:
        self._count, self._shown = count, 0

    def show(self, videos: Sequence[Mapping[str, Any]]) -> None:
        """Of the jobs that have not ended."""
        if not sys.stderr.isatty():
            return
        text = progress_text(videos, self._count)
        self.clear()
        sys.stderr.write(text)
        sys.stderr.flush()
        self._shown = len(text)

    def clear(self) -> None:
        """Leave an empty line."""
        if self._shown:
            sys.stderr.write("\r" + " " * self._shown + "\r")
            sys.stderr.flush()
            self._shown = 0


def progress_text(videos: Sequence[Mapping[str, Any]], count: int) -> str:
    """As "2 of 3 ended; 40 %, step 12 of 30, about 8 s left"."""
    left = [video for video in videos if video.get("status") not in ("completed", "failed")]
    done = f"{count - len(left)} of {count} ended; " if count > 1 else ""
    made = next((video for video in left if video.get("status") == "in_progress"), None)
    if made is None:
        place = left[0].get("queue_position") if left else None
        return one_line(f"{done}queued" + (f", {place} before it" if place else ""))[:78]
    said = f"{done}{made.get('progress', 0)} %, {made.get('stage', '')}"
    said += f", step {made.get('step', 0)} of {made.get('steps', 0)}"
    if isinstance(made.get("eta_s"), (int, float)):
        said += f", about {made['eta_s']:.0f} s left"
    return one_line(said)[:78]


if __name__ == "__main__":
    sys.exit(main())
