"""One declaration per setting: what is made from it, and that nothing is forgotten."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import integer
from opensora_sp.engine.progress import Position
from opensora_sp.jobs.identity import difference, digest, identity_of, latents_identity
from opensora_sp.jobs.records import FOLDER, Record, read_record
from opensora_sp.jobs.saved_latents import StateFiles
from opensora_sp.jobs.worklist import look_up_work
from opensora_sp.request.flags.table import DATACLASSES, all_flags, declared_flags
from opensora_sp.request.request import (
    Checkpoints,
    EngineSettings,
    Job,
    JobSettings,
    Request,
    Task,
)
from opensora_sp.request.setting import Setting, declared, field_names, setting, settings_of

MODELS = {"dit": "d", "t5": "t", "vae2d": "v2", "vae3d": "v3"}
PARTS = {"request": Request, "engine": EngineSettings, "job": JobSettings}
FIELDS = [(part, one) for part, cls in PARTS.items() for one in settings_of(cls).values()]
# A saved state of the version that had one RunSettings, cut after step 3 of 4.
STATE = Path(__file__).resolve().parents[1] / "data" / "state_before_engine_settings"
NAME = "sample_0000.mp4"


@pytest.mark.parametrize("cls", DATACLASSES)
def test_every_field_is_declared(cls: type[Any]) -> None:
    assert tuple(settings_of(cls)) == field_names(cls)


def test_a_declaration_that_does_not_say_what_it_changes_is_none() -> None:
    with pytest.raises(TypeError, match="changes"):
        setting("--x", integer(0), 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="changes"):
        Setting(name="--x", kind=integer(0), default=1, help="")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="perhaps"):
        declared("--x", integer(0), 1, changes="perhaps")  # type: ignore[arg-type]


def test_every_declared_flag_has_its_place_in_the_table() -> None:
    placed = Counter(flag.key for flag in all_flags())
    assert placed == dict.fromkeys(declared_flags(), 1)


ANOTHER: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 60,
    "condition_frame_length": 10,
    "loop": 3,
    "deadlines": "step=600",
    "checkpoints": "other weights",
    "llm_refine": False,
}


def another(one: Setting) -> Any:
    """A legal value of a field that is not the one in `identity_with`."""
    if one.field in ANOTHER:
        return ANOTHER[one.field]
    kind = one.field_kind
    assert kind is not None
    names = kind.metavar.strip("{}").split(",")
    candidates = [True, False, 3, 2, 10, *names, "other"]
    return next(c for c in candidates if kind.legal(c) and c != one.default)


def identity_with(part: str, change: dict[str, Any]) -> dict[str, Any]:
    """The identity of a small video with one value changed; prompts are refined."""
    models = MODELS
    if change.pop("checkpoints", None) is not None:  # what they hold is told by their digests
        models = {**MODELS, "dit": "other"}
    # Two clips, so that every model has a part in the latents.
    values: dict[str, dict[str, Any]] = {
        "request": {"prompt": "p", "loop": 2},
        "engine": {},
        "job": {"llm_refine": True},
    }
    values[part] |= change
    task = Task(request=Request(**values["request"]), output=Path("x.mp4"))
    return identity_of(
        task, EngineSettings(**values["engine"]), JobSettings(**values["job"]), models
    )


@pytest.mark.parametrize(("part", "one"), FIELDS, ids=lambda value: getattr(value, "field", value))
def test_an_identity_holds_what_is_declared_to_change_an_output(part: str, one: Setting) -> None:
    before, now = identity_with(part, {}), identity_with(part, {one.field: another(one)})
    found = [
        digest(before) != digest(now),
        digest(latents_identity(before)) != digest(latents_identity(now)),
    ]
    expected = {"content": [True, True], "file": [True, False], "nothing": [False, False]}
    assert found == expected[one.changes]


def test_values_made_in_python_are_checked_by_their_declarations() -> None:
    wrong: list[tuple[type[Any], dict[str, Any], str]] = [
        (EngineSettings, {"memory": "huge"}, "memory 'huge' is not one of auto, speed, balanced"),
        (EngineSettings, {"checkpoints": "dir"}, "checkpoints 'dir' is not a Checkpoints"),
        (EngineSettings, {"save_dir": "x"}, "save_dir is not a field of EngineSettings"),
        (JobSettings, {"save_every": -1}, "save_every -1 is not a whole number of at least 0"),
        (JobSettings, {"prompt_as_path": 1}, "prompt_as_path 1 is not true or false"),
        (JobSettings, {"save_dri": "x"}, "did you mean save_dir?"),
    ]
    for cls, given, said in wrong:
        with pytest.raises(UserError) as caught:
            cls(**given)
        assert said in str(caught.value)
    four = dict.fromkeys(("dit", "t5", "vae2d", "vae3d"), "x")
    assert EngineSettings(checkpoints=Checkpoints(**four)).checkpoints is not None  # type: ignore[arg-type]


def state_of_before(folder: Path) -> tuple[Record, Job]:
    """The saved state as a run finds it, and the job that goes on with it."""
    shutil.copytree(STATE, folder / FOLDER)
    record = read_record(folder / NAME)
    assert record is not None
    request = Request(prompt="a red ball", height=32, width=48, num_frames=17, steps=4)
    engine = EngineSettings(dtype="fp32")
    settings = JobSettings(save_dir=folder, verbose=0)
    task = Task(request=request, output=folder / NAME)
    return record, Job(engine=engine, settings=settings, tasks=(task,))


def test_a_state_of_the_version_before_goes_on(tmp_path: Path) -> None:
    record, job = state_of_before(tmp_path)
    models = record.identity["models"]
    identity = identity_of(job.tasks[0], job.engine, job.settings, models)
    assert difference(record.identity, identity) is None
    # What that version knew is still told in the same words and order.
    known = {name: value for name, value in identity.items() if name in record.identity}
    request = record.identity["request"]
    known["request"] = {k: v for k, v in identity["request"].items() if k in request}
    assert json.dumps(known) == json.dumps(record.identity)
    (found,) = look_up_work(job, models)
    assert (found.position, found.output) == (Position(0, 3), tmp_path / NAME)
    saved = StateFiles(tmp_path / NAME, latents_identity(identity)).load_step()
    assert saved.z.shape == (4, 5, 4, 6)
    assert bool(torch.isfinite(saved.z).all())
    other = dataclasses.replace(job, engine=EngineSettings(dtype="bf16"))
    (found,) = look_up_work(other, models)  # another request: it gets a name of its own
    assert (found.position, found.output) == (Position(), tmp_path / "sample_0000_2.mp4")


@pytest.mark.parametrize(
    ("part", "one", "value", "said"),
    [
        ("request", "loop_carry", "latents", "its loop_carry was 'frames' and is 'latents' now"),
        ("engine", "text weights", "int8", "its text weights was 'full' and is 'int8' now"),
    ],
)
def test_a_record_that_knows_less_had_the_defaults(
    part: str, one: str, value: str, said: str
) -> None:
    """As a setting that is declared later makes of every record that is there."""
    before = identity_with("request", {})
    del (before["request"] if part == "request" else before)[one]
    assert difference(before, identity_with("request", {})) is None
    change = {"t5_weights": value} if part == "engine" else {one: value}
    assert difference(before, identity_with(part, change)) == said
    del before["request"]["prompt"]
    assert difference(before, identity_with("request", {})) is not None
