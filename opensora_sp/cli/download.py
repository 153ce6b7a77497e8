"""Command: fetch the four published checkpoints, or check directories that are there already.

    opensora-sp download DIR             # into DIR/dit, DIR/t5, DIR/vae2d, DIR/vae3d
    opensora-sp download --check DIR...  # offline: files, names, shapes, hashes

What was fetched is not fetched again, and what was cut off goes on where it stopped. HF_ENDPOINT
names a mirror. A mirror could send another file together with that file's hash, so every file is
also compared with the SHA-256 in assets/weight_hashes.txt, and in the file of --hashes; for a file
that neither names, the run says that only the mirror vouches for it. HF_TOKEN goes to the hub
itself, and to a mirror only with --token-to-mirror.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.hashes import SUMS, git_blob, sha256, write_sums
from opensora_sp.base.screen import on_any_screen
from opensora_sp.base.value_types import shown
from opensora_sp.cli.console import refuse
from opensora_sp.cli.parser import RefusingParser
from opensora_sp.request.preflight import check_save_dir


@dataclass(frozen=True)
class Repository:
    """One published checkpoint: where it is, at which commit, and the files that are needed."""

    name: str
    commit: str
    files: tuple[str, ...]


_BINS = tuple(f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
_TOKENIZER = ("spiece.model", "special_tokens_map.json", "tokenizer_config.json")
REPOSITORIES = {
    "dit": Repository(
        "hpcai-tech/OpenSora-STDiT-v3",
        "9a8583918505ee93bd9fae8dd5ce32e1f9334c71",
        ("config.json", "model.safetensors"),
    ),
    "t5": Repository(
        "DeepFloyd/t5-v1_1-xxl",
        "c9c625d2ec93667ec579ede125fd3811d1f81d37",
        ("config.json", *_TOKENIZER, "pytorch_model.bin.index.json", *_BINS),
    ),
    "vae2d": Repository(
        "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        "2c17b4e85261cd549b4068d086b7c2ba9d468e9f",
        ("vae/config.json",),
    ),
    "vae3d": Repository(
        "hpcai-tech/OpenSora-VAE-v1.2",
        "33d153e9b5a9f771a8a84f98bd3f46458a8ed0bf",
        ("config.json", "model.safetensors"),
    ),
}
HUB = "huggingface.co"
PINNED = Path(__file__).resolve().parent.parent / "assets" / "weight_hashes.txt"
TRIES = 2  # a file that arrives broken is fetched once more


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 if the check found something, or 2 for a mistake."""
    try:
        arguments = parser().parse_args(argv)
        if arguments.check:
            return check(arguments.check)
        if arguments.directory is None:
            raise UserError("give a directory to download into, or --check DIR...")
        known = known_hashes([PINNED, *([arguments.hashes] if arguments.hashes else [])])
        download(
            arguments.directory,
            arguments.only,
            known=known,
            send_token=not is_mirror() or arguments.token_to_mirror,
        )
    except UserError as error:
        return refuse(error, same_everywhere=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = RefusingParser(
        prog="opensora-sp download",
        usage="opensora-sp download DIR\n       opensora-sp download --check DIR [DIR ...]",
        description="Fetches the four published checkpoints into DIR/dit, DIR/t5, DIR/vae2d and "
        "DIR/vae3d (25 GB), or checks directories that are there. HF_ENDPOINT names a mirror.",
    )
    made.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="where to put them")
    made.add_argument(
        "--only", nargs="+", choices=tuple(REPOSITORIES), help="some of the four (default: all)"
    )
    made.add_argument(
        "--hashes",
        type=Path,
        metavar="FILE",
        help="more hashes to hold files against: SHA256SUMS of an earlier download's DIR",
    )
    made.add_argument(
        "--token-to-mirror",
        action="store_true",
        help="send HF_TOKEN to the mirror in HF_ENDPOINT too, which can then use it as you",
    )
    made.add_argument(
        "--check",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="verify directories offline: a checkpoint, or the DIR of an earlier download",
    )
    return made


def is_mirror() -> bool:
    """Whether HF_ENDPOINT names somebody else than the hub itself. Raises UserError."""
    endpoint = _endpoint()
    if not endpoint:
        return False
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in ("http", "https"):
        raise UserError(
            f"HF_ENDPOINT {shown(endpoint)} is not the address of a mirror, such as https://{HUB}"
        )
    return (parts.scheme, host, port) != ("https", HUB, None)


def _endpoint() -> str:
    """The address of a mirror that the environment names; empty without one."""
    return os.environ.get("HF_ENDPOINT", "").strip()


def _source() -> str:
    """Where files come from, for messages."""
    return _endpoint() or "the hub"


