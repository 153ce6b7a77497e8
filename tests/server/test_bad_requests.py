"""Bad requests of every kind against one real server: what each is told, and that nothing stays.

The last tests of the file are the proof: the server that got all of this still makes a right video,
holds no file of what it refused and has not grown.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Server

pytest.importorskip("dbos")
TOKEN = "0123456789abcdef0123"
SMALL = {"prompt": "a ball", "size": "48x32", "num_frames": 17, "num_inference_steps": 2}
LIMITS = ("queued=3", "header_seconds=3", "body_seconds=3", "body_bytes=8000000")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "tokens").write_text(f"me:{TOKEN}\n")
    limits = [word for limit in LIMITS for word in ("--limit", limit)]
    one = Server(folder / "save", "--token-file", str(folder / "tokens"), *limits)
    one.headers["authorization"] = f"Bearer {TOKEN}"
    one.start()
    try:
        yield one
    finally:
        assert one.stop() == 0, one.log.read_text()[-3000:]


# --- How a request is written by hand ---------------------------------------------------------


def http(
    method: str = "POST",
    path: str = "/v1/videos",
    body: bytes = b"",
    *headers: str,
    plain: bool = False,
) -> bytes:
    """A request as bytes. plain: with no host, token and length but those that are given."""
    lines = [f"{method} {path} HTTP/1.1", "connection: close"]
    if not plain:
        lines += ["host: 127.0.0.1", f"authorization: Bearer {TOKEN}"]
    if not plain and not any(h.startswith(("content-length", "transfer-enc")) for h in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, *headers, "", ""]).encode("utf-8", "surrogateescape") + body


def send(server: Server, request: bytes, seconds: float = 30) -> tuple[int, str]:
    """Status and body of the answer; status 0 where the connection was closed without one."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as line:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            line.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := line.recv(1 << 16):
                answer += piece
    if not answer:
        return 0, ""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body.decode()


def as_json(fields: Any) -> bytes:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return http("POST", "/v1/videos", body, "content-type: application/json")


def part(name: str, value: bytes, file: str | None = None) -> bytes:
    more = "" if file is None else f'; filename="{file}"'
    head = f'--edge\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def form(*parts: bytes, end: bytes = b"--edge--\r\n", kind: str = "; boundary=edge") -> bytes:
    body = b"".join([part("prompt", b"a ball"), part("size", b"48x32"), *parts]) + end
    return http("POST", "/v1/videos", body, f"content-type: multipart/form-data{kind}")


def file(content: bytes, name: str = "../x", field: str = "input_reference") -> bytes:
    return form(part(field, content, name))


# --- Files that are not what they seem --------------------------------------------------------


def picture(size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, "red").save(held, kind)
    return held.getvalue()


