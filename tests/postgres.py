"""A Postgres of its own for tests and measurements: made, started, restarted and removed here."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PASSWORD = "se:cr/et"
_QUOTED = "se%3Acr%2Fet"


def programs() -> Path | None:
    """Where initdb and pg_ctl are, of the newest version that is installed; None without one."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if (on_path := shutil.which("initdb")) is not None:
        found.append(Path(on_path).resolve().parent)
    whole = [path for path in found if (path / "pg_ctl").exists()]
    return max(whole, key=lambda path: (path.parent.name.rjust(4), str(path)), default=None)


class Postgres:
    """One server on a free port of this machine, with its data in a folder that goes with it.

    address: where it answers beside 127.0.0.1, such as that of a bridge; `url` has it.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.address = address
        where = programs()
        assert where is not None
        self._bin = where
        # Postgres refuses to run as root, and its user must reach the folder.
        self._as: dict[str, Any] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        if os.geteuid() == 0:
            names = {one.pw_name for one in pwd.getpwall()}
            user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"postgresql+psycopg://tester:{_QUOTED}@{address}:{self.port}/postgres"
        secret = self.folder / "secret"
        secret.write_text(PASSWORD + "\n")
        secret.chmod(0o644)
        self._run(
            "initdb", "-D", "data", "-U", "tester", "--pwfile=secret", "-A", "scram-sha-256",
            "-E", "UTF8", "--no-sync", "--locale=C",
        )  # fmt: skip
        with (self.folder / "data" / "pg_hba.conf").open("a") as file:
            file.write("host all all samenet scram-sha-256\n")

    def start(self) -> Postgres:
        """Start it, and return when it answers."""
        addresses = ",".join({"127.0.0.1", self.address})
        options = f"-p {self.port} -k {self.folder} -c listen_addresses={addresses} -c fsync=off"
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")
        return self

    def stop(self, how: str = "fast") -> None:
        """End it: fast cuts connections, immediate is as a crash."""
        self._run("pg_ctl", "-D", "data", "-w", "-m", how, "stop")

    def pid(self) -> int:
        """The process that all its others are children of."""
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def remove(self) -> None:
        """End it and remove its data."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *words: str) -> None:
        done = subprocess.run(
            [str(self._bin / program), *words],
            cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, timeout=120, env={"PATH": "/usr/bin:/bin"},
            **self._as,
        )  # fmt: skip
        assert done.returncode == 0, f"{program} {words}: {done.stderr}"
