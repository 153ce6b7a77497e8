"""JSON that somebody else wrote: one line with file and key, and no hang, whatever it holds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reports import draft_of, validator

from opensora_sp.base.cpu_threads import transformer_width
from opensora_sp.base.errors import CheckpointError, UserError
from opensora_sp.base.outside_json import read_object
from opensora_sp.base.outside_yaml import parse_yaml
from opensora_sp.benchmark.report.files import SCHEMA_FILE, read_report
from opensora_sp.benchmark.report.schema_check import CHECKED, IGNORED, first_problem
from opensora_sp.cli.benchmark import main as benchmark
from opensora_sp.cli.plan import main as plan
from opensora_sp.models.configs import read_shards
from opensora_sp.models.stdit3 import STDiT3Config
from opensora_sp.models.text_encoder import TextEncoder
from opensora_sp.models.text_pieces import load_pieces
from opensora_sp.models.video_vae import VideoVAE
from opensora_sp.parallel.watchdog.store import StatusStore
from opensora_sp.planner.models import ModelSizes
from opensora_sp.request.embedded import EMBEDDED
from opensora_sp.request.request import Checkpoints

PLACES = {"dit": "dit", "t5": "t5", "vae2d": "vae2d/vae", "vae3d": "vae3d"}
# Model, key (of an object inside with a dot), value as JSON.
WRONG = [
    *(("dit", "hidden_size", value) for value in ('"abc"', "null", "[1]", "1e9", "-4", "true")),
    *(("dit", "num_heads", value) for value in ("0", "-1", "1.5")),
    *(("dit", "depth", value) for value in ("1000000000", "0", "{}")),
    *(("dit", key, "0") for key in ("mlp_ratio", "caption_channels", "model_max_length")),
    ("dit", "qk_norm", '"yes"'),
    ("dit", "patch_size", "2"),
    *(("t5", key, value) for key in ("d_model", "d_ff", "d_kv") for value in ("0", '"x"')),
    *(("t5", "num_layers", value) for value in ("1000000000", "-1", "null")),
    *(("t5", key, "0") for key in ("num_heads", "vocab_size", "layer_norm_epsilon")),
    ("t5", "feed_forward_proj", "7"),
    *(("vae2d", "norm_num_groups", value) for value in ("0", "-2", '"2"')),
    *(("vae2d", "block_out_channels", value) for value in ("8", "[]", "[0]", '["8"]')),
    *(("vae2d", key, "[1]") for key in ("act_fn", "layers_per_block", "latent_channels")),
    ("vae3d", "vae_temporal", '"abc"'),
    ("vae3d", "vae_2d", "[4]"),
    *(("vae3d", f"vae_temporal.{key}", "0") for key in ("filters", "num_groups", "embed_dim")),
    ("vae3d", "vae_temporal.channel_multipliers", "[1, null]"),
    ("vae3d", "vae_temporal.temporal_downsample", "[1, 2, 3]"),
    ("vae3d", "vae_2d.micro_batch_size", "0"),
    ("vae3d", "micro_frame_size", "2.5"),
]


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """The embedded model, to be broken."""
    return {name: Path(shutil.copytree(EMBEDDED / name, tmp_path / name)) for name in PLACES}


def load(name: str, models: dict[str, Path]) -> Any:
    if name == "dit":
        return STDiT3Config.load(models["dit"])
    if name == "t5":
        return TextEncoder.check(models["t5"])
    return VideoVAE.check(models["vae3d"], models["vae2d"])


def test_the_embedded_model_is_read(models: dict[str, Path]) -> None:
    for name in PLACES:
        load(name, models)
    sizes = ModelSizes.read(Checkpoints(**models))
    assert (sizes.channels, sizes.depth, sizes.t5_layers, sizes.filters) == (96, 4, 2, 16)


@pytest.mark.parametrize(("name", "key", "value"), WRONG)
def test_a_wrong_key_is_named_in_loading_and_in_planning(
    name: str, key: str, value: str, models: dict[str, Path]
) -> None:
    path = models[name].parent / PLACES[name] / "config.json"
    content = json.loads(path.read_text())
    *outer, last = key.split(".")
    (content[outer[0]] if outer else content)[last] = json.loads(value)
    path.write_text(json.dumps(content))
    for read in (lambda: load(name, models), lambda: ModelSizes.read(Checkpoints(**models))):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert str(path) in str(caught.value)
        assert key in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("key", "value"), [("act_fn", "x"), ("norm_num_groups", 3), ("down_block_types", ["x"])]
)
def test_values_that_only_diffusers_can_judge(
    key: str, value: object, models: dict[str, Path]
) -> None:
    path = models["vae2d"] / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match="does not describe an AutoencoderKL"):
        load("vae2d", models)


UNREADABLE: dict[str, tuple[Any, str]] = {
    "nested": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "nested objects": ('{"a":' * 300 + "1" + "}" * 300, "nested too deeply"),
    "not a number": ('{"hidden_size": NaN}', "NaN is not JSON"),
    "infinite": ('{"hidden_size": 1e999}', "not readable JSON"),
    "endless digits": ('{"depth": ' + "9" * 5000 + "}", "5000 digits"),
    "a list": ("[1]", "not a list"),
    "nothing": ("", "not readable JSON"),
    "not UTF-8": (b"\xff\xfe\x00", "not readable JSON"),
    "a key twice": ('{"depth": 1, "depth": 2}', "the key 'depth' is there twice"),
    "too large": (" " * (2**20 + 1), "at most"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_files_that_cannot_be_read(kind: str, models: dict[str, Path]) -> None:
    text, said = UNREADABLE[kind]
    for name, place in PLACES.items():
        path = models[name].parent / place / "config.json"
        before = path.read_bytes()
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        for read in (lambda: load(name, models), lambda: ModelSizes.read(Checkpoints(**models))):  # noqa: B023
            with pytest.raises(CheckpointError, match=said):
                read()
        path.write_bytes(before)


@pytest.mark.parametrize("shard", ['"../x.bin"', '"' + "a" * 300 + '"', "[1]", "null", '".hidden"'])
def test_an_index_that_names_no_neighbour(shard: str, tmp_path: Path) -> None:
    index = tmp_path / "model.bin.index.json"
    index.write_text('{"weight_map": {"w": ' + shard + "}}")
    with pytest.raises(CheckpointError, match="names the shard"):
        read_shards(index)


@pytest.mark.parametrize(
    "raw",
    [b"5", b"[]", b'{"rank": "x", "stage": "s", "what": "w"}', b'{"rank": 1}', b"\xff", b"[" * 500],
)
def test_an_entry_of_the_store_that_no_rank_wrote(raw: bytes) -> None:
    """Whoever reaches the port can write there; the watchdog's searches take a ValueError."""
    store = SimpleNamespace(check=lambda _: True, get=lambda _: raw)
    with pytest.raises((ValueError, TypeError)):
        StatusStore(store, 0).fault()


