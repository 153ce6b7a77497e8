"""The recipes of configs/deploy: what they name is there, and every command in them is accepted."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import av
import pytest
import yaml

from opensora_sp.cli import serve, work
from opensora_sp.cli.infer import main as generate

if TYPE_CHECKING:
    from opensora_sp.server.durable import JobQueue

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "configs" / "deploy"
CORE = ("v1", "apps/v1")
QUEUE = "postgresql+psycopg://user@host:5432/database"
# What LeaderWorkerSet and Kubernetes put into a pod of the second group, on its second node.
POD = {
    "POD_NAME": "opensora-sp-group-1",
    "LWS_LEADER_ADDRESS": "opensora-sp-pair-1.opensora-sp-pair.default",
    "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
}
# Fields of the two custom resources that are used, as their published definitions have them.
CUSTOM: dict[str, Any] = {
    "LeaderWorkerSet": {
        "replicas": int,
        "startupPolicy": ("LeaderCreated", "LeaderReady"),
        "leaderWorkerTemplate": {
            "size": int,
            "restartPolicy": ("RecreateGroupOnPodRestart", "None"),
            "workerTemplate": dict,
        },
    },
    "ScaledObject": {
        "scaleTargetRef": {"apiVersion": str, "kind": str, "name": str},
        "minReplicaCount": int,
        "maxReplicaCount": int,
        "pollingInterval": int,
        "advanced": {
            "horizontalPodAutoscalerConfig": {
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": int}}
            }
        },
        "triggers": list,
    },
}


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "OPENSORA_SP_QUEUE"):
        monkeypatch.delenv(name, raising=False)


def documents() -> list[dict[str, Any]]:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


def pod(document: dict[str, Any]) -> dict[str, Any] | None:
    spec = document["spec"]
    if document["kind"] == "LeaderWorkerSet":
        return dict(spec["leaderWorkerTemplate"]["workerTemplate"])
    return dict(spec["template"]) if "template" in spec else None


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of the program in a recipe: where it stands, and its words."""
    for document in documents():
        found = pod(document)
        for container in [] if found is None else found["spec"]["containers"]:
            words = [re.sub(r"\$\((\w+)\)", lambda m: POD[m[1]], w) for w in container["args"]]
            yield document["metadata"]["name"], words
    for name in ("gateway", "group"):
        words = compose()["services"][name]["command"]
        yield f"compose {name}", [re.sub(r"\$\{\w+:-(\w*)\}", r"\1", word) for word in words]
    for unit in sorted((ROOT / "configs").glob("*.service")):
        words = shlex.split(service(unit)["Service"]["ExecStart"].replace("%H-%i", "host-1"))
        yield unit.name, words[words.index("opensora-sp") + 1 :]


def service(unit: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(unit.read_text().replace("\\\n", " "))
    return parser


@pytest.mark.parametrize(("place", "words"), commands(), ids=lambda part: str(part)[:30])
def test_a_command_of_a_recipe_is_accepted(
    place: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the program reads it; the folders and files that a recipe mounts are the test's."""
    pytest.importorskip("dbos")
    monkeypatch.setenv("OPENSORA_SP_QUEUE", QUEUE)
    if "serve" in words and not any("queue" in word or "no-engine" in word for word in words):
        monkeypatch.delenv("OPENSORA_SP_QUEUE")
    tokens = tmp_path / "tokens"
    tokens.write_text("me:" + "x" * 32 + "\n")
    tokens.chmod(0o600)
    named = {"--save-dir": str(tmp_path / "shared"), "--token-file": str(tokens)}
    model = ROOT / "opensora_sp" / "assets" / "embedded"
    named |= {f"--ckpt-path-{one}": str(model / one) for one in ("dit", "t5", "vae2d", "vae3d")}
    given = [word for part in words for word in part.split("=", 1)]
    own = [named.get(given[at - 1], word) if at else word for at, word in enumerate(given)]
    assert own[0] in ("serve", "work")
    if own[0] == "serve":
        settings, _ = serve._settings(own[1:])
        group = settings.group
    else:
        parser = work.parser()
        found, engine = parser.parse_known_args(own[1:])
        group = serve.group_of(found, engine, serve.operations_of(found))
    assert group.save_dir == tmp_path / "shared"
    if "pair" in place:
        assert (group.nodes, group.node, group.ranks) == (2, 1, 16)
        assert group.master == f"{POD['LWS_LEADER_ADDRESS']}:29500"


def test_kubernetes_accepts_the_manifests() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in documents():
        if document["apiVersion"] in CORE:
            kubernetes_validate.validate(document, "1.31", strict=True)
            continue
        fits(document["spec"], CUSTOM[document["kind"]], document["kind"])
        if (template := pod(document)) is not None:
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
            whole["metadata"] = {"name": "x", **template["metadata"]}
            kubernetes_validate.validate(whole, "1.31", strict=True)


def fits(value: Any, allowed: Any, where: str) -> None:
    if isinstance(allowed, dict):
        assert isinstance(value, dict), where
        for name, inner in value.items():
            assert name in allowed, f"{where}.{name}"
            fits(inner, allowed[name], f"{where}.{name}")
    elif isinstance(allowed, tuple):
        assert value in allowed, where
    else:
        assert type(value) is allowed, where


def test_what_pods_name_is_declared() -> None:
    claims = {one["metadata"]["name"] for one in documents() if one["kind"].endswith("Claim")}
    claims.add("opensora-sp-weights")  # the person's own
    for document in documents():
        if (template := pod(document)) is None:
            continue
        volumes = {one["name"]: one for one in template["spec"]["volumes"]}
        for one in volumes.values():
            if "persistentVolumeClaim" in one:
                assert one["persistentVolumeClaim"]["claimName"] in claims
        for container in template["spec"]["containers"]:
            assert {one["name"] for one in container["volumeMounts"]} == set(volumes)
            ports = {one["name"]: one["containerPort"] for one in container["ports"]}
            for probe in (value for name, value in container.items() if name.endswith("Probe")):
                assert probe["httpGet"]["port"] in ports
                assert probe["httpGet"]["path"] in ("/health", "/ready")
            if "health" in ports:
                assert f"--health-port={ports['health']}" in container["args"]


def test_compose_names_what_is_there() -> None:
    whole = compose()
    for name, each in whole["services"].items():
        for mount in each.get("volumes", []):
            source = mount.split(":")[0]
            assert source in whole["volumes"] or (DEPLOY / source).is_file(), (name, source)
        assert set(each.get("secrets", [])) <= set(whole["secrets"]), name
        assert set(each.get("depends_on", [])) <= set(whole["services"]), name
        if "build" in each:
            assert (DEPLOY / each["build"]["context"]).resolve() == ROOT
            assert (ROOT / each["build"]["dockerfile"]).is_file()
    ignored = (DEPLOY / ".gitignore").read_text().split()
    assert {one["file"] for one in whole["secrets"].values()} <= set(ignored)


def test_the_dockerfile_copies_what_is_there_and_has_a_stage_for_each_stack() -> None:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.M))
    assert stages == {f"{stack}-base" for stack in ("cpu", "cuda", "gcu")}
    for words in re.findall(r"^COPY (.*)$", text, re.M):
        for source in words.split()[:-1]:
            assert (ROOT / source).exists(), source
    needed = {"pyproject.toml", "setup.py", "README.md", "opensora_sp", "configs"}
    assert needed <= set(re.findall(r"\S+", " ".join(re.findall(r"^COPY (.*)$", text, re.M))))


