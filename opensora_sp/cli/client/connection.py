"""HTTP to a server with the standard library alone. What it answers is not trusted."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from opensora_sp.base import access
from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import NotJson, parse_json
from opensora_sp.base.screen import one_line
from opensora_sp.base.value_types import shown

if TYPE_CHECKING:
    import http.client

DEFAULT_SERVER = "http://127.0.0.1:8000"
# A server looks at files that come along before it answers.
SECONDS = 120.0
_MOST_ANSWER = 16 << 20
_BLOCK = 1 << 20
ID = re.compile(r"video_[0-9a-f]{24}")
SUFFIXES: Mapping[str, str] = {
    "video/mp4": ".mp4",
    "image/png": ".png",
    "image/webp": ".webp",
    "image/jpeg": ".jpg",
}


class Refused(UserError):  # noqa: N818 (the server's refusal of one request)
    """The server said no. status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Form:
    """A form to send. files: (field, path) of what is streamed from the disk."""

    fields: Mapping[str, str]
    files: Sequence[tuple[str, Path]] = ()


def check_id(job_id: str) -> str:
    """An id as it is. Raises UserError for what is none: nothing else becomes a path."""
    if not ID.fullmatch(job_id):
        raise UserError(f"{shown(job_id)} is not an id of a job, such as opensora-sp jobs shows")
    return job_id


class Connection:
    """A server's address and what lets one in."""

    def __init__(self, server: str, token: str | None = None) -> None:
        try:
            parts = urlsplit(server)
            (parts.hostname or "").encode("idna")  # UnicodeError is a ValueError
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or any(one.isspace() or not one.isprintable() for one in server):
            raise UserError(f"--server {shown(server)} is not an address such as {DEFAULT_SERVER}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                f"--server {shown(server)}: give the address alone; a token comes by --token-file"
            )
        self.server, self._parts, self._token = server.rstrip("/"), parts, token
        self._path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")

    def call(self, method: str, path: str, form: Form | None = None) -> dict[str, Any]:
        """The object that the server answers with. Raises UserError; Refused where it says no."""
        link = self._open()
        try:
            with self._answer(link, method, path, form) as answer:
                return self._object(answer)
        finally:
            link.close()

    def download(self, path: str, name: str, folder: Path, exact: Path | None = None) -> Path:
        """Store a file that the server answers with, whole or not at all; where it is.

        Its name is ours: folder/name with the suffix of its type, or `exact`.
        """
        link = self._open()
        try:
            with self._answer(link, "GET", path) as answer:
                if answer.status != 200:
                    self._object(answer)
                kind = (answer.getheader("content-type") or "").split(";")[0]
                if kind not in SUFFIXES:
                    raise UserError(f"{self.server} sent {shown(kind)}, no video and no picture")
                target = exact or folder / f"{name}{SUFFIXES[kind]}"
                with atomic_output(target) as temporary, temporary.open("wb") as file:
                    while block := self._read(answer, _BLOCK):
                        file.write(block)
                    if answer.length:
                        raise UserError(f"{self.server} ended before {name} was whole: try again")
                return target
        finally:
            link.close()

    def _open(self) -> http.client.HTTPConnection:
        import http.client
        import ssl

        host = self._parts.hostname
        assert host is not None
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                host, self._parts.port, timeout=SECONDS, context=context
            )
        return http.client.HTTPConnection(host, self._parts.port, timeout=SECONDS)

    def _answer(
        self,
        link: http.client.HTTPConnection,
        method: str,
        path: str,
        form: Form | None = None,
    ) -> http.client.HTTPResponse:
        import http.client

        headers = {"accept": "application/json"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        body: Iterator[bytes] | None = None
        if form is not None:
            edge = secrets.token_hex(24)
            heads = _heads(form, edge)
            length = sum(len(head) + size for head, size, _ in heads) + len(_end(edge))
            headers["content-type"] = f"multipart/form-data; boundary={edge}"
            headers["content-length"] = str(length)
            body = _stream(heads, edge)
        try:
            # It may have answered before all was sent.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                link.request(method, self._path + path, body, headers)
            return link.getresponse()
        except TimeoutError:
            raise UserError(f"{self.server} did not answer within {SECONDS:.0f} s") from None
        except http.client.HTTPException:
            raise UserError(f"{self.server} does not answer as a server of HTTP does") from None
        except OSError as error:
            raise UserError(
                f"no server answers at {self.server} ({error.strerror or error}): start one with "
                "opensora-sp serve, or give its address with --server or OPENSORA_SP_SERVER"
            ) from None

    def _object(self, answer: http.client.HTTPResponse) -> dict[str, Any]:
        raw = self._read(answer, _MOST_ANSWER)
        try:
            found: Any = parse_json(raw)
        except NotJson:
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"{self.server} answers, but not as opensora-sp serve does (HTTP {answer.status})"
            )
        if answer.status == 200:
            return found
        if answer.status == 401:
            raise Refused(
                f"{self.server} asks for a token: give --token-file FILE or OPENSORA_SP_TOKEN, or "
                "the one that was given is not known there",
                401,
            )
        error = found.get("error")
        message = error.get("message") if isinstance(error, dict) else None
        raise Refused(one_line(message or f"HTTP {answer.status}"), answer.status)

    def _read(self, answer: http.client.HTTPResponse, most: int) -> bytes:
        import http.client

        try:
            return answer.read(most)
        except (OSError, http.client.HTTPException):
            raise UserError(f"{self.server} ended in the middle of its answer") from None


