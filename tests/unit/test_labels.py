"""Labels that laws ask for: what is in the picture, what is in the file, and what is refused."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from written import settings_in

from opensora_sp.base.atomic import remove_leftovers
from opensora_sp.base.errors import UserError
from opensora_sp.media import content_credentials
from opensora_sp.media.content_credentials import Signing
from opensora_sp.media.labels import CN_TEXTS, FileLabel, cn_label, eu_label
from opensora_sp.media.sinks import Collector
from opensora_sp.media.watermark import (
    LABEL_FONT,
    MarkStyle,
    Watermarked,
    draw_mark,
    missing_characters,
)
from opensora_sp.media.writer import VideoWriter, write_image
from opensora_sp.request.labels import mark_style
from opensora_sp.request.request import Job, JobSettings
from opensora_sp.request.settings import build_job, parse_command_line, resolve

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
CN = ("--label", "cn", "--label-producer", "001191110102TEST0000F10002")
# Height and width: the embedded model's, 144p and 720p both ways, and the smallest.
SIZES = [(64, 96), (96, 64), (144, 256), (256, 144), (720, 1280), (1280, 720), (32, 64), (40, 2000)]


def job_of(folder: Path, *argv: str) -> Job:
    words = ["--prompt", "x", "--save-dir", str(folder), *argv]
    return build_job(resolve(parse_command_line(words)))


def refused(folder: Path, *argv: str) -> str:
    """The line of a refusal; nothing is written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as error:
        job_of(folder, *argv)
    assert sorted(folder.rglob("*")) == before
    return str(error.value)


def on_grey(height: int, width: int, style: MarkStyle, frames: int = 3) -> NDArray[np.uint8]:
    collector = Collector()
    sink = Watermarked(collector, height, width, style)
    for _ in range(frames):
        sink.write(np.full((1, height, width, 3), 128, np.uint8))
    assert collector.frames is not None
    return collector.frames


