"""What a server is started with: where it listens, whom it lets in, and what its engine is."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.errors import LackingCharacter, NoSpaceError, SigningError, UserError
from opensora_sp.base.value_types import shown
from opensora_sp.media.labels import CN_TEXTS
from opensora_sp.request.request import Job
from opensora_sp.request.settings import build_job, parse_command_line, resolve
from opensora_sp.server.queue_url import QUEUE_VARIABLE, is_postgres

log = logging.getLogger(__name__)
# Names of this machine alone: a server that listens there needs no token.
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_MOST_LIMIT = 1 << 50
# To clients: the reason names files of the server's, and is in its log.
SIGNS_NOTHING = (
    "this service cannot sign what it makes: tell whoever runs it, whose log has the reason"
)
_PACKAGES = ("dbos", "fastapi", "python_multipart", "uvicorn", "jinja2", "prometheus_client")


@dataclass(frozen=True)
class GroupSettings:
    """How the engine's group of ranks is run.

    arguments: the engine's own flags. batch_jobs: the most jobs that are made together.
    serves, warmup: names of configurations that it is opened for, and that it makes a step of.
    log_format, log_level: as for `Operations`.

    Of a queue that many groups share: queue is the database's address; group_name: this group's
    name; parent: a word that is new with every start of the command, so that its engine knows its
    own name again; lease_s: seconds without a sign of life after which the group counts as dead;
    own_dir: the folder of the files that are this machine's alone.

    Of a group of several nodes: nodes: how many; node: which one this is, 0 leads; master:
    HOST:PORT of node 0, where torchrun's agents meet. ranks counts those of all nodes.

    other_labels: whether a request may have another label than the one of arguments.
    """

    save_dir: Path
    queue: str
    arguments: tuple[str, ...]
    warmup: tuple[str, ...] = ()
    ranks: int = 1
    batch_jobs: int = 1
    serves: tuple[str, ...] = ()
    log_format: str = "text"
    log_level: str = "info"
    group_name: str = ""
    parent: str = ""
    lease_s: float = 0.0
    own_dir: Path | None = None
    nodes: int = 1
    node: int = 0
    master: str = ""
    other_labels: bool = False

    @property
    def shared(self) -> bool:
        """Whether many groups share the queue."""
        return is_postgres(self.queue)

    @property
    def place(self) -> Path:
        """Where the files lie by which the engine and what started it know each other."""
        return self.save_dir if self.own_dir is None else self.own_dir

    def digest(self) -> str:
        """Short and equal for engines that take equally long for a job on one machine."""
        text = json.dumps([self.arguments, self.warmup, self.ranks, self.serves, self.batch_jobs])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """For the command line of a rank; `from_json` reads it.

        The address of a shared queue may hold a password. It goes through `environ` instead.
        """
        paths = {"save_dir": str(self.save_dir), "own_dir": self.own_dir and str(self.own_dir)}
        queue = {"queue": None if self.shared else self.queue}
        return json.dumps(asdict(self) | paths | queue)

    def environ(self) -> dict[str, str]:
        """What a rank's environment has beside this process's own."""
        return {QUEUE_VARIABLE: self.queue} if self.shared else {}

    @classmethod
    def from_json(cls, text: str) -> GroupSettings:
        """What `to_json` wrote."""
        found = json.loads(text)
        lists = {name: tuple(found[name]) for name in ("arguments", "warmup", "serves")}
        paths = {"save_dir": Path(found["save_dir"])}
        if found["own_dir"] is not None:
            paths["own_dir"] = Path(found["own_dir"])
        if found["queue"] is None:
            found["queue"] = os.environ[QUEUE_VARIABLE]
        return cls(**found | lists | paths)

    def job(self, arguments: Sequence[str], outputs: Path) -> Job:
        """The job of a request: the engine's flags, the request's, and where its output goes.

        Raises UserError for what the command line would refuse, in its words; what only who runs
        the server can mend is logged, and told without its files.
        """
        try:
            return self._job(arguments, outputs)
        except SigningError as error:
            log.error("%s", error)
            raise UserError(SIGNS_NOTHING) from None
        except LackingCharacter as error:
            raise UserError(
                f"--watermark-text {shown(error.text)}: the label's font has no "
                f"{shown(error.character)}: leave it out"
            ) from None

    def _job(self, arguments: Sequence[str], outputs: Path) -> Job:
        place = [f"--save-dir={outputs}", "--sample-name=video", "--verbose=0"]
        values = resolve(parse_command_line([*self.arguments, *arguments, *place]))
        self._check_label(values)
        try:
            job = build_job(values, world_size=self.ranks)
        except NoSpaceError as error:  # in words of the server's: whoever asks is told no path
            raise UserError(
                f"the server's disk has {error.free} free, and the video may need {error.needed}: "
                "try again later, or ask for a smaller or a shorter one"
            ) from None
        if job.failed:
            raise UserError(job.failed[0])
        return job

    def _check_label(self, values: Mapping[str, Any]) -> None:
        """Raise UserError for a label that this service does not let a request have."""
        own = service_label(self.arguments)
        asked = values["label"]
        if own.label not in ("none", asked) and not self.other_labels:
            raise UserError(
                f"--label {asked}: this service labels all that it makes with {own.label}, and "
                "lets no request choose"
            )
        text = values["watermark_text"]
        if own.label == "cn" and not self.other_labels and text not in (None, *CN_TEXTS):
            raise UserError(
                f"--watermark-text {shown(text)}: this service labels all that it makes, so the "
                f"text is {' or '.join(CN_TEXTS)}: leave it out"
            )
        if asked == "cn" and own.label != "cn" and values["label_producer"] is None:
            raise UserError(
                "--label cn: this service was not told its provider's name, which that label needs"
            )

    def first_job(self) -> Job:
        """The job that the engine is opened for: it stands for those to come."""
        prompts = ["--prompt", *["warm up"] * self.batch_jobs]
        return self._job([*prompts, f"--batch-size={self.batch_jobs}"], self.place / "warmup")


@dataclass(frozen=True)
class ServiceLabel:
    """The label of all that a service makes, and the provider that it names."""

    label: str = "none"
    producer: str | None = None

    def put_into(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request, with this label where they have none."""
        given = fields.get("label") not in (None, "")
        return dict(fields) if given or self.label == "none" else {**fields, "label": self.label}

    @property
    def arguments(self) -> tuple[str, ...]:
        """What a job's arguments hold beside the request's own, whichever group makes it."""
        return () if self.producer is None else (f"--label-producer={self.producer}",)