def known_hashes(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by kind/name, from files as sha256sum writes them.

    Raises UserError for a file that is none, or two files that contradict each other.
    """
    known: dict[str, str] = {}
    for file in files:
        what = f"--hashes {shown(str(file))}"
        lines = access.read_text(file, limit=access.CONFIG_LIMIT, what=what).splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            digest, _, name = line.partition("  ")
            if not _is_sha256(digest) or not name:
                raise UserError(
                    f"--hashes {file} line {number} is not `SHA-256  kind/name`, as sha256sum "
                    "writes it"
                )
            if known.setdefault(name, digest) != digest:
                raise UserError(f"--hashes {file} line {number} contradicts another hash of {name}")
    return known


def download(
    directory: Path,
    only: Sequence[str] | None = None,
    *,
    known: Mapping[str, str] | None = None,
    send_token: bool = True,
) -> None:
    """Fetch what is missing, compare it, and print the flags.

    known: SHA-256 by kind/name that files must have, whatever their server says of them.

    Raises UserError.
    """
    check_save_dir(str(directory), "DIR")
    known = known or {}
    token = None if send_token else False
    wanted = {kind: REPOSITORIES[kind] for kind in (only or REPOSITORIES)}
    published = {kind: _published(kind, each, known, token) for kind, each in wanted.items()}
    _check_space(directory, published)
    sums: dict[str, str] = {}
    for kind, repository in wanted.items():
        fetched = _fetch(repository, directory / kind, published[kind], token)
        sums |= {f"{kind}/{name}": digest for name, digest in fetched.items()}
    write_sums(directory, sums)
    unknown = [name for name in sums if name not in known]
    if unknown:
        print(
            f"note: {len(unknown)} of {len(sums)} files have no SHA-256 in {PINNED.name} or "
            f"--hashes, so only {_source()} vouches for them ({', '.join(unknown[:3])}"
            f"{', …' if len(unknown) > 3 else ''}); {directory / SUMS} holds what came: compare it "
            "with that of somebody you trust, and give it as --hashes elsewhere",
            file=sys.stderr,
        )
    for kind in wanted:
        print(f"--ckpt-path-{kind} {directory / kind}")


@dataclass(frozen=True)
class Published:
    """What the hub says of a file: bytes, and its hash (sha256, or git's name for small files)."""

    size: int
    etag: str


def _published(
    kind: str, repository: Repository, known: Mapping[str, str], token: bool | None
) -> dict[str, Published]:
    """Size and hash of every needed file at the pinned commit, asked of the hub.

    A known hash takes the place of what the hub says. Raises UserError where the two differ.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    found = {}
    for name in repository.files:
        address = hf_hub_url(repository.name, name, revision=repository.commit)
        metadata = _ask(
            repository, lambda address=address: get_hf_file_metadata(address, token=token)
        )  # type: ignore[misc]
        if metadata.size is None or not metadata.etag:
            raise UserError(f"{address} came without a size or a hash: is HF_ENDPOINT a hub?")
        pinned = known.get(f"{kind}/{name}")
        if pinned is not None and _is_sha256(metadata.etag) and metadata.etag != pinned:
            raise UserError(
                f"{name} of {repository.name} has SHA-256 {metadata.etag[:12]}… at "
                f"{_source()}, but the known one is {pinned[:12]}…: "
                "that is another file; use another mirror, or none"
            )
        found[name] = Published(metadata.size, pinned or metadata.etag)
    return found


def _check_space(directory: Path, published: dict[str, dict[str, Published]]) -> None:
    missing = sum(
        file.size
        for kind, files in published.items()
        for name, file in files.items()
        if not (directory / kind / name).exists()
    )
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if missing > free:
        raise UserError(
            f"{directory}: {missing / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free"
        )


def _fetch(
    repository: Repository, directory: Path, published: dict[str, Published], token: bool | None
) -> dict[str, str]:
    """One repository's files; SHA256SUMS is written once all of them are right, and returned."""
    sums = {}
    for name, expected in published.items():
        file = _fetch_file(repository, directory, name, expected, token)
        sums[name] = expected.etag if _is_sha256(expected.etag) else sha256(file)
    write_sums(directory, sums)
    return sums


def _fetch_file(
    repository: Repository, directory: Path, name: str, expected: Published, token: bool | None
) -> Path:
    """One file, from where an earlier try stopped; it has its name only once its hash is right."""
    file = directory / name
    part = file.with_name(f"{file.name}.part")
    if file.exists() and _is_right(file, expected):
        return file
    for _ in range(TRIES):
        _transfer(repository, name, part, expected, token)
        if _is_right(part, expected):
            part.replace(file)
            print(f"{file}: {expected.size} bytes, hash as published", file=sys.stderr)
            return file
        print(f"{file}: does not have the published hash", file=sys.stderr)
        part.unlink()
    raise UserError(
        f"{name} of {repository.name} arrived {TRIES} times without the published hash "
        f"{expected.etag}: the connection or the mirror in HF_ENDPOINT alters it"
    )


def _transfer(
    repository: Repository, name: str, part: Path, expected: Published, token: bool | None
) -> None:
    """Add to `part` what it lacks. The library's own download begins anew after a broken one."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if have >= expected.size:  # whole, or of another kind: its hash tells
        return
    with part.open("ab") as target:
        _ask(
            repository,
            lambda: http_get(
                hf_hub_url(repository.name, name, revision=repository.commit),
                target,
                resume_size=have,
                headers=build_hf_headers(token=token),
                expected_size=expected.size,
                displayed_filename=f"{repository.name}/{name}",
            ),
        )


def _is_sha256(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", etag) is not None


def _is_right(file: Path, expected: Published) -> bool:
    if file.stat().st_size != expected.size:
        return False
    return (sha256 if _is_sha256(expected.etag) else git_blob)(file) == expected.etag


def _ask(repository: Repository, call: Any) -> Any:
    """What the hub answers; its refusals and a missing network as one line."""
    try:
        return call()
    except Exception as error:  # requests or httpx, by version, and the hub's own kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{repository.name} at {repository.commit[:12]} cannot be had from {_source()}: "
            f"{reason}"
        ) from error


def check(directories: Sequence[Path]) -> int:
    """Print a line per finding; 1 if anything is wrong. Raises UserError."""
    from opensora_sp.verification.weights import check_directory

    wrong = 0
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"--check {directory}: no such directory")
        inner = [directory / kind for kind in REPOSITORIES if (directory / kind).is_dir()]
        for checkpoint in inner or [directory]:
            for finding in check_directory(checkpoint):
                print(finding, flush=True)
                wrong += finding.wrong is not None
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
