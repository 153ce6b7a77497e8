"""--log-dir: a file per rank with everything that the rank prints.

The file holds what Python code prints, its warnings and its last exception. Output of native
libraries is not in it; torchrun's own --log-dir and --tee catch that.
"""

from __future__ import annotations

import errno
import faulthandler
import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from opensora_sp.base.errors import UserError
from opensora_sp.base.launcher import read_launch
from opensora_sp.base.redaction import redacted
from opensora_sp.base.screen import note


class _Log:
    """The file of a rank. When it cannot be written, one note is printed and the run goes on."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file, self._gone = path, file, False

    def put(self, line: str) -> None:
        """Write a line and flush it."""
        if self._gone:
            return
        try:
            print(line, file=self._file, flush=True)
        except OSError as error:
            self._end(error)

    def close(self) -> None:
        """Close the file. Lines that it could not take are lost."""
        with suppress(OSError):  # closing tries to write buffered lines again
            self._file.close()

    def _end(self, error: OSError) -> None:
        self._gone = True
        note(f"--log-dir: {self._path} takes no more ({error.strerror}): the run goes on without")


class _Tee(io.TextIOBase):
    """A stream that also writes each line, with the time, into a log."""

    def __init__(self, stream: TextIO, log: _Log, mark: str) -> None:
        self._stream, self._log, self._mark, self._line = stream, log, mark, ""

    def write(self, text: str) -> int:
        """Write text. A progress bar redraws its line; the log gets the last state of it."""
        self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._put(line)
        return len(text)

    def flush(self) -> None:
        """Flush the stream. The log is flushed with each line."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal. Progress bars ask for it."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's."""
        return self._stream.encoding

    def end(self) -> None:
        """Log the last line, if it has no line end."""
        if self._line:
            self._put(self._line)
            self._line = ""

    def _put(self, line: str) -> None:
        now = datetime.now().isoformat(sep=" ", timespec="milliseconds")
        self._log.put(f"{now} {self._mark} {redacted(line.rpartition(chr(13))[2])}")


def rank_log(directory: str | None) -> AbstractContextManager[None]:
    """A context in which this rank's output also goes to `directory`/rank-N.log.

    directory None: no log. Raises UserError where the file cannot be created.
    """
    if directory is None:
        return nullcontext()
    return _logging(Path(directory) / f"rank-{read_launch().rank}.log")


@contextmanager
def _logging(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            note(f"--log-dir: {path} takes nothing ({error.strerror}): the run goes on without")
            yield
            return
        raise UserError(f"--log-dir: cannot write {path}: {error.strerror}") from None
    log = _Log(path, file)
    out, err = sys.stdout, sys.stderr
    tees = _Tee(out, log, "out"), _Tee(err, log, "err")
    with closing(log):
        faulthandler.enable(file)  # a crash in native code writes the Python stack here
        sys.stdout, sys.stderr = tees  # type: ignore[assignment]
        log.put(f"process {os.getpid()}: {redacted(' '.join(sys.argv))}")
        try:
            yield
        except BaseException:
            # A caller may print it too. The log has it even if this process is killed before that.
            log.put(redacted(traceback.format_exc()))
            raise
        finally:
            sys.stdout, sys.stderr = out, err
            for tee in tees:
                tee.end()
            faulthandler.disable()
