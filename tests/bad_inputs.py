"""Bad inputs: what is given, what the line must say, and (in docs/bad_inputs.md) the line seen.

    python tests/bad_inputs.py > docs/bad_inputs.md

Each row is a whole command line in a folder of its own. It must end with one line on standard
error, before which notes may stand, and code 2. It must write nothing. The tests run all of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from opensora_sp.cli.main import main as command  # noqa: E402
from opensora_sp.request.embedded import EMBEDDED  # noqa: E402

DIGITS = "9" * 5000  # more than int() reads
JOB = "video_" + "0" * 24
Maker = Callable[[Path], None]


@dataclass(frozen=True)
class BadInput:
    """One row.

    argv: the words after `opensora-sp`; {tmp} is the row's folder, {model} the embedded model.
    told: what the line must say. makes: what the folder holds besides FILES. env: variables.
    heavy: torch, numpy or PyAV may be imported before it is refused, for a file is looked into.
    about: what is wrong, where the command does not show it.
    """

    kind: str
    argv: list[str]
    told: list[str]
    makes: Maker | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    heavy: bool = False
    about: str = ""


# What is typed ({tmp} is a folder with the files below), and what the line must say.
_WORDS: list[tuple[list[str], list[str]]] = [
    ([], ["--prompt", "--prompt-path"]),
    (["--prompt"], ["--prompt"]),
    (["--prompt", "x", "--resolution", "333p"], ["--resolution", "333p", "240p"]),
    (["--prompt", "x", "--resolution", "256"], ["--resolution", "256", "9:16", "12:25"]),
    (["--prompt", "x", "--aspect-ratio", "16x9"], ["--aspect-ratio", "16x9", "16:9"]),
    (["--prompt", "x", "--image-size", "0", "64"], ["--image-size", "0"]),
    (["--prompt", "x", "--image-size", "64"], ["--image-size"]),
    (["--prompt", "x", "--num-frames", "2.5"], ["--num-frames", "2.5", "16s"]),
    (["--prompt", "x", "--num-frames", "-4"], ["--num-frames", "-4"]),
    (["--prompt", "x", "--num-sampling-steps", "0"], ["--num-sampling-steps", "0"]),
    (
        ["--prompt", "x", "--step-cache", "fast", "--num-sampling-steps", "5"],
        ["--step-cache fast", "--num-sampling-steps of at least 10"],
    ),
    (["--prompt", "x", "--cfg-scale", "nan"], ["--cfg-scale", "nan"]),
    (["--prompt", "x", "--cfg-scale=-inf"], ["--cfg-scale", "-inf"]),
    (["--prompt", "x", "--cfg-scale", "-1"], ["--cfg-scale", "-1"]),
    (["--prompt", "x", "--aes", "inf"], ["--aes", "inf"]),
    (["--prompt", "x", "--fps", "0"], ["--fps", "0"]),
    (["--prompt", "x", "--save-fps", "1e9"], ["--save-fps", "1e9"]),
    (["--prompt", "x", "--seed", "1.5"], ["--seed", "1.5"]),
    (["--prompt", "x", "--seed", "-1"], ["--seed", "-1"]),
    (["--prompt", "x", "--batch-size", "0"], ["--batch-size", "0"]),
    (["--prompt", "x", "--micro-frame-size", "0"], ["--micro-frame-size", "0"]),
    (["--prompt", "x", "--dtype", "fp8"], ["--dtype", "fp8", "bf16"]),
    (["--prompt", "x", "--device", "tpu"], ["--device", "tpu", "gcu"]),
    (["--prompt", "x", "--device", "cpu", "--backend", "nccl"], ["--backend", "nccl"]),
    (["--prompt", "x", "--flash-attn", "maybe"], ["--flash-attn", "maybe"]),
    (["--prompt", "x", "--promt-as-path"], ["--promt-as-path", "--prompt-as-path"]),
    (["--prompt", "x", "--seed", "1", "2"], ["2"]),
    (["--prompt", "x", "--cpu-threads", "0"], ["--cpu-threads", "0"]),
    (["--prompt", "x", "--sequence-parallel", "3"], ["--sequence-parallel", "3"]),
    (["--prompt", "x", "--watermark", "maybe"], ["--watermark", "maybe"]),
    (["--prompt", "x", "--watermark-size", "90"], ["--watermark-size", "90", "50"]),
    (["--prompt", "x", "--watermark-place", "middle"], ["--watermark-place", "top-left"]),
    (
        ["--prompt", "x", "--watermark", "true", "--watermark-text", "AI 龘"],
        ["--watermark-text", "龘", "--watermark-font"],
    ),
    (["--prompt", "x", "--label", "us"], ["--label", "us", "none, cn, eu"]),
    (["--prompt", "x", "--label", "cn"], ["--label cn", "--label-producer"]),
    (["--prompt", "x", "--label-producer", "a b"], ["--label-producer", "a b"]),
    (["--prompt", "x", "--label", "eu", "--label-key", "k.pem"], ["--label-certificate"]),
    (["--prompt", "x", "--llm-refine", "y"], ["--llm-refine", "OPENAI_API_KEY"]),
    (["--prompt", "x", "--prompt-generator", ""], ["--prompt-generator", "''"]),
    (["--prompt", "x", "--eval-count", "3"], ["--eval-count", "3", "opensora-sp benchmark"]),
    (["--prompt", 'x {"reference_path": "a.png"}'], ["reference", "a.png"]),
    (["--prompt", 'x {"reference": "a.png"}'], ["prompt", "reference", "mask_strategy"]),
    (["--prompt", 'x {"mask_strategy": "0"'], ["prompt", "JSON"]),
    (["--prompt", "x", "--image", "{tmp}/none.png"], ["reference", "none.png"]),
    (["--prompt", "x", "--edit", "{tmp}/one.txt"], ["reference", "one.txt"]),
    (["--prompt", "x", "--image", "http://x/a.png"], ["http://x/a.png", "--allow-remote"]),
    (["--prompt", "x", "--mask-strategy", "0,0,0,0,1,2"], ["mask strategy", "edit_ratio"]),
    (["--prompt", "x", "--mask-strategy", "0,1"], ["mask strategy", "reference 1"]),
    (["--prompt", "x", "--loop", "2", "--num-frames", "17"], ["--loop", "17"]),
    (["--prompt", "x", "--edit", "a", "--edit-strength", "2"], ["--edit-strength", "2"]),
    (["--prompt", "|0|a cat|two|a dog"], ["prompt", "two"]),
    (["--prompt", "bad \udcff byte"], ["--prompt", "byte", "UTF-8"]),
    (["--prompt-path", "{tmp}/none.txt"], ["--prompt-path", "none.txt"]),
    (["--prompt-path", "{tmp}/empty.txt"], ["--prompt-path", "empty.txt", "no prompt"]),
    (["--prompt-path", "{tmp}/latin.txt"], ["--prompt-path", "latin.txt", "UTF-8"]),
    (["--prompt-path", "{tmp}"], ["--prompt-path"]),
    (["--prompt-path", "{tmp}/one.txt", "--start-index", "7"], ["--start-index", "7"]),
    (["--prompt-path", "{tmp}/one.txt", "--end-index", "0"], ["--end-index", "0"]),
    (["--prompt", "x", "--save-dir", "{tmp}/one.txt/out"], ["--save-dir", "one.txt"]),
    (["--prompt", "x", "--save-dir", ""], ["--save-dir", "''"]),
    (["--prompt", "x", "--sample-name", "../x"], ["--sample-name", "../x"]),
    (["--prompt", "x", "--ckpt-path-dit", "{tmp}"], ["--ckpt-path-t5", "--ckpt-path-vae3d"]),
    (
        ["--prompt", "x", *(f"--ckpt-path-{m}={{tmp}}" for m in ("dit", "t5", "vae2d", "vae3d"))],
        ["--ckpt-path-dit", "config.json"],
    ),
    (["--config", "{tmp}/none.yaml"], ["--config", "none.yaml"]),
    (["--config", "{tmp}/typo.yaml"], ["--config", "cfg_scael", "cfg_scale"]),
    (["--config", "{tmp}/twice.yaml"], ["--config", "seed", "line 2", "twice"]),
    (["--config", "{tmp}/broken.yaml"], ["--config", "broken.yaml", "line"]),
    (["--config", "{tmp}/object.yaml"], ["--config", "object.yaml"]),
    (["--config", "{tmp}/tag.yaml"], ["--config", "tag.yaml", "line 1", "python/int"]),
    (["--config", "{tmp}/value.yaml"], ["--cfg-scale", ".nan"]),
    (["--config", "{tmp}/escape.yaml"], ["--config", "escape.yaml", "not YAML"]),
    (["--config", "{tmp}/huge_escape.yaml"], ["--config", "huge_escape.yaml", "not YAML"]),
    (["--config", "{tmp}/version.yaml"], ["--config", "version.yaml", "not YAML"]),
    (["--config", "{tmp}/half.yaml"], ["--prompt", "ud800", "UTF-8"]),
    (["--config", "{tmp}/half_path.yaml"], ["--save-dir", "ud800", "usable path"]),
    (["--config", "{tmp}/half_key.yaml"], ["--config", "ud800", "not a key"]),
    (["--config", "{tmp}/half_word.yaml"], ["--dtype", "ud800", "bf16"]),
    (["--config", "{tmp}/half_tag.yaml"], ["--config", "half_tag.yaml"]),
    (["--prompt", "x", "--seed", DIGITS], ["--seed", "999", "whole number"]),
    (["--prompt", "x", "--num-frames", DIGITS], ["--num-frames", "999"]),
    (["--prompt", "x", "--image-size", DIGITS, "64"], ["--image-size", "999"]),
    (["--prompt", "x", "--cfg-scale", DIGITS], ["--cfg-scale", "999"]),
    (["--prompt", "x", "--verbose", DIGITS], ["--verbose", "999"]),
    (["--prompt", "x", "--deadlines", f"step={DIGITS}x"], ["--deadlines"]),
    (["--prompt", "x", "--aspect-ratio", f"{DIGITS}:9"], ["--aspect-ratio", "999"]),
    (["--prompt", "x", "--mask-strategy", f"0,{DIGITS}"], ["mask strategy", "whole numbers"]),
    (["--prompt", "x", "--mask-strategy", f"0,{DIGITS[:4000]}"], ["mask strategy", "999"]),
    (["--prompt", f"|0|a|{DIGITS}|b"], ["prompt", "not a clip number"]),
    (["--prompt", f"|0|a|{DIGITS[:4000]}|b"], ["prompt", "not a clip number"]),
    (["--prompt", 'x{"mask_strategy": ' + DIGITS + "}"], ["prompt", "5000 digits"]),
    (["--prompt", 'x{"mask_strategy": ' + "[" * 50_000], ["prompt", "nested too deeply"]),
    (["--prompt", 'x{"mask_strategy": ' + "[" * 400 + "]" * 400 + "}"], ["nested too deeply"]),
    (["--prompt", "a." * 20_000], ["prompt", "40000 characters", "10000"]),
    (["--prompt", f"|0|a|2|{'aGVsbG8' * 2000}"], ["prompt", "14000 characters"]),
]
FILES: dict[str, bytes] = {
    "empty.txt": b"\n\n",
    "one.txt": b"a prompt\n",
    "latin.txt": "M\u00fcnchen\n".encode("latin-1"),
    "typo.yaml": b"cfg_scael: 3\n",
    "twice.yaml": b"seed: 1\nseed: 2\n",
    "broken.yaml": b"prompt: [x\n",
    "object.yaml": b"prompt: !!python/object/apply:os.system [ls]\n",
    "tag.yaml": b"seed: !!python/int 3\n",
    "value.yaml": b"cfg_scale: .nan\n",
    "escape.yaml": b'prompt: "\\U00110000"\n',
    "huge_escape.yaml": b'prompt: "\\UFFFFFFFF"\n',
    "version.yaml": b"%YAML 1." + b"9" * 5000 + b"\n---\nseed: 1\n",
    "half.yaml": b'prompt: "\\ud800"\n',
    "half_path.yaml": b'save_dir: "\\ud800"\n',
    "half_key.yaml": b'"\\ud800": 1\n',
    "half_word.yaml": b'dtype: "\\ud800"\n',
    "half_tag.yaml": b"seed: !<%ED%A0%80> 1\n",
}

# --- what a row's folder holds -------------------------------------------------------------------


def text(name: str, content: str | bytes) -> Maker:
    """A file."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def pipe(name: str) -> Maker:
    """A FIFO: whoever opens it waits."""
    return lambda folder: os.mkfifo(folder / name)


