"""What is no picture is named before anything tries to decode it."""

import io
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from whole_reference import read_reference

from opensora_sp.base.errors import UserError
from opensora_sp.media.reader import check_reference


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as made:
        made.writestr("a.png", "picture")
    return data.getvalue()


def tiff(tags: dict[int, int | bytes]) -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[tag] = value
        if isinstance(value, bytes):
            info.tagtype[tag] = 1
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(data, format="TIFF", tiffinfo=info)
    return data.getvalue()


SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
KINDS: dict[str, tuple[bytes, str]] = {
    "a.svg": (SVG.encode(), "(SVG): save it as PNG or JPEG"),
    "named.png": (SVG.encode(), "(SVG)"),
    "xml.svg": (f'<?xml version="1.0"?>\n<!-- by hand -->\n{SVG}'.encode(), "(SVG)"),
    "bom.svg": (b"\xef\xbb\xbf" + SVG.encode(), "(SVG)"),
    "wide.svg": (SVG.encode("utf-16"), "(SVG)"),
    "prefixed.svg": (b"<svg:svg xmlns:svg='x'/>", "(SVG)"),
    "pointer.png": (POINTER, "a Git LFS pointer, not the picture: fetch it with `git lfs pull`"),
    "pointer.mp4": (POINTER, "a Git LFS pointer"),
    "page.jpg": (b"<html>404 Not Found</html>", "(HTML, a web page): download the picture"),
    "page.mp4": (b"\n\n<!DOCTYPE html>\n<p>Sign in", "(HTML, a web page)"),
    "feed.png": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "(XML)"),
    "words.png": ("Grüße aus 東京\n".encode() * 600, "(text)"),
    "data.json": (b'{"error": "quota"}', "(text)"),
    "list.m3u8": (b"#EXTM3U\n#EXTINF:1,\na.ts\n", "(a playlist): give the video itself"),
    "art.psd": (b"8BPS\0\1" + bytes(40), "(Photoshop)"),
    "photo.jxl": (b"\xff\x0a" + bytes(60), "(JPEG XL)"),
    "boxed.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "(JPEG XL)"),
    "art.ai": (b"%PDF-1.5\n%\xe2\xe3", "(PDF or Illustrator)"),
    "art.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "(PostScript or Illustrator)"),
    "art.xcf": (b"gimp xcf v011\0" + bytes(40), "(GIMP)"),
    "light.exr": (b"v/1\x01\2\0\0\0" + bytes(40), "(OpenEXR)"),
    "light.hdr": (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "(Radiance HDR)"),
    "photo.cr2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "(camera raw)"),
    "photo.cr3": (b"\0\0\0\x18ftypcrx \0\0\0\1" + bytes(40), "(camera raw)"),
    "photo.raf": (b"FUJIFILMCCD-RAW 0201" + bytes(40), "(camera raw)"),
    "photo.rw2": (b"IIU\0\x18\0\0\0" + bytes(40), "(camera raw)"),
    "photo.dng": (tiff({50706: b"\1\4\0\0"}), "(camera raw)"),
    "photo.nef": (tiff({254: 1, 330: 8}), "(camera raw)"),
    "all.zip": (zipped(), "(ZIP): unpack it first"),
    "all.gz": (b"\x1f\x8b\x08\0" + bytes(40), "(gzip): unpack it first"),
}


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_are_named(tmp_path: Path, name: str) -> None:
    content, said = KINDS[name]
    path = tmp_path / name
    path.write_bytes(content)
    for use in (check_reference, lambda path: read_reference(path, 16, 16)):
        with pytest.raises(UserError) as caught:
            use(path)
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_pictures_with_headers_of_text_are_read(tmp_path: Path) -> None:
    ramp = np.arange(64, 128, dtype=np.uint8)  # letters, so that all of the file looks like text
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 255\n" + ramp.tobytes())
    (tmp_path / "b.ppm").write_bytes(b"P3\n1 1\n255\n9 9 9\n")
    for path in tmp_path.iterdir():
        assert check_reference(path) == []
    picture = read_reference(tmp_path / "a.pgm", 8, 8).video
    assert ((picture[0, 0] + 1) * 127.5).round().flatten().tolist() == ramp.tolist()
    # One of the tags of a raw file alone does not make one.
    for number, tags in enumerate(({254: 1}, {271: b"Camera"}, {})):
        (tmp_path / f"{number}.tiff").write_bytes(tiff(tags))  # type: ignore[arg-type]
        assert check_reference(tmp_path / f"{number}.tiff") == []


def test_a_kind_is_named_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "logo.svg").write_text(SVG)
    (tmp_path / "photo.dng").write_bytes(tiff({50706: b"\1\4\0\0"}))
    code = (
        "import sys\nfrom opensora_sp.base.errors import UserError\n"
        "from opensora_sp.media.reader import check_reference\n"
        "for path in sys.argv[1:]:\n"
        "    try: check_reference(path)\n"
        "    except UserError: continue\n"
        "    sys.exit('read')\n"
        "sys.exit('torch' in sys.modules)"
    )
    paths = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, timeout=120)
    assert (len(paths), done.returncode) == (2, 0), done.stderr


def test_random_bytes_are_not_taken_for_text() -> None:
    from opensora_sp.media.file_types import refuse_unread_kind

    random = np.random.default_rng(3)
    for _ in range(200):
        data = (
            struct.pack("<I", 0x9E370001) + random.integers(0, 256, 400).astype(np.uint8).tobytes()
        )
        file = io.BytesIO(data)
        refuse_unread_kind(file, "x")
        assert file.tell() == 0
