"""Generate through a shared queue: a list of prompts of any length, put on the queue and followed.

    opensora-sp generate --queue URL --save-dir SHARED --prompt-path prompts.txt --num-frames 17

Each prompt is a job of its own, as if it stood alone. A job's id is made of what it asks for, so
the same list sent twice makes nothing twice. The list is read as it is queued, and only what is
queued is kept in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from opensora_sp.base.errors import Stopped, UserError
from opensora_sp.base.screen import one_line, result
from opensora_sp.base.value_types import shown
from opensora_sp.base.wording import plural
from opensora_sp.cli.console import world_size
from opensora_sp.cli.help import help_asked, say
from opensora_sp.cli.parser import RefusingParser

if TYPE_CHECKING:
    from opensora_sp.server.job_store import JobSpec
    from opensora_sp.server.shared_queue import SharedQueue
    from opensora_sp.server.shared_store import SharedStore

# So many prompts are looked up and queued in one statement.
BATCH = 500
LOOK_SECONDS = 0.5
MOST_NAMED = 5
Spec = Callable[[str], "JobSpec"]


def run(words: Sequence[str]) -> int:
    """Queue the prompts and follow them; 0: all are there, 1: some failed. Raises UserError."""
    if help_asked(words) is not None:
        return say(parser().format_help())
    found, rest = parser().parse_known_args(list(words))
    if world_size() > 1:
        raise UserError("--queue takes no launcher: the groups of the queue have the ranks")
    if not 0 < found.queued <= 1_000_000:
        raise UserError(f"--queued {found.queued} is not a number of jobs from 1 to 1000000")
    from opensora_sp.server.queue_url import QUEUE_VARIABLE, parse_queue_url
    from opensora_sp.server.settings import require_packages

    url = parse_queue_url(found.queue or os.environ.get(QUEUE_VARIABLE, ""))
    require_packages("psycopg")
    from opensora_sp.server.shared_queue import SharedQueue
    from opensora_sp.server.shared_store import SharedStore, require_same_folder

    spec = _specs(rest, found.save_dir)
    with _prompts(found.prompt_path) as lines, _Failures(found.prompt_path) as failures:
        queue = SharedQueue(url, "opensora-sp list")
        queue.prepare()
        require_same_folder(found.save_dir, queue, url)
        store = SharedStore(found.save_dir, lambda _: 0, lambda _: None)
        follow = Follow(queue, store, spec, failures, found.queued, found.retry_failed)

        def stop(number: int, _frame: Any) -> None:
            raise Stopped(number)

        before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            follow.all(_texts(lines))
        except Stopped as stopped:
            print(follow.summary(), file=sys.stderr)
            print(
                "stopped: what is queued is made all the same; the same command goes on from here",
                file=sys.stderr,
            )
            return 128 + stopped.number
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
            queue.close()
        print(follow.summary(), file=sys.stderr)
        return 1 if failures.count else 0


def parser() -> argparse.ArgumentParser:
    """Its own flags; those of a request are of the flag table."""
    parser = RefusingParser(
        prog="opensora-sp generate --queue URL",
        description=(
            "Puts a list of prompts on a queue that groups (opensora-sp work) share, and follows "
            "it. Flags of generate that say what to make (--num-frames, --image-size, --seed ...) "
            "are taken for all prompts; the groups have those that say how."
        ),
        add_help=False,
        allow_abbrev=False,  # --prompt is not short for --prompt-path
    )
    parser.add_argument("--queue", metavar="URL", help="the database that the groups share")
    parser.add_argument(
        "--save-dir", type=Path, required=True, metavar="DIR", help="the folder that they share"
    )
    parser.add_argument(
        "--prompt-path", required=True, metavar="FILE",
        help="one prompt a line, in UTF-8; - reads standard input; lines that begin with '# ' are "
        "comments",
    )  # fmt: skip
    parser.add_argument(
        "--queued", type=int, default=1000, metavar="N",
        help="the most jobs of the list that are queued at once (default 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--retry-failed", action="store_true", help="make what has failed before once more"
    )
    return parser


@dataclass
class Counts:
    """How many prompts have come how far."""

    read: int = 0
    there: int = 0
    made: int = 0


class Follow:
    """Puts jobs on the queue and looks how they end. Holds what is queued, not the list.

    most: the most jobs that are queued at once. again: whether those that failed before are made
    once more.
    """

    def __init__(
        self,
        queue: SharedQueue,
        store: SharedStore,
        spec: Spec,
        failures: _Failures,
        most: int,
        again: bool,
    ) -> None:
        self._queue, self._store, self._spec = queue, store, spec
        self._failures, self._most, self._again = failures, most, again
        self._waiting: dict[str, str] = {}
        self.counts = Counts()

    def all(self, texts: Iterator[str]) -> None:
        """Queue every prompt, and return when all have ended."""
        more, looked = True, 0.0
        while more or self._waiting:
            room = min(BATCH, self._most - len(self._waiting))
            batch = list(islice(texts, room)) if more else []
            more = more and (room == 0 or bool(batch))
            if batch:
                self._put(batch)
            if time.monotonic() - looked > LOOK_SECONDS:
                self._look()
                looked = time.monotonic()
            elif not batch:
                time.sleep(LOOK_SECONDS / 5)

    def summary(self) -> str:
        """How far the list is, in a line."""
        counts = self.counts
        parts = [plural(counts.read, "prompt"), f"{counts.made} made"]
        parts.append(f"{counts.there} were there or stand twice")
        if self._waiting:
            parts.append(f"{len(self._waiting)} queued")
        return f"{', '.join(parts)}, {self._failures.count} failed{self._failures.where()}"

    def _put(self, batch: Sequence[str]) -> None:
        self.counts.read += len(batch)
        specs: dict[str, JobSpec] = {}
        texts: dict[str, str] = {}
        for text in batch:
            try:
                spec = self._spec(text)
            except UserError as refused:
                self._failures.add(text, str(refused))
                continue
            if spec.id in specs or spec.id in self._waiting:
                self.counts.there += 1
            specs[spec.id], texts[spec.id] = spec, text
        known = _until_it_answers(lambda: self._queue.outcomes(specs))
        again = []
        for job_id, (state, error, _) in known.items():
            if state == "ended" and error is None:
                self.counts.there += 1
            elif state == "ended" and self._again:
                again.append(job_id)
            elif state == "ended":
                self._failures.add(texts[job_id], error or "")
        new = [one for name, one in specs.items() if known.get(name, ("gone",))[0] == "gone"]
        if new:
            _until_it_answers(lambda: self._queue.put_many(new))
        if again:
            _until_it_answers(lambda: self._queue.make_again(again))
        for job_id in specs:
            state = known.get(job_id, ("gone",))[0]
            if state != "ended" or job_id in again:
                self._waiting[job_id] = texts[job_id]

    def _look(self) -> None:
        """Take out what has ended, or was deleted by somebody."""
        found = _until_it_answers(lambda: self._queue.outcomes(self._waiting))
        for job_id, text in list(self._waiting.items()):
            state, error, output = found.get(job_id, ("gone", None, None))
            if state == "gone":
                self._failures.add(text, "it was deleted")
            elif state != "ended":
                continue
            elif error is not None:
                self._failures.add(text, error)
            else:
                self.counts.made += 1
                attempt, file = output or (0, "")
                result(self._store.attempt(job_id, attempt) / file)
            del self._waiting[job_id]


class _Failures:
    """Prompts that failed, each under its reason, in a file that can be given as a list again."""

    def __init__(self, prompt_path: str) -> None:
        name = "prompts" if prompt_path == "-" else Path(prompt_path).name
        self._path = Path(f"{name}.failed.txt")
        self._file: IO[str] | None = None
        self._named: list[str] = []
        self.count = 0

    def __enter__(self) -> _Failures:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, text: str, reason: str) -> None:
        """Note a prompt. The first ones are said, too."""
        if self._file is None:
            try:
                self._file = self._path.open("w", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{self._path} cannot be written: {error.strerror}") from None
        self.count += 1
        self._file.write(f"# {one_line(reason)}\n{text}\n")
        self._file.flush()
        if self.count <= MOST_NAMED:
            print(f"failed: {one_line(text)}: {one_line(reason)}", file=sys.stderr)

    def where(self) -> str:
        """Where they are written, for the end of a line."""
        return "" if not self.count else f": {self._path} lists them, for --retry-failed"


def _specs(words: Sequence[str], save_dir: Path) -> Spec:
    """What makes a job of a prompt, with the flags of all. Raises UserError for a wrong flag."""
    from opensora_sp.cli.client.forms import PROMPTS, forms_of
    from opensora_sp.request.settings import parse_command_line
    from opensora_sp.request.step_cache import LEVELS, OFF
    from opensora_sp.request.step_choice import OWN_FILE
    from opensora_sp.server.checking import judge
    from opensora_sp.server.job_store import JobSpec
    from opensora_sp.server.protocol import BadRequest, read_fields
    from opensora_sp.server.settings import GroupSettings

    for key in parse_command_line(words).written:
        if key in PROMPTS:
            raise UserError(
                f"--{key.replace('_', '-')} does not go with --queue: every line of the file that "
                "--prompt-path names is made"
            )
    form = forms_of([*words, "--prompt", "a list"], {})[0]
    if form.files:
        raise UserError("files go with one video, not with a list: opensora-sp submit sends them")
    fields = {name: value for name, value in form.fields.items() if name != "prompt"}
    levels = ("", OFF, *LEVELS)
    if (level := fields.get("step_cache") or "") not in levels:
        raise UserError(
            f"--step-cache {shown(level)} is a file, which a queue does not take: give "
            f"{', '.join(levels[1:])}, and put schedules into {OWN_FILE} beside the weights of the "
            "groups"
        )
    if fields.get("label") == "cn":
        raise UserError(
            "--label cn: a list on a queue takes this label from the groups, which know the "
            "provider: start them with work --label cn --label-producer NAME, and leave --label out"
        )
    group = GroupSettings(save_dir.resolve(), "", ())
    try:
        arguments = read_fields({"prompt": "a list", **fields}).arguments
        told = judge(group, arguments, [], save_dir / "jobs")
    except BadRequest as error:
        raise UserError(str(error)) from None
    # Nobody here knows which model the groups have. Gateways work out what a job costs.
    told["cost"].pop("engine")
    alike = json.dumps(fields, sort_keys=True)

    def spec(text: str) -> JobSpec:
        try:
            asked = read_fields({"prompt": text, **fields})
        except BadRequest as error:
            raise UserError(str(error)) from None
        name = hashlib.sha256(f"{alike}\n{text}".encode()).hexdigest()[:24]
        return JobSpec(
            id=f"video_{name}",
            created_at=time.time(),
            arguments=asked.arguments,
            shown=asked.shown | told,
            priority=asked.priority,
        )

    return spec


def _prompts(path: str) -> IO[str]:
    """The list, opened. Raises UserError."""
    if path == "-":
        return open(sys.stdin.fileno(), encoding="utf-8-sig", closefd=False)
    try:
        return open(path, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt-path {shown(path)}: {error.strerror}") from None


def _texts(lines: IO[str]) -> Iterator[str]:
    """The prompts, without comments and empty lines. Raises UserError for what is no UTF-8."""
    from opensora_sp.request.prompt_files import is_comment

    try:
        for line in lines:
            text = line.strip()
            if text and not is_comment(text):
                yield text
    except UnicodeDecodeError:
        raise UserError(f"--prompt-path {shown(lines.name)} is not UTF-8") from None


def _until_it_answers(ask: Callable[[], Any]) -> Any:
    """What a call says, as soon as the database answers it."""
    from opensora_sp.server.shared_link import QueueLost

    said = False
    while True:
        try:
            return ask()
        except QueueLost as error:
            if not said:
                print(f"the database does not answer: {error}; it is tried again", file=sys.stderr)
            said = True
            time.sleep(1)