def png(width: int, height: int, rows: int) -> bytes:
    """A grey PNG that says how large it is, and packs so many rows of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    packer = zlib.compressobj(9)
    line = b"\0" * (width + 1)
    data = b"".join(packer.compress(line) for _ in range(rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    content = bytearray(picture((8, 8), "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def webp(width: int, height: int) -> bytes:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + size
    body += picture((8, 8), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def video(change: Callable[[bytearray], None] = lambda content: None) -> bytes:
    """A video of 8 frames whose headers were changed."""
    import av

    held = io.BytesIO()
    with av.open(held, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(8):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), "blue"))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = bytearray(held.getvalue())
    change(content)
    return bytes(content)


def ages(content: bytearray) -> None:
    """Every frame lasts as long as the table of times can say."""
    at = content.index(b"stts")
    content[at + 12 : at + 16] = b"\x7f\xff\xff\xff"


def endless(content: bytearray) -> None:
    """The table of times counts four thousand million frames."""
    at = content.index(b"stts")
    content[at + 8 : at + 12] = b"\xff\xff\xff\xff"


def vast(content: bytearray) -> None:
    """A frame as large as the headers can say."""
    at = content.index(b"mp4v")
    content[at + 28 : at + 32] = b"\xff\xff\xff\xff"


# --- The table: what is sent, the status, the field at fault, words of the answer -------------

A = {"prompt": "a"}
DEEP = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
FIELDS: dict[str, tuple[Any, str | None, str]] = {
    "no prompt": ({}, "prompt", "prompt is needed"),
    "an empty prompt": ({"prompt": "  "}, "prompt", "prompt is needed"),
    "a prompt that is a number": ({"prompt": 3}, "prompt", "prompt is needed"),
    "a prompt that is a list": ({"prompt": ["a"]}, "prompt", "prompt is needed"),
    "a long prompt": ({"prompt": "a" * 30_000}, "prompt", "30000 characters"),
    "a prompt with NUL": ({"prompt": "a\0b"}, "prompt", "no text"),
    "half a character": (b'{"prompt": "a \\ud800"}', "prompt", "no text"),
    "a name that is half a character": (b'{"\\ud800": 1}', "\\ud800", "no text"),
    "a file of the server's": ({"prompt": 'x {"reference_path": "/etc/passwd"}'}, None, "passwd"),
    "an address": ({"prompt": 'x {"reference_path": "http://127.0.0.1/x.png"}'}, None, "remote"),
    "an unknown field": ({**A, "promt": "b"}, "promt", "is not a field"),
    "a field of Python's": ({**A, "__class__": "b"}, "__class__", "is not a field"),
    "the engine's memory": ({**A, "memory": "small"}, "memory", "not a field"),
    "a folder": ({**A, "save_dir": "/tmp"}, "save_dir", "is not a field"),
    "a path": ({**A, "reference_path": "/x"}, "reference_path", "not a field"),
    "a path as a file": ({**A, "image": "/etc/passwd"}, "image", "is a file: send it as a form"),
    "another model": ({**A, "model": "sora-2"}, "model", "'sora-2' is not here"),
    "a model that is a list": ({**A, "model": []}, "model", "[] is not here"),
    "seconds in words": ({**A, "seconds": "two"}, "seconds", "'two'"),
    "no seconds": ({**A, "seconds": "0"}, "seconds", "'0'"),
    "seconds without end": ({**A, "seconds": 1e300}, "seconds", "1e+300"),
    "two lengths": ({**A, "seconds": "2", "num_frames": 17}, "seconds", "give one"),
    "a size in words": ({**A, "size": "large"}, "size", "WIDTHxHEIGHT"),
    "a size of one side": ({**A, "size": "64x"}, "size", "WIDTHxHEIGHT"),
    "a size that is a list": ({**A, "size": [64, 48]}, "size", "WIDTHxHEIGHT"),
    "a tiny size": ({**A, "size": "8x8"}, "size", "8"),
    "a huge size": ({**A, "size": "99999x64"}, "size", "99999"),
    "no such resolution": ({**A, "resolution": "9p"}, "resolution", "240p"),
    "no such ratio": ({**A, "aspect_ratio": "2:7"}, None, "2:7"),
    "no steps": ({**A, "num_inference_steps": 0}, "num_inference_steps", "'0'"),
    "steps in words": ({**A, "num_inference_steps": "x"}, "num_inference_steps", "'x'"),
    "a file of schedules": ({**A, "step_cache": "/etc/s.yaml"}, "step_cache", "is not one of off"),
    "too few steps to leave any out": (
        {**A, "step_cache": "fast", "num_inference_steps": 4},
        "step_cache",
        "of 4 steps none is left out",
    ),
    "a negative seed": ({**A, "seed": -1}, "seed", "'-1'"),
    "a seed of 400 digits": ({**A, "seed": 10**400}, None, "a number of 401 digits"),
    "guidance that is no number": ({**A, "guidance_scale": "nan"}, "guidance_scale", "nan"),
    "a list as a value": ({**A, "fps": [24]}, "fps", "[24]"),
    "a flag as a value": ({**A, "fps": "24 --memory=small"}, "fps", "24"),
    "half a frame": ({**A, "num_frames": 1.5}, "num_frames", "1.5"),
    "frames without end": ({**A, "num_frames": 10**12}, "num_frames", "1000000000000"),
    "loops of a picture": ({**A, "num_frames": 1, "loop": 2}, "loop", "loop 2"),
    "a strategy without files": ({**A, "mask_strategy": "0,7"}, None, "0,7"),
    "an unknown watermark": ({**A, "watermark": "maybe"}, "watermark", "maybe"),
    "an unknown label": ({**A, "label": "us"}, "label", "none, cn, eu"),
    "a label without a provider": ({**A, "label": "cn"}, "label", "provider's name"),
    "a mark that no font has": (
        {**A, "watermark": True, "watermark_text": "龘"}, "watermark_text", "龘"
    ),
    "a font of the server's": ({**A, "watermark_font": "/a.otf"}, "watermark_font", "not a field"),
    "a priority beyond": ({**A, "priority": 0}, "priority", "from 1 to 1000"),
    "a priority that is true": ({**A, "priority": True}, "priority", "from 1 to 1000"),
    "several at once": ({**A, "n": 2}, "n", "one request a video"),
    "a field twice": (b'{"prompt": "a", "seed": 1, "seed": 2}', "seed", "came twice"),
    "not a number": (b'{"prompt": "a", "seed": NaN}', None, "NaN is not JSON"),
    "infinity": (b'{"prompt": "a", "fps": -Infinity}', None, "-Infinity is not JSON"),
    "9000 digits": (b'{"prompt": "a", "seed": ' + b"9" * 9000 + b"}", None, "9000 digits"),
    "no body": (b"", None, "not readable JSON"),
    "a list": ([1, 2], None, "not a JSON object"),
    "a text": (b'"a"', None, "not a JSON object"),
    "half of it": (b'{"prompt": "a', None, "not readable JSON"),
    "bytes that are no text": (b'{"prompt": "\xff\xfe"}', None, "not readable JSON"),
    "a hundred thousand lists": (DEEP, None, "nested too deeply"),
}  # fmt: skip

MANY = [part(f"f{number}", b"1") for number in range(70)]
FORMS: dict[str, tuple[bytes, int, str | None, str]] = {
    "no boundary": (form(kind=""), 400, None, "cannot be read"),
    "another boundary": (form(kind="; boundary=other"), 400, None, "cannot be read"),
    "no end": (form(part("seed", b"1"), end=b""), 400, None, "cut off"),
    "a field twice": (form(part("size", b"64x48")), 400, "size", "came twice"),
    "70 fields": (form(*MANY), 400, None, "cannot be read"),
    "9 files": (form(*[part("reference", picture(), "x") for _ in range(9)]), 400, None, "many"),
    "a field of 2 MB": (form(part("user", b"a" * 2_000_000)), 400, None, "cannot be read"),
    "a path as a field": (form(part("../../x", b"1")), 400, "../../x", "is not a field"),
    "a file under a path": (file(picture(), field="../image"), 400, "../image", "takes no file"),
    "a prompt that is a file": (file(b"a", field="prompt"), 400, "prompt", "takes no file"),
    "one file twice": (
        form(part("image", picture(), "x"), part("image", picture(), "y")), 400, "image", "twice"),
    "a picture as extend": (file(picture(), field="extend"), 400, None, "upload 0.png"),
    "an empty file": (file(b""), 400, "input_reference", "is empty"),
    "a program": (file(b"MZ\x90\0 program"), 400, "input_reference", "no picture or video"),
    "a page": (file(b"%PDF-1.7"), 400, "input_reference", "PDF"),
    "a drawing": (file(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 400, None, "SVG"),
    "a playlist": (file(b"ffconcat version 1.0\nfile '/etc/passwd'\n"), 400, None, "playlist"),
    "a list of streams": (file(b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), 400, None, "playlist"),
    "an archive": (file(b"PK\3\4" + b"\0" * 60), 400, None, "ZIP"),
    "half a picture": (file(picture()[:40]), 400, "input_reference", "upload 0.png"),
    "a head and nothing": (file(b"\x89PNG\r\n\x1a\n"), 400, "input_reference", "upload 0.png"),
    "a PNG of 2 gigapixels": (file(png(50_000, 40_000, 1)), 400, "input_reference", "too many"),
    "a packed PNG": (file(png(16_000, 16_000, 16_000)), 400, "input_reference", "too many pixels"),
    "a GIF of 4 gigapixels": (file(gif(65_535, 65_535)), 400, "input_reference", "too many pixels"),
    "a WebP of 268 megapixels": (file(webp(16_384, 16_384)), 400, "input_reference", "upload 0"),
    "a TIFF of nothing": (file(b"II*\0\xff\xff\xff\xff"), 400, "input_reference", "upload 0.tif"),
    "an AVIF of nothing": (file(b"\0\0\0\x18ftypavif" + b"\0" * 40), 400, None, "upload 0.avif"),
    "a video of nothing": (file(b"\0\0\0\x18ftypisom" + b"\0" * 40), 400, None, "upload 0.mp4"),
    "half a video": (file(video()[:900]), 400, "input_reference", "upload 0.mp4"),
    "a video of ages": (file(video(ages)), 400, "input_reference", "upload 0.mp4"),
    "a video of endless frames": (file(video(endless)), 400, "input_reference", "upload 0.mp4"),
    "a video of vast frames": (file(video(vast)), 400, "input_reference", "upload 0.mp4"),
    "a frame of MPEG-TS": (file(b"G" + b"\xff" * 600), 400, "input_reference", "upload 0.ts"),
}  # fmt: skip

ID = "video_000000000000000000000000"
JSON = "content-type: application/json"
LONG = "x-long: " + "a" * 400_000
CHUNKS = b"5\r\nhello\r\n0\r\n\r\n"
# No words: the answer is that of the HTTP parser, which is no JSON.
OTHERS: dict[str, tuple[bytes, int, str | None]] = {
    "an id with dots": (http("GET", "/v1/videos/..%2f..%2fetc%2fpasswd"), 404, ""),
    "an id with dots twice": (http("GET", "/v1/videos/%252e%252e%252fjob.json"), 404, "no video"),
    "an id with NUL": (http("GET", f"/v1/videos/{ID}%00.json"), 404, "no video"),
    "an id of another": (http("GET", f"/v1/videos/{ID}"), 404, "there is no video"),
    "a long id": (http("GET", "/v1/videos/" + "v" * 5000), 404, "there is no video"),
    "the file of another": (http("GET", f"/v1/videos/{ID}/content"), 404, "there is no video"),
    "the events of another": (http("GET", f"/v1/videos/{ID}/events"), 404, "there is no video"),
    "another is deleted": (http("DELETE", f"/v1/videos/{ID}"), 404, "there is no video"),
    "dots are deleted": (http("DELETE", "/v1/videos/.."), 404, ""),
    "a variant that is a path": (
        http("GET", f"/v1/videos/{ID}/content?variant=../job.json"), 400, "'../job.json'"),
    "no videos a page": (http("GET", "/v1/videos?limit=0"), 400, "from 1 to 100"),
    "too many a page": (http("GET", "/v1/videos?limit=101"), 400, "from 1 to 100"),
    "a page in words": (http("GET", "/v1/videos?limit=ten"), 400, "limit 'ten'"),
    "a page of many digits": (http("GET", "/v1/videos?limit=" + "9" * 5000), 400, "limit"),
    "an order": (http("GET", "/v1/videos?order=up"), 400, "'up'"),
    "after nobody": (http("GET", "/v1/videos?after=nobody"), 400, "'nobody'"),
    "after a path": (http("GET", "/v1/videos?after=../../x"), 400, "'../../x'"),
    "a method": (http("PUT"), 405, ""),
    "a method of its own": (http("BREW"), 405, ""),
    "the program": (http("GET", "/static/../app.py"), 404, ""),
    "the program, written otherwise": (http("GET", "/static/%2e%2e/app.py"), 404, ""),
    "a drive": (http("GET", "/static/c:%5cx"), 404, ""),
    "nothing there": (http("GET", "/nothing"), 404, ""),
    "no token": (http("GET", "/v1/videos", b"", "host: 127.0.0.1", plain=True), 401, "a token"),
    "a wrong token": (
        http("GET", "/v1/videos", b"", "host: localhost", "authorization: Bearer " + "0" * 20,
             plain=True), 401, "a token is needed"),
    "a token in the address": (
        http("GET", f"/v1/videos?token={TOKEN}&authorization=Bearer+{TOKEN}", b"",
             "host: localhost", plain=True), 401, "a token is needed"),
    "half a token": (
        http("GET", "/v1/videos", b"", "host: localhost", f"authorization: Bearer {TOKEN[:-1]}",
             plain=True), 401, "a token is needed"),
    "a token that is no text": (
        http("GET", "/v1/videos", b"", "host: localhost", "authorization: Bearer \udcff\udcfe",
             plain=True), 401, "a token is needed"),
    "a token without its scheme": (
        http("GET", "/v1/videos", b"", "host: localhost", f"authorization: {TOKEN}", plain=True),
        401, "a token is needed"),
    "a page of another site": (
        http("POST", "/v1/videos", b"{}", JSON, "origin: http://evil.example"), 403, "sites"),
    "a page of no site": (http("POST", "/v1/videos", b"{}", JSON, "origin: null"), 403, "sites"),
    "another host": (http("GET", "/", b"", "host: evil.example", plain=True), 421, "evil.example"),
    "no host": (http("GET", "/", b"", "x: y", plain=True), 400, None),
    "two hosts": (http("GET", "/", b"", "host: evil.example"), 400, None),
    "a huge header": (http("GET", "/", b"", LONG), 400, None),
    "two lengths": (http("POST", "/v1/videos", b"{}", "content-length: 2", "content-length: 3"),
                    400, None),
    "a length below none": (http("POST", "/v1/videos", b"{}", "content-length: -1"), 400, None),
    "a length in words": (http("POST", "/v1/videos", b"{}", "content-length: two"), 400, None),
    "a length of 19 digits": (
        http("POST", "/v1/videos", b"{}", JSON, f"content-length: {'9' * 19}"), 413, "larger"),
    "a length beyond": (
        http("POST", "/v1/videos", b"{}", JSON, "content-length: 8000001"), 413, "larger than"),
    "a form without length": (
        http("POST", "/v1/videos", CHUNKS, "content-type: multipart/form-data; boundary=edge",
             "transfer-encoding: chunked"), 411, "needs its content-length"),
    "chunks that are none": (
        http("POST", "/v1/videos", b"zz\r\n", JSON, "transfer-encoding: chunked"), 400, None),
    "JSON of 2 MB": (as_json(b" " * 2_000_000), 413, "at most 1 MiB"),
    "JSON of 2 MB in chunks": (
        http("POST", "/v1/videos", b"fffff\r\n" + b" " * 0xFFFFF + b"\r\n" + b"fffff\r\n"
             + b" " * 0xFFFFF + b"\r\n0\r\n\r\n", JSON, "transfer-encoding: chunked"),
        413, "at most 1 MiB"),
    "packed JSON": (
        http("POST", "/v1/videos", zlib.compress(b'{"prompt": "a"}'), JSON,
             "content-encoding: deflate"), 400, "not readable JSON"),
    "a plain text": (http("POST", "/v1/videos", b"a", "content-type: text/plain"), 415, "send"),
    "no type": (http("POST", "/v1/videos", b"a"), 415, "send multipart/form-data"),
    "a long form of an address": (
        http("POST", "/v1/videos", b"prompt=" + b"a" * 2_000_000,
             "content-type: application/x-www-form-urlencoded"), 413, "at most 1 MiB"),
    "no HTTP": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\0" * 40 + b"\r\n\r\n", 400, None),
    "HTTP of no number": (b"GET / HTTP/x\r\nhost: localhost\r\n\r\n", 400, None),
}  # fmt: skip


def refused(server: Server, request: bytes, status: int) -> Any:
    """The answer to a bad request; nothing of it is kept, and no place on the server is named."""
    before = server.jobs()
    got, text = send(server, request)
    assert got == status, text[:500]
    assert str(server.save_dir) not in text
    assert "Traceback" not in text
    assert server.jobs() == before
    return text


def check(text: str, param: str | None, words: str) -> None:
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert "--" not in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("kind", FIELDS)
def test_a_bad_field_is_one_line_that_names_it(kind: str, server: Server) -> None:
    fields, param, words = FIELDS[kind]
    check(refused(server, as_json(fields), 400), param, words)


@pytest.mark.parametrize("kind", FORMS)
def test_a_bad_form_and_a_bad_file_are_refused(kind: str, server: Server) -> None:
    request, status, param, words = FORMS[kind]
    check(refused(server, request, status), param, words)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_there_and_what_is_no_request(kind: str, server: Server) -> None:
    request, status, words = OTHERS[kind]
    text = refused(server, request, status)
    if words is not None:
        check(text, None, words)


def test_a_body_and_a_header_that_never_arrive_are_given_up(server: Server) -> None:
    slow_body = http("POST", "/v1/videos", b"{", JSON, "content-length: 100")
    slow_file = form(end=b"").replace(b"content-length: ", b"content-length: 9")
    slow_head = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: a"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body, upload, head, silent = pool.map(
            lambda request: send(server, request), (slow_body, slow_file, slow_head, b"")
        )
    for status, text in (body, upload):
        assert status == 400
        check(text, None, "did not arrive within 3 s")
    assert head == silent == (0, "")
    assert server.jobs() == []


def test_a_flood_is_refused_and_the_queued_ones_stay(server: Server) -> None:
    long = server.create(num_inference_steps=100_000)
    server.until(long, "in_progress")
    request = as_json(SMALL)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: send(server, request), range(200)))
    accepted = {json.loads(text)["id"] for status, text in answers if status == 200}
    assert [status for status, _ in answers if status != 200] == [429] * (200 - len(accepted))
    assert len(accepted) == 3
    assert set(server.jobs()) == accepted | {long}
    for job in (long, *accepted):
        assert server.call("DELETE", f"/v1/videos/{job}")[0] == 200
    server.gone(long)


def test_after_all_of_it_the_server_makes_a_right_video(server: Server) -> None:
    assert server.process is not None
    made = server.create()
    assert server.wait(made)["status"] == "completed"
    assert server.content(made)[4:8] == b"ftyp"
    assert server.jobs() == [made]
    held = {path.name for path in (server.save_dir / "jobs").rglob("*") if path.is_file()}
    assert held == {"job.json", "progress.json", "result.json", *_of_infer(held)}
    process = Path(f"/proc/{server.process.pid}")
    opened = [os.readlink(path) for path in _there(process / "fd")]
    assert not [name for name in opened if tempfile.gettempdir() + "/tmp" in name], opened
    assert "ASGI" not in server.log.read_text()


def _of_infer(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("video_0000")}


def _there(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_symlink()]
