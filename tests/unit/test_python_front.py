"""`from opensora_sp import ...`: light until used, and the promises of docs/python.md."""

from __future__ import annotations

import ast
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import opensora_sp
from opensora_sp import Cancelled, CheckpointError, Pipeline, Request
from opensora_sp.parallel.session import alone
from opensora_sp.request.embedded import EMBEDDED, embedded_checkpoints

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("dit", "t5", "vae2d", "vae3d")
SMALL = Request(prompt="a red ball", height=32, width=32, num_frames=1, steps=3)


def in_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_importing_the_package_loads_next_to_nothing() -> None:
    done = in_python(
        "import sys, opensora_sp\n"
        "own = sorted(name for name in sys.modules if name.startswith('opensora_sp.'))\n"
        "print(own, 'torch' in sys.modules, 'Pipeline' in dir(opensora_sp))\n"
        "from opensora_sp import UserError, Request\n"
        "print(Request(prompt='x').seed, 'torch' in sys.modules)\n"
        "from opensora_sp import Pipeline\n"
        "print(Pipeline.__module__, 'torch' in sys.modules)\n"
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "['opensora_sp.base', 'opensora_sp.base.waiting'] False True",
        "42 False",
        "opensora_sp.engine.pipeline True",
    ]


def test_every_public_name_is_where_a_type_checker_sees_it() -> None:
    source = ast.parse(Path(opensora_sp.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for block in source.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert set(seen) == set(opensora_sp.__all__) - {"__version__"}
    for name, module in seen.items():
        assert getattr(opensora_sp, name) is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        getattr(opensora_sp, "Pipelin")  # noqa: B009


def load(*places: Any, **named: Any) -> Pipeline:
    return Pipeline.from_pretrained(*places, session=alone("cpu"), dtype="fp32", **named)


def test_from_pretrained_takes_one_directory_or_four(tmp_path: Path) -> None:
    assert load(EMBEDDED).models.checkpoints == embedded_checkpoints()
    four = {kind: str(EMBEDDED / kind) for kind in KINDS}
    assert load(**four).models.checkpoints == embedded_checkpoints()
    moved = tmp_path / "another"
    moved.symlink_to(EMBEDDED / "dit")
    one_elsewhere = load(str(EMBEDDED), dit=moved)
    assert one_elsewhere.models.checkpoints.dit == moved
    assert one_elsewhere.models.checkpoints.t5 == EMBEDDED / "t5"
    (latents,) = one_elsewhere.generate(SMALL).latents
    (expected,) = Pipeline.load(session=alone("cpu"), dtype="fp32").generate(SMALL).latents
    assert latents is not None
    assert expected is not None
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("missing", KINDS)
def test_from_pretrained_names_the_directory_that_is_missing(missing: str, tmp_path: Path) -> None:
    for kind in KINDS:
        if kind != missing:
            (tmp_path / kind).symlink_to(EMBEDDED / kind)
    with pytest.raises(CheckpointError) as absent:
        load(tmp_path)
    assert str(absent.value) == f"{missing} '{tmp_path / missing}' does not exist"
    (tmp_path / missing).mkdir()
    with pytest.raises(CheckpointError, match=rf"^{missing} '.*' has no .*(json|spiece\.model)"):
        load(tmp_path)
    three = {kind: EMBEDDED / kind for kind in KINDS if kind != missing}
    with pytest.raises(CheckpointError, match=f"^{missing} is not given: give one directory"):
        load(**three)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(session=alone("cpu"), dtype="fp32")


def test_the_callback_sees_every_step_and_changes_nothing(pipeline: Pipeline) -> None:
    plain = pipeline.generate(SMALL)
    seen: list[tuple[int, float, Tensor]] = []

    def watch(step: int, t: float, latents: Tensor | None) -> Any:
        assert latents is not None
        seen.append((step, t, latents.clone()))
        latents.zero_()  # what a callback does with its latents is its own affair
        return 1  # only True ends a run

    watched = pipeline.generate(SMALL, callback_on_step_end=watch)
    steps, times, states = zip(*seen, strict=True)
    assert steps == (0, 1, 2)
    assert times[0] == 1000
    assert sorted(times, reverse=True) == list(times)
    assert {tuple(state.shape) for state in states} == {(1, 4, *SMALL.latent_shape)}
    (latents,), (expected,) = watched.latents, plain.latents
    assert latents is not None
    assert expected is not None
    assert torch.equal(latents, expected)
    assert torch.equal(states[-1], latents)
    assert not torch.equal(states[0], states[1])
    for one, other in zip(watched.videos, plain.videos, strict=True):
        assert one is not None
        assert (one == other).all()


def test_the_callback_ends_a_run_and_the_pipeline_goes_on(pipeline: Pipeline) -> None:
    steps: list[int] = []

    def stop(step: int, *_: Any) -> bool:
        steps.append(step)
        return step == 1

    with pytest.raises(Cancelled, match="after step 2"):
        pipeline.generate(SMALL, callback_on_step_end=stop)
    assert steps == [0, 1]
    assert pipeline.generate(SMALL).latents[0] is not None


def test_a_library_user_hears_warnings_alone(tmp_path: Path) -> None:
    """Unless logging is configured; then what the command line shows is there too."""
    code = (
        "import logging, sys\n"
        "from pathlib import Path\n"
        "from opensora_sp import Pipeline, Request\n"
        "from opensora_sp.parallel.session import alone\n"
        f"cache = Path({str(tmp_path / 'cache')!r})\n"
        "def use():\n"
        "    for _ in range(2):\n"
        "        pipeline = Pipeline.load(session=alone('cpu'), dtype='fp32', text_cache=cache,\n"
        "            show_progress=True)\n"
        "        pipeline.text.encode(['a cat'], 300)\n"
        "    for file in cache.rglob('*.safetensors'):\n"
        "        file.write_bytes(b'')\n"
        "    again = Pipeline.load(session=alone('cpu'), dtype='fp32', text_cache=cache)\n"
        "    again.text.encode(['a cat'], 300)\n"
        "use()\n"
        "print('configured', file=sys.stderr)\n"
        "logging.basicConfig(level='INFO')\n"
        "use()\n"
    )
    done = in_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    quiet, _, told = done.stderr.partition("configured\n")
    (line,) = quiet.splitlines()
    assert line.startswith("text cache: ")
    mine = [line for line in told.splitlines() if ":opensora_sp." in line]
    assert mine[0] == "INFO:opensora_sp.engine.text:text: 1 captions from the cache"
    assert mine[-1].startswith("WARNING:opensora_sp.engine.text_cache:text cache: ")


def test_nothing_below_the_commands_prints_to_standard_error() -> None:
    """They log, so that a library user decides. The watchdog alone writes: see its `_say`."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "opensora_sp").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"file=sys\.stderr|sys\.stderr\.write|\bnote\(", line)
        and path.parts[len(ROOT.parts) + 1] not in ("cli", "base")
    ]
    assert all("watchdog/" in line or "def note" in line for line in found), found


def test_the_package_leaves_logging_as_it_was() -> None:
    from opensora_sp.base.screen import robust_screen

    log = logging.getLogger("opensora_sp")
    before = log.level, log.propagate, log.handlers[:]
    with robust_screen():
        assert not log.propagate
    assert (log.level, log.propagate, log.handlers) == before


def test_the_examples_of_the_page_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # What a comment beside a print promises is what is printed.
    promised = re.findall(r"print\(.*\)  # (?:.* = )?(.*\d.*|.*exist)$", page, re.MULTILINE)
    assert len(promised) == 5
    for words in promised:
        assert words in done.stdout.splitlines()
    for name in set(opensora_sp.__all__) - {"__version__"}:
        assert f"`{name}" in page