def link(name: str, target: str) -> Maker:
    return lambda folder: (folder / name).symlink_to(target)


def both(*makers: Maker) -> Maker:
    def make(folder: Path) -> None:
        for each in makers:
            each(folder)

    return make


def model(name: str, *changes: Maker) -> Maker:
    """A copy of one of the embedded models, and what is done to it there."""

    def make(folder: Path) -> None:
        shutil.copytree(EMBEDDED / name, folder / name)
        for change in changes:
            change(folder / name)

    return make


def key(name: str, value: str, file: str = "config.json") -> Maker:
    """Another value, as JSON, of a key; one of an object inside has a dot in its name."""

    def make(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        *outer, last = name.split(".")
        inner = content
        for each in outer:
            inner = inner[each]
        inner[last] = "PLACE"
        (folder / file).write_text(json.dumps(content).replace('"PLACE"', value))

    return make


def checkpoint(name: str) -> list[str]:
    """Flags that take this one model from the row's folder."""
    places = {other: f"{{model}}/{other}" for other in ("dit", "t5", "vae2d", "vae3d")}
    places[name] = f"{{tmp}}/{name}"
    return [word for other, place in places.items() for word in (f"--ckpt-path-{other}", place)]


class Trap:
    """Unpickled by somebody who does not look, it makes a directory."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("executed",)


CODE = pickle.dumps({"a": Trap()}, protocol=2)


def cut(name: str, share: float) -> Maker:
    """Only the first part of a file."""

    def make(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return make


def header(name: str, change: Callable[[dict[str, Any]], object]) -> Maker:
    """Another header of a safetensors file, before the same tensors."""

    def make(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        about = json.loads(content[8 : 8 + length])
        change(about)
        written = json.dumps(about).encode()
        (folder / name).write_bytes(
            struct.pack("<Q", len(written)) + written + content[8 + length :]
        )

    return make


def first_tensor(**changes: object) -> Callable[[dict[str, Any]], object]:
    def change(about: dict[str, dict[str, object]]) -> None:
        name = next(name for name in sorted(about) if name != "__metadata__")
        about[name].update(changes)

    return change


def first_length(value: int) -> Maker:
    """Another length of the header."""

    def make(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(struct.pack("<Q", value) + file.read_bytes()[8:])

    return make


def tar(name: str) -> Maker:
    """The form of torch 0.1: a tar whose first member is unpickled."""

    def make(folder: Path) -> None:
        content = pickle.dumps(Trap(), protocol=2)
        with tarfile.open(folder / name, "w") as archive:
            member = tarfile.TarInfo("sys_info")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    return make


def gone(name: str) -> Maker:
    return lambda folder: (folder / name).unlink()


def gif(width: int, height: int, frames: int) -> bytes:
    """Frames of one pixel on a canvas of this size, a few bytes each."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"\x21\xf9\x04\0\x0a\0\0\0"
    picture = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return head + (control + picture) * frames + b"\x3b"


def png(width: int, height: int, content: bytes = bytes(100)) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"IDAT", zlib.compress(content))
        + chunk(b"IEND", b"")
    )


SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
SWEEP = "resolutions: [144p]\ndurations: [17]\nmeshes: [1x1]\n"
_LISTS: list[tuple[str, str | bytes, list[str]]] = [
    ("two.csv", "a red ball\na blue square\n", ["none of which is 'prompt'"]),
    ("cells.csv", "prompt\na red ball, rolling\n", ["line 2 has 2 cells"]),
    ("quote.csv", 'prompt\n"a red\n', ["not CSV"]),
    ("twice.csv", "prompt,prompt\na,b\n", ["twice"]),
    ("seed.csv", "prompt,seed\na,x\n", ["line 2: seed 'x' is not"]),
    ("head.csv", "prompt\n", ["holds no prompt"]),
    ("object.json", '{"prompt": "a"}', ["not an array"]),
    ("comma.json", '["a",]', ["not readable JSON"]),
    ("number.json", '["a", 3]', ["entry 1 is neither"]),
    ("words.json", '[{"words": "a"}]', ["has no field 'prompt'"]),
    ("inner.json", '[{"prompt": ["a"]}]', ["entry 0: prompt"]),
    ("twice.json", '[{"prompt": "a", "prompt": "b"}]', ["twice"]),
    ("deep.json", "[" * 100_000, ["nested too deeply"]),
    ("digits.json", '[{"prompt": "a", "seed": ' + "1" * 5000 + "}]", ["5000 digits"]),
    ("line.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["line 2 is not readable JSON"]),
    ("seed.jsonl", '{"prompt": "a", "seed": -1}\n', ["line 1: seed -1"]),
    ("json.txt", '[\n"a",\n"b"\n', ["begins as JSON"]),
    ("list.pdf", "%PDF-1.7", ["PDF"]),
    ("list.docx", b"PK\x03\x04", ["docx"]),
    ("list.yaml", "- a red ball\n", ["YAML"]),
    ("long.txt", "a" * 20_000, ["20000 characters"]),
]

# Model, key (of an object inside with a dot), value as JSON.
_CONFIG_VALUES: list[tuple[str, str, str]] = [
    *(("dit", "hidden_size", value) for value in ('"abc"', "null", "[1]", "1e9", "-4", "true")),
    *(("dit", "num_heads", value) for value in ("0", "-1", "1.5", "7")),
    *(("dit", "depth", value) for value in ("1000000000", "0", "{}")),
    ("dit", "mlp_ratio", "0"),
    ("dit", "patch_size", "2"),
    *(("t5", name, "0") for name in ("d_model", "d_ff", "num_heads", "vocab_size")),
    ("t5", "num_layers", "-1"),
    ("t5", "feed_forward_proj", "7"),
    *(("vae2d", "norm_num_groups", value) for value in ("0", "-2", '"2"')),
    *(("vae2d", "block_out_channels", value) for value in ("8", "[]", "[0]", '["8"]')),
    ("vae3d", "vae_temporal", '"abc"'),
    ("vae3d", "vae_2d", "[4]"),
    ("vae3d", "vae_temporal.filters", "0"),
    ("vae3d", "vae_temporal.channel_multipliers", "[1, null]"),
    ("vae3d", "micro_frame_size", "2.5"),
]
_CONFIG_FILES: list[tuple[str, str | bytes, str]] = [
    ("nested", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ("not a number", '{"hidden_size": NaN}', "NaN is not JSON"),
    ("infinite", '{"hidden_size": 1e999}', "not readable JSON"),
    ("endless digits", '{"depth": ' + DIGITS + "}", "5000 digits"),
    ("a list", "[1]", "not a list"),
    ("nothing", "", "not readable JSON"),
    ("not UTF-8", b"\xff\xfe\x00", "not readable JSON"),
    ("too large", " " * (2**20 + 1), "at most"),
]

_PICTURES: list[tuple[str, str | bytes, list[str]]] = [
    ("empty.png", "", ["is empty"]),
    ("words.png", "words\n" * 99, ["(text)"]),
    ("noise.mp4", bytes(range(128, 256)) * 40, ["neither an image nor"]),
    ("a.svg", SVG, ["(SVG)"]),
    ("pointer.png", POINTER, ["a Git LFS pointer"]),
    ("page.jpg", "<html>404 Not Found</html>", ["(HTML, a web page)"]),
    ("list.m3u8", "#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", ["(a playlist)"]),
    ("list.ffconcat", "ffconcat version 1.0\nfile /etc/passwd\n", ["(a playlist)"]),
    ("frameless.y4m", "YUV4MPEG2 W16 H16 F24:1\n", ["has no frame"]),
    ("art.psd", b"8BPS\0\1" + bytes(40), ["(Photoshop)"]),
    ("art.ai", b"%PDF-1.5\n%\xe2\xe3", ["(PDF or Illustrator)"]),
    ("all.gz", b"\x1f\x8b\x08\0" + bytes(40), ["(gzip)"]),
    ("wide.gif", gif(13_300, 13_300, 1), ["13300x13300 pixels"]),
    ("long.gif", gif(16, 16, 100_000), ["20001 frames"]),
    ("work.gif", gif(5000, 5000, 1000), ["1000 frames of 5000x5000"]),
    ("cut.gif", gif(16, 16, 3)[:40], ["cut.gif"]),
    ("wide.png", png(13_000, 13_000), ["13000x13000 pixels"]),
    ("wider.png", png(60_000, 60_000), ["too many pixels"]),
    ("short.png", png(64, 64), ["short.png"]),
    ("cut.png", png(16, 16)[:45], ["cut.png"]),
    ("flat.png", png(0, 16), ["flat.png"]),
]

_OTHER_COMMANDS: list[tuple[list[str], list[str]]] = [
    (["generat"], ["generat", "generate"]),
    (["\x1b[31mred"], ["red"]),
    (["plan", "--device-memory", "0GB"], ["--device-memory", "0GB"]),
    (["plan", "--device-memory", "nan"], ["--device-memory", "nan"]),
    (["plan", "--device-memory", "lots"], ["--device-memory", "lots"]),
    (["plan", "--ranks", "0"], ["--ranks", "0"]),
    (["plan", "--ranks", "1000000000"], ["--ranks", "1000000000"]),
    (["plan", "--flop-rate", "-1"], ["--flop-rate", "-1"]),
    (["plan", "--image-size", "999999999", "999999999"], ["--image-size", "999999999"]),
    (["plan", "--sequence-parallel", DIGITS], ["--sequence-parallel"]),
    (["verify", "--dtype", "fp8"], ["--dtype", "fp8"]),
    (["verify", "--reference", "{tmp}/none"], ["none"]),
    (["parity", "--tolerance", "x"], ["--tolerance"]),
    (["benchmark", "--prompt", "x", "--eval-count", "0"], ["--eval-count", "0"]),
    (["benchmark", "--prompt", "x", "--warmup-count", "-1"], ["--warmup-count", "-1"]),
    (["benchmark", "--prompt", "x", "--peak-tflops", "inf"], ["--peak-tflops", "inf"]),
    (["benchmark", "--prompt", "x", "--benchmark-save-path", "{tmp}"], ["--benchmark-save-path"]),
    (["compare", "{tmp}/one.txt"], ["compare", "A.json B.json"]),
    (["convert", "dit", "{tmp}/none", "{tmp}/new"], ["none"]),
    (["convert", "dit", "{tmp}/one.txt", "{tmp}/new"], ["one.txt"]),
    (["convert", "t6", "{tmp}/one.txt", "{tmp}/new"], ["t6"]),
    (["convert", "dit", "{tmp}/one.txt", "{tmp}/one.txt"], ["one.txt"]),
    (["download", "--check", "{tmp}/none"], ["none"]),
    (["download", "--only", "t6", "{tmp}/new"], ["--only", "t6"]),
    (["download", "--hashes", "{tmp}/none", "{tmp}/new"], ["--hashes", "none"]),
    (["serve", "--port", "99999"], ["--port", "99999"]),
    (["serve", "--port", "x"], ["--port", "x"]),
    (["serve", "--host", "0.0.0.0"], ["--host", "--token-file"]),
    (["serve", "--nproc", "0"], ["--nproc", "0"]),
    (["serve", "--token-file", "{tmp}/none"], ["--token-file", "none"]),
    (["serve", "--token-file", "{tmp}/one.txt"], ["--token-file", "one.txt"]),
    (["serve", "--warmup", "9000p-1s"], ["--warmup", "9000p-1s"]),
    (["serve", "--allow-origin", "*"], ["--allow-origin *", "http://localhost:8080"]),
    (["serve", "--allow-origin", "null"], ["--allow-origin null", "http://localhost:8080"]),
    (["serve", "--allow-origin", "http://a.example/"], ["http://a.example/", "slash"]),
    (["serve", "--allow-origin", "a.example"], ["a.example", "http or https"]),
    (["serve", "--allow-origin", "http://a.example:0"], ["a.example:0", "port"]),
    (["serve", "--limit", "queued=-1"], ["--limit", "queued"]),
    (["serve", "--limit", "quued=1"], ["--limit", "quued"]),
    (["serve", "--prompt", "x"], ["--prompt"]),
    (["serve", "--save-dir", "{tmp}/one.txt"], ["--save-dir", "one.txt"]),
    (["submit"], ["--prompt"]),
    (["submit", "--prompt", "x", "--server", "ftp://x"], ["--server", "ftp://x"]),
    (["submit", "--prompt", "x", "--server", "http://127.0.0.1:1"], ["127.0.0.1:1"]),
    (["submit", "--prompt", "x", "--priority", "0"], ["--priority", "0"]),
    (["submit", "--prompt", "x", "--image", "{tmp}/none.png"], ["none.png"]),
    (["jobs", "--limit", "0"], ["--limit", "0"]),
    (["jobs", "--server", "http://127.0.0.1:1"], ["127.0.0.1:1"]),
    (["fetch", "../x", "--server", "http://127.0.0.1:1"], ["../x"]),
    (["cancel"], ["ID"]),
    (["completion", "fish"], ["fish"]),
    (["completion"], ["bash", "zsh"]),
    (["--prompt", "x"], ["the command comes first"]),
    (["\ud800"], ["ud800", "is not a command"]),
    (["compare", "a\0b", "x"], ["not a path"]),
    (["parity", "--image-size", "x", "y"], ["--image-size", "'x' is not a whole number"]),
    (["parity", "--sequence-parallel", DIGITS], ["--sequence-parallel", "not a whole number"]),
    (["parity", "--seed", "-1"], ["seed -1"]),
    (["download", "{tmp}/one.txt"], ["one.txt is not a directory"]),
    (["download", "--hashes", "/dev/zero", "{tmp}/new"], ["--hashes", "a device"]),
    (["serve", "--token-file", "/dev/zero"], ["--token-file", "a device"]),
    (["serve", "--limit", "queued=nan"], ["queued is a number above 0 and below"]),
    (["serve", "--limit", f"queued={DIGITS}"], ["--limit", "above 0 and below"]),
    (["serve", "--host", "a b", "--token-file", "{tmp}/one.txt"], ["--host 'a b'"]),
    (["serve", "--no-engine"], ["--no-engine", "--queue"]),
    (["serve", "--batch-jobs", "0"], ["--batch-jobs 0", "1 to 64"]),
    (["serve", "--keep-gb", "nan"], ["--keep-gb 'nan'"]),
    (["serve", "--port", ""], ["--port", "'' is not a whole number"]),
    (["jobs", "--limit", DIGITS], ["--limit", "not a whole number"]),
    (["jobs", "--token-file", "{tmp}"], ["--token-file", "directory"]),
    (["fetch", JOB, "-o", "{tmp}/one.txt/out"], ["-o", "one.txt is not a directory"]),
    (["submit", "--prompt", "x", "-o", "{tmp}/one.txt/a.mp4"], ["-o", "one.txt is not"]),
    (["submit", "--prompt", "x", "y", "-o", "a.mp4"], ["one file for 2 jobs"]),
    (["submit", "--prompt", "x", "--memory", "small"], ["--memory does not go with a request"]),
    (["submit", "--prompt", "x", "--image", "/dev/zero"], ["no regular file"]),
    (["quality", "{tmp}", "{tmp}/one.txt"], ["is a folder, but B"]),
    (["quality", "/dev/zero", "/dev/zero"], ["no regular file"]),
    (["quality", "{tmp}/one.txt", "{tmp}/typo.yaml", "--plot", "a.bmp"], [".svg or .png"]),
    (["quality", "{tmp}/one.txt", "{tmp}/typo.yaml", "--out", "/dev/null"], ["--out", "regular"]),
    (["calibrate"], ["--out FILE is needed"]),
    (["calibrate", "--out", "x.txt"], ["--out 'x.txt'", ".yaml"]),
    (["calibrate", "--out", "{tmp}/one.txt/x.yaml"], ["--out", "one.txt is not a directory"]),
    (["calibrate", "--out", "{tmp}/typo.yaml"], ["--out", "is not a list of 1 to 1000"]),
    (["calibrate", "--out", "x.yaml", "--full-runs", "0"], ["--full-runs '0'"]),
    (["calibrate", "--out", "x.yaml", "--num-sampling-steps", "2"], ["fewer than 3 steps"]),
    (["calibrate", "--out", "x.yaml", "--step-cache", "fast"], ["belongs to generate"]),
    (["calibrate", "--out", "x.yaml", "--loop", "2"], ["belongs to generate"]),
    (["benchmark", "--prompt", "x", "--sweep", "/dev/zero"], ["--sweep '/dev/zero'", "a device"]),
    (["benchmark", "--prompt", "x", "--count-ranks", "2"], ["--count"]),
    (["benchmark", "--prompt", "x", "--measure-peak", "--peak-tflops", "5"], ["choose one"]),
]

# Addresses of a server that are none.
_SERVERS: tuple[str, ...] = (
    "http://[::1",
    "http://a b",
    "http://a..b",
    f"http://{'a' * 70}.com",
    "http://\u2100.com",
)
_SERVERS += ("http://x\udcff", "http://127.0.0.1:1/a b", "http://:80", "http://127.0.0.1:99999")

# Of a shared queue; what is said never shows a password.
_QUEUE = "postgresql://me:secret@127.0.0.1:1/db"
_QUEUES: list[tuple[list[str], list[str]]] = [
    (["--queue", "mysql://me:secret@h/d"], ["mysql is not the address of a Postgres database"]),
    (["--queue", "postgresql://h"], ["names no database"]),
    (["--queue", "postgresql://me:secret@[::1/d"], ["cannot be read"]),
    (["--queue", "postgresql://me:secret@h:99999/d"], ["cannot be read"]),
    (["--queue", "postgresql://me:secret@h/d\udcff"], ["cannot be read"]),
    (["--queue", "postgresql://me:secret@h/d\nb"], ["cannot be read"]),
    ([], ["work needs --queue URL"]),
    (["--queue", _QUEUE, "--nnodes", "2"], ["--nnodes 2 needs --node-rank N"]),
    (
        ["--queue", _QUEUE, "--nnodes", "2", "--node-rank", "0"],
        ["--nnodes 2 needs --group-name"],
    ),
    (["--queue", _QUEUE, "--node-rank", "1"], ["--node-rank 1 needs --nnodes"]),
    (["--queue", _QUEUE, "--group-name", "../x"], ["--group-name '../x'"]),
    (["--queue", _QUEUE, "--lease-seconds", "nan"], ["--lease-seconds 'nan'", "3 to 3600"]),
    (["--queue", _QUEUE, "--health-port", "70000"], ["--health-port 70000"]),
    (["--queue", _QUEUE, "--prompt", "x"], ["--prompt belongs to a job"]),
    (["--queue", _QUEUE], ["the database does not answer"]),
]

# Of one schedule, which is right without them: other keys, and what the line must say.
_SCHEDULES: list[tuple[dict[str, object], str]] = [
    ({"steps": 0}, "steps 0 is not"),
    ({"steps": "30"}, "steps '30' is not"),
    ({"computed": [1, 2]}, "begins with 0"),
    ({"computed": [0, 0]}, "ascending"),
    ({"computed": [0, 30]}, "the last is 29"),
    ({"fill": "cubic"}, "fill 'cubic'"),
    ({"tokens": [5, 2]}, "tokens (5, 2)"),
    ({"cfg_scale": [None, 1]}, "cfg_scale (None, 1)"),
    ({"psnr": -1}, "psnr -1"),
    ({"model": "a b"}, "model 'a b'"),
    ({"name": "../x"}, "name '../x'"),
    ({"images": "yes"}, "images 'yes'"),
    ({"colour": 1}, "'colour' is not a key"),
    ({"steps": 31}, "has no schedule for"),
]
_SCHEDULE_FILES: list[tuple[str | bytes, str]] = [
    ("", "not a list of 1 to 1000"),
    ("- 1\n", "not a group of `key: value` lines"),
    ("- {}\n", "the key name is missing"),
    (b"\xff\xfe", "not UTF-8"),
    ("- &a [*a]\n", "alias"),
    ("[" * 50_000, "nested too deeply"),
    ("#" * (2 << 20), "larger than 1 MiB"),
    ("- {name: x, name: y}\n", "twice"),
    ("- !!python/object:os.system {}\n", "not YAML"),
    ("- {name: x, steps: 30, computed: [0], fill: hold, psnr: .inf}\n", "psnr inf"),
]

HEAD = """# Bad inputs

{count} command lines that cannot be run, and the line that each of them ended with. Exit code 2,
nothing executed, nothing written. Long words are cut here. The folder of each row is left out of
the names; MODEL is the embedded model. `python tests/bad_inputs.py > docs/bad_inputs.md` runs all
rows and writes this page. The tests run them too. Requests to the server have a table of their own
in `tests/server/test_bad_requests.py`.

| kind | given | the line seen |
| --- | --- | --- |
"""

# --- the rows ------------------------------------------------------------------------------------


def _generate() -> Iterator[BadInput]:
    for argv, told in _WORDS:
        file = argv[1] if len(argv) > 1 else ""
        kind = {"--config": "YAML", "--prompt-path": "prompt files"}.get(argv[0] if argv else "")
        heavy = "{tmp}/one.txt" in argv and "--edit" in argv
        yield BadInput(
            kind or ("prompts" if len(argv) == 2 and file else "flags"),
            ["generate", *argv],
            told,
            heavy=heavy,
        )


def _prompt_files() -> Iterator[BadInput]:
    for name, content, said in _LISTS:
        yield BadInput(
            "prompt files",
            ["generate", "--prompt-path", f"{{tmp}}/{name}"],
            said,
            text(name, content),
        )
    yield BadInput(
        "prompt files",
        ["generate", "--prompt-path", "{tmp}/pipe"],
        ["--prompt-path", "pipe"],
        pipe("pipe"),
    )
    yield BadInput(
        "prompt files", ["generate", "--prompt-path", "/dev/zero"], ["--prompt-path", "/dev/zero"]
    )


def _yaml() -> Iterator[BadInput]:
    yield BadInput(
        "YAML", ["generate", "--config", "{tmp}/pipe"], ["--config", "pipe"], pipe("pipe")
    )
    yield BadInput("YAML", ["generate", "--config", "/dev/zero"], ["--config", "/dev/zero"])
    for name, content, said in (
        ("deep.yaml", "prompt: " + "[" * 20_000, ["deep"]),
        (
            "bomb.yaml",
            "a: &a [1,1,1,1,1,1,1,1]\n"
            + "".join(
                f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n"
                for p, c in zip("abcdefgh", "bcdefghi", strict=True)
            ),
            ["bomb.yaml"],
        ),
        ("list.yaml", "- prompt\n", ["list.yaml"]),
        ("zero.yaml", b"prompt: a\0b\n", ["zero.yaml"]),
        ("two.yaml", "seed: 1\n---\nseed: 2\n", ["two.yaml"]),
        ("date.yaml", "seed: 2026-11-27\n", ["--seed", "2026-11-27"]),
        ("bool.yaml", "num_frames: yes\n", ["--num-frames"]),
        ("inner.yaml", "seed: {a: 1}\n", ["inner.yaml", "line 1"]),
    ):
        yield BadInput(
            "YAML",
            ["generate", "--prompt", "x", "--config", f"{{tmp}}/{name}"],
            said,
            text(name, content),
        )


def _configs() -> Iterator[BadInput]:
    def row(name: str, about: str, told: list[str], *changes: Maker) -> BadInput:
        argv = ["plan", "--device-memory", "24GB", *checkpoint(name)]
        return BadInput("config.json", argv, told, model(name, *changes), about=f"{name}: {about}")

    for name, wrong, value in _CONFIG_VALUES:
        inside = "vae/config.json" if name == "vae2d" else "config.json"
        change = key(wrong, value, inside)
        yield row(name, f"{wrong} {value}", [wrong.split(".")[-1]], change)
    for about, content, said in _CONFIG_FILES:
        change = text("config.json", content)
        yield row("dit", about, ["config.json", said], gone("config.json"), change)
    change = pipe("config.json")
    yield row("dit", "a FIFO", ["has no config.json"], gone("config.json"), change)


def _weights() -> Iterator[BadInput]:
    safe, listed, old = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
    shards = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    alone = [gone(name) for name in (*shards, f"{old}.index.json")]

    def index(**weights: str) -> Maker:
        return both(gone(safe), text(listed, json.dumps({"weight_map": weights})))

    transformer: tuple[tuple[str, list[str], Maker], ...] = (
        ("half of the file", [safe, "cut short"], cut(safe, 0.5)),
        ("an empty file", [safe, "0 bytes"], cut(safe, 0)),
        ("a Git LFS pointer", [safe, "Git LFS pointer"], text(safe, POINTER)),
        ("no file", [safe], gone(safe)),
        ("a header of 2^63 bytes", [safe], first_length(2**63)),
        ("a header longer than the file", [safe], first_length(10**8)),
        ("another shape in the header", [safe], header(safe, first_tensor(shape=[1, 2, 3]))),
        ("an unknown dtype", [safe], header(safe, first_tensor(dtype="F99"))),
        ("a tensor of 2^60 bytes", [safe], header(safe, first_tensor(data_offsets=[0, 2**60]))),
        ("a tensor that ends early", [safe], header(safe, first_tensor(data_offsets=[8, 4]))),
        ("a tensor left out", [safe], header(safe, lambda head: head.pop(sorted(head)[-1]))),
        ("a number for a tensor", [safe], header(safe, lambda head: head.update(a=1))),
        ("a FIFO", [safe], both(gone(safe), pipe(safe))),
        ("a link to itself", [safe], both(gone(safe), link(safe, safe))),
        ("an index to ../..", ["which is not in"], index(a="../../x.safetensors")),
        ("an index to /etc/hostname", ["which is not in"], index(a="/etc/hostname")),
        ("an index to no file", ["which is not in"], index(a="b.safetensors")),
        ("an index of nothing", ["weight_map"], both(gone(safe), text(listed, "{}"))),
        ("an index, nested", ["nested too deeply"], both(gone(safe), text(listed, "[" * 100_000))),
    )
    encoder: tuple[tuple[str, list[str], Maker], ...] = (
        ("no tokenizer", ["spiece.model"], gone("spiece.model")),
        ("a pickle with code", [old, "holds code, not only tensors"], text(old, CODE)),
        ("a tar with code", [old, "tar archive"], tar(old)),
        ("4 bytes of a zip", [old, "corrupt or cut short"], text(old, b"PK\x03\x04")),
        ("a pickle of nothing", [old], text(old, b"\x80\x02}q\x00.")),
        ("a third of a shard", [shards[0]], cut(shards[0], 0.3)),
        ("no second shard", [shards[1]], gone(shards[1])),
    )
    for name, damaged in (("dit", transformer), ("t5", encoder)):
        for about, told, change in damaged:
            argv = ["generate", "--prompt", "x", "--num-frames", "1", *checkpoint(name)]
            first = alone if old in told else []
            makes = model(name, *first, change)
            yield BadInput("weights", argv, told, makes, heavy=True, about=f"{name}: {about}")


def _references() -> Iterator[BadInput]:
    for name, content, said in _PICTURES:
        yield BadInput(
            "references",
            ["generate", "--prompt", "x", "--image", f"{{tmp}}/{name}"],
            [name, *said],
            text(name, content),
            heavy=True,
        )
    image = ["generate", "--prompt", "x", "--image"]
    yield BadInput(
        "references", [*image, "{tmp}/pipe"], ["pipe", "not a file"], pipe("pipe"), heavy=True
    )
    yield BadInput("references", [*image, "/dev/zero"], ["/dev/zero", "not a file"], heavy=True)
    yield BadInput("references", [*image, "{tmp}"], ["not a file"], heavy=True)
    yield BadInput(
        "references",
        [*image, "{tmp}/loop.png"],
        ["loop.png"],
        link("loop.png", "loop.png"),
        heavy=True,
    )
    for flag in ("--extend", "--edit"):
        yield BadInput(
            "references",
            ["generate", "--prompt", "x", flag, "{tmp}/none.mp4"],
            ["none.mp4"],
            heavy=True,
        )
    for address, allowed, said in (
        ("http://example.com/a.png", [], ["--allow-remote"]),
        ("ftp://example.com/a.png", ["--allow-remote"], ["only http:// and https://"]),
        ("file:///etc/hostname", ["--allow-remote"], ["only http:// and https://"]),
        ("s3://bucket/a.png", ["--allow-remote"], ["only http:// and https://"]),
        ("http://127.0.0.1:1/a.png", ["--allow-remote"], ["--allow-private"]),
        ("http://[::1]:1/a.png", ["--allow-remote"], ["--allow-private"]),
        ("http://169.254.169.254/latest", ["--allow-remote"], ["--allow-private"]),
        ("http://user:secret@127.0.0.1:1/a.png", ["--allow-remote"], ["--allow-private"]),
        ("http:///a.png", ["--allow-remote"], []),
        ("http://[::1/a.png", ["--allow-remote"], []),
        ("http://127.0.0.1:99999/a.png", ["--allow-remote"], []),
    ):
        yield BadInput(
            "addresses",
            ["generate", "--prompt", "x", "--image", address, *allowed],
            said,
            heavy=True,
        )


def _environment() -> Iterator[BadInput]:
    two = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    two |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    changed = [("RANK", value) for value in ("5", "-1", "x")]
    changed += [("WORLD_SIZE", value) for value in ("0", "1000000000", DIGITS)]
    changed += [("MASTER_PORT", value) for value in ("x", "0", "99999")]
    for name, value in [*changed, ("LOCAL_RANK", "-3"), ("MASTER_ADDR", "")]:
        env = two | {name: value}
        yield BadInput("environment", ["generate", "--prompt", "x"], [name], env=env)


def _sweeps() -> Iterator[BadInput]:
    for content, said in (
        ("durations: [1]\nmeshes: [1x1]", "resolutions needs"),
        (SWEEP.replace("1x1", "3y1"), "3y1"),
        (SWEEP + "colour: 2", "'colour' is not a key"),
        (SWEEP + "point_timeout: soon", "point_timeout 'soon'"),
        (SWEEP.replace("144p", "../../x"), "'../../x' is not in the size table"),
        (SWEEP.replace("144p", "99999x8"), "99999"),
        (SWEEP.replace("17", "/tmp/x"), "'/tmp/x' is not"),
        (SWEEP.replace("1x1", "2x9999999"), "2x9999999"),
        (SWEEP.replace("[1x1]", "[]"), "meshes needs"),
        (SWEEP.replace("[144p]", "[]"), "resolutions needs"),
        (SWEEP.replace("[17]", "[]"), "durations needs"),
        ("[1, 2]", "sweep.yaml"),
        ("a: &a [*a]", "sweep.yaml"),
    ):
        yield BadInput(
            "sweep files",
            ["benchmark", "--prompt", "x", "--sweep", "{tmp}/sweep.yaml"],
            [said],
            text("sweep.yaml", content),
        )


def _reports() -> Iterator[BadInput]:
    for name, content, said in (
        ("none.json", None, "none.json"),
        ("empty.json", "", "empty.json"),
        ("object.json", "{}", "object.json"),
        ("list.json", "[1]", "list.json"),
        ("deep.json", "[" * 100_000, "nested"),
        ("nan.json", '{"run": NaN}', "NaN"),
        ("digits.json", '{"run": ' + DIGITS + "}", "5000 digits"),
        ("binary.json", b"\xff\xfe\0", "binary.json"),
    ):
        makes = None if content is None else text(name, content)
        yield BadInput("reports", ["compare", f"{{tmp}}/{name}", f"{{tmp}}/{name}"], [said], makes)
        yield BadInput(
            "reports",
            ["benchmark", "--prompt", "x", "--baseline", f"{{tmp}}/{name}"],
            [said],
            makes,
        )
    yield BadInput("reports", ["compare", "{tmp}/pipe", "{tmp}/pipe"], ["pipe"], pipe("pipe"))


def _commands() -> Iterator[BadInput]:
    heavy = ("convert", "download", "verify", "quality", "parity")
    for argv, told in _OTHER_COMMANDS:
        yield BadInput("commands", argv, told, heavy=argv[0] in heavy)


def _client() -> Iterator[BadInput]:
    for address in _SERVERS:
        yield BadInput("servers", ["jobs", "--server", address], ["--server", "not an address"])
    token = {"OPENSORA_SP_TOKEN": "a\nb"}
    yield BadInput("servers", ["jobs"], ["OPENSORA_SP_TOKEN"], env=token)
    for content, said in (
        (b"\xff\xfe", "UTF-8"),
        ("me:short", "16 or more"),
        (":" + "a" * 20, "name"),
    ):
        argv = ["jobs", "--token-file", "{tmp}/t"]
        yield BadInput("tokens", argv, ["--token-file", said], text("t", content))
    odd = text("t", "me:" + "\u00e9" * 20)
    yield BadInput("tokens", ["serve", "--token-file", "{tmp}/t"], ["no request can carry"], odd)
    for whose in ("serve", "jobs"):
        argv = [whose, "--token-file", "{tmp}/pipe"]
        yield BadInput("tokens", argv, ["--token-file", "a pipe"], pipe("pipe"))
    argv = ["submit", "--prompt", "x", "--image", "{tmp}/pipe"]
    yield BadInput("servers", argv, ["no regular file"], pipe("pipe"))


def _queues() -> Iterator[BadInput]:
    for argv, told in _QUEUES:
        yield BadInput("queues", ["work", *argv], told, heavy=True)


def _schedules() -> Iterator[BadInput]:
    argv = ["generate", "--prompt", "x", "--step-cache", "{tmp}/s.yaml"]
    right = {"name": "x", "steps": 30, "computed": [0, 1, 29], "fill": "hold"}
    for changed, said in _SCHEDULES:
        about, makes = json.dumps(changed), text("s.yaml", json.dumps([right | changed]))
        yield BadInput("schedules", argv, ["--step-cache", said], makes, about=about)
    for content, said in _SCHEDULE_FILES:
        makes = text("s.yaml", content)
        yield BadInput("schedules", argv, ["--step-cache", "s.yaml", said], makes, about=said)
    none = [*argv[:-1], "{tmp}/s.yaml:none"]
    makes = text("s.yaml", json.dumps([right]))
    yield BadInput("schedules", none, ["has no schedule 'none'"], makes)
    yield BadInput("schedules", argv, ["no regular file"], pipe("s.yaml"), about="a FIFO")
    near = [*argv[:-1], "near-losless"]
    yield BadInput("schedules", near, ["did you mean near-lossless"])


def _comparisons() -> Iterator[BadInput]:
    """Latents and pictures that are no pair."""

    def latents(body: bytes, **about: object) -> bytes:
        head = json.dumps(about).encode()
        return struct.pack("<Q", len(head)) + head + body

    def f32(*shape: int) -> dict[str, object]:
        size = 4
        for each in shape:
            size *= each
        return {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}

    endless = struct.pack("<16f", *[float("nan")] * 16)
    for about, content, said in (
        ("an empty file", b"", "not a whole file of saved latents"),
        ("a header of 2^63 bytes", struct.pack("<Q", 2**63) + b"{}", "not a whole file"),
        ("another tensor", latents(bytes(8), w=f32(2)), "no tensor called latents"),
        ("another shape", latents(bytes(8), latents=f32(2)), "holds latents [2]"),
        ("NaN", latents(endless, latents=f32(4, 1, 2, 2)), "NaN or infinite"),
    ):
        name = "a.safetensors"
        argv = ["quality", f"{{tmp}}/{name}", f"{{tmp}}/{name}"]
        yield BadInput("comparisons", argv, [said], text(name, content), heavy=True, about=about)
    small, wide = png(16, 16, bytes(16 * 49)), png(32, 16, bytes(16 * 97))
    for name, content, said in (
        ("b.png", wide, "nothing is scaled"),
        ("b.gif", gif(16, 16, 3), "compare two of one kind"),
        ("b.safetensors", b"x", "compare latents with latents"),
    ):
        argv = ["quality", "{tmp}/a.png", f"{{tmp}}/{name}"]
        makes = both(text("a.png", small), text(name, content))
        yield BadInput("comparisons", argv, [said], makes, heavy=True)


def _conversions() -> Iterator[BadInput]:
    def row(about: str, said: str, makes: Maker, *more: str, source: str = "one.txt") -> BadInput:
        argv = ["convert", "dit", f"{{tmp}}/{source}", "{tmp}/a/new", *more]
        return BadInput("conversions", argv, [said], makes, heavy=True, about=about)

    config = ("--config", "{tmp}/c.json")
    yield row("a FIFO", "neither a regular file", pipe("p.safetensors"), source="p.safetensors")
    yield row("no such file", "c.json cannot be read", text("x", ""), *config)
    yield row("a FIFO", "not a regular file", pipe("c.json"), *config)
    yield row("a list", "must hold a JSON object", text("c.json", "[1]"), *config)
    yield row("nested", "nested too deeply", text("c.json", "[" * 100_000), *config)
    yield row("a pickle with code", "holds code", text("a.pt", CODE), source="a.pt")
    yield row("a tar with code", "holds code", tar("a.pt"), source="a.pt")
    yield row("one byte", "corrupt", text("a.safetensors", b"x"), source="a.safetensors")
    index = text("d/model.safetensors.index.json", '{"weight_map": {"a": "../x"}}')
    yield row("an index to ..", "which is not in", index, source="d")
    words = text("d/x.bin", "")
    yield row("no weights", "holds no weights that are known", words, source="d")
    argv = ["convert", "dit", "{tmp}/one.txt", "{tmp}/l"]
    yield BadInput("conversions", argv, ["is there already"], link("l", "nowhere"), heavy=True)
    argv = ["convert", "dit", "{tmp}/one.txt", "{tmp}/one.txt/new"]
    yield BadInput("conversions", argv, ["one.txt is not a directory"], heavy=True)
    for about, content, said in (
        ("another model", '{"cases": {}}', "'cases' is not one of dit, t5, vae3d"),
        ("a list", "[]", "must hold a JSON object"),
        ("nested", "[" * 9999, "nested too deeply"),
    ):
        argv = ["verify", "--device", "cpu", "--reference", "{tmp}/s"]
        makes = text("s/manifest.json", content)
        yield BadInput("suites", argv, ["manifest.json", said], makes, heavy=True, about=about)
    for about, maker, said in (
        ("a FIFO", pipe("h"), "a pipe"),
        ("two hashes", text("h", f"{'0' * 64}  a\n{'1' * 64}  a\n"), "contradicts"),
        ("no UTF-8", text("h", b"\xff"), "UTF-8"),
        ("over 1 MiB", text("h", "#" * (2 << 20)), "larger than 1 MiB"),
    ):
        argv = ["download", "{tmp}/new", "--hashes", "{tmp}/h"]
        yield BadInput("downloads", argv, ["--hashes", said], maker, heavy=True, about=about)
    for address in ("http://[::1", "ftp://x", "x"):
        env = {"HF_ENDPOINT": address}
        argv = ["download", "{tmp}/new"]
        yield BadInput("downloads", argv, ["HF_ENDPOINT", address], env=env, heavy=True)


def rows() -> tuple[BadInput, ...]:
    """All of them."""
    parts = (
        _generate,
        _prompt_files,
        _yaml,
        _configs,
        _weights,
        _references,
        _environment,
        _sweeps,
        _reports,
        _commands,
        _client,
        _queues,
        _schedules,
        _comparisons,
        _conversions,
    )
    return tuple(row for part in parts for row in part())


# --- what is done with a row ---------------------------------------------------------------------


_UNSET: tuple[str, ...] = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "OPENAI_API_KEY",
    "HF_ENDPOINT",
)
_UNSET += ("OPENSORA_SP_SERVER", "OPENSORA_SP_TOKEN", "OPENSORA_SP_QUEUE")


@dataclass(frozen=True)
class Seen:
    """What came of a row. left: what is in its folder afterwards and was not before."""

    code: int
    out: str
    err: str
    left: tuple[str, ...]


def try_it(row: BadInput, folder: Path) -> Seen:
    """Run a row in this process, with an empty folder as its working directory."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    if row.makes is not None:
        row.makes(folder)
    argv = [
        word.replace("{tmp}", str(folder)).replace("{model}", str(EMBEDDED)) for word in row.argv
    ]
    if row.argv[0] == "generate" and "--save-dir" not in argv:
        argv += ["--save-dir", str(folder / "out")]
    before, out, err = _files(folder), io.StringIO(), io.StringIO()
    kept, here = dict(os.environ), Path.cwd()
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ.update(row.env)
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command(argv)
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(kept)
    return Seen(code, out.getvalue(), err.getvalue(), tuple(sorted(_files(folder) - before)))


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def wrong(row: BadInput, seen: Seen) -> str:
    """Why this is not how a bad input ends; empty where it is."""
    if seen.code != 2:
        return f"code {seen.code}"
    if seen.out:
        return f"standard output {seen.out[:200]!r}"
    *notes, line = seen.err.splitlines() or [""]
    if not line.startswith("error: ") or any(not note.startswith("note: ") for note in notes):
        return f"not one line: {seen.err[:300]!r}"
    if len(seen.err) > 900:
        return f"{len(seen.err)} characters"
    if not all(each.isprintable() for each in (line, *notes)):
        return f"control characters: {seen.err[:300]!r}"
    missing = [word for word in row.told if word not in seen.err]
    if missing:
        return f"{missing} is not in {seen.err[:400]!r}"
    if "secret" in seen.err or DIGITS[:1000] in seen.err:
        return f"shows what it must not: {seen.err[:300]!r}"
    return f"left {seen.left}" if seen.left else ""


def main() -> int:
    """Print the page."""
    lines, worst = [], 0
    for number, row in enumerate(rows()):
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            try:
                seen = try_it(row, Path(folder))
            except Exception as bug:
                seen = Seen(1, "", f"{type(bug).__name__}: {bug}", ())
            took = time.process_time() - began
            line = (
                seen.err.replace(folder + "/", "")
                .replace(folder, "FOLDER")
                .replace(str(EMBEDDED), "MODEL")
                .strip()
            )
        problem = wrong(row, seen)
        if problem or took > 1:
            print(f"{number} {given(row)[:200]}: {took:.1f} s {problem}", file=sys.stderr)
        worst = max(worst, bool(problem))
        lines.append(f"| {row.kind} | {cell(given(row))} | {cell(line)} |")
    print(HEAD.format(count=len(lines)) + "\n".join(lines))
    return worst


def given(row: BadInput) -> str:
    """A row's command, as the page shows it."""
    words = [
        word.replace("{tmp}/", "").replace("{tmp}", "FOLDER").replace("{model}", "MODEL")
        for word in row.argv
    ]
    words = [word for word in words if "ckpt-path" not in word and not word.startswith("MODEL/")]
    variables = [f"{name}={value}" for name, value in row.env.items()]
    quoted = [repr(word) if not word or " " in word else word for word in words]
    return " ".join([*variables, *quoted]) + (f"  ({row.about})" if row.about else "")


def cell(words: str) -> str:
    """Words in a cell of the page's table, cut where they are long."""
    words = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in words)
    words = words.replace("|", "\\|").replace("`", "'")
    return f"`{words if len(words) <= 160 else words[:120] + ' … ' + words[-30:]}`"


if __name__ == "__main__":
    sys.exit(main())