def test_dashboards_and_scaling_ask_for_metrics_that_exist(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    from opensora_sp.server.board import Board
    from opensora_sp.server.engine_process import Health
    from opensora_sp.server.job_store import JobStore
    from opensora_sp.server.metrics import Metrics

    board = Board(JobStore(tmp_path), cast("JobQueue", None))
    shown = Metrics(board, lambda: Health("ready", "", 0)).text().decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", shown, re.M))
    known = {name for name, kind in kinds.items() if kind != "histogram"}
    for name in (name for name, kind in kinds.items() if kind == "histogram"):
        known |= {f"{name}{suffix}" for suffix in ("_bucket", "_sum", "_count")}
    dashboard = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
    queries = [one["expr"] for panel in dashboard["panels"] for one in panel["targets"]]
    queries += [
        trigger["metadata"]["query"]
        for document in documents()
        if document["kind"] == "ScaledObject"
        for trigger in document["spec"]["triggers"]
    ]
    for query in queries:
        names = set(re.findall(r"opensora_sp_\w+", query))
        assert names
        assert names <= known, (query, names - known)
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    "script", sorted((DEPLOY / "slurm").glob("*.sbatch")), ids=lambda p: p.name
)
def test_a_slurm_script_is_bash_and_says_what_it_needs(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script.read_text(), re.M))
    assert options["signal"].startswith("TERM@")


def test_a_list_on_two_slurm_nodes_is_what_one_process_makes(tmp_path: Path) -> None:
    """srun and scontrol are stand-ins: two copies of the command that meet on this machine."""
    tools = tmp_path / "tools"
    tools.mkdir()
    made = {
        "scontrol": 'echo "127.0.0.1"',
        "srun": (
            'while [[ "$1" == --* ]]; do shift; done\n'
            'SLURM_NODEID=1 SLURM_PROCID=1 "$@" &\nother=$!\n'
            'SLURM_NODEID=0 SLURM_PROCID=0 "$@"\nwait $other'
        ),
        "opensora-sp": 'exec python -m opensora_sp "$@"',
    }
    for name, body in made.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    python = Path(sys.executable).parent
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\na blue square\n")
    flags = ["--device", "cpu", "--dtype", "fp32", "--image-size", "48", "64", "--num-frames", "17"]
    flags += ["--num-sampling-steps", "3"]
    env = {**os.environ, "PATH": f"{tools}:{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "RANKS_PER_NODE": "1"}
    env |= {"SLURM_JOB_NODELIST": "node[1-2]", "OMP_NUM_THREADS": "1"}
    script = DEPLOY / "slurm" / "list.sbatch"
    done = subprocess.run(
        ["bash", str(script), str(prompts), str(tmp_path / "two"), *flags],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one = ["--prompt-path", str(prompts), "--save-dir", str(tmp_path / "one"), *flags]
    assert generate(one) == 0
    names = sorted(path.name for path in (tmp_path / "one").glob("*.mp4"))
    assert len(names) == 2
    for name in names:
        with (
            av.open(str(tmp_path / "one" / name)) as alone,
            av.open(str(tmp_path / "two" / name)) as shared,
        ):
            pairs = list(zip(alone.decode(video=0), shared.decode(video=0), strict=True))
        assert len(pairs) == 17
        for a, b in pairs:
            apart = a.to_ndarray(format="rgb24").astype(int) - b.to_ndarray(format="rgb24")
            assert abs(apart).max() <= 2
