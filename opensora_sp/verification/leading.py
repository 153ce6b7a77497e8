"""Conformance checks that only the leading rank runs: sizes, prompts, T5, VAE, media."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.verification.suite import Check, load_cases, load_json, max_error

VAE_LIMIT = 1e-4
TEXT_LIMIT = 1e-4
VIDEO_LIMIT = 1e-5
GREY_LEVEL = 2 / 255  # one level of a uint8 image, in [-1, 1]
OFF_PIXELS_LIMIT = 1e-3  # share of image values that may be one grey level off


def size_checks(suite: Path) -> Iterator[Check]:
    """sizes.json: every resolution with every aspect ratio, and every duration, exactly."""
    from opensora_sp.request import sizes

    expected = load_json(suite / "sizes.json")
    wrong = []
    for resolution, ratios in expected.get("image_size_height_width", {}).items():
        for ratio, size in ratios.items():
            try:
                if list(sizes.resolve_size(resolution, ratio, None)) != size:
                    wrong.append(f"{resolution} {ratio}")
            except UserError:
                wrong.append(f"{resolution} {ratio}")
    wrong += [
        name
        for name, frames in expected.get("num_frames", {}).items()
        if sizes.resolve_frames(name) != frames
    ]
    yield _count("sizes", "table", wrong)


def prompt_checks(suite: Path) -> Iterator[Check]:
    """prompts.json: every section that the suite has, exactly."""
    expected = load_json(suite / "prompts.json")
    checks: dict[str, Callable[[Any], list[str]]] = {
        "caption_cleaning": _cleaning,
        "mask_strategy_parse": _strategies,
        "prompt_by_loop": _loops,
        "score_suffix": _suffixes,
        "prompt_json": _prompt_json,
        "align_to": _alignment,
        "apply_mask_strategy": _application,
    }
    for key, check in checks.items():
        if key in expected:
            try:
                wrong = check(expected[key])
            except UserError as error:
                wrong = [str(error)]
            yield _count("prompts", key, wrong)
        else:
            yield Check("prompts", key, None, 0.0, "not in this suite")


def _cleaning(cases: list[dict[str, str]]) -> list[str]:
    from opensora_sp.request.captions import clean_caption

    return [case["raw"] for case in cases if clean_caption(case["raw"]) != case["clean"]]


def _strategies(cases: Mapping[str, list[list[float]]]) -> list[str]:
    from dataclasses import astuple

    from opensora_sp.request.mask_strategy import parse_mask_strategy

    return [
        text
        for text, groups in cases.items()
        if [list(astuple(group)) for group in parse_mask_strategy(text)] != groups
    ]


def _loops(case: Mapping[str, Any]) -> list[str]:
    from opensora_sp.request.prompts import prompt_for_loop

    prompt = case["prompt"]
    return [
        f"clip {clip}"
        for clip, text in case["by_loop"].items()
        if prompt_for_loop(prompt, int(clip)) != text
    ]


def _suffixes(cases: list[dict[str, Any]]) -> list[str]:
    from opensora_sp.request.prompts import append_scores

    return [
        case["prompt"]
        for case in cases
        if append_scores(case["prompt"], case["aes"], case["flow"], case["camera"]) != case["out"]
    ]


def _prompt_json(cases: list[dict[str, str]]) -> list[str]:
    from opensora_sp.request.prompts import parse_prompt_json

    wrong = []
    for case in cases:
        found = parse_prompt_json(case["raw"])
        got = (found.prompt, found.reference_path or "", found.mask_strategy or "")
        if got != (case["prompt"], case["reference"], case["mask_strategy"]):
            wrong.append(case["raw"])
    return wrong


def _alignment(cases: list[list[int]]) -> list[str]:
    from opensora_sp.request.mask_strategy import align_to

    return [str(case) for case in cases if align_to(*case[:3]) != case[3]]


def _application(cases: list[dict[str, Any]]) -> list[str]:
    """The first reference holds 1, 2, 3, …, the second 101, 102, …, to recognise copies."""
    from opensora_sp.engine.clips import apply_strategy
    from opensora_sp.request.mask_strategy import parse_mask_strategy, plan_strategy

    wrong = []
    for case in cases:
        frames, lengths = case["latent_frames"], case["reference_frames"]
        z = torch.zeros(4, frames, 1, 1)
        references = [
            (torch.arange(length) + 1.0 + 100 * i).view(1, length, 1, 1).expand(4, -1, 1, 1)
            for i, length in enumerate(lengths)
        ]
        groups = parse_mask_strategy(case["mask_strategy"])
        placements = plan_strategy(groups, case["loop"], lengths, frames, case["align"])
        mask = apply_strategy(z, references, placements)
        expected = torch.tensor(case["filled"]).view(1, -1, 1, 1).expand_as(z)
        if not torch.equal(z, expected) or not torch.equal(mask, torch.tensor(case["mask"])):
            wrong.append(case["mask_strategy"])
    return wrong


def manifest_checks(suite: Path) -> Iterator[Check]:
    """manifest.json: names and shapes of the models at the published size, on the meta device."""
    from opensora_sp.verification.published import PUBLISHED, published_shapes

    expected = load_json(suite / "manifest.json")
    for model in sorted(expected):
        shapes = expected[model]
        listed = isinstance(shapes, dict) and all(isinstance(s, list) for s in shapes.values())
        if model not in PUBLISHED or not listed:
            raise UserError(
                f"{suite / 'manifest.json'}: {shown(model)} is not one of {', '.join(PUBLISHED)} "
                "with a list of sizes for each weight: give a whole suite, or leave --reference out"
            )
        ours, aliases = published_shapes(model)
        theirs = {name: tuple(shape) for name, shape in shapes.items()}
        theirs = {name: shape for name, shape in theirs.items() if name not in aliases}
        ours = {name: shape for name, shape in ours.items() if name not in aliases}
        wrong = [n for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)]
        yield _count("manifest", model, wrong)


def vae_checks(suite: Path, device: torch.device) -> Iterator[Check]:
    """vae3d/cases: posterior means and decoded videos."""
    from opensora_sp.models.video_vae import VideoVAE

    vae = VideoVAE.load(
        suite / "vae3d", suite / "vae2d", dtype=torch.float32, device=device, with_encoder=True
    )
    for name, case in load_cases(suite / "vae3d" / "cases.safetensors").items():
        if "latent_mean" in case:
            latent = vae.encode(case["video"]).cpu()
            yield Check(
                "vae3d", f"{name}.encode", max_error(latent, case["latent_mean"]), VAE_LIMIT
            )
        if "decoded" in case:
            video = vae.decode(case["z"], case["video"].shape[2]).cpu()
            yield Check("vae3d", f"{name}.decode", max_error(video, case["decoded"]), VAE_LIMIT)


def text_checks(suite: Path, device: torch.device) -> Iterator[Check]:
    """t5/cases: token ids exactly, and embeddings of the tokens without padding."""
    from opensora_sp.models.text_encoder import TextEncoder

    settings = load_json(suite / "t5" / "cases.json")
    expected = load_cases(suite / "t5" / "cases.safetensors")
    tensors = {name: case[""] for name, case in expected.items()}
    encoder = TextEncoder.load(
        suite / "t5", dtype=torch.float32, device=device, max_length=settings["max_length"]
    )
    ids, mask = encoder.tokenize(settings["prompts"])
    for i, prompt in enumerate(settings["prompts"]):
        same = torch.equal(ids[i], tensors["input_ids"][i]) and torch.equal(
            mask[i], tensors["mask"][i]
        )
        yield Check("t5", f"{i}.ids", 0.0 if same else math.inf, 0.0, "" if same else prompt[:40])
        y = encoder.encode([prompt]).y[0].cpu()
        yield Check("t5", f"{i}.embedding", max_error(y, tensors["embedding"][i]), TEXT_LIMIT)


def media_checks(suite: Path) -> Iterator[Check]:
    """media/cases: resizing and cropping of references."""
    from opensora_sp.media.reader import fit_image, fit_video

    for name, case in load_cases(suite / "media" / "cases.safetensors").items():
        out = case["out"]
        height, width = out.shape[-2:]
        if "rgb" in case:
            fitted = fit_image(case["rgb"].numpy(), height, width)
            yield Check("media", name, _off_pixels(fitted, out), OFF_PIXELS_LIMIT)
        else:
            fitted = fit_video(case["frames"].numpy(), height, width)
            yield Check("media", name, max_error(fitted, out), VIDEO_LIMIT)


def _off_pixels(actual: Tensor, expected: Tensor) -> float:
    """The share of values that differ; infinite where one differs by more than a grey level."""
    if actual.shape != expected.shape:
        return math.inf
    levels = ((actual - expected).abs() / GREY_LEVEL).round()
    return math.inf if float(levels.max()) > 1 else float((levels > 0).float().mean())


def _count(part: str, case: str, wrong: list[str]) -> Check:
    note = f"{len(wrong)} differ, first: {wrong[0][:60]!r}" if wrong else ""
    return Check(part, case, float(len(wrong)), 0.0, note)
