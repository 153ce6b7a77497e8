"""Groups in network namespaces: one whose link is cut in mid-job, and one over two machines."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from groups import PATIENCE_SECONDS, Pool
from namespaces import Network, network, why_no_network
from postgres import Postgres, programs
from serving import ROOT

from opensora_sp.cli.infer import main as generate
from opensora_sp.cli.main import main
from opensora_sp.server.queue_url import parse_queue_url
from opensora_sp.server.shared_queue import SharedQueue

pytest.importorskip("dbos")
pytest.importorskip("psycopg")
pytestmark = pytest.mark.skipif(
    programs() is None, reason="no Postgres here: apt-get install postgresql"
)
LONG = {"num_inference_steps": 300, "seed": 5}
MANIFEST = ROOT / "configs" / "deploy" / "kubernetes" / "group-two-nodes.yaml"
LEADER = "opensora-sp-pair-0.opensora-sp-pair.default"


@pytest.fixture(scope="module")
def no_network() -> str | None:
    """Why there is none here. Asked only where a test runs: it makes a network."""
    return why_no_network()


@pytest.fixture
def net(no_network: str | None) -> Iterator[Network]:
    if no_network is not None:
        pytest.skip(no_network)
    with network(2) as one:
        yield one


def test_a_group_that_is_cut_off_publishes_nothing_of_what_another_has_taken_over(
    net: Network, tmp_path: Path
) -> None:
    database = Postgres(net.address)
    inside = {name: net.inside(number, tmp_path) for number, name in enumerate("ab")}
    try:
        database.start()
        with Pool(tmp_path / "save", database.url, inside) as pool:
            wanted = pool.digest(pool.first.create(**LONG))
            job = pool.first.create(**LONG)
            name = pool.maker(job)
            net.cut("ab".index(name))
            cut = time.monotonic()
            other = pool.heir(job, name)
            taken = time.monotonic()
            net.mend("ab".index(name))
            assert pool.digest(job) == wanted
            print(f"taken over {taken - cut:.1f} s, ended {time.monotonic() - cut:.1f} s after it")
            log = pool.groups[name].log
            attempts = tmp_path / "save" / "jobs" / job / "attempts"
            end = time.monotonic() + PATIENCE_SECONDS
            while (
                "another attempt has the job or will get it" not in log.read_text()
                or len(list(attempts.iterdir())) > 1
            ):
                assert time.monotonic() < end, log.read_text()[-2000:]
                time.sleep(0.1)
            assert pool.outputs(job) == ["attempts/0002/video_0000.mp4"]
            # The one that came back takes new work: the other one has a job already.
            jobs = [pool.first.create(**LONG) for _ in range(2)]
            assert {pool.maker(one) for one in jobs} == {name, other}
    finally:
        database.remove()


class Pods:
    """The two pods of the manifest's group, on this machine, with a rank each.

    net: where each has an address of its own, as pods have. None: both are at localhost.
    """

    def __init__(self, net: Network | None, url: str, folder: Path) -> None:
        (container,) = yaml.safe_load(MANIFEST.read_text())["spec"]["leaderWorkerTemplate"][
            "workerTemplate"
        ]["spec"]["containers"]
        self._net, self._folder, self._args = net, folder, container["args"]
        self._environ = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        self._environ["OPENSORA_SP_QUEUE"] = url
        self.leader = "localhost" if net is None else LEADER
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs = [folder / f"pod-{number}.log" for number in range(2)]
        self._ports = [_free_port() for _ in range(3)]

    def start(self) -> None:
        """Both at once, as with startupPolicy LeaderCreated."""
        for number in range(2):
            # What LeaderWorkerSet sets in each pod, and what the kubelet makes of the arguments.
            environ = self._environ | {
                "LWS_LEADER_ADDRESS": self.leader,
                "LWS_GROUP_SIZE": "2",
                "LWS_WORKER_INDEX": str(number),
            }
            words = [one for one in self._args if not one.startswith("--ckpt-path")]
            for name in re.findall(r"\$\((\w+)\)", " ".join(words)):
                words = [one.replace(f"$({name})", environ[name]) for one in words]
            mine = {"--save-dir": str(self._folder / "save"), "--nproc": "1"}
            inside: Sequence[str] = ()
            if self._net is None:
                mine |= {"--health-port": str(self._ports[number])}
                words += ["--master-port", str(self._ports[2])]
                environ |= {name: "lo" for name in environ if name.endswith("SOCKET_IFNAME")}
            else:
                names = {self.leader: self._net.addresses[0]}
                inside = self._net.inside(number, self._folder, names)
            for flag, value in mine.items():
                assert sum(one.startswith(f"{flag}=") for one in words) == 1
                words = [f"{flag}={value}" if one.startswith(f"{flag}=") else one for one in words]
            command = [*inside, sys.executable, "-m", "opensora_sp", *words]
            command += ["--device", "cpu", "--dtype", "fp32"]
            environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            with self.logs[number].open("ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, env={**os.environ, **environ}, stdout=log, stderr=log, cwd=ROOT
                    )
                )

    def ready(self, number: int) -> bool:
        """What the probe of a pod asks."""
        port = 8001 if self._net is not None else self._ports[number]
        host = "127.0.0.1" if self._net is None else self._net.addresses[number]
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Give this process Ctrl-C when a pod ends, or nothing comes of the block for long."""
        done, end = threading.Event(), time.monotonic() + PATIENCE_SECONDS

        def watch() -> None:
            while not done.wait(0.2):
                if time.monotonic() > end or any(one.poll() is not None for one in self.processes):
                    os.kill(os.getpid(), signal.SIGINT)
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def said(self) -> str:
        """The ends of both logs."""
        return "\n".join(log.read_text()[-2000:] for log in self.logs)

    def stop(self) -> list[int]:
        """Ask both to end, as the kubelet does; their exit codes."""
        for one in self.processes:
            one.send_signal(signal.SIGTERM)
        codes = []
        for one in self.processes:
            try:
                codes.append(one.wait(60))
            except subprocess.TimeoutExpired:
                one.kill()
                codes.append(one.wait())
        return codes


def test_a_group_of_two_pods_makes_what_one_process_makes(
    no_network: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red ball\n")
    flags = ["--prompt-path", "prompts.txt", "--image-size", "48", "64", "--num-frames", "17"]
    flags += ["--num-sampling-steps", "3"]
    assert generate([*flags, "--save-dir", "one", "--device", "cpu", "--dtype", "fp32"]) == 0
    capsys.readouterr()
    net = Network(2) if no_network is None else None
    database = Postgres("127.0.0.1" if net is None else net.address)
    try:
        url = database.start().url
        pods = Pods(net, url, tmp_path)
        try:
            pods.start()
            with pods.interrupting():
                code = main(["generate", "--queue", url, "--save-dir", "save", *flags])
            assert code == 0, pods.said()
            made = Path(capsys.readouterr().out.strip())
            assert [pods.ready(number) for number in range(2)] == [True, True], pods.said()
            queue = SharedQueue(parse_queue_url(url))
            (group,) = queue.groups()
            queue.close()
            assert (group.name, group.about["ranks"]) == (pods.leader, 2)
        finally:
            codes = pods.stop()
        assert codes == [0, 0], pods.said()
    finally:
        database.remove()
        if net is not None:
            net.close()
    (alone,) = Path("one").glob("*.mp4")
    apart = np.abs(_frames(made) - _frames(alone))
    assert apart.shape == (17, 48, 64, 3)
    assert apart.max() <= 2


def _frames(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int_]]:
    """Pixels [F,H,W,3]."""
    with av.open(str(path)) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(found).astype(int)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
