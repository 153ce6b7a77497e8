"""The server's logs: text for people, or one JSON object a line on standard error.

Each object has time, level, logger and message, and job and rank where there are any. Lines that
were printed, by libraries, by the launcher or over an error, become objects too. They hold no
prompt unless that was asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import IO, Any, TextIO

from opensora_sp.base.errors import printable
from opensora_sp.base.outside_json import NotJson, parse_json
from opensora_sp.base.redaction import redacted

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning")
# Their own handlers would print beside ours.
_LIBRARIES = ("dbos", "uvicorn", "uvicorn.error", "py.warnings")
# Of a prompt, so many words in a row are hidden; characters of scripts without spaces are words.
_RUN, _SHORTEST_HIDDEN = 3, 4
_WORD = re.compile(r"[A-Za-z0-9]+|\w")
_LONGEST_LINE = 32_768


def hidden(text: str, prompts: Sequence[str]) -> str:
    """A text in which no run of `_RUN` words of a prompt is left, and no shorter prompt whole.

    Words and not the whole: messages quote a prompt cleaned, shortened and with its scores.
    """
    for prompt in prompts:
        text = _without(text, _spans(text, prompt))
    return text


def _spans(text: str, prompt: str) -> list[tuple[int, int]]:
    """Where a text holds runs of words of a prompt: begins and ends, in order, apart."""
    asked = [word.lower() for word in _WORD.findall(prompt)]
    run = min(_RUN, len(asked))
    if run == 0 or len(prompt.strip()) < _SHORTEST_HIDDEN:
        return []
    runs = {tuple(asked[n : n + run]) for n in range(len(asked) - run + 1)}
    words = list(_WORD.finditer(text))
    said = [word[0].lower() for word in words]
    spans: list[tuple[int, int]] = []
    for n in range(len(said) - run + 1):
        if tuple(said[n : n + run]) in runs:
            start, end = words[n].start(), words[n + run - 1].end()
            if spans and start <= spans[-1][1]:
                start = spans.pop()[0]
            spans.append((start, end))
    return spans


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    for start, end in reversed(spans):
        text = f"{text[:start]}(a prompt){text[end:]}"
    return text


class _Now:
    """The job that this process makes, and what is hidden in every line that it writes."""

    job: str | None = None
    hide: Callable[[str], str] = staticmethod(lambda text: text)


@contextmanager
def about_job(job_id: str) -> Iterator[None]:
    """Lines that are written in this block are about this job."""
    before, _Now.job = _Now.job, job_id
    try:
        yield
    finally:
        _Now.job = before


def hide_in_lines(hide: Callable[[str], str]) -> None:
    """From here on every JSON line that this process writes or relays goes through `hide`."""
    _Now.hide = staticmethod(hide)  # type: ignore[assignment]


def line(level: str, logger: str, message: str, **more: Any) -> str:
    """One object. more: further keys; those that are None are left out."""
    content: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "level": level,
        "logger": logger,
        "message": _Now.hide(redacted(message[:_LONGEST_LINE])),
    }
    more = {"job": _Now.job} | more
    return json.dumps(content | {key: value for key, value in more.items() if value is not None})


class JsonFormatter(logging.Formatter):
    """A record as one JSON object. rank: of the engine's rank, None in the gateway."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """The object; `job` is what the record's `extra` says, or the job that is made."""
        error = None
        if record.exc_info:
            error = _Now.hide(redacted(self.formatException(record.exc_info)))
        return line(
            record.levelname.lower(),
            record.name,
            record.getMessage(),
            job=getattr(record, "job", _Now.job),
            rank=self._rank,
            exception=error,
        )


class JsonStream:
    """A text stream that writes each line that is printed as an object, on another stream."""

    def __init__(self, stream: TextIO, rank: int | None = None) -> None:
        self.stream, self._rank = stream, rank
        self._rest, self._lock = "", threading.Lock()

    def write(self, text: str) -> int:
        """Any text; what does not end with a line end waits for the next."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for one in lines:
                if (whole := as_json(one, self._rank)) is not None:
                    self.stream.write(whole + "\n")
            self.stream.flush()
        return len(text)

    def flush(self) -> None:
        """The stream's."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Never: nothing is redrawn."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def as_json(text: str, rank: int | None = None) -> str | None:
    """A printed line as an object. One that is an object already only has its prompts hidden.

    None for an empty line.
    """
    text = text.rstrip("\r").rpartition("\r")[2]  # of a bar that was redrawn, the last state
    if not text.strip():
        return None
    with contextlib.suppress(NotJson):
        found = parse_json(text) if text.startswith("{") else None
        if isinstance(found, dict) and found.keys() >= {"time", "level", "message"}:
            for key in ("message", "exception"):
                if isinstance(found.get(key), str):
                    found[key] = _Now.hide(found[key])
            return json.dumps(found)
    level = "error" if re.match(r"(rank \d+: )?error:", text) else "info"
    level = "warning" if text.startswith(("note:", "warning:")) else level
    return line(level, "stderr", printable(text), rank=rank)


def write_json(rank: int | None = None) -> None:
    """From here on this process writes JSON lines on standard error. rank: as for a formatter."""
    stream = sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(rank))
    logging.getLogger("opensora_sp").handlers[:] = [handler]
    logging.getLogger().handlers[:] = [handler]
    logging.captureWarnings(True)
    sys.stderr = JsonStream(stream, rank)  # type: ignore[assignment]
    quieten_libraries()


def set_level(level: str) -> None:
    """What is said of the server's own messages, one of `LEVELS`; libraries say warnings."""
    logging.getLogger("opensora_sp.server").setLevel(level.upper())


def quieten_libraries() -> None:
    """Have libraries speak through our handler; again after one has set up its own."""
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        # Not through the root's: a library without a handler would add one.
        library.handlers[:] = logging.getLogger().handlers
        library.propagate = False


def relay(pipe: IO[bytes]) -> None:
    """Copy what the engine's processes print, as JSON lines, to standard error until they end."""
    for raw in iter(lambda: pipe.readline(_LONGEST_LINE), b""):
        target = sys.stderr.stream if isinstance(sys.stderr, JsonStream) else sys.stderr
        with contextlib.suppress(Exception):
            text = raw.decode("utf-8", "replace").rstrip("\n")
            if (whole := as_json(text)) is not None:
                target.write(whole + "\n")
                target.flush()
