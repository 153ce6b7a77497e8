"""/health and /ready of a group that has no gateway, for probes of what runs it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opensora_sp.base.errors import UserError
from opensora_sp.server.engine_process import Health

# A probe asks in one short request. Who connects and sends nothing is cut off.
_SECONDS = 5.0


@contextmanager
def answering_health(port: int, health: Callable[[], Health]) -> Iterator[int]:
    """Answer on every address while the block runs; yields the port. Port 0 answers nowhere.

    /health: 200, and 503 when the engine has failed. /ready: 200 only while it takes jobs. Both
    tell the state, the reason and the number of restarts, as the gateway's do. Raises UserError
    where the port cannot be had.
    """
    if port == 0:
        yield 0
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

    try:
        server = ThreadingHTTPServer(("", port), Answer)
    except OSError as error:
        raise UserError(
            f"--health-port {port} cannot be listened on: {error.strerror}; give another"
        ) from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
