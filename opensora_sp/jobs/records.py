"""The record of an output: the identity of its request, its stage, its checksum.

A record is a small JSON file in `.opensora-sp/` of the save directory, beside the saved state. Each
output has a file of its own, so that several replicas, or several runs in one directory, never
write the same file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from opensora_sp.base import access
from opensora_sp.base.atomic import atomic_output, reported
from opensora_sp.base.hashes import sha256
from opensora_sp.base.outside_json import parse_json
from opensora_sp.base.processes import Process
from opensora_sp.jobs.identity import Identity, digest

FOLDER = ".opensora-sp"
Stage = Literal["waiting", "denoising", "latents saved", "done"]
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one output. size, mtime_ns, sha256: of its file, once it is done.

    maker: the process that wrote the record, None in those of an older version.
    """

    identity: Identity
    stage: Stage
    size: int | None = None
    mtime_ns: int | None = None
    sha256: str | None = None
    maker: Process | None = None

    def made_by(self) -> Process | None:
        """The process of this machine that is making the output now; None where there is none."""
        maker = self.maker
        if self.stage == "done" or maker is None or not maker.here or maker.state() == "gone":
            return None
        return maker

    def fits(self, output: Path) -> bool:
        """Whether the file exists unchanged. It is read only where its time has changed."""
        if not access.is_file(output):
            return False
        found = output.stat()
        if found.st_size != self.size:
            return False
        return found.st_mtime_ns == self.mtime_ns or sha256(output) == self.sha256


def record_path(output: Path) -> Path:
    """The path of an output's record."""
    return output.parent / FOLDER / f"{output.name}.json"


def read_record(output: Path) -> Record | None:
    """The record of an output; None where it is absent or damaged.

    Raises UserError where it may not be read, or is no regular file of a record's size.
    """
    path = record_path(output)
    if not access.exists(path):
        return None
    content = access.read_bytes(path, limit=access.RECORD_LIMIT)
    try:
        found: Any = parse_json(content)
        if found["version"] != _VERSION or found["stage"] not in get_args(Stage):
            return None
        if found["digest"] != digest(found["identity"]) or not isinstance(found["identity"], dict):
            return None
        return Record(
            identity=found["identity"],
            stage=found["stage"],
            size=found["size"],
            mtime_ns=found["mtime_ns"],
            sha256=found["sha256"],
            maker=_maker(found.get("maker")),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _maker(found: Any) -> Process | None:
    if found is None:
        return None
    pid, started, node = found["pid"], found["started"], found["node"]
    if not (type(pid) is int and 0 < pid < 2**31 and type(started) is type(node) is str):
        raise ValueError("not a process")
    return Process(pid, started, node)


def write_record(output: Path, identity: Identity, stage: Stage) -> None:
    """Write the record of an output. The stage "done" also stores the checksum of its file.

    Raises UserError where the directory or the disk does not allow it.
    """
    record: dict[str, Any] = {
        "version": _VERSION,
        "output": output.name,
        "stage": stage,
        "digest": digest(identity),
        "size": None,
        "mtime_ns": None,
        "sha256": None,
        "maker": asdict(Process.current()),
        "identity": identity,
    }
    if stage == "done":
        found = output.stat()
        record |= {
            "size": found.st_size,
            "mtime_ns": found.st_mtime_ns,
            "sha256": sha256(output),
        }
    path = record_path(output)
    with atomic_output(path) as temporary, reported(path):
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
