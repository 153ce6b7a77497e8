"""Mistakes in Python are the same single lines as on the command line, before a model is loaded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_sp.base.errors import UserError
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.media.sinks import Collector
from opensora_sp.parallel.session import alone, open_session
from opensora_sp.request.embedded import EMBEDDED, embedded_checkpoints
from opensora_sp.request.request import Checkpoints, JobSettings, Request
from opensora_sp.request.settings import check_request, parse_command_line, resolve

SMALL = Request(prompt="x", height=32, width=32, num_frames=1, steps=1)
LOOPS = [
    {"loop": 2, "num_frames": 17},
    {"loop": 2, "num_frames": 1},
    {"loop": 2, "condition_frame_length": 3},
    {"loop": 3, "condition_frame_length": 10, "num_frames": 34},
]


@pytest.mark.parametrize("fields", LOOPS)
def test_rules_on_fields_hold_in_python_in_the_words_of_the_flags(fields: dict[str, int]) -> None:
    with pytest.raises(UserError) as caught:
        Request(prompt="x", **fields)  # type: ignore[arg-type]
    flags = [t for k, v in fields.items() for t in (f"--{k.replace('_', '-')}", str(v))]
    with pytest.raises(UserError) as said:
        check_request(resolve(parse_command_line(flags)))
    words = str(said.value)
    for key in ("num_frames", "condition_frame_length", "loop"):
        words = words.replace(f"--{key.replace('_', '-')}", key)
    assert str(caught.value) == words
    assert "--" not in str(caught.value)
    with pytest.raises(UserError):
        replace(SMALL, **fields)  # type: ignore[arg-type]


def test_rules_leave_alone_what_the_flags_allow() -> None:
    Request(prompt="x", condition_frame_length=3)
    assert Request(prompt="x", loop=2, num_frames=34).loop == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"heigth": 96}, "heigth is not a field of Request; did you mean height?"),
        ({"seed": 1.0}, "seed 1.0 is not a whole number"),
        ({"seed": np.float64(1)}, "seed 1.0 is not a whole number"),
        ({"height": 15}, "height 15 is not a whole number from 16"),
        ({"height": "96"}, "height '96' is not"),
        ({"steps": True}, "steps True is not"),
        ({"cfg_scale": float("nan")}, "cfg_scale nan is not a finite number"),
        ({"reference_path": 3}, "reference_path 3 is not"),
        ({"prompt": Path("x")}, "is not valid UTF-8 text"),
        ({"prompt": b"x"}, "is not valid UTF-8 text"),
    ],
)
def test_fields_that_are_not_legal(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        Request(**{"prompt": "x", **fields})
    assert said in str(caught.value)


def test_by_name_only() -> None:
    with pytest.raises(UserError, match="given by name, as Request"):
        Request("a red ball")  # type: ignore[misc]


def test_scalars_of_numpy_are_scalars() -> None:
    sizes = {"height": np.int64(32), "width": np.uint16(32), "num_frames": np.int32(1)}
    given = Request(prompt="x", steps=1, cfg_scale=np.float32(7), **sizes)  # type: ignore[arg-type]
    assert given == replace(SMALL, cfg_scale=7.0)
    assert given.digest() == SMALL.digest()
    assert type(given.height) is int
    found: Any = Request(prompt="x", reference_path=Path("a.png"))  # type: ignore[arg-type]
    assert found.reference_path == "a.png"
    assert pickle.loads(pickle.dumps(given)) == copy.deepcopy(given) == given


def test_paths_as_text(tmp_path: Path) -> None:
    names = {name: str(EMBEDDED / name) for name in ("dit", "t5", "vae2d", "vae3d")}
    assert Checkpoints(**names) == embedded_checkpoints()  # type: ignore[arg-type]
    assert JobSettings(save_dir=str(tmp_path)).save_dir == tmp_path  # type: ignore[arg-type]
    pipeline = Pipeline.load(
        Checkpoints(**names),  # type: ignore[arg-type]
        session=alone("cpu"),
        text_cache=str(tmp_path),  # type: ignore[arg-type]
        transformer_only=True,
    )
    assert pipeline.text.cache == tmp_path
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"dit": 3}, "dit 3 is not a usable path"),
        ({"vae": "x"}, "vae is not"),
    ]
    for wrong, said in wrongs:
        with pytest.raises(UserError, match=said):
            Checkpoints(**{**names, **wrong})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"checkpoints": "dir"}, "checkpoints 'dir' is not a Checkpoints: give Checkpoints(dit="),
        ({"checkpoints": {"dit": "x"}}, "is not a Checkpoints"),
        ({"dtype": "float16"}, "dtype 'float16' is not one of fp32, fp16, bf16"),
        ({"dtype": torch.float16}, "is not one of fp32, fp16, bf16"),
        ({"session": open_session("cpu")}, "is not a Session: give with open_session() as session"),
        ({"runtime": "small"}, "runtime 'small' is not a Runtime"),
        ({"parallelism": 2}, "parallelism 2 is not a Parallelism"),
        ({"check_finite": "always"}, "check_finite 'always' is not one of off, steps, blocks"),
        ({"weights_from": "s3"}, "weights_from 's3' is not one of disk, rank0"),
        ({"text_cache": 3}, "text_cache 3 is not a usable path"),
    ],
)
def test_loading_refuses_what_is_no_argument(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        Pipeline.load(**arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(session=alone("cpu"), dtype="fp32", transformer_only=True)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "text": (lambda p: p.generate("a red ball"), "'a red ball' is not a Request: make one"),
    "nothing": (lambda p: p.generate([]), "no request is given"),
    "None": (lambda p: p.generate(None), "None is not a Request"),
    "texts": (lambda p: p.generate(["a", "b"]), "'a' is not a Request"),
    "sizes": (lambda p: p.generate([SMALL, replace(SMALL, width=64)]), "differ in width"),
    "steps": (lambda p: p.generate([SMALL, replace(SMALL, steps=2)]), "differ in steps"),
    "noise": (lambda p: p.generate(SMALL, noise=torch.zeros(1, 4, 1, 4, 5)), "[1, 4, 1, 4, 4]"),
    "half": (
        lambda p: p.generate(SMALL, noise=torch.zeros(1, 4, 1, 4, 4, dtype=torch.float16)),
        "is not [1, 4, 1, 4, 4] of float32",
    ),
    "list": (lambda p: p.generate(SMALL, noise=[0]), "noise [0] is not a tensor"),
    "callback": (lambda p: p.generate(SMALL, step_noise=3), "step_noise 3 is not a function"),
    "sinks": (lambda p: p.generate_to([SMALL], [Collector(), Collector()]), "2 sinks for 1"),
    "file": (lambda p: p.generate(replace(SMALL, reference_path="none.png")), "none.png"),
    "strategy": (lambda p: p.generate(replace(SMALL, mask_strategy="0,7")), "'0,7'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_generating_refuses_before_a_model_is_loaded(kind: str, pipeline: Pipeline) -> None:
    call, said = WRONG[kind]
    with pytest.raises(UserError) as caught:
        call(pipeline)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert pipeline.models._transformer is None
    assert pipeline.text._encoder is None
    assert pipeline.models._vae is None


def test_a_session_that_is_closed_is_no_session() -> None:
    with open_session("cpu") as session:
        pipeline = Pipeline.load(session=session, transformer_only=True)
    with pytest.raises(UserError, match="the session is closed"):
        pipeline.generate(SMALL)
    with pytest.raises(UserError, match="the session is closed"):
        Pipeline.load(session=session)
