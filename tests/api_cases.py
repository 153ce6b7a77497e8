"""Requests made from the server's own OpenAPI description: none may end in an error of the server.

    python tests/api_cases.py --seconds 600

Needs the program Schemathesis, in this environment or any other: `pip install schemathesis`. It is
no requirement of the tests, because its run takes minutes. A server of one rank with the embedded
model is started for it, so what is accepted is made too. Some videos are queued first:
tests/api_hooks.py lets half of the requests name them. How often each operation answered with
which status is printed at the end. The exit code is Schemathesis's own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from serving import Server  # noqa: E402

VIDEOS = 30  # more than one is deleted


def answered(server: Server) -> list[str]:
    """How often each operation answered with which status, as the server's metrics have it."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    counts: dict[str, list[str]] = {}
    for labels, value in re.findall(r"^\w*requests_total\{(.*)\} (\S+)$", text, re.MULTILINE):
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        operation = f"{of['method']} {of['route']}"
        counts.setdefault(operation, []).append(f"{float(value):.0f} times {of['status']}")
    return [f"{operation}: {', '.join(each)}" for operation, each in sorted(counts.items())]


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
        server = Server(Path(folder) / "jobs")
        try:
            server.start(600)
            ids = [server.create(seed=seed) for seed in range(VIDEOS)]
            server.wait(ids[0])
            hooks = {"API_CASES_IDS": ",".join(ids), "SCHEMATHESIS_HOOKS": "api_hooks"}
            hooks["PYTHONPATH"] = str(Path(__file__).resolve().parent)
            command = [program, "run", f"{server.url}/openapi.json", "--continue-on-failure"]
            command += ["--checks", "not_a_server_error", "--max-examples", str(options.examples)]
            command += ["--request-timeout", "120", "--max-time", str(options.seconds)]
            code = subprocess.run(command, check=False, env=os.environ | hooks).returncode
            for line in answered(server):
                print(line)
            return code
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
