"""Opening of a reference: a file, or an address that is fetched.

Addresses are refused unless --allow-remote is given. They are limited to http and https, one
deadline from the host's lookup to the last byte, and few redirects. Addresses of this machine and
of private networks need --allow-private as well. The connection goes to the IP address that was
checked, so a second lookup cannot lead elsewhere. User, password and query of an address are never
shown.
"""

from __future__ import annotations

import base64
import http
import http.client
import ipaddress
import queue
import socket
import ssl
import stat
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from opensora_sp.base.access import Remote as Remote
from opensora_sp.base.errors import UserError
from opensora_sp.base.redaction import is_address, without_secrets

MAX_REMOTE_BYTES = 512 * 2**20
MAX_REMOTE_SECONDS = 60.0
MAX_REDIRECTS = 5

# Characters of a path or query that are sent unchanged. Others are percent-encoded.
_SAFE = "%/:=&?~#+!$,;'@()*[]"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def check_address(path: str | Path, allow_remote: Remote) -> None:
    """Refuse an address that is not allowed, without a lookup.

    Raises:
        UserError: remote references are not allowed, or the address is not http(s), has no host,
            or names this machine or a private network.
    """
    shown = without_secrets(path)
    if not allow_remote:
        raise UserError(
            f"reference {shown} is remote: download it and give the file, or pass --allow-remote"
        )
    if not str(path).lower().startswith(("http://", "https://")):
        raise UserError(f"reference {shown}: only http:// and https:// addresses can be fetched")
    try:
        parts = urllib.parse.urlsplit(str(path))
        host, usable = parts.hostname or "", parts.port != 0
    except ValueError:
        host, usable = "", False
    if not host or not usable:
        raise UserError(f"reference {shown} is not an address such as https://host/picture.png")
    if allow_remote == "private":
        return
    literal = _literal(host)
    if host.rstrip(".").lower() == "localhost" or (literal is not None and not _public(literal)):
        raise _private(shown, host)


@contextmanager
def open_file(path: str | Path, allow_remote: Remote = False) -> Iterator[IO[bytes]]:
    """Open a non-empty regular file, or fetch an address into a temporary one, for reading.

    At most `MAX_REMOTE_BYTES` are fetched, in at most `MAX_REMOTE_SECONDS` from the beginning.

    Raises:
        UserError: one line that says why this file or address cannot be had.
    """
    if is_address(path):
        check_address(path, allow_remote)
        with tempfile.TemporaryFile() as copy:
            _fetch(str(path), copy, allow_remote)
            copy.seek(0)
            yield copy
        return
    with _opened(path) as file:
        yield file


def _opened(path: str | Path) -> IO[bytes]:
    try:
        file = Path(path).expanduser()
        # Checked before opening, because opening a pipe waits for its writer.
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"reference {str(path)!r} is not a file: give an image or a video")
        if status.st_size == 0:
            raise UserError(f"reference {path} is empty: give an image or a video")
        return file.open("rb")
    # ValueError: the name holds a NUL. RuntimeError: ~ names an unknown user.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read reference {path}: {said(error)}; check the path") from error


