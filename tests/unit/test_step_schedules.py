"""Files of step schedules, the values of --step-cache, and what follows from the choice."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.benchmark.live_report import run_facts
from opensora_sp.cli.plan import main as plan
from opensora_sp.jobs.identity import difference, identity_of
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import denoising_peak
from opensora_sp.planner.plan import Options, make_plan
from opensora_sp.planner.requests import plan_in_mode, shape_of
from opensora_sp.request.general_pattern import LONGEST, _stretches
from opensora_sp.request.memory_modes import FASTEST
from opensora_sp.request.request import EngineSettings, Job, JobSettings, Request, Task
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.step_choice import (
    OWN_FILE,
    check_step_cache,
    choose_schedule,
    general_pattern,
    tokens_of,
)
from opensora_sp.request.step_schedule import (
    StepSchedule,
    choose,
    fill_weights,
    read_schedules,
    write_schedules,
)
from opensora_sp.request.step_times import times_of, timesteps

VIDEO = Request(prompt="p", height=64, width=96, num_frames=17)
TOKENS = tokens_of(VIDEO)
SCHEDULE = StepSchedule(
    name="own",
    steps=30,
    computed=(*range(9), 12, 20, 29),
    fill="quadratic",
    tokens=(TOKENS, TOKENS + 1),
    cfg_scale=(6.5, 7.0),
    model="ab12",
    psnr=54.25,
    prompts=4,
)
LINES = """\
- name: own
  steps: 30
  computed: [0, 4, 29]
  fill: hold
