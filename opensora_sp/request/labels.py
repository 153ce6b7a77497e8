"""The marks and labels of outputs, from a job's settings: checked here, drawn and written by media.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from opensora_sp.base import access
from opensora_sp.base.errors import LackingCharacter, UserError
from opensora_sp.base.value_types import shown
from opensora_sp.media.content_credentials import Signing, check_signing
from opensora_sp.media.labels import (
    CN_LEAST_SIZE,
    CN_SECONDS,
    CN_TEXTS,
    FileLabel,
    cn_label,
    eu_label,
    says_generated,
)
from opensora_sp.media.watermark import TEXTS, MarkStyle, Place, draw_mark, missing_characters
from opensora_sp.request.job_settings import JobSettings


def mark_style(settings: JobSettings) -> MarkStyle | None:
    """How the mark in the picture looks; None where there is none."""
    if settings.label != "cn" and not settings.watermark:
        return None
    own = settings.watermark_text
    texts: tuple[str, ...] | None = None if own is None else (own,)
    size = settings.watermark_size
    if settings.label == "cn":
        texts, size = texts or CN_TEXTS, size or CN_LEAST_SIZE
    return MarkStyle(
        texts=texts,
        size=size,
        place=cast(Place, settings.watermark_place),
        font=None if settings.watermark_font is None else Path(settings.watermark_font),
    )


def file_label(settings: JobSettings, number: str) -> FileLabel | None:
    """The label in an output's file. number: of its content."""
    if settings.label == "none":
        return None
    if settings.label == "eu":
        return eu_label(_signing(settings))
    assert settings.label_producer is not None  # or check_labels refuses it
    return cn_label(settings.label_producer, number)


def check_labels(settings: JobSettings, size: tuple[int, int], seconds: float | None) -> list[str]:
    """Notes on the labels of outputs of this size (height, width) and length (None: a picture).

    Raises UserError for a label that could not be made as it is asked for.
    """
    notes = _check_cn(settings, seconds) if settings.label == "cn" else []
    style = mark_style(settings)
    if style is None:
        notes += _without_mark(settings)
    elif not style.plain:
        _check_style(settings, style, size)
    return notes + _check_eu(settings)


def _check_cn(settings: JobSettings, seconds: float | None) -> list[str]:
    if settings.label_producer is None:
        raise UserError(
            "--label cn needs --label-producer NAME, the name or the code of who provides the "
            "service: GB 45438-2025 wants it in the file"
        )
    text, size = settings.watermark_text, settings.watermark_size
    if text is not None and not says_generated(text):
        raise UserError(
            f"--watermark-text {shown(text)} does not say what --label cn has to: it needs "
            f"人工智能 or AI, and 生成 or 合成, such as {CN_TEXTS[1]}"
        )
    if size is not None and size < CN_LEAST_SIZE:
        raise UserError(
            f"--watermark-size {size:g} is too small for --label cn: the standard wants "
            f"{CN_LEAST_SIZE:g} percent of the shorter side or more"
        )
    if seconds is not None and seconds < CN_SECONDS:
        return [
            f"--label cn is on all {seconds:.2g} s of the video: GB 45438-2025 wants it shown for "
            f"{CN_SECONDS:g} s, which needs a longer one"
        ]
    return []


def _check_eu(settings: JobSettings) -> list[str]:
    given = settings.label_certificate is not None, settings.label_key is not None
    if given[0] != given[1]:
        have, lack = ("certificate", "key") if given[0] else ("key", "certificate")
        raise UserError(f"--label-{have} needs --label-{lack} FILE beside it")
    signing = _signing(settings)
    if settings.label != "eu":
        return (
            ["--label-certificate and --label-key have no effect without --label eu"]
            if signing is not None
            else []
        )
    if signing is None:
        return [
            "--label eu writes a mark that is not signed: a C2PA manifest needs "
            "--label-certificate and --label-key"
        ]
    check_signing(signing)
    return []


def _without_mark(settings: JobSettings) -> list[str]:
    """Notes on flags of a mark that nobody asked for."""
    given = [
        f"--watermark-{name}"
        for name in ("text", "size", "font")
        if getattr(settings, f"watermark_{name}") is not None
    ]
    if settings.watermark_place != "bottom-right":
        given.append("--watermark-place")
    if not given:
        return []
    return [f"{' and '.join(given)}: no effect without --watermark true or --label cn"]


def _check_style(settings: JobSettings, style: MarkStyle, size: tuple[int, int]) -> None:
    if style.font is not None and not access.is_file(style.font):
        raise UserError(f"--watermark-font {settings.watermark_font}: {access.no_file(style.font)}")
    text = style.texts[-1] if style.texts else ""
    for one in style.texts or TEXTS:
        if not (lacking := missing_characters(one, style.font)):
            continue
        where = settings.watermark_font or "the package's label font"
        raise LackingCharacter(
            f"--watermark-text {shown(one)}: {where} has no {shown(lacking[0])}: "
            + ("leave it out" if settings.watermark_text else "give another text")
            + ", or give --watermark-font FILE, a font that has it",
            one,
            lacking[0],
        )
    if draw_mark(*size, style) is None:
        asked = "--label cn" if settings.label == "cn" else "--watermark true"
        said = f" {shown(text)}" if text else ""
        large = f" at {style.size:g} percent of the shorter side" if style.size else ""
        raise UserError(
            f"{asked}: the text{said}{large} does not fit {size[0]}x{size[1]} pixels (height x "
            "width): ask for a larger picture, a shorter --watermark-text or a smaller "
            "--watermark-size"
        )


def _signing(settings: JobSettings) -> Signing | None:
    if settings.label_certificate is None or settings.label_key is None:
        return None
    return Signing(Path(settings.label_certificate), Path(settings.label_key))
