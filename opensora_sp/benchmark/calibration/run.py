"""A calibration: full runs, the path search, whole runs that confirm, schedules. On all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from opensora_sp.base.wording import plural
from opensora_sp.benchmark.calibration.full_runs import FullRuns
from opensora_sp.benchmark.calibration.options import CalibrationOptions, Sizes
from opensora_sp.benchmark.calibration.result import (
    rows_of,
    schedule_of,
    table,
    write_curve,
    write_merged,
    write_picture,
)
from opensora_sp.benchmark.calibration.selection import (
    LEVELS,
    Candidate,
    Curve,
    candidates_of,
)
from opensora_sp.benchmark.report import units
from opensora_sp.engine.weight_digests import model_digests
from opensora_sp.jobs.identity import reference_digests
from opensora_sp.jobs.open import announce, load_pipeline, mesh_of, open_engine_session
from opensora_sp.parallel.agreement import ensure_agreement
from opensora_sp.request.preflight import amount
from opensora_sp.request.prompts import caption
from opensora_sp.request.request import Job, Request
from opensora_sp.request.step_times import times_of

_log = logging.getLogger(__name__)
# What confirming takes: about so many lists, of so many of the steps in the mean.
_LISTS, _SHARE = 12, 0.4


def run_calibration(job: Job, options: CalibrationOptions) -> int:
    """Calibrate the job's model on its first prompts; returns the exit code.

    0: at least one level has a schedule, and the file is written; 1: none has. Raises UserError.
    """
    requests = [task.request for task in job.tasks]
    requests = requests[: options.full_runs]
    with open_engine_session(job.engine) as session:
        mesh = mesh_of(job, session.world_size)
        pipeline = load_pipeline(job, session, mesh)
        sources = session.control.broadcast_object(
            session.control.together(
                lambda: _Sources(
                    model_digests(pipeline.models.checkpoints),
                    [reference_digests(request) for request in requests],
                ),
                leading_only=True,
            )
        )
        assert sources is not None
        model = sources.models["dit"]
        digest = _digest(job, requests, sources)
        ensure_agreement(session, {"list of requests": digest})
        folder = options.out.with_name(f"{options.out.name}.runs-{digest[:12]}")
        runs = FullRuns(pipeline, requests, folder)
        announce(pipeline, requests[0], mesh)
        says = session.leads and job.settings.verbose > 0
        _make_full_runs(runs, says=says)
        candidates = session.control.broadcast_object(
            candidates_of(runs.grams(), times_of(requests[0])) if session.leads else None
        )
        assert candidates is not None

        def measure(one: Candidate) -> Sequence[float]:
            found = runs.compare(schedule_of("trial", one, requests[0], None))
            if says:
                _log.info(
                    f"{one.count} of {requests[0].steps} steps, {one.fill}: "
                    f"{fmean(found):.1f} dB, worst {min(found):.1f} dB"
                )
            return found

        curve = Curve(candidates, measure)
        chosen = {name: curve.fewest(level) for name, level in LEVELS.items()}
        found = {
            name: schedule_of(name, one, requests[0], model, curve.run(one))
            for name, one in chosen.items()
            if one is not None
        }
        if session.leads:
            any_of = schedule_of("any", curve.best(1), requests[0], model)
            write_merged(options.out, list(found.values()), any_of)
            rows = rows_of(curve, requests[0].steps)
            about = _about(requests, model)
            named = {name: one.to_dict() for name, one in found.items()}
            write_curve(options.curve, about | {"schedules": named, "curve": rows})
            write_picture(options.picture, rows, about["title"])
            print(table(rows, found))
            for name, level in LEVELS.items():
                if name not in found:
                    print(
                        f"no schedule {name}: no list reaches {level.mean:g} dB in the mean and "
                        f"{level.worst:g} dB in every prompt"
                    )
            print(f"schedules: {options.out}")
            print(f"curve: {options.curve}, {options.picture}", flush=True)
            if not job.settings.keep_state:
                runs.remove()
        session.control.barrier()
    return 0 if found else 1


def _make_full_runs(runs: FullRuns, *, says: bool) -> None:
    """The full runs that are not there yet, after what they take; all texts first. Collective."""
    session, pipeline = runs.pipeline.session, runs.pipeline
    request, count = runs.requests[0], len(runs.requests)
    left = [number for number in range(count) if not runs.is_there(number)]
    sizes = Sizes.of(request)
    session.control.together(lambda: sizes.check(runs.folder.parent, len(left)), leading_only=True)
    whole = count * (1 + _LISTS * _SHARE)
    if says:
        _log.info(
            f"calibrating takes about as long as {whole:.0f} full runs: {count} full runs of "
            f"{request.steps} steps, then about {_LISTS} lists of steps for each prompt; "
            f"{amount(sizes.run + count * sizes.frames)} of disk in {runs.folder} on the way"
        )
        if len(left) < count:
            _log.info(f"{count - len(left)} of {count} full runs are there already")
    pipeline.text.encode(
        [caption(one, 0) for one in runs.requests], pipeline.models.max_length(request)
    )
    if not pipeline.text.stays:
        pipeline.text.release_encoder()
    for number in left:
        seconds = runs.make(number)
        if says:
            rest = (len(left) - 1 - left.index(number) + count * _LISTS * _SHARE) * seconds
            _log.info(
                f"full run {number + 1} of {count}: {units.seconds(seconds)}; about "
                f"{units.seconds(rest)} are left in all"
            )


@dataclass(frozen=True)
class _Sources:
    """Digests of the files that the full runs are made from: models by name, requests' references.

    The leading rank's: only it need see the files.
    """

    models: dict[str, str]
    references: list[list[str]]


def _digest(job: Job, requests: Sequence[Request], sources: _Sources) -> str:
    """What decides the full runs: a folder belongs to one."""
    facts = {
        "requests": [request.digest() for request in requests],
        "models": sources.models,
        "references": sources.references,
        "dtype": job.engine.dtype,
        "step kernels": job.engine.step_kernels,
        "text weights": job.engine.t5_weights,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _about(requests: Sequence[Request], model: str) -> dict[str, Any]:
    request = requests[0]
    size = f"{request.height}×{request.width}, {plural(request.num_frames, 'frame')}"
    return {
        "title": f"{size}, {request.steps} steps, guidance {request.cfg_scale:g}",
        "model": model,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "steps": request.steps,
        "cfg_scale": request.cfg_scale,
        "prompts": [one.prompt for one in requests],
    }