class _Deadline:
    """A deadline for all sockets of a block. It shuts them down when the time is up.

    A socket's own timeout limits one wait only. A server that sends a byte now and then would never
    exceed it.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._seconds = seconds
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.passed = False

    def __enter__(self) -> _Deadline:
        self._timer = threading.Timer(self._seconds, self._end_all)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for guarded in self._sockets:
                guarded.close()
            self._sockets.clear()

    @property
    def left(self) -> float:
        """Seconds that are left. Raises TimeoutError after the deadline."""
        left = self._end - time.monotonic()
        if self.passed or left <= 0:
            raise TimeoutError
        return left

    def guard(self, connected: socket.socket) -> None:
        """Shut this connection down at the deadline."""
        # A duplicate, because TLS detaches the socket's own descriptor.
        with self._lock:
            self._sockets.append(connected.dup())

    def _end_all(self) -> None:
        self.passed = True
        with self._lock:
            for guarded in self._sockets:
                with suppress(OSError):
                    guarded.shutdown(socket.SHUT_RDWR)


def _fetch(address: str, file: IO[bytes], allow_remote: Remote) -> None:
    shown, deadline = without_secrets(address), _Deadline(MAX_REMOTE_SECONDS)
    # Errors are raised from None, because a library's message may quote the address or the server.
    try:
        with deadline:
            _follow(address, file, allow_remote, deadline)
    except UserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        if deadline.passed or isinstance(error, TimeoutError):
            raise _too_slow(shown) from None
        if isinstance(error, http.client.IncompleteRead):
            raise UserError(
                f"reference {shown} broke off while it was fetched: try again"
            ) from None
        if isinstance(error, OSError):
            raise UserError(f"cannot fetch reference {shown}: {reason(error)}") from None
        raise UserError(f"cannot fetch reference {shown}: the answer is not HTTP") from None


def _follow(address: str, file: IO[bytes], allow_remote: Remote, deadline: _Deadline) -> None:
    """Write the content of an address into the file, following redirects."""
    shown, hop = without_secrets(address), address
    for _ in range(MAX_REDIRECTS + 1):
        with closing(_connection(hop, allow_remote, deadline)) as connection:
            # User and password are sent only to the origin that they were given for.
            login = address if _origin(hop) == _origin(address) else hop
            answer = _ask(connection, hop, login)
            target = answer.getheader("Location")
            if answer.status not in (301, 302, 303, 307, 308) or not target:
                _require_content(shown, answer)
                _receive(shown, answer, file, deadline)
                return
        hop = _next_hop(shown, hop, target, allow_remote)
    raise UserError(
        f"reference {shown} is redirected more than {MAX_REDIRECTS} times: give the final address"
    )


def _next_hop(shown: str, hop: str, target: str, allow_remote: Remote) -> str:
    following = urllib.parse.urljoin(hop, target)
    try:
        check_address(following, allow_remote)
    except UserError as error:
        raise UserError(f"reference {shown} leads on to another address: {error}") from None
    return following


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(address)
    return parts.scheme.lower(), parts.hostname, parts.port


def _connection(
    address: str, allow_remote: Remote, deadline: _Deadline
) -> http.client.HTTPConnection:
    """A connection, through a proxy if one is set. It is opened by the first request."""
    parts = urllib.parse.urlsplit(address)
    assert parts.hostname is not None
    host, secure = _ascii(parts.hostname), parts.scheme.lower() == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    proxy = _proxy(parts.scheme.lower(), host)
    if proxy is None:
        connection = kind(host, parts.port, timeout=deadline.left)
    else:
        assert proxy.hostname is not None
        connection = kind(proxy.hostname, proxy.port or 80, timeout=deadline.left)
        if secure:
            connection.set_tunnel(host, parts.port, headers=_credentials(proxy, "Proxy-"))

    def connect(place: tuple[str, int], *_: Any) -> socket.socket:
        if proxy is not None:
            # The proxy looks the name up. If this machine can do so too, the result is checked.
            with suppress(socket.gaierror):
                _allowed(address, host, 80, allow_remote, deadline)
            return _connect(_look_up(*place, deadline), deadline)
        return _connect(_allowed(address, *place, allow_remote, deadline), deadline)

    # http.client opens its socket here only. TLS and the tunnel use that socket.
    connection._create_connection = connect  # type: ignore[attr-defined]
    return connection


def _ask(
    connection: http.client.HTTPConnection, address: str, login: str
) -> http.client.HTTPResponse:
    parts = urllib.parse.urlsplit(address)
    host = _ascii(parts.hostname or "")
    target = urllib.parse.quote(parts.path or "/", safe=_SAFE)
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe=_SAFE)
    headers = {"User-Agent": "opensora-sp", **_credentials(urllib.parse.urlsplit(login))}
    proxy = _proxy(parts.scheme.lower(), host)
    if proxy is not None and parts.scheme.lower() == "http":
        target = f"http://{host if parts.port is None else f'{host}:{parts.port}'}{target}"
        headers |= _credentials(proxy, "Proxy-")
    connection.request("GET", target, headers=headers)
    connection.auto_open = 0
    return connection.getresponse()


def _ascii(host: str) -> str:
    return host if host.isascii() else host.encode("idna").decode("ascii")


def _proxy(scheme: str, host: str) -> urllib.parse.SplitResult | None:
    found = urllib.request.getproxies().get(scheme)
    if not found or urllib.request.proxy_bypass(host):
        return None
    proxy = urllib.parse.urlsplit(found if "://" in found else f"http://{found}")
    return proxy if proxy.hostname else None


def _credentials(parts: urllib.parse.SplitResult, kind: str = "") -> dict[str, str]:
    if parts.username is None:
        return {}
    text = ":".join(urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    encoded = base64.b64encode(text.encode("utf-8", "surrogatepass")).decode("ascii")
    return {f"{kind}Authorization": f"Basic {encoded}"}


def _require_content(shown: str, answer: http.client.HTTPResponse) -> None:
    if answer.status == 200:
        return
    # The standard phrase of the status is shown, and not the server's text.
    names = {status.value: f" ({status.phrase})" for status in http.HTTPStatus}
    raise UserError(
        f"cannot fetch reference {shown}: the server answers with status {answer.status}"
        f"{names.get(answer.status, '')}"
    )


def _receive(
    shown: str, answer: http.client.HTTPResponse, file: IO[bytes], deadline: _Deadline
) -> None:
    received = 0
    # read1 returns after one receive, so the deadline is checked often on a slow connection.
    while block := answer.read1(2**16):
        received += len(block)
        if received > MAX_REMOTE_BYTES:
            raise UserError(
                f"reference {shown} is larger than {MAX_REMOTE_BYTES / 2**20:g} MiB: "
                "download it and give the file"
            )
        _ = deadline.left
        file.write(block)
    _ = deadline.left  # a connection that was shut down looks like a finished one
    if answer.length:  # bytes that the server announced and did not send
        raise http.client.IncompleteRead(b"", answer.length)
    if not received:
        raise UserError(f"reference {shown} is empty: give an image or a video")


def _allowed(
    address: str, host: str, port: int, allow_remote: Remote, deadline: _Deadline
) -> list[tuple[str, int]]:
    """(IP address, port) of a host, those that are allowed. Raises UserError where none is."""
    places = _look_up(host, port, deadline)
    if allow_remote == "private":
        return places
    public = [place for place in places if _public(ipaddress.ip_address(_without_zone(place[0])))]
    if not public:
        raise _private(without_secrets(address), places[0][0])
    return public


def _look_up(host: str, port: int, deadline: _Deadline) -> list[tuple[str, int]]:
    """(IP address, port) of a host, in the order in which they are tried."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.put(error)

    # A lookup cannot be interrupted. Its thread is abandoned at the deadline.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=deadline.left)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return list(dict.fromkeys((str(place[0]), int(place[1])) for *_, place in answer))


