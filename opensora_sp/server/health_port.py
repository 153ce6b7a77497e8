"""/health and /ready of a group that has no gateway, for probes of what runs it."""

from __future__ import annotations

import errno
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.server.engine_process import Health

# A probe asks in one short request. Who connects and sends nothing is cut off.
_SECONDS = 5.0
# More that ask at once are hung up on.
_MOST = 16


def health_socket(port: int) -> socket.socket | None:
    """Listen on every address, of IPv6 too where the machine has it; None for port 0.

    Raises UserError where the port cannot be had.
    """
    if port == 0:
        return None
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError as error:
                # A kernel may know IPv6 and have no address of it.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"--health-port {port} cannot be listened on: {error.strerror}; give another"
        ) from None


class _Server(ThreadingHTTPServer):
    """Answers on a socket that listens already, at most `_MOST` at once."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(listening.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self._places = threading.BoundedSemaphore(_MOST)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


@contextmanager
def answering_health(
    listening: socket.socket | None, health: Callable[[], Health]
) -> Iterator[None]:
    """Answer on this socket while the block runs, and close it then; None answers nowhere.

    /health: 200, and 503 when the engine has failed. /ready: 200 only while it takes jobs. Both
    tell the state, the reason and the number of restarts, as the gateway's do.
    """
    if listening is None:
        yield
        return

    class Answer(BaseHTTPRequestHandler):
        timeout = _SECONDS

        def do_GET(self) -> None:
            now = health()
            good = {"/health": now.state != "failed", "/ready": now.state == "ready"}
            if self.path not in good:
                self.send_error(404)
                return
            about = {"status": str(now), "restarts": now.restarts}
            body = json.dumps(about).encode()
            self.send_response(200 if good[self.path] else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A probe every few seconds is no news."""

    server = _Server(listening, Answer)
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
