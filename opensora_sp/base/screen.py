"""What a command says, on any screen: one that is not UTF-8, that is full, closed or a pipe.

What was done is told by the exit code and the files, so saying it never ends a run: what a screen
cannot show is replaced, and a screen that is gone is done without. Imports no torch.

The rooms below the commands speak through `logging`, under loggers named opensora_sp.…; a command
puts a handler there that shows their records on standard error. Whoever uses the package from
Python sees warnings alone, as of any library, until he configures logging.
"""

from __future__ import annotations

import codecs
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import wraps
from typing import Any, TextIO

from opensora_sp.base.errors import escaped, printable
from opensora_sp.base.redaction import redacted

MOST_SHOWN = 800  # characters of one message
_REPLACED = "opensora_sp.replaced"
_noted: set[str] = set()


def one_line(message: object) -> str:
    """A message as one printable line of at most `MOST_SHOWN` characters.

    White space of any kind becomes single spaces, what is secret in addresses and keys are left
    out, and of one that is too long the middle goes.
    """
    text = printable(redacted(" ".join(str(message).split())))
    if len(text) <= MOST_SHOWN:
        return text
    # The end says what to do, so it stays.
    half = (MOST_SHOWN - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _between_bars() -> AbstractContextManager[None]:
    """While something is printed, progress bars leave their line: a thread may print beside one."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        return nullcontext()
    found: AbstractContextManager[None] = tqdm.tqdm.external_write_mode(file=sys.stderr)
    return found


def note(message: object) -> None:
    """Say on standard error what a person should know and nobody need mend."""
    with _between_bars():
        print(f"note: {one_line(message)}", file=sys.stderr, flush=True)


@contextmanager
def nothing_on_stdout() -> Iterator[None]:
    """While a library works that writes to standard output by itself, where results are awaited.

    The Gloo of torch 2.10 tells there of every group of ranks, from C++. Of the whole process, so
    it is for moments in which no thread has a result to print.
    """
    try:
        sys.stdout.flush()
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError, AttributeError):  # closed, or none
        yield
        return
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def warn_once(log: logging.Logger, kind: str, message: object) -> None:
    """Log a warning, but of each kind of trouble only the first time in a command."""
    if kind not in _noted:
        _noted.add(kind)
        log.warning(message)


def shown_record(record: logging.LogRecord) -> str:
    """A log record as the screen shows it.

    A warning is a note and an error an error, each one bounded line; information is shown whole,
    and whoever logs it bounds what people may have written there.
    """
    said = record.getMessage()
    if record.levelno >= logging.ERROR:
        return f"error: {one_line(said)}"
    if record.levelno >= logging.WARNING:
        return f"note: {one_line(said)}"
    return "\n".join(printable(line) for line in said.split("\n"))


class _OnScreen(logging.Handler):
    """Shows records on standard error as it is when they come: --log-dir takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        with _between_bars():
            print(shown_record(record), file=sys.stderr, flush=True)


@contextmanager
def log_on_screen() -> Iterator[None]:
    """While the block runs, standard error shows what the package logs, and nobody else does."""
    log = logging.getLogger("opensora_sp")
    before = log.level, log.propagate, log.handlers[:]
    # Only this handler: one of a surrounding command, or of the root logger, would say it again.
    log.handlers[:] = [_OnScreen()]
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.setLevel(before[0])
        log.propagate, log.handlers[:] = before[1], before[2]


def result(path: object) -> None:
    """Print the path of something that was made on standard output.

    A terminal gets it printable; a file or a program gets the name itself, to open it by.
    """
    text = str(path)
    with suppress(Exception):
        if sys.stdout.isatty():
            text = printable(text)
    with _between_bars():
        print(text, flush=True)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """Codec error handler: bytes of file names as they are, other characters as escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    if error.encoding.lower().replace("-", "") == "utf8" and all(
        0xDC80 <= ord(c) <= 0xDCFF for c in found
    ):
        return found.encode("utf-8", "surrogateescape"), error.end
    return "".join(escaped(c) for c in found), error.end


codecs.register_error(_REPLACED, _replaced)


class _Screen:
    """A text stream that takes everything: it never raises for what the system does to it."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._gone = stream, name, False

    def write(self, text: str) -> int:
        """Any text."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Any texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As far as there is something to flush to."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """As the stream."""
        return not self._gone and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            action()
        except UnicodeEncodeError:  # a stream that could not be told to replace
            with suppress(Exception):
                self._stream.write("(a line that this screen cannot show)\n")
        except (OSError, ValueError) as error:  # ValueError: closed by somebody
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._gone = True
        with suppress(Exception):
            # What is left in the buffer goes there when Python ends, which else would make it 120.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        # A reader that has had enough, such as head, is no news.
        if self._name == "stdout" and getattr(error, "errno", None) != errno.EPIPE:
            reason = getattr(error, "strerror", None) or str(error)
            note(
                f"standard output takes nothing more ({reason}): the work goes on, and the exit "
                "code tells how it ended"
            )


@contextmanager
def robust_screen() -> Iterator[None]:
    """While the block runs, standard output and error may be anything: see the module."""
    _noted.clear()
    _open_missing()
    before = sys.stdout, sys.stderr
    handlers = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        handlers.append((stream, getattr(stream, "errors", None)))
        with suppress(Exception):  # one that was put there by a test or a host program
            raw = name == "stdout" and not stream.isatty()
            stream.reconfigure(errors=_REPLACED if raw else "backslashreplace")
        setattr(sys, name, _Screen(stream, name))
    screens = sys.stdout, sys.stderr
    try:
        with log_on_screen():
            yield
    finally:
        for screen in screens:
            screen.flush()
        for stream, errors in handlers:
            with suppress(Exception):
                stream.reconfigure(errors=errors)
        sys.stdout, sys.stderr = before


def _open_missing() -> None:
    """Where a standard stream was closed, open nothing in its place: no file may get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                null = os.open(os.devnull, os.O_RDWR)
                if null != number:
                    try:
                        os.fstat(number)
                    except OSError:
                        os.dup2(null, number)
                    os.close(null)
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (it stays open)
            setattr(sys, name, stream)


def on_any_screen(main: Callable[..., int]) -> Callable[..., int]:
    """A command's `main` that runs on any screen."""

    @wraps(main)
    def run(*arguments: Any, **named: Any) -> int:
        with robust_screen():
            return main(*arguments, **named)

    return run