def _connect(places: list[tuple[str, int]], deadline: _Deadline) -> socket.socket:
    trouble: OSError = OSError("the host has no address")
    for number, place in enumerate(places):
        try:
            connected = socket.create_connection(place, deadline.left / (len(places) - number))
        except OSError as error:
            trouble = error
            continue
        connected.settimeout(deadline.left)
        deadline.guard(connected)
        return connected
    raise trouble


def _without_zone(address: str) -> str:
    return address.partition("%")[0]


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(_without_zone(host))
    except ValueError:
        return None


def _public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an IP address is public. An IPv4 address inside an IPv6 address is checked too."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _public(inner)
    return address.is_global and not address.is_multicast


def _private(shown: str, host: str) -> UserError:
    return UserError(
        f"reference {shown} lies at {host}, which is this machine or in a private network: "
        "download it and give the file, or pass --allow-private too"
    )


def _too_slow(shown: str) -> UserError:
    return UserError(
        f"reference {shown} did not arrive within {MAX_REMOTE_SECONDS:g} s: "
        "download it and give the file"
    )


def reason(error: OSError) -> str:
    """Why a connection failed, without text that a server or a proxy sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails ({(error.reason or 'no reason given').replace('_', ' ').lower()})"
    return error.strerror or "the connection is refused or broken off"


def said(error: BaseException) -> str:
    """The message of an error, on one line, without its number."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