@cache
def service_label(arguments: tuple[str, ...]) -> ServiceLabel:
    """The label that the flags of an engine have."""
    values = resolve(parse_command_line(arguments))
    return ServiceLabel(values["label"], values["label_producer"])


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, and all of them, may ask of the gateway.

    bytes_at_once: of all bodies that are arriving together; they lie on the disk meanwhile.
    """

    queued: int = 1000
    queued_each: int = 200
    body_bytes: int = 512 << 20
    bytes_at_once: int = 4 << 30
    body_seconds: float = 120.0
    header_seconds: float = 20.0
    connections: int = 4000
    files: int = 8
    fields: int = 64
    image_seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Operations:
    """How a server is run.

    log_format: text or json. log_level: debug, info or warning. log_prompts: whether prompts may be
    logged. drain: what SIGTERM does with the job that is made, save or finish; drain_seconds: how
    long finishing may take. keep_days, keep_gb: what is kept of ended jobs, 0 for no limit.
    """

    log_format: str = "text"
    log_level: str = "info"
    log_prompts: bool = False
    drain: str = "save"
    drain_seconds: float = 600.0
    keep_days: float = 0.0
    keep_gb: float = 0.0


@dataclass(frozen=True)
class ServiceSettings:
    """A server.

    tokens: token → its owner's name; empty lets everybody in. origins: of pages of other sites
    whose scripts may use the API.
    """

    host: str
    port: int
    group: GroupSettings
    tokens: Mapping[str, str] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    operations: Operations = field(default_factory=Operations)


def require_packages(*more: str) -> None:
    """Raise UserError with the way to install it where a package that serving needs is absent.

    more: packages beside those that every server needs.
    """
    for name in (*_PACKAGES, *more):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"serving needs the package {name}: pip install 'opensora_sp[serve]'")


def read_limits(words: Sequence[str]) -> Limits:
    """Limits of NAME=NUMBER each; those that are not given stay. Raises UserError."""
    known: dict[str, Any] = asdict(Limits())
    found: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            raise UserError(
                f"--limit {shown(word)}: there are {', '.join(known)}, each as NAME=NUMBER"
            )
        try:
            found[name] = type(known[name])(text)
        except ValueError:
            found[name] = 0
        if not 0 < found[name] < _MOST_LIMIT:
            raise UserError(
                f"--limit {shown(word)}: {name} is a number above 0 and below {_MOST_LIMIT}, such "
                f"as {known[name]}"
            )
    return Limits(**found)


def read_origins(words: Sequence[str]) -> tuple[str, ...]:
    """Origins as browsers send them, each once: SCHEME://HOST or SCHEME://HOST:PORT.

    Raises UserError for what no browser sends, and for what would let every page in.
    """
    found: list[str] = []
    for word in words:
        if word in ("*", "null"):
            why = "any page" if word == "*" else "any page that was opened as a file"
            raise UserError(
                f"--allow-origin {word} would let {why} use this server: name the pages' own "
                "origin, such as http://localhost:8080"
            )
        origin = word.lower()
        parts = re.fullmatch(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", origin)
        if parts is None or int(parts[3] or 1) not in range(1, 65536):
            raise UserError(
                f"--allow-origin {shown(word)} is not an origin: give http or https, the host and "
                "the port, without a path or a slash at the end, such as http://localhost:8080"
            )
        scheme, host, port = parts.groups()
        # A browser leaves out the port that the scheme stands for.
        usual = port is None or int(port) == {"http": 80, "https": 443}[scheme]
        found.append(f"{scheme}://{host}" if usual else f"{scheme}://{host}:{int(port)}")
    return tuple(dict.fromkeys(found))


def read_tokens(path: Path) -> dict[str, str]:
    """Tokens of a file, one a line, NAME:TOKEN or TOKEN, with their owners' names.

    Lines of one name are one owner. A token without a name is an owner of its own, whatever line it
    is in. Raises UserError. Warns of a file that every user may read.
    """
    flag = f"--token-file {shown(str(path))}"
    lines = access.read_text(path, limit=access.CONFIG_LIMIT, what=flag).splitlines()
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o007:
            log.warning("--token-file %s can be read by every user: chmod 600 %s", path, path)
    tokens: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, token = line.partition(":")
        if not colon:
            name, token = f"token {hashlib.sha256(line.encode()).hexdigest()[:8]}", line
        name, token = name.strip(), token.strip()
        if not name:
            raise UserError(f"--token-file {path}: line {number} has no name before its colon")
        if len(token) < 16:
            raise UserError(
                f"--token-file {path}: the token in line {number} has {len(token)} characters; "
                "16 or more are needed, such as `openssl rand -hex 24` makes"
            )
        if not (token.isascii() and token.isprintable()):
            raise UserError(
                f"--token-file {path}: the token in line {number} has a character that no request "
                "can carry: printable ASCII is needed, such as `openssl rand -hex 24` makes"
            )
        if (before := tokens.setdefault(token, name)) != name:
            raise UserError(
                f"--token-file {path}: the token in line {number} is {shown(before)}'s already: "
                f"give {shown(name)} one of its own"
            )
    if not tokens:
        raise UserError(f"--token-file {path} holds no token")
    return tokens
