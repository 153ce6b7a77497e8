"""A network on this machine, for tests and measurements: namespaces whose links can be cut.

Each namespace has an interface eth0, as a pod or a machine has, and they and this machine meet at a
bridge. A link that is cut loses every packet and answers nothing, as a cable that was pulled.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class Network:
    """Namespaces 0, 1, ... on a bridge. Needs root.

    address: of this machine on the bridge. addresses: of the namespaces.
    """

    def __init__(self, count: int) -> None:
        name = f"osp{os.getpid()}"
        # 198.18.0.0/15 is set aside for such measurements (RFC 2544).
        part = f"198.{18 + os.getpid() // 256 % 2}.{os.getpid() % 256}"
        self.address = f"{part}.1"
        self.addresses = [f"{part}.{2 + number}" for number in range(count)]
        self._bridge = f"{name}b"
        self._links = [f"{name}v{number}" for number in range(count)]
        self._spaces = [f"{name}n{number}" for number in range(count)]
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for link, space, address in zip(self._links, self._spaces, self.addresses, strict=True):
                _ip("netns", "add", space)
                _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
                _ip("link", "set", link, "master", self._bridge, "up")
                _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
                _ip("-n", space, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def inside(
        self, number: int, folder: Path, names: Mapping[str, str] | None = None
    ) -> list[str]:
        """Words before a command that is to run in a namespace.

        names: what resolves there beside its own name, with the addresses. folder: for the file of
        them.
        """
        hosts = folder / f"hosts-{number}"
        known = {"localhost": "127.0.0.1", socket.gethostname(): self.addresses[number]}
        lines = [f"{address} {name}\n" for name, address in (known | dict(names or {})).items()]
        hosts.write_text("".join(lines))
        # ip gives the command a mount namespace of its own.
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        return ["ip", "netns", "exec", self._spaces[number], "sh", "-c", script, str(hosts)]

    def cut(self, number: int) -> None:
        """From here on nothing reaches a namespace, nor comes from it."""
        _ip("link", "set", self._links[number], "down")

    def mend(self, number: int) -> None:
        """The link is there again."""
        _ip("link", "set", self._links[number], "up")

    def close(self) -> None:
        """Remove all of it. What still runs there has no network then."""
        words = [("netns", "del", space) for space in self._spaces]
        words += [("link", "del", link) for link in (*self._links, self._bridge)]
        for one in words:  # a link goes with its namespace, some time later
            subprocess.run(["ip", *one], capture_output=True, check=False)


def why_no_network() -> str | None:
    """Why this machine allows no such network, in a line; None where it does."""
    if shutil.which("ip") is None:
        return "no ip here: apt-get install iproute2"
    try:
        Network(1).close()
    except OSError as error:
        return f"namespaces with links between them are not allowed here: {error}"
    return None


@contextmanager
def network(count: int) -> Iterator[Network]:
    """A network that goes with the block."""
    one = Network(count)
    try:
        yield one
    finally:
        one.close()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
