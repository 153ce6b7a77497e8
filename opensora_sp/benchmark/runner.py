"""The benchmark: it runs a job several times through the main path, after warm-up runs.

As in generate, all texts are encoded first, so that T5 can be freed, and then the videos are made.
Each run encodes its texts again, and that time is the first part of the run. With --profile one
more run is traced.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from opensora_sp.base import faults
from opensora_sp.base.machine import describe_machine
from opensora_sp.benchmark.flops import decode_flops, denoise_flops, measure_peak, text_flops
from opensora_sp.benchmark.live_report import LiveReport, frames_of, run_facts
from opensora_sp.benchmark.memory_meter import MemoryMeter
from opensora_sp.benchmark.options import BenchmarkOptions
from opensora_sp.benchmark.profile import profiled, trace_path
from opensora_sp.benchmark.recording import Phase, rank_record, recorded
from opensora_sp.benchmark.report.build import run_record
from opensora_sp.benchmark.report.page import write_page
from opensora_sp.benchmark.report.table import report_lines
from opensora_sp.benchmark.weights import describe_weights
from opensora_sp.engine.kernel_choice import PLAIN, described_attention
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.timing import Clock
from opensora_sp.engine.weight_digests import transformer_digest
from opensora_sp.jobs.open import announce, load_pipeline, mesh_of, open_engine_session, tidy
from opensora_sp.jobs.outputs import open_outputs
from opensora_sp.jobs.prepare import with_step_schedules
from opensora_sp.media.sinks import Sink
from opensora_sp.media.writer import probe_encoder
from opensora_sp.parallel.backend_table import DRIVER_PACKAGES, for_device
from opensora_sp.parallel.session import Session
from opensora_sp.planner.requests import plan_in_mode
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.flags.benchmark_settings import WARMUP_STEPS
from opensora_sp.request.prompts import caption
from opensora_sp.request.request import Job, Task
from opensora_sp.request.step_cache import OFF

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Batches = Sequence[Sequence[Task]]


@dataclass
class CountingSink:
    """A sink that counts frames and passes them to another sink, if there is one."""

    inner: Sink | None = None
    frames: int = 0

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3]."""
        self.frames += len(frames)
        if self.inner is not None:
            self.inner.write(frames)


@dataclass
class _Run:
    """A planned run: its kind, its batches, and its text phase once that is recorded.

    left_out: per batch made, the steps of each clip that were not computed.
    """

    kind: str
    number: int
    batches: Batches
    text: Phase | None = None
    left_out: list[Sequence[Sequence[int]]] = field(default_factory=list)

    @property
    def saved(self) -> bool:
        return self.kind == "measured"


def run_benchmark(job: Job, options: BenchmarkOptions) -> int:
    """Measure the job on this rank and its peers. Returns the exit code 0.

    The report is on disk from the start with the status running. An error sets the status failed
    and is raised again. Raises UserError for mistakes of the user.
    """
    with open_engine_session(job.engine) as session:
        tidy(session, job.settings.save_dir)
        live = LiveReport(job, options, ranks=session.world_size)
        clock = Clock(session.device, session.control.stage)
        if session.control.watchdog is not None and session.leads:
            # When a peer fails this process may be ended where it stands.
            session.control.watchdog.at_end.append(live.fail_for_all)
        try:
            if session.leads:
                row = for_device(session.device.type)
                live.facts["machine"] = describe_machine(
                    session.device,
                    job.settings.save_dir,
                    tool=row.tool,
                    driver_query=row.driver_query,
                    driver_packages=DRIVER_PACKAGES,
                )
                live.write("running")
            _measure(job, options, session, live, clock)
        except BaseException as error:
            if session.leads:
                live.fail(error, clock.failed_in)
            raise
        if session.leads:
            with session.control.stage("report"):
                faults.reach("report")
                _finish(live, options)
        # Whoever had left could not say that the leading rank was killed over its report.
        session.control.barrier()
    return 0