def video_path(job_id: str, rest: str = "") -> str:
    """The path of a job."""
    return f"/v1/videos/{quote(check_id(job_id))}{rest}"


def _heads(form: Form, edge: str) -> list[tuple[bytes, int, Path | None]]:
    """Of each part: what stands before it, the size of a file, and the file."""
    heads: list[tuple[bytes, int, Path | None]] = []
    for name, text in form.fields.items():
        value = text.encode("utf-8", "replace")
        start = f'--{edge}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n'
        heads.append((start.encode() + value + b"\r\n", 0, None))
    for name, path in form.files:
        if access.exists(path) and not access.is_file(path):  # opening a pipe would wait
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {shown(str(path))} is not a regular file")
        try:
            size = path.stat().st_size
            with path.open("rb"):
                pass
        except OSError as error:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {shown(str(path))}: {error.strerror}") from None
        # The server names files itself, so it is told no name of this machine.
        start = f'--{edge}\r\ncontent-disposition: form-data; name="{name}"; filename="file"\r\n'
        start += "content-type: application/octet-stream\r\n\r\n"
        heads.append((start.encode(), size + 2, path))
    return heads


def _stream(heads: Sequence[tuple[bytes, int, Path | None]], edge: str) -> Iterator[bytes]:
    for head, size, path in heads:
        yield head
        if path is None:
            continue
        left = size - 2
        with path.open("rb") as file:
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                left -= len(block)
                yield block
        if left:
            raise UserError(f"{shown(str(path))} became shorter while it was sent: try again")
        yield b"\r\n"
    yield _end(edge)


def _end(edge: str) -> bytes:
    return f"--{edge}--\r\n".encode()


def connect(server: str | None, token_file: Path | None) -> Connection:
    """The server that the flags or the environment name. Raises UserError."""
    token = os.environ.get("OPENSORA_SP_TOKEN") or None
    if token_file is not None:
        from opensora_sp.server.settings import read_tokens

        token = next(iter(read_tokens(token_file)))
    if token is not None and not (token.isascii() and token.isprintable()):
        raise UserError("OPENSORA_SP_TOKEN holds what no token holds: give the token alone")
    address = server or os.environ.get("OPENSORA_SP_SERVER") or DEFAULT_SERVER
    return Connection(address, token)