"""


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    image = replace(SCHEDULE, name="picture", images=True, model=None, psnr=None, prompts=None)
    path = tmp_path / "new" / "s.yaml"
    write_schedules(path, [SCHEDULE, image])
    assert read_schedules(path) == (SCHEDULE, image)
    assert "  computed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 20, 29]\n" in path.read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (LINES, "", "is not a list of 1 to 1000 schedules"),
        (LINES, "a: 1\n", "is not a list of 1 to 1000 schedules"),
        (LINES, "- [0]\n", r"schedule 1 \[0\] is not a group"),
        ("hold", "hold\n  colour: red", "schedule 1: 'colour' is not a key; it takes name, steps"),
        ("  fill: hold\n", "", "schedule 1: the key fill is missing"),
        ("hold", "hold\n  fill: linear", "line 5: the key 'fill' is there twice"),
        ("hold", "cubic", "schedule 1: fill 'cubic' is not one of hold, linear, quadratic"),
        ("own", "../own", "schedule 1: name '../own' is not a name of at most 64"),
        ("[0, 4, 29]", "[4, 29]", "schedule 1: computed .* is not a list of ascending"),
        ("[0, 4, 29]", "[0, 4, 4]", "schedule 1: computed .* is not a list of ascending"),
        ("[0, 4, 29]", "[0, true]", "schedule 1: computed .* is not a list of ascending"),
        ("[0, 4, 29]", "[0, 30]", "computed has step 30, but of 30 steps the last is 29"),
        ("30", "30.0", "schedule 1: steps 30.0 is not a whole number from 1"),
        ("hold", "hold\n  tokens: [5, 5]", "schedule 1: tokens .* the first below the second"),
        ("hold", "hold\n  cfg_scale: [7, .nan]", "schedule 1: cfg_scale .* is not a list of two"),
        ("hold", "hold\n  model: ['a']", "schedule 1: model .* is not the fingerprint"),
        ("hold", "!!python/object:os.system hold", "is not YAML"),
        ("[0, 4, 29]", "&a [*a]", r"the alias \*a is not read"),
        ("[0, 4, 29]", "[0, 4", "is not YAML at line"),
        ("hold", "hold" + " " * 2**20, "is larger than 1 MiB"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would be shortened in the message
    Path("s.yaml").write_text(LINES.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=said) as refused:
        check_step_cache([replace(VIDEO, step_cache="s.yaml")], None)
    assert "s.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 29},
        {"tokens": TOKENS + 1},
        {"tokens": TOKENS - 1},
        {"cfg_scale": 7.1},
        {"model": "cd34"},
        {"model": None},
        {"images": True},
        {"name": "fast"},
    ],
)
def test_a_schedule_is_chosen_for_what_it_was_made_for_alone(other: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"name": None, "steps": 30, "tokens": TOKENS, "cfg_scale": 7.0}
    asked["model"] = "ab12"
    assert choose([SCHEDULE], **asked) == SCHEDULE
    assert choose([SCHEDULE], **asked | other) is None


def known(text: str) -> Callable[[], str]:
    return lambda: text


def test_a_level_is_the_checkpoints_own_and_else_a_pattern_that_says_so(tmp_path: Path) -> None:
    asked = replace(VIDEO, step_cache="fast")
    own = replace(SCHEDULE, name="fast")
    write_schedules(tmp_path / OWN_FILE, [SCHEDULE, own])
    chosen = choose_schedule(asked, tmp_path, known("ab12"))
    assert chosen.schedule == own
    assert chosen.said == (
        "step cache fast: 12 of 30 steps are computed (0-8 12 20 29), the others filled "
        "(quadratic); measured over 4 prompts: 54.2 dB against all steps"
    )
    # A plan takes any model for the one that was measured.
    assert choose_schedule(asked, tmp_path).schedule == replace(own, model=None)
    for request, model in (
        (asked, "cd34"),
        (replace(asked, cfg_scale=4.0), "ab12"),
        (replace(asked, timestep_transform=False), "ab12"),
        (replace(asked, num_frames=1), "ab12"),
        (replace(asked, steps=50), "ab12"),
    ):
        chosen = choose_schedule(request, tmp_path, known(model))
        pattern = general_pattern("fast", times_of(request), images=request.is_image)
        assert chosen.schedule == pattern
        assert "a general pattern" in chosen.said
        assert "was not measured" in chosen.said


def test_a_general_pattern_leaves_steps_out_where_the_velocity_changes_least() -> None:
    small = timesteps(30, height=64, width=96, frames=17)
    large = timesteps(30, height=720, width=1280, frames=408)
    near, fast = (general_pattern(level, small).computed for level in ("near-lossless", "fast"))
    assert near == (*range(10), 11, 13, 15, 17, 19, 22, 24, 26, 28, 29)
    assert (len(near), len(fast)) == (20, 15)
    assert set(range(7)) <= set(fast), "near the noise, where a small size has its longest moves"
    for level, last, early in (("near-lossless", 8, 8), ("fast", 5, 6)):
        computed = general_pattern(level, large).computed
        assert set(range(30 - last, 30)) <= set(computed), "a large one has them at the end"
        assert len([step for step in computed if step < 15]) <= early
    with pytest.raises(UserError, match="--step-cache fast: of 9 steps none is left out"):
        general_pattern("fast", small[:9])


@pytest.mark.parametrize("size", [(64, 96, 1), (144, 256, 51), (720, 1280, 408)])
def test_general_patterns_of_any_number_of_steps(size: tuple[int, int, int]) -> None:
    height, width, frames = size
    for steps, together in ((10, 1), (11, 1), (29, 1), (100, 1), (250, 3), (100_000, 1000)):
        times = timesteps(steps, height=height, width=width, frames=frames)
        for level, share in (("near-lossless", 2 / 3), ("fast", 1 / 2)):
            computed = general_pattern(level, times).computed
            assert computed[0] == 0
            assert computed[-1] == steps - 1
            assert abs(len(computed) - math.ceil(share * steps)) < together
            assert list(computed) == sorted(set(computed))


def test_a_general_pattern_is_the_best_list_of_its_own_measure() -> None:
    """Against every list there is, of a run short enough to look at all."""
    times = tuple(timesteps(10, height=240, width=426, frames=51))
    computed = general_pattern("fast", times).computed

    def cost(listed: tuple[int, ...]) -> float:
        pairs = zip((None, *listed), listed, listed[1:], strict=False)
        return sum(_stretches(times, before, a)[b - a - 1] for before, a, b in pairs)

    lists = [(0, *middle, 9) for middle in itertools.combinations(range(1, 9), len(computed) - 2)]
    lists = [one for one in lists if max(b - a for a, b in itertools.pairwise(one)) <= LONGEST]
    assert cost(computed) == pytest.approx(min(map(cost, lists)), rel=1e-12)
    assert sorted(map(cost, lists))[1] > 1.0001 * cost(computed), "one list is the best"


def test_a_file_is_taken_whole_or_by_a_name_in_it(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    second = replace(SCHEDULE, name="second", model=None)
    write_schedules(path, [SCHEDULE, second])

    def chosen(value: str, model: str = "ab12", **fields: Any) -> StepSchedule | None:
        request = replace(VIDEO, step_cache=value, **fields)
        return choose_schedule(request, tmp_path, known(model)).schedule

    assert chosen(str(path)) == SCHEDULE
    assert chosen(str(path), "cd34") == second
    assert chosen(f"{path}:second") == second
    with pytest.raises(UserError, match=r"has no schedule 'third'; it has own, second"):
        chosen(f"{path}:third")
    with pytest.raises(UserError, match=r"has no schedule for a video of 20 steps, .*the first is"):
        chosen(str(path), steps=20)
    with pytest.raises(UserError, match="was measured on another transformer"):
        chosen(f"{path}:own", "cd34")
    with pytest.raises(UserError, match="its steps lie at other times"):
        chosen(str(path), timestep_transform=False)
    with pytest.raises(UserError, match=r"neither off, .* did you mean fast\?"):
        chosen("fats")
    with pytest.raises(UserError, match="there is no such file"):
        chosen(str(tmp_path / "other.yaml"))


def test_an_outputs_identity_is_what_is_computed_whatever_it_is_called(tmp_path: Path) -> None:
    def identity(value: Any) -> dict[str, Any]:
        task = Task(request=replace(VIDEO, step_cache=value), output=tmp_path / "a.mp4")
        return identity_of(task, EngineSettings(), JobSettings(), {"dit": "d"})

    renamed = replace(SCHEDULE, name="other", psnr=None, tokens=(1, 99999), model=None)
    assert identity(SCHEDULE) == identity(renamed)
    assert difference(identity(SCHEDULE), identity(replace(SCHEDULE, fill="hold"))) is not None
    assert identity("off") == identity(replace(SCHEDULE, computed=tuple(range(30))))
    before = {k: v for k, v in identity("off").items() if k != "step cache"}
    assert difference(before, identity("off")) is None
    said = difference(before, identity(SCHEDULE))
    assert said == "its step cache was 'off' and is 'quadratic, steps 0-8 12 20 29 of 30' now"


def test_a_plan_counts_the_computed_steps_and_the_velocities_that_are_held(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    write_schedules(path, [SCHEDULE])
    settings, models = EngineSettings(), ModelSizes()
    every, some = (
        shape_of(replace(VIDEO, step_cache=value), settings, 2, None)
        for value in ("off", str(path))
    )
    plans = [make_plan(shape, 2, FASTEST, models, Options()) for shape in (every, some)]
    for one in ("denoise", "sent"):
        whole, less = (getattr(plan.cost, one) for plan in plans)
        assert whole > 0
        assert less / whole == pytest.approx(12 / 30)
    peaks = [denoising_peak(shape, Mesh(), Runtime(), models) for shape in (every, some)]
    assert peaks[1] - peaks[0] == 3 * 2 * TOKENS * 16 * 4  # three, of two samples, in float32


def test_a_plan_counts_the_steps_at_which_frames_of_its_batch_join(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    write_schedules(path, [SCHEDULE])
    plain = replace(VIDEO, step_cache=str(path))
    # Steps 15 and 20 are those at which these join; 20 is computed in any case.
    times = times_of(plain)
    ratios = [(times[step] + times[step - 1]) / 2000 for step in (15, 20)]
    edits = [
        replace(plain, reference_path="a.mp4", mask_strategy=f"0,0,0,0,5,{ratio}")
        for ratio in ratios
    ]

    def computed(*requests: Request, batch: int = 2) -> int:
        tasks = tuple(
            Task(request=one, output=tmp_path / f"{number}.mp4")
            for number, one in enumerate(requests)
        )
        job = Job(engine=EngineSettings(), settings=JobSettings(batch_size=batch), tasks=tasks)
        # A benchmark's report counts those of the schedule that the models were settled on.
        settled = [replace(t, request=replace(t.request, step_cache=SCHEDULE)) for t in tasks]
        pipeline = MagicMock()
        pipeline.session.world_size = 1
        facts = run_facts(pipeline, replace(job, tasks=tuple(settled)))
        planned = plan_in_mode(job, 1, FASTEST).shape.computed
        assert planned == facts["computed_steps"] or requests[0].step_cache == "off"
        return planned

    assert computed(plain) == computed(plain, plain) == computed(edits[1]) == 12
    assert computed(plain, edits[0]) == computed(edits[1], edits[0]) == 13
    assert computed(replace(edits[0], step_cache="off")) == 30
    # Of several batches as large, wherever the one is in which most steps are computed.
    for order in itertools.permutations([plain, *edits]):
        assert computed(*order, batch=1) == 13
    assert computed(plain, plain, edits[0], plain) == 13
    assert computed(plain, plain, edits[0]) == 12, "the larger batch counts"


def test_the_command_plan_counts_the_step_at_which_an_edit_begins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--device-memory", "48GB", "--image-size", "240", "426", "--step-cache", "fast"]
    said = []
    edit = ["--edit", "a.mp4", "--edit-strength"]
    written = ["--reference-path", "a.mp4", "--mask-strategy", "0,0,0,0,15,0.3"]
    for more in ([], [*edit, "0.25"], [*edit, "0.3"], written):
        assert plan([*asked, *more]) == 0
        said.append(re.findall(r"(\d+) of 30 steps computed", capsys.readouterr().out))
    assert said == [["15"], ["15"], ["16"], ["16"]]  # 0.25 joins at a step that is computed anyway


def test_weights_of_a_fill_sum_to_one_and_fewer_times_are_a_lower_order() -> None:
    for fill, order in (("hold", 1), ("linear", 2), ("quadratic", 3)):
        for count in range(1, 5):
            weights = fill_weights(fill, [900.0, 700.0, 600.0, 400.0][:count], 300.0)
            assert len(weights) == min(order, count)
            assert sum(weights) == pytest.approx(1)
    with pytest.raises(ValueError, match="give none at 5"):
        fill_weights("linear", [7.0, 7.0], 5.0)


class Notes:
    """A job's store that keeps the notes of its progress."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def put_progress(self, job_id: str, note: Any) -> None:
        self.notes.append(note)

    def cancel_asked(self, job_id: str) -> bool:
        return False


