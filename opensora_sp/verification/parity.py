"""Parity: N ranks are compared with one, on the user's machine, checkpoint, size and dtype.

All ranks compute a forward and a few steps, with the kernels that a run of the request would have.
Then rank 0 computes the same alone, with a one-rank denoiser on the same weights, and compares the
results. Where the run's steps are folded, rank 0 compares a plain one with them too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora_sp.base.errors import UserError
from opensora_sp.base.free_memory import free_bytes
from opensora_sp.base.wording import plural
from opensora_sp.engine.guidance import Conditions, Denoiser
from opensora_sp.engine.kernel_choice import PLAIN, choose_kernels, described_attention
from opensora_sp.engine.loading import load_transformer
from opensora_sp.engine.noise import NoiseKey, draw_noise
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.sampling import sample
from opensora_sp.engine.timing import synchronize
from opensora_sp.models.kernels.active import Kernels, using
from opensora_sp.models.stdit3 import STDiT3
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import plan_mesh
from opensora_sp.planner.cost import Workload, project_step
from opensora_sp.request.request import Request
from opensora_sp.request.step_kernels import kernels_of
from opensora_sp.request.step_times import times_of

FORWARD_LIMIT = 1e-5  # max|Δ| / max|reference|, one float32 forward
# A folded forward beside a plain one: in float32 as FORWARD_LIMIT, in half precision its distance
# from float32 in that of the plain one.
FOLDED_LIMIT, FOLDED_FACTOR = 2e-5, 1.5
ULP_FACTOR = 10  # limit of a float32 run, in responses to a one-ulp change of its noise
TEXT_TOKENS = 60
PROBE_TIME = 600.0  # the timestep of the single forward
RESIDUALS_ALONE = 13  # tensors of [branches·T·S, C] alive at once on one rank


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The result of the comparison.

    forward, run: the error relative to one rank, as max|Δ| / max|reference|, or as relative RMS in
    half precision. folded: how far a folded forward is from the plain one in float32, or from
    float32 in half precision; None where the run's steps are plain. sent: bytes of each kind of
    collective per step, of the rank that sends most. exchange_share: the share of a step that is
    spent waiting for collectives.
    """

    request: Request
    reduced: bool
    forward_max: float
    forward: float
    forward_limit: float
    run_max: float
    run: float
    run_limit: float
    folded: float | None
    folded_limit: float
    psnr: float
    step_seconds: float
    alone_seconds: float
    exchange_share: float
    sent: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether all errors are within their limits. NaN is not."""
        folds = self.folded is None or self.folded <= self.folded_limit
        return self.forward <= self.forward_limit and self.run <= self.run_limit and folds


@dataclass(frozen=True)
class _Trial:
    """The results of all ranks for one request, which rank 0 has to reproduce alone."""

    forward: Tensor | None
    run: Tensor | None
    step_seconds: float
    exchange_share: float
    sent: dict[str, int]


def check_parity(pipeline: Pipeline, request: Request, *, most_seconds: float) -> Parity | None:
    """Compare all ranks with rank 0 alone. Returns the result on rank 0, else None. Collective.

    A request that does not fit on rank 0 alone, or would take longer than `most_seconds`, is made
    smaller first: fewer frames, then a smaller picture. Its steps are folded or plain as those of
    the request that was asked for.
    """
    runtime = pipeline.models.runtime
    kind = kernels_of(request, runtime.step_kernels)
    models = replace(pipeline.models, runtime=replace(runtime, step_kernels=kind))
    pipeline = replace(pipeline, models=models)
    with pipeline.models.arithmetic():
        return _check(pipeline, request, most_seconds)


def _check(pipeline: Pipeline, request: Request, most_seconds: float) -> Parity | None:
    session = pipeline.session
    wanted = request
    while True:
        smaller = _smaller(request)
        if session.control.broadcast_object(
            _fits_alone(pipeline, request) if session.leads else None
        ):
            trial = _on_all_ranks(pipeline, request)
            busy = trial.step_seconds * pipeline.models.mesh(request).replica_size
            runs = 3 if pipeline.models.dtype == torch.float32 else 1
            soon = busy * (request.steps + 2) * runs <= most_seconds
            if session.control.broadcast_object(soon if session.leads else None) or smaller is None:
                break
        elif smaller is None:
            raise UserError(
                f"rank 0 alone has no memory for even {plural(request.num_frames, 'frame')} of "
                f"{request.height}x{request.width}: free some"
            )
        request = smaller
    found = _compare(pipeline, request, trial, request != wanted) if session.leads else None
    session.control.barrier()
    return found


def _smaller(request: Request) -> Request | None:
    """About half the request, or None when it is small already."""
    if request.num_frames > 17:
        return replace(request, num_frames=max(17, request.num_frames // 34 * 17))
    if min(request.height, request.width) >= 64:
        return replace(request, height=request.height // 2, width=request.width // 2)
    return None


def _fits_alone(pipeline: Pipeline, request: Request) -> bool:
    frames, *_ = request.latent_shape
    rows, columns = request.patch_grid
    itemsize = torch.empty((), dtype=pipeline.models.dtype).element_size()
    residual = 2 * frames * rows * columns * pipeline.models.config.hidden_size * itemsize
    return RESIDUALS_ALONE * residual < free_bytes(pipeline.session.device)


def _on_all_ranks(pipeline: Pipeline, request: Request) -> _Trial:
    session, ledger = pipeline.session, pipeline.session.ledger
    denoiser = pipeline.models.denoiser(request)
    choose_kernels(pipeline.models, [request], [_text_tokens(pipeline)])
    forward = _forward(denoiser, pipeline, request)
    synchronize(session.device)  # only the leading rank has waited for its forward
    before, started = ledger.snapshot(), time.perf_counter()
    run = _run(denoiser, pipeline, request, draw_noise([request], 0))
    synchronize(session.device)
    seconds = (time.perf_counter() - started) / request.steps
    spent = {k: e for k, e in ledger.since(before).items() if e.calls and k != "gather_latents"}
    waited = sum(entry.seconds for entry in spent.values()) / request.steps
    sent = {kind: entry.bytes_sent // request.steps for kind, entry in spent.items()}
    everyone = session.control.all_gather_object((seconds, waited, sent))
    busiest = max((row[2] for row in everyone), key=lambda row: sum(row.values()))
    slowest = max(row[0] for row in everyone)
    share = max(row[1] for row in everyone) / slowest
    return _Trial(forward, run, slowest, share, busiest)


def _compare(pipeline: Pipeline, request: Request, trial: _Trial, reduced: bool) -> Parity:
    models = pipeline.models
    alone = _alone(pipeline, request, models.transformer)
    noise = draw_noise([request], 0)
    forward = _present(_forward(alone, pipeline, request))
    started = time.perf_counter()
    run = _present(_run(alone, pipeline, request, noise))
    synchronize(pipeline.session.device)
    alone_seconds = (time.perf_counter() - started) / request.steps
    sharded_forward, sharded_run = _present(trial.forward), _present(trial.run)
    plain: Tensor | None = None
    if models.runtime.step_kernels == "folded":
        unfolded = _alone(pipeline, request, models.transformer, plain=True)
        plain = _present(_forward(unfolded, pipeline, request))
    folded, folded_limit = None, FOLDED_LIMIT
    if models.dtype == torch.float32:
        nudged = torch.nextafter(noise, torch.full_like(noise, math.inf))
        moved = _present(_run(alone, pipeline, request, nudged))
        forward_limit, run_limit = FORWARD_LIMIT, ULP_FACTOR * _relative(moved, run)
        measure = _relative
        if plain is not None:
            folded = _relative(forward, plain)
    else:
        # In half precision the limit is one rank's own distance from float32.
        exact = load_transformer(
            models.checkpoints.dit, models.config, torch.float32, pipeline.session.device
        )
        # The kernels of the run may not take float32. Its own are those that every device has.
        with using(Kernels()):
            in_float32 = _alone(pipeline, request, exact, plain=True)
            reference = _present(_forward(in_float32, pipeline, request))
        forward_limit = run_limit = _rms(forward, reference)
        measure = _rms
        if plain is not None:
            folded, folded_limit = _rms(forward, reference), FOLDED_FACTOR * _rms(plain, reference)
    return Parity(
        request=request,
        reduced=reduced,
        forward_max=float((sharded_forward - forward).abs().max()),
        forward=measure(sharded_forward, forward),
        forward_limit=forward_limit,
        run_max=float((sharded_run - run).abs().max()),
        run=measure(sharded_run, run),
        run_limit=run_limit,
        folded=folded,
        folded_limit=folded_limit,
        psnr=_psnr(sharded_run, run),
        step_seconds=trial.step_seconds,
        alone_seconds=alone_seconds,
        exchange_share=trial.exchange_share,
        sent=trial.sent,
    )


def _present(tensor: Tensor | None) -> Tensor:
    """A tensor that is there, because only the leading rank calls this."""
    assert tensor is not None
    return tensor


def _alone(pipeline: Pipeline, request: Request, model: STDiT3, *, plain: bool = False) -> Denoiser:
    """A one-rank denoiser beside the sharded one; plain: never with folded steps."""
    runtime = pipeline.models.runtime
    runtime = replace(runtime, step_kernels="plain") if plain else runtime
    frames, *size = request.latent_shape
    layout = Layout(frames=frames, size=(size[0], size[1]), ranks=1)
    return parallelize(model, None, layout, runtime)


def _text_tokens(pipeline: Pipeline) -> int:
    return min(TEXT_TOKENS, pipeline.models.config.model_max_length)


def _conditions(pipeline: Pipeline, request: Request) -> Conditions:
    """Random text from keyed noise. Parity compares ranks, so T5 is not needed."""
    config = pipeline.models.config
    length = _text_tokens(pipeline)
    masks = torch.zeros(1, config.model_max_length, dtype=torch.int64)
    masks[:, :length] = 1
    tokens = NoiseKey(request.seed).normal((length, config.caption_channels), "parity text")
    return Conditions(
        tokens=[tokens * 0.1],
        masks=masks,
        height=request.height,
        width=request.width,
        fps=request.model_fps,
        cfg_scale=request.cfg_scale,
    )


def _forward(denoiser: Denoiser, pipeline: Pipeline, request: Request) -> Tensor | None:
    """One guided velocity as latents [1,4,T,H,W] on the leading rank."""
    velocity = denoiser.prepare(_conditions(pipeline, request))
    z = denoiser.shard(draw_noise([request], 0))
    out = denoiser.gather(velocity(z, PROBE_TIME))
    return None if out is None else out.cpu()


def _run(denoiser: Denoiser, pipeline: Pipeline, request: Request, noise: Tensor) -> Tensor | None:
    """A few steps as latents [1,4,T,H,W] on the leading rank."""
    velocity = denoiser.prepare(_conditions(pipeline, request))
    out = denoiser.gather(sample(denoiser.shard(noise), times_of(request), velocity))
    return None if out is None else out.cpu()


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _rms(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _psnr(actual: Tensor, expected: Tensor) -> float:
    error = float((actual - expected).pow(2).mean())
    peak = float(expected.max() - expected.min())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def report(parity: Parity, pipeline: Pipeline) -> Iterator[str]:
    """The lines of the printed result."""
    request, mesh = parity.request, pipeline.models.mesh(parity.request)
    kind = "relative" if pipeline.models.dtype == torch.float32 else "relative RMS"
    what = f"{plural(request.num_frames, 'frame')} of {request.height}x{request.width}"
    if parity.reduced:
        yield "the request is too large for one rank alone, so a smaller one is compared"
    ranks = plural(mesh.size, "rank")
    yield f"{what}, {pipeline.models.dtype}, {ranks} as {mesh} against rank 0 alone"
    kernels = pipeline.models.kernels
    attention = "; ".join(
        f"{of}: {name}" for of, name in described_attention(pipeline.models).items()
    )
    steps = "plain" if parity.folded is None else "folded"
    yield f"steps: {steps}; attention: {attention}; norms: {kernels.fused_why or PLAIN}"
    for name, worst, error, limit in (
        ("one forward", parity.forward_max, parity.forward, parity.forward_limit),
        (plural(request.steps, "step"), parity.run_max, parity.run, parity.run_limit),
    ):
        verdict = "ok" if error <= limit else "FAILED"
        yield (
            f"{name:<12} max error {worst:.2e}  {kind} {error:.2e}  limit {limit:.2e}  {verdict}"
        )
    if parity.folded is not None:
        held = parity.folded <= parity.folded_limit
        yield (
            f"{'folded':<12} {kind} {parity.folded:.2e} from "
            f"{'plain' if pipeline.models.dtype == torch.float32 else 'float32'}  "
            f"limit {parity.folded_limit:.2e}  {'ok' if held else 'FAILED: --step-kernels plain'}"
        )
    yield f"PSNR of the latents after {plural(request.steps, 'step')}: {parity.psnr:.1f} dB"
    kinds = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in sorted(parity.sent.items()))
    total = sum(parity.sent.values()) / 1e6
    yield f"sent per step by the busiest rank: {total:.2f} MB ({kinds or 'nothing'})"
    yield (
        f"step: {parity.step_seconds:.3f} s on {ranks}, {parity.alone_seconds:.3f} s "
        f"alone; waiting for the exchange: {parity.exchange_share:.0%} of the step"
    )


def project(parity: Parity, pipeline: Pipeline, link: float) -> Iterator[str]:
    """Lines with the projected time of a step on more ranks, from the measured one-rank step.

    link: bytes per second between ranks.
    """
    frames, *size = parity.request.latent_shape
    work = Workload(
        frames=frames,
        size=(size[0], size[1]),
        channels=pipeline.models.config.hidden_size,
        depth=pipeline.models.config.depth,
        text=TEXT_TOKENS,
        guided=parity.request.cfg_scale != 1,
        itemsize=torch.empty((), dtype=pipeline.models.dtype).element_size(),
    )
    for ranks in (2, 4, 8):
        mesh = plan_mesh(ranks, guided=work.guided)
        step = project_step(
            work,
            mesh,
            pipeline.models.runtime,
            one_rank_seconds=parity.alone_seconds,
            link_bytes_per_second=link,
        )
        yield (
            f"projected on {ranks} ranks ({mesh.guidance}x{mesh.sequence}) at {link / 1e9:g} GB/s: "
            f"{step.hidden:.3f} s a step with the exchange hidden, {step.exposed:.3f} s without"
        )