def _measure(
    job: Job, options: BenchmarkOptions, session: Session, live: LiveReport, clock: Clock
) -> None:
    """Load, run and describe: everything between the first and the last version of the report."""
    with clock.stage("check"):
        mesh = mesh_of(job, session.world_size)
        # No text cache, because encoding is measured.
        pipeline = load_pipeline(job, session, mesh, clock=clock, text_cache=False)
    live.check_seconds = clock.seconds["check"]
    checkpoints = job.engine.checkpoints or embedded_checkpoints()
    digest = partial(transformer_digest, checkpoints.dit)
    job = with_step_schedules(job, session, digest)
    live.settled(job)
    live.facts["run"] = run_facts(pipeline, job)
    mode = pipeline.models.runtime.mode
    assert mode is not None  # a job's runtime is always a memory mode's
    live.plan = plan_in_mode(job, session.world_size, mode)
    first = job.tasks[0].request
    if not first.is_image:
        session.control.together(
            lambda: probe_encoder(first.save_fps, *first.decoded_size), leading_only=True
        )
    announce(pipeline, first, mesh)
    meter = MemoryMeter(session.device)
    runs = _planned_runs(job, options)
    tokens = _encode_texts(pipeline, runs, meter, live)
    for run in runs:
        _run(pipeline, job, run, meter, live)
    if options.profile is not None:
        _profile(pipeline, options, runs[-1], live)
    live.doing = "counting FLOPs and hashing weights"
    _describe(pipeline, job, options, live, tokens, runs[-1])


def _planned_runs(job: Job, options: BenchmarkOptions) -> list[_Run]:
    batches = job.batches()
    short = [[_shortened(task) for task in batches[0]]]
    warmups = [_Run("warmup", number, short) for number in range(options.warmup_count)]
    return warmups + [_Run("measured", number, batches) for number in range(options.eval_count)]


def _shortened(task: Task) -> Task:
    """The task with the number of steps of a warm-up, all of them computed."""
    return replace(task, request=replace(task.request, steps=WARMUP_STEPS, step_cache=OFF))


def _encode_texts(
    pipeline: Pipeline, runs: Sequence[_Run], meter: MemoryMeter, live: LiveReport
) -> dict[str, int]:
    """Encode the texts of every run. Returns the number of tokens of each caption, on all ranks."""
    for run in runs:
        live.doing = f"texts of {run.kind} run {run.number}"
        pipeline.text.forget()
        with recorded(pipeline, meter) as run.text:
            _encode_run(pipeline, run)
    pipeline.text.release_encoder()
    # The last run is a measured one, so it has every caption.
    requests = [task.request for batch in runs[-1].batches for task in batch]
    captions = [caption(request, clip) for request in requests for clip in range(request.loop)]
    length = pipeline.models.max_length(requests[0])
    counts = pipeline.text.token_counts(captions, length) if pipeline.session.leads else None
    return dict(zip(captions, pipeline.session.control.broadcast_object(counts), strict=True))


def _encode_run(pipeline: Pipeline, run: _Run) -> None:
    requests = [task.request for batch in run.batches for task in batch]
    captions = [caption(request, clip) for request in requests for clip in range(request.loop)]
    pipeline.text.encode(captions, pipeline.models.max_length(requests[0]))


def _run(pipeline: Pipeline, job: Job, run: _Run, meter: MemoryMeter, live: LiveReport) -> None:
    """Make one run, and add its record to the report on the leading rank. Collective."""
    live.doing = f"{run.kind} run {run.number}"
    if pipeline.session.leads and pipeline.options.show_progress:
        _log.info("%s run %d", run.kind, run.number)
    with recorded(pipeline, meter) as phase:
        frames = _generate(pipeline, job, run)
    assert run.text is not None
    session = pipeline.session
    ranks = session.control.all_gather_object(rank_record(session.rank, [run.text, phase]))
    if session.leads:
        videos = sum(len(batch) for batch in run.batches)
        live.runs.append(run_record(run.kind, run.number, ranks, frames=frames, videos=videos))
        live.write("running")


