"""Requests made from the server's own OpenAPI description: none may end in an error of the server.

    python tests/api_cases.py --seconds 600

Needs the program Schemathesis, in this environment or any other: `pip install schemathesis`. It is
no requirement of the tests, because its run takes minutes. A server of one rank with the embedded
model is started for it, so what is accepted is made too. The exit code is Schemathesis's own.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from serving import Server  # noqa: E402


def main() -> int:
    """Start the server, send it requests, and stop it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--examples", type=int, default=100, help="requests of each operation")
    parser.add_argument("--schemathesis", default="schemathesis", help="the program")
    options = parser.parse_args()
    program = shutil.which(options.schemathesis)
    if program is None:
        parser.error("there is no schemathesis: pip install schemathesis, or give --schemathesis")
    with tempfile.TemporaryDirectory(prefix="opensora-sp-api-") as folder:
        server = Server(Path(folder) / "jobs").start()
        try:
            command = [program, "run", f"{server.url}/openapi.json", "--continue-on-failure"]
            command += ["--checks", "not_a_server_error", "--max-examples", str(options.examples)]
            command += ["--request-timeout", "10", "--max-time", str(options.seconds)]
            return subprocess.run(command, check=False).returncode
        finally:
            assert server.process is not None
            server.process.terminate()
            server.process.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