@pytest.mark.parametrize("start", [0, 7])
def test_a_server_says_what_is_left_by_the_steps_that_are_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: int
) -> None:
    pytest.importorskip("dbos")
    from opensora_sp.engine.progress import Position
    from opensora_sp.server import job_reporter

    clock = [1000.0]
    monkeypatch.setattr("opensora_sp.server.job_reporter.time.time", lambda: clock[0])
    request = replace(VIDEO, num_frames=34, loop=2, step_cache=SCHEDULE)
    task = Task(request=request, output=tmp_path / "a.mp4")
    job = Job(
        engine=EngineSettings(),
        settings=JobSettings(save_dir=tmp_path, batch_size=1, num_sample=1),
        tasks=(task,),
    )
    store = Notes()
    reporter = job_reporter.JobReporter(store, "id", True)  # type: ignore[arg-type]
    reporter.begin(job, Position(0, start))
    for step in range(start, 60):
        clock[0] += 100.0 if step % 30 in SCHEDULE.computed else 0.5
        reporter.on_step_end(step, 0.0, None)
        left = sum(later % 30 in SCHEDULE.computed for later in range(step + 1, 60))
        said = store.notes[-1].eta_s
        if step > start + 1:
            assert said == pytest.approx(100 * left, rel=0.05), step