def _generate(pipeline: Pipeline, job: Job, run: _Run) -> int:
    """Make the run's videos as generate does. Returns the number of frames on this rank."""
    frames = 0
    for batch in run.batches:
        with ExitStack() as stack:
            inner: list[Any] = [None] * len(batch)
            if run.saved:
                inner = stack.enter_context(open_outputs(pipeline, job, batch))
            sinks = [CountingSink(sink) for sink in inner]
            made = pipeline.generate_to([task.request for task in batch], sinks, keep_latents=False)
        run.left_out.append(made.left_out_steps)
        frames += frames_of(sinks)
    return frames


def _profile(pipeline: Pipeline, options: BenchmarkOptions, last: _Run, live: LiveReport) -> None:
    """Profile an extra run with few steps, so that no measured run is slowed down."""
    assert options.profile is not None
    live.doing = "profiled run"
    session = pipeline.session
    short = [[_shortened(task) for task in last.batches[0]]]
    path = trace_path(options.profile, session.rank)
    session.control.barrier()
    with profiled(path, session.rank, session.device):
        for batch in short:
            requests = [task.request for task in batch]
            pipeline.generate_to(requests, [CountingSink() for _ in batch], keep_latents=False)
    live.profile = session.control.all_gather_object(str(path))


def _describe(
    pipeline: Pipeline,
    job: Job,
    options: BenchmarkOptions,
    live: LiveReport,
    tokens: dict[str, int],
    last: _Run,
) -> None:
    """FLOPs, peak and weights: what is worth knowing after the runs. Collective."""
    session = pipeline.session
    checkpoints = job.engine.checkpoints or embedded_checkpoints()
    made = zip(last.batches, last.left_out, strict=True)
    own = sum(_denoise_flops(pipeline, batch, tokens, left_out) for batch, left_out in made)
    shares = session.control.all_gather_object(own)
    if options.measure_peak:
        with pipeline.models.arithmetic():
            session.control.barrier()
            peaks = session.control.all_gather_object(
                measure_peak(session.device, pipeline.models.dtype)
            )
        live.peak = {"per_rank": peaks, "source": "measured"}
    elif options.peak_tflops is not None:
        given = [options.peak_tflops * 1e12] * session.world_size
        live.peak = {"per_rank": given, "source": "given"}
    if not session.leads:
        return
    live.facts["run"]["attention"] = described_attention(pipeline.models)
    live.facts["run"]["fused_kernels"] = pipeline.models.kernels.fused_why or PLAIN
    compiler = pipeline.models.compiler
    live.facts["run"]["compiled"] = None if compiler is None else compiler.described()
    length = pipeline.models.max_length(job.tasks[0].request)
    request = job.tasks[0].request
    clips = len(job.tasks) * request.loop
    decoded = decode_flops(request, checkpoints.vae3d, checkpoints.vae2d)
    live.work = {
        "denoise": shares,
        "decode": None if decoded is None else decoded * clips,
        "text": text_flops(checkpoints.t5, length) * len(tokens),
    }
    live.facts["model"] = {
        "checkpoints": "embedded" if job.engine.checkpoints is None else "given",
        "transformer_parameters": sum(p.numel() for p in pipeline.models.transformer.parameters()),
        "weights": describe_weights(checkpoints, hashes=options.weight_hashes),
    }


def _denoise_flops(
    pipeline: Pipeline,
    batch: Sequence[Task],
    tokens: dict[str, int],
    left_out: Sequence[Sequence[int]],
) -> float:
    """FLOPs of this rank, over all clips of a batch. left_out: per clip, steps not computed."""
    requests = [task.request for task in batch]
    mesh, rank = pipeline.models.mesh(requests[0]), pipeline.session.rank
    of_clip = partial(
        denoise_flops,
        requests,
        config=pipeline.models.config,
        mesh=mesh,
        rank=rank,
        runtime=pipeline.models.runtime,
    )
    return sum(
        of_clip(
            [tokens[caption(r, clip)] for r in requests],
            steps=requests[0].steps - len(not_computed),
        )
        for clip, not_computed in enumerate(left_out)
    )


def _finish(live: LiveReport, options: BenchmarkOptions) -> None:
    report = live.write("ok")
    write_page(options.page, report)
    for line in report_lines(report):
        print(line)
    print(f"report: {options.benchmark_save_path}")
    print(f"page: {options.page}", flush=True)
