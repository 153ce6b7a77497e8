"""What a server decides before a job is queued: fit, memory mode, T5's place, time."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.cli import work
from opensora_sp.cli.serve import main
from opensora_sp.models.latent_colours import SIDE
from opensora_sp.planner.devices import GB, usable
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.plan import Options, TextPlace
from opensora_sp.planner.warm import (
    Room,
    WarmEngine,
    fewer_frames,
    open_warm,
    shortfall,
    smaller_size,
    text_place,
    warm_plan,
)
from opensora_sp.request.memory_modes import MEMORY_MODES
from opensora_sp.server.board import Entry
from opensora_sp.server.checking import judge, without_paths
from opensora_sp.server.engine_process import command
from opensora_sp.server.estimate import Estimator, fit
from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec
from opensora_sp.server.protocol import as_bad_request
from opensora_sp.server.served import (
    facts_path,
    plan_request,
    read_facts,
    served_shapes,
    why_not,
    write_facts,
)
from opensora_sp.server.settings import GroupSettings

MODELS, FREE = ModelSizes(), Options()
LONG = Shape(height=720, width=1280, num_frames=408, encodes=True)
SHORT = Shape(height=240, width=426, num_frames=51, encodes=True)
MODES = list(MEMORY_MODES.values())


def room(memory: float, ranks: int = 1, host: float = 256 * GB, device: str = "gcu") -> Room:
    return Room(device=device, by_rank=(usable(memory * GB),) * ranks, host=host)


def opened(memory: float, *shapes: Shape, ranks: int = 1, **more: Any) -> WarmEngine:
    served = {str(number): shape for number, shape in enumerate(shapes)}
    return open_warm(served, room(memory, ranks, **more), ranks, MODELS, FREE)


def test_t5_stays_on_the_device_else_in_host_memory_else_nowhere() -> None:
    fastest, in_turns = MODES[0], MODES[1]
    cases = [
        (room(80), fastest, FREE, "device"),
        (room(24), fastest, FREE, "device"),
        (room(16), fastest, FREE, "host"),
        (room(16, host=4 * GB), fastest, FREE, "reload"),
        (room(16), fastest, Options(t5_int8=True), "device"),  # half of it fits
        (room(80), in_turns, FREE, "host"),  # the mode has one model on the device at a time
        (room(80), fastest, Options(t5_on_cpu=True), "cpu"),
        (room(80, device="cpu"), fastest, FREE, "device"),
        (room(14, device="cpu"), fastest, FREE, "reload"),  # host memory is all there is
        (Room(device="gcu", host=256 * GB), fastest, FREE, "host"),  # nobody knows the device's
    ]
    found = [
        text_place([LONG], space, 1, mode, MODELS, options) for space, mode, options, _ in cases
    ]
    assert found == [wanted for *_, wanted in cases]
    # The largest of the served sizes decides, wherever it stands.
    assert text_place([SHORT], room(16), 1, fastest, MODELS, FREE) == "device"
    assert text_place([SHORT, LONG, SHORT], room(16), 1, fastest, MODELS, FREE) == "host"


def test_what_stays_is_planned_beside_the_others() -> None:
    def stages(place: Any) -> dict[str, int]:
        engine = replace(opened(80, LONG), text=place)
        return {s.name: s.total for s in warm_plan(engine, LONG, MODELS, FREE).stages}

    stays, gone, host = stages("device"), stages("reload"), stages("host")
    t5 = MODELS.t5_weights * 2
    assert stays["denoise"] - gone["denoise"] == stays["decode"] - gone["decode"] == t5
    # Even a T5 that is loaded anew has the models of the job before beside it.
    assert gone["text"] > t5 + MODELS.transformer_weights * 2
    assert host["denoise"] - gone["denoise"] == MODELS.t5_other_weights * 2
    assert host["text"] < gone["text"] / 2
    # T5 waits on the leading rank alone.
    alone, four = opened(12, LONG), opened(12, LONG, ranks=4, host=20 * GB)
    assert alone.text == four.text == "host"


def test_fitting_the_previews_colours_needs_less_than_any_request() -> None:
    pictures = Shape(height=8 * SIDE, width=8 * SIDE, num_frames=1)
    for mode in MODES:
        for place in get_args(TextPlace):
            engine = replace(opened(80, LONG), mode=mode, text=place)
            fitting = warm_plan(engine, pictures, MODELS, FREE).stages[-1]
            assert fitting.name == "decode"
            for shape in (SHORT, LONG):
                assert fitting.total < warm_plan(engine, shape, MODELS, FREE).peak


def test_the_served_sizes_decide_the_mode() -> None:
    assert opened(8, SHORT).mode is MODES[0]
    assert opened(8, SHORT, LONG).mode is MODES[-1]
    asked = replace(FREE, memory=MODES[0])
    for memory, options in ((2, FREE), (8, asked)):
        with pytest.raises(
            UserError, match=r"--serves long does not fit in any .* GB.*--no-plan"
        ) as e:
            open_warm({"long": LONG}, room(memory), 1, MODELS, options)
        assert "\n" not in str(e.value)
        tried = open_warm({"long": LONG}, room(memory), 1, MODELS, options, tries=True)
        assert tried.tries


def test_the_nearest_that_fits_fits_and_the_next_does_not() -> None:
    engine = opened(8, SHORT)  # in the fastest mode, so that larger ones do not fit
    odd = Shape(height=1000, width=600, num_frames=408)
    for shape in (LONG, odd, replace(LONG, guided=False)):
        assert shortfall(engine, shape, MODELS, FREE) is not None
        frames = fewer_frames(engine, shape, MODELS, FREE)
        assert frames is not None
        for count, fits in ((frames, True), (frames + 1, False)):
            said = shortfall(engine, replace(shape, num_frames=count), MODELS, FREE)
            assert (said is None) == fits, (shape, count)
    # A size of the table gets the next of the table, any other one of its own ratio.
    assert smaller_size(engine, LONG, MODELS, FREE) in ((480, 854), (360, 640), (240, 426))
    height, width = smaller_size(engine, odd, MODELS, FREE) or (0, 0)
    assert height % 16 == width % 16 == 0
    assert height / width == pytest.approx(1000 / 600, rel=0.1)
    for more, fits in ((0, True), (16, False)):
        larger = replace(odd, height=height + more, width=width + more)
        assert (shortfall(engine, larger, MODELS, FREE) is None) == fits
    nothing = replace(engine, room=room(1.2))
    assert fewer_frames(nothing, LONG, MODELS, FREE) is None
    assert smaller_size(nothing, odd, MODELS, FREE) is None


def group(folder: Path, *flags: str, **more: Any) -> GroupSettings:
    arguments = ("--device", "cpu", "--dtype", "fp32", *flags)
    return GroupSettings(save_dir=folder, queue="", arguments=arguments, **more)


def test_a_request_is_judged_by_what_the_engine_has(tmp_path: Path) -> None:
    settings = group(tmp_path)
    large = ["--prompt=a", "--image-size", "720", "1280", "--num-frames=408"]

    def told(*arguments: str, refuse: bool = True) -> Any:
        return judge(settings, arguments, [], tmp_path / "outputs", refuse)

    assert told(*large)["cost"]["peak_memory_mb"] > 500  # nobody knows yet: it is taken
    warm = WarmEngine(
        room=Room(device="cpu", by_rank=(120e6,), host=None), ranks=1, mode=MODES[0], text="device"
    )
    write_facts(tmp_path, warm, settings.digest())
    assert read_facts(settings) == warm
    assert read_facts(replace(settings, ranks=2)) is None  # of another engine
    with pytest.raises(UserError) as caught:
        told(*large)
    refused = as_bad_request(caught.value)
    text = str(refused)
    assert refused.param == "size"  # no number of frames fits at this size
    assert "size 1280x720 with num_frames 408 does not fit: " in text
    assert "GB on a rank in memory mode speed, of 0.12 GB" in text
    assert text.endswith("; the nearest that fits: 256x144 at this length")
    assert "--" not in text
    with pytest.raises(UserError) as caught:
        told("--prompt=a", "--resolution=240p", "--num-frames=408")
    refused = as_bad_request(caught.value)
    assert refused.param == "num_frames"
    assert "resolution of 426x240" in str(refused)
    assert "frames at this size, or 256x144 at this length" in str(refused)
    assert told(*large, refuse=False)["reason"] == text.replace(
        "size 1280", "--image-size 1280"
    ).replace("num_frames", "--num-frames")
    assert told("--prompt=a", "--image-size", "32", "48", "--num-frames=17", refuse=False)[
        "reason"
    ] is None  # fmt: skip
    write_facts(tmp_path, replace(warm, tries=True), settings.digest())
    told(*large)  # --no-plan tries it
    facts_path(tmp_path).write_text(json.dumps({"settings": settings.digest(), "room": 1}))
    assert read_facts(settings) is None


def test_a_full_disk_is_refused_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr("opensora_sp.request.preflight.shutil.disk_usage", lambda _: free)
    with pytest.raises(UserError) as caught:
        judge(group(tmp_path), ["--prompt=a"], [], tmp_path / "jobs" / "video_1" / "outputs")
    assert re.fullmatch(
        r"the server's disk has 1\.00 kB free, and the video may need .* shorter one",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("{o}: it may not be written to", "the server's folder: it may not be written to"),
        ("cannot write {o}/video_0000.mp4: full", "cannot write video_0000.mp4: full"),
        ("{s}/tmp is full; --save-dir", "the server's folder/tmp is full; --save-dir"),
        ("'{j}/uploads/0.png' is cut off", "'upload 0.png' is cut off"),
    ],
)
def test_what_a_client_is_told_names_no_place_of_the_server(
    said: str, told: str, tmp_path: Path
) -> None:
    job = tmp_path / "jobs" / "video_1"
    text = said.format(o=job / "outputs", j=job, s=tmp_path)
    assert without_paths(text, job / "outputs") == told


def test_a_batch_is_planned_for_as_many_as_it_has(tmp_path: Path) -> None:
    settings = group(tmp_path, batch_jobs=4)
    job = settings.job(["--prompt=a", "--image-size", "96", "160"], tmp_path / "outputs")
    assert {shape.batch for shape in served_shapes(settings, settings.first_job()).values()} == {4}
    needed = plan_request(replace(settings, batch_jobs=1), job)[0].peak
    warm = WarmEngine(
        room=Room(device="cpu", by_rank=(2.0 * needed,), host=None),
        ranks=1,
        mode=MODES[-1],
        text="device",
    )
    assert why_not(job, warm) is None
    assert "does not fit" in (why_not(job, warm, batch=100) or "")


def test_the_sizes_that_are_served(tmp_path: Path) -> None:
    def sizes(**more: Any) -> set[tuple[int, int, int]]:
        one = group(tmp_path, **more)
        shapes = served_shapes(one, one.first_job()).values()
        assert all(shape.encodes and shape.guided and shape.dtype == "fp32" for shape in shapes)
        return {(shape.height, shape.width, shape.num_frames) for shape in shapes}

    assert sizes() == {(144, 256, 51)}
    assert sizes(serves=("480p-2s", "embedded")) == {(480, 854, 51), (64, 96, 17)}
    assert (720, 1280, 408) in sizes(warmup=("720p-16s",))


def test_a_server_refuses_at_its_start_what_it_cannot_serve(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("dbos")
    shared = ["--queue", "postgresql://me:secret@db/v"]
    for flags, said in (
        (["--warmup", "720p-3s"], "--warmup '720p-3s' is not one of 144p-16s, "),
        (["--serves", "480p-2s,base"], "--serves 'base' is not one of 144p-16s, "),
        (["--serves", "720p-16s", "--device-memory", "1100MB"], "--serves 720p-16s does not fit"),
        (["--replicas", "2", "--nproc", "2"], "--replicas belongs to generate"),
        (["--device-memory", "much"], "--device-memory 'much' is neither a size"),
        (["--queue", "mysql://me:secret@db/v"], "--queue: mysql is not the address of a Postgres"),
        (["--queue", "me:secret@db/v"], "--queue: the value is not the address of a Postgres"),
        (["--queue", "postgresql://me:secret@db"], "--queue postgresql://db names no database"),
        (["--queue", "postgresql://me:secret@db:x/v"], "--queue: the address cannot be read"),
        ([*shared, "--batch-jobs", "2"], "--batch-jobs 2 does not go with --queue"),
        ([*shared, "--lease-seconds", "1"], "--lease-seconds '1' is not a number from 3 to 3600"),
        ([*shared, "--group-name", "a b"], "--group-name 'a b' is not 1 to 64 letters"),
        (["--group-name", "a"], "--group-name belongs to --queue"),
        (["--lease-seconds", "15"], "--lease-seconds belongs to --queue"),
        (["--no-engine"], "--no-engine belongs to --queue"),
    ):
        assert main([*flags, "--save-dir", str(tmp_path / "save")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert "secret" not in error
    nodes = [*shared, "--nnodes", "2", "--master-addr", "node0"]
    for flags, said in (
        ([], "work needs --queue URL"),
        ([*shared, "--node-rank", "1", "--master-addr", "a"], "--node-rank 1 needs --nnodes N"),
        ([*nodes, "--group-name", "a"], "--nnodes 2 needs --node-rank N on each node: 0 to 1"),
        ([*nodes, "--node-rank", "0"], "--nnodes 2 needs --group-name NAME, the same on each node"),
        ([*nodes, "--group-name", "a", "--node-rank", "2"], "--node-rank 2 is not one of 2 nodes"),
    ):
        assert work.main([*flags, "--save-dir", str(tmp_path / "save")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "save").exists()


def test_the_address_of_a_shared_queue_is_on_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "postgresql://me:secret@db/v"
    one = GroupSettings(tmp_path, url, ("--device", "cpu"), group_name="a", own_dir=tmp_path / "a")
    assert not any("secret" in word for word in command(one))
    for name, value in one.environ().items():
        monkeypatch.setenv(name, value)
    assert GroupSettings.from_json(one.to_json()) == one


def spec(name: str, flops: float, *, steps: int = 10, engine: str = "e") -> JobSpec:
    """A job of a step's FLOPs; decoding has a tenth of a step's."""
    cost = {"engine": engine, "shape": f"{flops} {steps}", "steps": steps}
    cost |= {"denoise": steps * flops, "decode": flops / 10}
    return JobSpec(id=name, created_at=0.0, arguments=(), shown={"cost": cost})


def made(
    job: JobSpec, *, load: float = 0.0, compiled: float = 0.0, steps: int | None = None
) -> JobResult:
    """0.01 s and a picosecond a FLOP for a step, half a second in all for the rest."""
    cost = job.shown["cost"]
    denoise = cost["steps"] * 0.01 + cost["denoise"] * 1e-12
    stages = {"denoise": denoise, "decode": cost["decode"] * 1e-12, "write": 0.1, "load": load}
    stages["compile"] = compiled
    seconds = sum(stages.values()) + 0.4
    steps = cost["steps"] if steps is None else steps
    return JobResult(finished_at=0.0, file="x", seconds=seconds, stages=stages, steps_made=steps)


def test_times_of_shapes_that_were_never_made_follow_from_those_that_were() -> None:
    known = Estimator("e")
    new = spec("new", 5e12, steps=30)
    other = replace(made(spec("b", 1e9)), error="it failed")
    for job, result in (
        (spec("a", 1e9), other),
        (spec("b", 1e9, engine="another"), made(spec("b", 1e9))),
        (spec("c", 1e9), made(spec("c", 1e9), steps=3)),  # it went on from a saved step
    ):
        known.learn(job, result)
        assert known.seconds(new.shown["cost"]) is None
    for number, flops in enumerate((1e9, 1e11, 1e12, 1e12)):
        job = spec(str(number), flops)
        # The first loads models, and the first of a shape compiles.
        load, compiled = 60.0 if number == 0 else 0.0, 0.0 if number == 3 else 90.0
        known.learn(job, made(job, load=load, compiled=compiled))
        assert known.seconds(job.shown["cost"]) == pytest.approx(made(job).seconds)
    assert known.seconds(new.shown["cost"]) == pytest.approx(made(new).seconds, rel=0.01)
    assert known.seconds(None) is None


def test_a_job_of_a_batch_counts_with_its_share_and_a_batch_is_waited_for_once() -> None:
    known, job = Estimator("e"), spec("a", 1e12)
    alone = made(job)
    slower = {name: 3 * seconds for name, seconds in alone.stages.items()}
    known.learn(job, replace(alone, seconds=3 * alone.seconds, stages=slower, together=3))
    assert known.seconds(job.shown["cost"]) == pytest.approx(alone.seconds)
    assert known.decode_seconds(job.shown["cost"]) == pytest.approx(0.2)
    running = JobProgress("denoising", 5, 10, eta_s=3.0, together=2)
    begun = JobProgress("text", 0, 10, started_at=time.time(), together=2)
    whole = 2 * alone.seconds
    assert known.left(Entry(job, "in_progress", begun)) == pytest.approx(whole, rel=0.1)
    entries = [Entry(replace(job, id=name), "in_progress", running) for name in "ab"]
    left = 3.0 + 2 * 0.2
    assert known.etas([*entries, Entry(replace(job, id="c"), "queued")]) == {
        "a": pytest.approx(left),
        "b": pytest.approx(left),
        "c": pytest.approx(left + alone.seconds),
    }


def test_the_fit_of_times_is_never_negative() -> None:
    assert fit([(2.0, 6.0)]).at(4.0) == pytest.approx(12.0)  # one shape gives the pace alone
    line = fit([(1.0, 3.0), (2.0, 4.0), (10.0, 12.0)])
    assert (line.a, line.b) == (pytest.approx(2.0), pytest.approx(1.0))
    assert fit([(1.0, 5.0), (100.0, 4.0)]).b == 0.0  # a larger one that was faster
    assert fit([(1.0, 1.0), (2.0, 9.0)]).a == 0.0


def test_a_queued_job_waits_for_those_before_it() -> None:
    known = Estimator("e")
    jobs = [spec(str(number), flops) for number, flops in enumerate((1e12, 1e11, 1e12))]
    waiting = [Entry(job, "queued") for job in jobs]
    assert known.etas(waiting) == {}
    for job in jobs:
        known.learn(job, made(job))
    each = [made(job).seconds for job in jobs]
    assert known.etas(waiting) == {
        "0": pytest.approx(each[0]),
        "1": pytest.approx(each[0] + each[1]),
        "2": pytest.approx(sum(each)),
    }
    # The one that is made counts with what is left of it: steps as it says, then the decoding.
    under_way = Entry(jobs[0], "in_progress", JobProgress("denoising", 5, 10, eta_s=3.0))
    assert known.left(under_way) == pytest.approx(3.0 + 0.2)
    begun = JobProgress("text", 0, 10, started_at=time.time() - each[0] / 2)
    assert known.left(Entry(jobs[0], "in_progress", begun)) == pytest.approx(each[0] / 2, rel=0.1)
    unknown = Entry(JobSpec("old", 0.0, ()), "queued")
    assert set(known.etas([waiting[0], unknown, waiting[1]])) == {"0"}
    # The work of a queue: what is left of those that are made, and a usual job for an unknown one.
    assert known.outstanding([]) == 0
    assert known.outstanding([unknown]) == 60
    assert known.outstanding([under_way, *waiting[1:]]) == pytest.approx(3.2 + sum(each[1:]))
    assert known.outstanding([waiting[1], unknown]) == pytest.approx(2 * each[1])
    batch = JobProgress("denoising", 5, 10, eta_s=3.0, together=2)
    pair = [Entry(replace(jobs[0], id=name), "in_progress", batch) for name in "ab"]
    assert known.outstanding(pair) == pytest.approx(3.0 + 2 * 0.2)


@pytest.mark.parametrize(
    ("queue", "kinds"),
    [("sqlite:///q", ["dropped", "unknown"]), ("postgresql://h/d", ["dropped"])],
)
def test_a_gateway_tells_of_letters_where_it_knows_the_vocabulary(
    queue: str, kinds: list[str], tmp_path: Path
) -> None:
    group = GroupSettings(save_dir=tmp_path, queue=queue, arguments=("--device", "cpu"))
    words = ["--prompt", "a ball, 一个红球 👍", "--image-size", "32", "48", "--num-frames", "1"]
    notes = judge(group, words, [], tmp_path / "outputs", refuse=False)["notes"]
    marks = {"dropped": "caption cleaning drops", "unknown": "no letters for '👍'"}
    assert len(notes) == len(kinds)
    assert all(marks[kind] in note for kind, note in zip(kinds, notes, strict=True))
