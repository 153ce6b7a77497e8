"""Conformance checks of transformer and sampler, on all ranks, by the production denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_sp.base import access
from opensora_sp.engine.blocks import Stream, run_blocks
from opensora_sp.engine.compiling import new_compiler
from opensora_sp.engine.guidance import Conditions, Denoiser
from opensora_sp.engine.loading import load_transformer
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.sampling import sample
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config, StepTables, unpatchify
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh, legal_meshes
from opensora_sp.parallel.session import MeshComms, Session
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.step_times import timesteps
from opensora_sp.verification.suite import Check, load_cases, load_json, max_error, relative_rms

Case = Mapping[str, Tensor]
FORWARD_LIMIT = 2e-5  # of max|out|, one float32 forward
BF16_LIMIT = 2e-2  # relative RMS, one bf16 forward
SAMPLER_LIMIT = 1e-3
TIMESTEP_LIMIT = 1e-3


class Transformer:
    """The suite's transformer on the session's ranks."""

    def __init__(
        self, directory: Path, session: Session, dtype: torch.dtype, runtime: Runtime
    ) -> None:
        self.session, self.runtime = session, runtime
        self.model: STDiT3 = load_transformer(
            directory, STDiT3Config.load(directory), dtype, session.device
        )
        self._comms: dict[Mesh, MeshComms] = {}
        self._compiler = new_compiler(session.device) if runtime.compile else None

    def denoiser(self, z: Tensor, mesh: Mesh) -> Denoiser:
        """The denoiser for latents of z's shape [B,4,T,H,W]."""
        if mesh not in self._comms:
            self._comms[mesh] = self.session.build(mesh)
        layout = Layout(frames=z.shape[2], size=(z.shape[3], z.shape[4]), ranks=mesh.sequence)
        return parallelize(
            self.model, self._comms[mesh], layout, self.runtime, compiler=self._compiler
        )

    def forward(self, case: Case) -> Tensor | None:
        """The raw output of a case's forward: float32 [B,8,T,H,W] on rank 0, None elsewhere.

        The batch is cut in two streams, as the two CFG branches are.
        """
        x = case["x"]
        batch, model = x.shape[0], self.model
        denoiser = self.denoiser(x, Mesh(sequence=self.session.world_size))
        mask = case["mask"].repeat(batch // case["mask"].shape[0], 1).bool()
        fps = case["fps"].repeat(batch // case["fps"].shape[0])
        height, width = float(case["height"][0]), float(case["width"][0])
        positions = denoiser.positions(height, width)
        half = max(1, batch // 2)
        streams, frame_mask = [], case.get("x_mask")
        for start in range(0, batch, half):
            part = slice(start, start + half)
            tokens = [case["y"][i, 0][mask[i]] for i in range(batch)[part]]
            streams.append(
                Stream(
                    x=model.embed(denoiser.shard(x[part]), positions),
                    tables=_tables(
                        model,
                        case["timestep"][part],
                        fps[part],
                        None if frame_mask is None else frame_mask[part],
                    ),
                    text=model.text_kv(tokens),
                )
            )
        kernels = denoiser.step_kernels(x.shape[2], guided=True)
        outs = run_blocks(
            model, streams, denoiser.sharding.reshard, denoiser.runtime, kernels=kernels
        )
        raw = [
            model.head(out, stream.tables, model.config.out_channels)
            for out, stream in zip(outs, streams, strict=True)
        ]
        whole = denoiser.sharding.gather(torch.cat(raw))
        return None if whole is None else unpatchify(whole, denoiser.size).float().cpu()


def _tables(model: STDiT3, t: Tensor, fps: Tensor, frame_mask: Tensor | None) -> StepTables:
    """A case's tables, with the groups of frames that have one time and one frame rate."""
    samples = list(zip(t.tolist(), fps.tolist(), strict=True))
    if frame_mask is None:
        return model.tables(t, fps).grouped([[sample] for sample in samples])
    still = [(0.0, rate) for _, rate in samples]
    keys = [
        [now if generated else kept for generated in row]
        for now, kept, row in zip(samples, still, frame_mask.tolist(), strict=True)
    ]
    return model.tables(t, fps, frame_mask).grouped(keys)


def forward_checks(
    suite: Path, session: Session, dtype: torch.dtype, runtime: Runtime
) -> Iterator[Check]:
    """dit/cases. In another dtype than float32 the error is the relative RMS."""
    transformer = Transformer(suite / "dit", session, dtype, runtime)
    exact = dtype == torch.float32
    limit = FORWARD_LIMIT if exact else _half_precision_limit(suite)
    for name, case in load_cases(suite / "dit" / "cases.safetensors").items():
        out = transformer.forward(case)
        if out is None:
            continue
        actual, expected = _generated_frames(out, case), _generated_frames(case["out"], case)
        if exact:
            error = max_error(actual, expected) / float(expected.abs().max())
        else:
            error = relative_rms(actual, expected)
        yield Check("dit", name, error, limit, "" if exact else f"relative RMS in {dtype}")


def bf16_checks(suite: Path, session: Session, runtime: Runtime) -> Iterator[Check]:
    """dit/cases_bf16: a run in bf16, compared with Open-Sora 1.2's results in bf16."""
    transformer = Transformer(suite / "dit", session, torch.bfloat16, runtime)
    for name, case in load_cases(suite / "dit" / "cases_bf16.safetensors").items():
        out = transformer.forward(case)
        if out is not None:
            actual, expected = _generated_frames(out, case), _generated_frames(case["out"], case)
            yield Check("dit_bf16", name, relative_rms(actual, expected), BF16_LIMIT)


def sampler_checks(suite: Path, session: Session, runtime: Runtime) -> Iterator[Check]:
    """sampler/cases: whole runs, on every mesh of one replica that these ranks allow."""
    transformer = Transformer(suite / "dit", session, torch.float32, runtime)
    settings = load_json(suite / "sampler" / "cases.json")
    meshes = [mesh for mesh in legal_meshes(session.world_size, guided=True) if mesh.replicas == 1]
    for name, case in load_cases(suite / "sampler" / "cases.safetensors").items():
        times = _times(settings[name])
        if session.leads:
            error = max_error(torch.tensor(times, dtype=torch.float64), case["timesteps"])
            yield Check("sampler", f"{name}.timesteps", error, TIMESTEP_LIMIT)
        for mesh in meshes:
            if mesh.guidance == 2 and settings[name]["cfg"] == 1:
                continue
            out = _run(transformer, mesh, case, settings[name], times)
            if out is not None:
                label = f"{name} {mesh.guidance}x{mesh.sequence}" if mesh.size > 1 else name
                yield Check("sampler", label, max_error(out, case["out"]), SAMPLER_LIMIT)


def _times(setting: Mapping[str, Any]) -> list[float]:
    return timesteps(
        setting["steps"],
        height=setting["hw"][0],
        width=setting["hw"][1],
        frames=setting["frames"],
        transform=setting["tt"],
    )


def _run(
    transformer: Transformer, mesh: Mesh, case: Case, setting: Mapping[str, Any], times: list[float]
) -> Tensor | None:
    z = case["z"]
    denoiser = transformer.denoiser(z, mesh)
    masks = case["mask"].repeat(z.shape[0] // case["mask"].shape[0], 1)
    velocity = denoiser.prepare(
        Conditions(
            tokens=[y[0][keep.bool()] for y, keep in zip(case["y"], masks, strict=True)],
            masks=masks,
            height=setting["hw"][0],
            width=setting["hw"][1],
            fps=setting["fps"],
            cfg_scale=setting["cfg"],
        )
    )
    noise = case.get("noise")
    out = sample(
        denoiser.shard(z),
        times,
        velocity,
        case.get("frame_mask"),
        None if noise is None else lambda step: denoiser.shard(noise[step]),
    )
    whole = denoiser.gather(out)
    return None if whole is None else whole.cpu()


def _generated_frames(out: Tensor, case: Case) -> Tensor:
    """The output for generated frames. The sampler does not use the output for kept frames."""
    mask = case.get("x_mask")
    if mask is None:
        return out
    return out[mask[:, None, :, None, None].expand_as(out)]


def _half_precision_limit(suite: Path) -> float:
    """Twice the distance between bf16 and float32 in Open-Sora 1.2, from the suite's results."""
    path = suite / "dit" / "cases_bf16.safetensors"
    if not access.is_file(path):
        return 0.25
    cases = load_cases(path).values()
    return 2 * max(relative_rms(case["out"], case["out_float32"]) for case in cases)