def letters_of(frame: NDArray[np.uint8]) -> tuple[slice, slice]:
    """Rows and columns of what is much lighter than the grey ground: the letters."""
    light = frame[..., 0] > 190
    rows, columns = np.flatnonzero(light.any(1)), np.flatnonzero(light.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def letter_heights(frame: NDArray[np.uint8]) -> list[int]:
    """The height of each group of columns that hold letters, wide enough to be one."""
    rows, columns = letters_of(frame)
    light = frame[rows, columns, 0] > 160
    edges = np.flatnonzero(np.diff(np.r_[0, light.any(0).astype(int), 0]))
    parts = [light[:, a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [int(np.ptp(np.flatnonzero(part.any(1))) + 1) for part in parts if part.shape[1] > 1]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_chinese_label_is_large_enough_in_a_corner_of_every_frame(
    height: int, width: int, tmp_path: Path
) -> None:
    style = mark_style(job_of(tmp_path, *CN, "--num-frames", "51").settings)
    assert style is not None
    frames = on_grey(height, width, style)
    np.testing.assert_array_equal(frames[1], frames[0])
    rows, columns = letters_of(frames[0])
    shorter = min(height, width)
    assert rows.stop - rows.start >= 0.05 * shorter
    # Every character by itself, the capitals too, which are lower than the Chinese ones.
    heights = letter_heights(frames[0])
    assert min(heights) >= 0.05 * shorter
    assert max(heights) >= 12  # the strokes of a Chinese character need so many rows
    assert 0 < height - rows.stop <= max(5, height / 8)
    assert 0 < width - columns.stop <= width / 8
    assert (frames[0, : height // 3] == 128).all()


@pytest.mark.parametrize(
    ("place", "top", "left"),
    [
        ("bottom-right", False, False),
        ("bottom-left", False, True),
        ("top-right", True, False),
        ("top-left", True, True),
    ],
)
def test_a_mark_is_in_the_corner_that_is_asked_for(place: Any, top: bool, left: bool) -> None:
    for style in (MarkStyle(place=place), MarkStyle(("生成",), 6.0, place)):
        changed = (on_grey(144, 256, style)[0] != 128).any(-1)
        halves = {
            (True, True): changed[:72, :128],
            (True, False): changed[:72, 128:],
            (False, True): changed[72:, :128],
            (False, False): changed[72:, 128:],
        }
        assert halves.pop((top, left)).any()
        assert not any(half.any() for half in halves.values())


def test_the_size_is_the_height_of_capitals_in_percent() -> None:
    for percent in (4.0, 10.0, 25.0):
        frame = on_grey(360, 640, MarkStyle(("HE",), percent))[0]
        rows, _ = letters_of(frame)
        assert 0 <= rows.stop - rows.start - 3.6 * percent <= 3


def test_the_longer_text_is_for_wide_pictures_and_the_bundled_font_has_every_word() -> None:
    wide = draw_mark(720, 1280, style := MarkStyle(CN_TEXTS, 5.0))
    narrow = draw_mark(1280, 720, style)
    assert wide is not None
    assert narrow is not None
    assert wide.opacity.shape[1] > 1.8 * narrow.opacity.shape[1]
    known = "".join(CN_TEXTS) + "北京示例科技有限公司 AI generated · Open-Sora Größe, 2 %"
    assert missing_characters(known, None) == ""
    assert missing_characters("AI 龘生🐈\t", None) == "龘🐈\t"


def test_refusals_of_labels_and_marks_name_the_value_and_the_way_out(tmp_path: Path) -> None:
    assert "--label 'us' is not one of none, cn, eu" in refused(tmp_path, "--label", "us")
    assert "--label cn needs --label-producer NAME" in refused(tmp_path, "--label", "cn")
    said = refused(tmp_path, "--label", "cn", "--label-producer", "Some Company")
    assert "--label-producer 'Some Company' is not 1 to 200 ASCII letters" in said
    said = refused(tmp_path, *CN, "--watermark-text", "made here")
    assert "'made here' does not say what --label cn has to" in said
    assert "--watermark-size 4 is too small" in refused(tmp_path, *CN, "--watermark-size", "4")
    said = refused(tmp_path, *CN, "--image-size", "24", "64")
    assert "--label cn: the text 'AI生成' at 5 percent" in said
    assert "does not fit 24x64" in said
    marked = ("--watermark", "true")
    said = refused(tmp_path, *marked, "--watermark-text", "AI生成 龘")
    assert re.search("label font has no '龘': leave it out, or give --watermark-font FILE", said)
    said = refused(tmp_path, *marked, "--watermark-text", "long " * 60)
    assert "does not fit 240x424" in said
    font = tmp_path / "no.otf"
    said = refused(tmp_path, *marked, "--watermark-font", str(font))
    assert "no.otf: there is no such file" in said
    font.write_bytes(b"OTTO no font")
    assert "is not a font file" in refused(tmp_path, *marked, "--watermark-font", str(font))
    said = refused(tmp_path, "--label", "eu", "--label-key", "key.pem")
    assert "--label-key needs --label-certificate FILE beside it" in said


def test_what_a_label_lacks_is_told(tmp_path: Path) -> None:
    def notes(*argv: str) -> str:
        return "\n".join(job_of(tmp_path, *argv).notes)

    assert "on all 0.71 s of the video" in notes(*CN, "--num-frames", "17")
    assert "--label cn" not in notes(*CN, "--num-frames", "51")
    assert "--label cn" not in notes(*CN, "--num-frames", "image")
    assert "--label eu writes a mark that is not signed" in notes("--label", "eu")
    assert "no effect without --watermark true" in notes("--watermark-text", "x")
    assert "no effect without --label cn" in notes("--label-producer", "x")


def frames() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 64, 3), dtype=np.uint8)


def video(path: Path, label: FileLabel | None) -> Path:
    writer = VideoWriter(path, fps=8, height=32, width=64, metadata={"a": 1}, label=label)
    with writer:
        writer.write(frames())
    return path


def picture(path: Path, label: FileLabel | None) -> Path:
    write_image(path, frames()[0], {"a": 1}, label)
    return path


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each ISO box, one after the other."""
    place = 0
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        assert 8 <= size <= len(data) - place
        yield kind, data[place + 8 : place + size]
        place += size
    assert place == len(data)


def mp4_keys(path: Path) -> dict[str, str]:
    """The metadata of moov.udta.meta, read by its boxes: names in keys, values in ilst."""
    inside = dict(boxes(path.read_bytes()))[b"moov"]
    meta = dict(boxes(dict(boxes(inside))[b"udta"]))[b"meta"]
    parts = dict(boxes(meta[4:]))
    assert parts[b"hdlr"][8:12] == b"mdta"
    names = [name.decode() for kind, name in boxes(parts[b"keys"][8:]) if kind == b"mdta"]
    found = {}
    for kind, item in boxes(parts[b"ilst"]):
        ((_, value),) = boxes(item)
        found[names[int.from_bytes(kind, "big") - 1]] = value[8:].decode()
    return found


def png_xmp(path: Path) -> ElementTree.Element:
    """The XMP of a PNG: the text of its one iTXt chunk with the keyword of XMP."""
    data, place, found = path.read_bytes(), 8, []
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + size]
        if kind == b"iTXt" and content.startswith(b"XML:com.adobe.xmp\0"):
            found.append(content.split(b"\0", 5)[5])
        place += 12 + size
    (packet,) = found
    return ElementTree.fromstring(packet)


def value_of(root: ElementTree.Element, namespace: str, name: str) -> str:
    (found,) = root.iter(f"{{{namespace}}}{name}")
    return found.text or ""


def check_aigc(text: str, producer: str, number: str) -> None:
    """The seven fields of annex E of GB 45438-2025, in order, and their characters."""
    fields = json.loads(text)
    assert list(fields) == [
        "Label", "ContentProducer", "ProduceID", "ReservedCode1",
        "ContentPropagator", "PropagateID", "ReservedCode2",
    ]  # fmt: skip
    for one in fields.values():
        assert isinstance(one, str)
        assert all(c == 0x21 or 0x23 <= c <= 0x5B or 0x5D <= c <= 0x7E for c in map(ord, one))
    assert fields["Label"] == "1"
    assert fields["ContentProducer"] == fields["ContentPropagator"] == producer
    assert fields["ProduceID"] == fields["PropagateID"] == number
    assert fields["ReservedCode1"] == fields["ReservedCode2"] == ""


def test_the_chinese_label_in_the_file_has_the_fields_of_the_standard(tmp_path: Path) -> None:
    label = cn_label("X<&>Co", "id-1")
    mp4, png = video(tmp_path / "a.mp4", label), picture(tmp_path / "a.png", label)
    check_aigc(mp4_keys(mp4)["AIGC"], "X<&>Co", "id-1")
    found = value_of(png_xmp(png), "http://www.tc260.org.cn/ns/AIGC/1.0/", "AIGC")
    check_aigc(found, "X<&>Co", "id-1")
    # One label a file; the settings are read as ever; the frames are the same.
    assert mp4.read_bytes().count(b'"Label"') == 1
    assert settings_in(mp4) == settings_in(png) == {"a": 1}
    with av.open(str(mp4)) as a, av.open(str(video(tmp_path / "b.mp4", None))) as b:
        for one, other in zip(a.decode(video=0), b.decode(video=0), strict=True):
            np.testing.assert_array_equal(one.to_ndarray(), other.to_ndarray())
    assert "AIGC" not in av.open(str(tmp_path / "b.mp4")).metadata
    for bad in ("", "a b", 'a"b', "a\\b", "公司"):
        with pytest.raises(ValueError, match="AIGC"):
            cn_label(bad, "1")


def test_the_european_mark_is_in_xmp_and_in_the_keys(tmp_path: Path) -> None:
    label, iptc = eu_label(None), "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    mp4, png = video(tmp_path / "a.mp4", label), picture(tmp_path / "a.png", label)
    assert mp4_keys(mp4)["DigitalSourceType"] == GENERATED
    assert value_of(png_xmp(png), iptc, "DigitalSourceType") == GENERATED
    (box,) = [content for kind, content in boxes(mp4.read_bytes()) if kind == b"uuid"]
    assert box[:16].hex() == "be7acfcb97a942e89c71999491e3afac"
    assert value_of(ElementTree.fromstring(box[16:]), iptc, "DigitalSourceType") == GENERATED
    with av.open(str(mp4)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3


@pytest.mark.parametrize("law", ["cn", "eu"])
def test_a_label_leaves_files_the_same_bytes_each_time(law: str, tmp_path: Path) -> None:
    for make, end in ((video, "mp4"), (picture, "png")):
        one, other = (
            make(tmp_path / f"{name}.{end}", cn_label("X", "1") if law == "cn" else eu_label(None))
            for name in "ab"
        )
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.skipif(which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.slow
def test_exiftool_reads_the_labels(tmp_path: Path) -> None:
    for law, label in (("cn", cn_label("X", "7")), ("eu", eu_label(None))):
        files = [video(tmp_path / f"{law}.mp4", label), picture(tmp_path / f"{law}.png", label)]
        said = subprocess.run(
            ["exiftool", "-j", "-G1", *map(str, files)], capture_output=True, check=True, text=True
        )
        for found in json.loads(said.stdout):
            assert "ExifTool:Warning" not in found
            values = [value for key, value in found.items() if key.startswith(("Keys:", "XMP-"))]
            if law == "eu":
                assert GENERATED in values
            else:
                objects = [value for value in values if "ProduceID" in str(value)]
                assert len(objects) == 1


def pem_files(folder: Path) -> tuple[Path, Path]:
    """A certificate for signing with one above it, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from datetime import datetime, timedelta, timezone

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("Test CA", "Test signer")}
    now = datetime.now(timezone.utc)
    made: list[Any] = []
    for subject, key in keys.items():
        above, issuer = subject == "Test CA", keys["Test CA"]
        names = [
            x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Test"),
                       x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
            for name in (subject, "Test CA")
        ]  # fmt: skip
        names_of_use = ("content_commitment", "key_encipherment", "data_encipherment")
        use = dict.fromkeys(
            [*names_of_use, "key_agreement", "encipher_only", "decipher_only"], False
        )
        builder = (
            x509.CertificateBuilder(names[1], names[0], key.public_key(), len(made) + 1000)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(above, None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not above, key_cert_sign=above, crl_sign=above, **use
                ),
                critical=True,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        )
        if not above:
            usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(usage, critical=False)
        made.append(builder.sign(issuer, hashes.SHA256()))
    pem = serialization.Encoding.PEM
    certificate, key_file = folder / "chain.pem", folder / "key.pem"
    certificate.write_bytes(made[1].public_bytes(pem) + made[0].public_bytes(pem))
    key_file.write_bytes(
        keys["Test signer"].private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate, key_file


def test_a_manifest_is_signed_where_there_is_a_certificate(tmp_path: Path) -> None:
    c2pa = pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    certificate, key = pem_files(tmp_path)
    flags = ("--label", "eu", "--label-certificate", str(certificate), "--label-key")
    job = job_of(tmp_path, *flags, str(key))
    assert not [note for note in job.notes if "--label" in note]
    said = refused(tmp_path, *flags, str(certificate))
    assert "holds no private key in PEM" in said
    assert "none.pem: No such file" in refused(tmp_path, *flags, str(tmp_path / "none.pem"))
    from opensora_sp.request.labels import file_label

    label = file_label(job.settings, "1")
    for path in (video(tmp_path / "a.mp4", label), picture(tmp_path / "a.png", label)):
        store = json.loads(c2pa.Reader(str(path)).json())
        assert store["validation_state"] == "Valid"
        manifest = store["manifests"][store["active_manifest"]]
        actions = [a for a in manifest["assertions"] if a["label"].startswith("c2pa.actions")]
        assert actions[0]["data"]["actions"][0]["digitalSourceType"] == GENERATED
        assert settings_in(path) == {"a": 1}
        broken = bytearray(path.read_bytes())
        place = broken.find(b"IDAT" if path.suffix == ".png" else b"mdat") + 40
        broken[place] ^= 1
        kind = "image/png" if path.suffix == ".png" else "video/mp4"
        store = json.loads(c2pa.Reader(kind, io.BytesIO(bytes(broken))).json())
        assert store["validation_state"] == "Invalid"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.mp4", "a.png", "chain.pem", "key.pem",
    ]  # fmt: skip


def test_without_its_package_signing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "c2pa" else find(name))
    said = refused(
        tmp_path, "--label", "eu", "--label-certificate", "a.pem", "--label-key", "b.pem"
    )
    assert said.endswith("pip install 'opensora_sp[c2pa]'")


def test_a_client_is_told_no_file_and_no_flag_of_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("fastapi")
    from opensora_sp.server.settings import GroupSettings

    files = (f"--label-certificate={tmp_path}/chain.pem", f"--label-key={tmp_path}/key.pem")
    signing = GroupSettings(tmp_path, "", ("--device=cpu", "--label=eu", *files))
    with pytest.raises(UserError, match=r"^this service cannot sign what it makes: ") as error:
        signing.job(["--prompt=a"], tmp_path / "out")
    assert str(tmp_path) not in str(error.value)
    assert "--label-certificate" in caplog.text
    with pytest.raises(UserError, match="--label-certificate"):  # whoever starts it is told
        signing.first_job()
    plain = GroupSettings(tmp_path, "", ("--device=cpu",))
    marked = ["--prompt=a", "--watermark=true", "--watermark-text=AI 龘"]
    with pytest.raises(UserError, match=r"has no '龘': leave it out$"):
        plain.job(marked, tmp_path / "out")


def test_a_list_on_a_queue_leaves_the_chinese_label_to_the_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("psycopg")
    from opensora_sp.cli.infer import main

    (tmp_path / "list.txt").write_text("a ball\n")
    words = ["--queue", "postgresql://a@127.0.0.1:1/b", "--save-dir", str(tmp_path)]
    words += ["--prompt-path", str(tmp_path / "list.txt"), "--label", "cn"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --label cn: a list on a queue takes this label from the groups")
    assert said.count("\n") == 1


def font_without(folder: Path, *glyphs: str) -> Path:
    """The label font with these characters left empty."""
    tools = pytest.importorskip("fontTools.ttLib", reason="fontTools is not installed")
    from fontTools.pens.t2CharStringPen import T2CharStringPen

    font = tools.TTFont(LABEL_FONT)
    strings = font["CFF "].cff.topDictIndex[0].CharStrings
    for one in glyphs:
        name = font.getBestCmap()[ord(one)]
        empty = T2CharStringPen(500, None).getCharString(strings[name].private)
        strings[name] = empty
    path = folder / "empty.otf"
    font.save(path)
    return path


def test_a_font_without_what_a_mark_needs_is_refused(tmp_path: Path) -> None:
    font = str(font_without(tmp_path, "A", "·", "生"))
    marked = ("--watermark", "true", "--watermark-font", font)
    assert "empty.otf has no 'A': give another text" in refused(tmp_path, *marked)
    said = refused(tmp_path, *marked, "--watermark-text", "生I")
    assert "'生I': " in said
    assert "empty.otf has no '生': leave it out" in said
    # Without a capital A it is measured by the text's first character.
    job_of(tmp_path, *marked, "--watermark-text", "Ein Bild", "--watermark-size", "5")
    for text in ("生", "A"):  # empty, and never of any height
        with pytest.raises(UserError, match="its letters are empty or too thin"):
            draw_mark(144, 256, MarkStyle((text,), 5.0, font=Path(font)))


def test_a_kill_while_a_file_is_signed_leaves_what_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_signing: Signing, _kind: str, _source: Any, target: Any) -> None:
        target.write(b"half")
        target.flush()
        os._exit(0 if len(list(tmp_path.iterdir())) == 2 else 1)

    monkeypatch.setattr(content_credentials, "_sign", killed)
    path = tmp_path / "a.png"
    path.write_bytes(b"whole")
    process = multiprocessing.get_context("fork").Process(
        target=content_credentials.sign, args=(path, "image/png", Signing(path, path))
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("a.png", b"whole")]


def test_a_service_keeps_its_label(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from opensora_sp.server.protocol import as_bad_request, read_fields
    from opensora_sp.server.settings import GroupSettings, service_label

    words = ("--device=cpu", "--label=cn", "--label-producer=X")
    group = GroupSettings(tmp_path, "", words)
    label = service_label(words)

    def settings(service: GroupSettings, **fields: str) -> JobSettings:
        asked = read_fields(label.put_into({"prompt": "a", **fields}))
        return service.job(asked.arguments, tmp_path / "out").settings

    assert settings(group).label == settings(group, label="cn").label == "cn"
    for other in ("none", "eu"):
        with pytest.raises(UserError, match="lets no request choose") as error:
            settings(group, label=other)
        refusal = as_bad_request(error.value)
        assert (refusal.param, str(refusal)[: len(other) + 7]) == ("label", f"label {other}:")
    # What has the words of the label may deny it: a client may send the label's own texts alone.
    for text in ("mine", "这不是AI生成"):
        with pytest.raises(UserError, match="so the text is 人工智能生成合成 or AI生成") as error:
            settings(group, watermark_text=text)
        assert as_bad_request(error.value).param == "watermark_text"
    for text in CN_TEXTS:
        assert settings(group, watermark_text=text).watermark_text == text
    # serve's own flags are not taken for those of a label, nor the other way round.
    from opensora_sp.cli.serve import _settings

    flags = ["--label", "cn", "--label-producer", "X", "--save-dir", str(tmp_path / "served")]
    for more in ([], ["--other-labels"]):
        served = _settings([*flags, "--device", "cpu", *more])[0].group
        assert service_label(served.arguments) == label
        assert served.other_labels == bool(more)
    allowed = GroupSettings(tmp_path, "", words, other_labels=True)
    assert settings(allowed, label="none").label == "none"
    assert settings(allowed, watermark_text="AI生成, mine").watermark_text == "AI生成, mine"
    # A group without a label of its own makes a gateway's jobs with the gateway's.
    plain = GroupSettings(tmp_path, "", ("--device=cpu",))
    asked = read_fields(label.put_into({"prompt": "a"}))
    assert asked.shown["settings"]["label"] == "cn"
    made = plain.job((*label.arguments, *asked.arguments), tmp_path / "out").settings
    assert (made.label, made.label_producer) == ("cn", "X")
    with pytest.raises(UserError, match="not told its provider's name"):
        plain.job(["--prompt=a", "--label=cn"], tmp_path / "out")
