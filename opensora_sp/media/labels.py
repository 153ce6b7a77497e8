"""Labels in a file that say that its content was generated, as laws ask for them.

cn: the implicit label of China's GB 45438-2025, a JSON object under the key AIGC. eu: IPTC's
Digital Source Type for content of a trained model, and a C2PA manifest where there is a
certificate. docs/labels.md has the sources and what these labels do not do.
"""

from __future__ import annotations

import html
import json
import re
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from opensora_sp.media.content_credentials import GENERATED, Signing, sign

Law = Literal["none", "cn", "eu"]

AIGC = "AIGC"
SOURCE_TYPE = "DigitalSourceType"
# What the visible label says, longest first: both hold what the standard asks for, that it is AI
# and that it is generated or synthesized.
CN_TEXTS = ("人工智能生成合成", "AI生成")
CN_LEAST_SIZE = 5.0  # percent of the shorter side, for the height of the text
CN_SECONDS = 2.0  # how long a video shows it at least
_CN_AI, _CN_MADE = ("人工智能", "AI"), ("生成", "合成")
_GENERATED_BY_AI = "1"  # Label: 1 generated, 2 possibly, 3 suspected
# Annex E: visible ASCII without the quote and the backslash.
_VALUE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,200}")

_TC260 = "http://www.tc260.org.cn/ns/AIGC/1.0/"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP_BOX = uuid.UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes


@dataclass(frozen=True)
class FileLabel:
    """What goes into a file beside its settings.

    tags: keys of an MP4's metadata. video_xmp, picture_xmp: an XMP packet, for a box of an MP4 and
    for a chunk of a PNG. signing: a C2PA manifest is added by it.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    video_xmp: str | None = None
    picture_xmp: str | None = None
    signing: Signing | None = None

    def finish(self, path: Path, kind: Literal["video/mp4", "image/png"]) -> None:
        """Add to a closed file what its writer cannot. Raises UserError where signing fails."""
        if kind == "video/mp4" and self.video_xmp is not None:
            packet = self.video_xmp.encode()
            size = 8 + len(_XMP_BOX) + len(packet)
            with path.open("ab") as file:
                file.write(struct.pack(">I4s", size, b"uuid") + _XMP_BOX + packet)
        if self.signing is not None:
            sign(path, kind, self.signing)


def is_producer(text: str) -> bool:
    """Whether a text may be a value of the AIGC object."""
    return _VALUE.fullmatch(text) is not None


def says_generated(text: str) -> bool:
    """Whether a visible text has what GB 45438-2025 asks for: AI, and generated or synthesized."""
    return any(word in text for word in _CN_AI) and any(word in text for word in _CN_MADE)


def cn_label(producer: str, number: str) -> FileLabel:
    """The implicit label of GB 45438-2025.

    producer: name or code of who provides the service. number: the provider's number of this
    content. Whoever generates a file also writes the two fields of whoever spreads it, with the
    same values; the two reserved fields are empty. Raises ValueError for a value that is not legal.
    """
    if not is_producer(producer) or not is_producer(number):
        raise ValueError(f"{producer!r} or {number!r} is no value of the AIGC object")
    value = json.dumps(
        {
            "Label": _GENERATED_BY_AI,
            "ContentProducer": producer,
            "ProduceID": number,
            "ReservedCode1": "",
            "ContentPropagator": producer,
            "PropagateID": number,
            "ReservedCode2": "",
        },
        separators=(",", ":"),
    )
    return FileLabel(tags={AIGC: value}, picture_xmp=_xmp("TC260", _TC260, AIGC, value))


def eu_label(signing: Signing | None) -> FileLabel:
    """The machine-readable mark for article 50(2) of the AI Act."""
    packet = _xmp("Iptc4xmpExt", _IPTC, SOURCE_TYPE, GENERATED)
    return FileLabel({SOURCE_TYPE: GENERATED}, packet, packet, signing)


def _xmp(prefix: str, namespace: str, name: str, value: str) -> str:
    """An XMP packet with one property."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:{prefix}="{namespace}">'
        f"<{prefix}:{name}>{html.escape(value, quote=False)}</{prefix}:{name}>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