def test_yaml_is_read_to_16_levels() -> None:
    assert parse_yaml("a: " + "[" * 15 + "]" * 15, "x") is not None
    for text in ("\na: " + "[" * 16 + "]" * 16, "\n" + "[" * 300, "\n" + "- " * 300):
        with pytest.raises(UserError, match="x is nested too deeply at line 2: 16 levels"):
            parse_yaml(text, "x")


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            read_object(path)
    os.mkfifo(tmp_path / "config.json")
    assert transformer_width(tmp_path) is None
    os.mkfifo(tmp_path / "spiece.model")
    with pytest.raises(CheckpointError):
        load_pieces(tmp_path)


def test_the_plan_of_a_broken_checkpoint_is_one_line(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = models["dit"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"depth": 10**9}))
    flags = [part for name in PLACES for part in (f"--ckpt-path-{name}", str(models[name]))]
    assert plan(["--device-memory", "24GB", *flags]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert "depth 1000000000 is not a whole number from 1 to 512" in said


def _keywords(schema: Any, names: bool = False) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_keywords, schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    found: set[str] = set() if names else set(schema)
    for key, inner in schema.items():
        if key not in ("enum", "const", "required"):
            found |= _keywords(inner, not names and key in ("properties", "$defs"))
    return found


def test_every_keyword_of_the_schema_is_known() -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    assert _keywords(schema) - CHECKED - IGNORED == set()


def _changes(report: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Places of a report, each with a value of a wrong kind or without any."""
    found: list[tuple[tuple[Any, ...], Any]] = []

    def walk(value: Any, place: tuple[Any, ...]) -> None:
        if place and place[0] != "runs":
            found.extend((place, wrong) for wrong in (None, "abc", [1], {"a": 1}, -1, ...))
        if isinstance(value, (dict, list)):
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                walk(value[key], (*place, key))

    walk(report, ())
    return found


@pytest.mark.slow
def test_a_changed_report_is_never_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = draft_of(tmp_path).write("ok")
    assert first_problem(good, SCHEMA_FILE) is None
    right, broken = tmp_path / "report.json", tmp_path / "broken.json"
    refused = 0
    for place, wrong in _changes(good)[::7]:
        changed = json.loads(json.dumps(good))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        if wrong is ...:
            del inner[place[-1]]
        else:
            inner[place[-1]] = wrong
        broken.write_text(json.dumps(changed))
        code = benchmark(["--compare", str(right), str(broken)])
        said = capsys.readouterr().err
        assert code in (0, 2), place
        assert (code == 2) == said.startswith("error: --compare"), (place, said)
        # Our reading of the schema and the library's agree, but for keys that are unknown.
        if validator().is_valid(changed) and changed["status"] == "ok":
            assert code == 0, (place, wrong, said)
        refused += code == 2
    assert refused > 40


def test_a_report_without_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = draft_of(tmp_path, ranks=1).write("ok")
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({k: v for k, v in good.items() if k != "run"}))
    assert benchmark(["--compare", str(tmp_path / "report.json"), str(broken)]) == 2
    assert "run is missing" in capsys.readouterr().err
    argv = ["--baseline", str(broken), "--prompt", "x", "--save-dir", str(tmp_path)]
    argv += ["--benchmark-save-path", str(tmp_path / "new.json")]
    assert benchmark(argv) == 2
    assert "run is missing" in capsys.readouterr().err
    newer = good | {"schema": {**good["schema"], "version": "1.0"}, "more": 1}
    broken.write_text(json.dumps(newer))
    assert read_report(broken, "x")["more"] == 1
