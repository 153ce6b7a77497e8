"""Fuzzing of everything that reads bytes from people: each must end in a result or in one line.

    python tests/fuzz.py all --seconds 7200 --out docs/benchmarks/fuzzing.json
    python tests/fuzz.py pictures --seconds 300 --guided
    python tests/fuzz.py pictures --replay fuzz_findings/pictures-1a2b3c4d

The corpus is made here: small valid files of every kind. They are mutated (fuzz_mutators.py), and
each is read by the program's own functions in a child process with limits of memory and time. A
finding is whatever is no result and no one-line UserError: another exception, a message that is no
single printable line, a crash of the process, more than --case-seconds of CPU time, a minute in
which it only waits, or more than --memory-mb of memory. Its bytes are saved below --findings, to be
replayed. One of each kind is kept. The exit code is 1 where there are findings.

--seconds are of CPU time, spent on cases alone: neither imports nor the making of the corpus count.
The targets take turns of --turn seconds, so a run that is ended early has tried them all.

--guided mutates by coverage with Atheris (pip install atheris), where it can be installed. It sees
the Python code of this program; C libraries are mutated blindly, as without it.

With --out the run is added to those of the file, after every turn. Its random numbers go on where
those of the file end, so no run repeats the cases of an earlier one. `planted` is not for a record.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import platform
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(ROOT)]

from fuzz_mutators import mutate  # noqa: E402

from opensora_sp.base.errors import UserError  # noqa: E402

Reader = Callable[[bytes], None]
_REPORT_EVERY = 0.5  # s, between two counts of a child
LEAST_TURN = 0.5  # s of CPU time; what is left of a turn is not begun below it
_TO_BEGIN_S = 120.0  # of CPU time: imports and the corpus are no case


# --- targets -------------------------------------------------------------------------------------
# Each makes, in a folder: its corpus, and the function that reads bytes as the program does.


def pictures(folder: Path) -> tuple[list[bytes], Reader]:
    """Still and moving pictures as references."""
    import numpy as np
    from PIL import Image
    from whole_reference import read_reference

    from opensora_sp.media.reader import check_reference

    pixels = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3)).astype(np.uint8) // 64 * 64
    frames = [Image.fromarray(each) for each in pixels]
    kinds: list[tuple[str, dict[str, Any]]] = [
        (kind, {}) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "AVIF")
    ]
    kinds += [("TIFF", {"compression": one}) for one in ("tiff_lzw", "jpeg", "packbits")]
    moving = {"save_all": True, "append_images": frames[1:], "duration": 40}
    kinds += [(kind, moving) for kind in ("PNG", "GIF", "WEBP", "TIFF", "AVIF")]
    kinds += [("JPEG", {"progressive": True}), ("JPEG2000", {}), ("ICO", {})]
    corpus = []
    for kind, options in kinds:
        file = io.BytesIO()
        with contextlib.suppress(OSError, KeyError, ValueError):  # not in this build of Pillow
            frames[0].save(file, format=kind, **options)
            corpus.append(file.getvalue())
    for mode in ("L", "P", "RGBA", "1", "I;16", "LA"):
        file = io.BytesIO()
        frames[0].convert("L" if mode == "I;16" else mode).save(file, format="PNG")
        corpus.append(file.getvalue())

    def read(data: bytes) -> None:
        path = folder / "reference"
        path.write_bytes(data)
        check_reference(path)
        read_reference(path, 16, 16)

    return corpus, read


def watched(path: Path) -> Callable[[], bool]:
    """A function that says whether the file was opened since it was asked last, by inotify."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    when_opened = 0x20
    if handle < 0 or libc.inotify_add_watch(handle, os.fsencode(path), when_opened) < 0:
        raise OSError(ctypes.get_errno(), "the file cannot be watched")

    def opened() -> bool:
        try:
            return bool(os.read(handle, 4096))
        except BlockingIOError:
            return False

    path.read_bytes()
    assert opened(), "a file that is opened is not noticed"
    return opened


def videos(folder: Path) -> tuple[list[bytes], Reader]:
    """Videos as references, and playlists that name other files."""
    import av
    import numpy as np
    from whole_reference import read_reference

    from opensora_sp.media.reader import check_reference

    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    kinds = [
        ("mp4", "libx264", {}),
        ("mp4", "mpeg4", {"movflags": "faststart"}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("mov", "mpeg4", {}),
        ("matroska", "mpeg4", {}),
        ("webm", "libvpx-vp9", {}),
        ("avi", "mpeg4", {}),
        ("avi", "mjpeg", {}),
        ("mpegts", "mpeg2video", {}),
        ("gif", "gif", {}),
        ("flv", "flv", {}),
        ("nut", "ffv1", {}),
    ]
    corpus = []
    for container_kind, codec, options in kinds:
        file = io.BytesIO()
        try:
            with av.open(file, "w", format=container_kind, options=options) as container:
                stream: Any = container.add_stream(codec, rate=24)
                stream.height = stream.width = 32
                formats = stream.codec_context.codec.video_formats or []
                names = [one.name for one in formats]
                stream.pix_fmt = "yuv420p" if "yuv420p" in names or not names else names[0]
                for index, each in enumerate(pixels):
                    frame = av.VideoFrame.from_ndarray(each, format="rgb24")
                    frame.pts, frame.time_base = index, Fraction(1, 24)
                    container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
        except (av.FFmpegError, ValueError):  # not in this build of FFmpeg
            continue
        corpus.append(file.getvalue())
    secret = folder / "another-file"
    secret.write_bytes(corpus[0])
    opened = watched(secret)
    corpus += [
        f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n".encode(),
        f"<?xml version='1.0'?><MPD><BaseURL>{secret}</BaseURL></MPD>".encode(),
        b"YUV4MPEG2 W8 H8 F24:1 Ip A1:1 C420\nFRAME\n" + bytes(96),
    ]

    def read(data: bytes) -> None:
        path = folder / "reference"
        path.write_bytes(data)
        try:
            check_reference(path)
            read_reference(path, 16, 16)
        finally:
            if opened():
                raise AssertionError("another file was opened")

    return corpus, read


def safetensors(folder: Path) -> tuple[list[bytes], Reader]:
    """Weight files as .safetensors."""
    import torch
    from safetensors.torch import save

    from opensora_sp.models.checkpoint import WeightFiles

    corpus = [
        save({"a": torch.randn(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16)}),
        save({"a": torch.zeros(0), "b": torch.ones(1, dtype=torch.int64)}, {"format": "pt"}),
    ]

    def read(data: bytes) -> None:
        (folder / "model.safetensors").write_bytes(data)
        weights = WeightFiles.open(folder, "model")
        for name in weights.shapes:
            weights.get(name).float().sum()

    return corpus, read


def tensors(folder: Path) -> tuple[list[bytes], Reader]:
    """Weight files of torch.save, some of which hold code."""
    import pickle

    import torch

    from opensora_sp.models.checkpoint import WeightFiles

    mark = folder / "code-was-run"

    class Code:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(mark),))

    corpus = []
    values: list[Any] = [
        {"a": torch.randn(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16)},
        {"a": torch.nn.Parameter(torch.ones(2)), "n": {"deep": [1, 2.5, "x", None]}},
        {"a": torch.ones(2).to_sparse()},
        {"a": Code(), "b": torch.ones(1)},
    ]
    for value in values:
        for new in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=new)
            corpus.append(file.getvalue())
    corpus += [pickle.dumps(Code(), protocol) for protocol in range(6)]

    def read(data: bytes) -> None:
        (folder / "model.bin").write_bytes(data)
        try:
            weights = WeightFiles.open(folder, "model")
            for name in weights.shapes:
                weights.get(name).float().sum()
        finally:
            if mark.exists():
                mark.rmdir()
                raise AssertionError("code of the file was run")

    return corpus, read


def states(folder: Path) -> tuple[list[bytes], Reader]:
    """Saved states, half of them with a checksum that is made right again."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    from opensora_sp.engine.progress import Position
    from opensora_sp.jobs import saved_latents
    from opensora_sp.jobs.identity import identity_of, latents_identity
    from opensora_sp.request.request import EngineSettings, JobSettings, Request, Task

    request = Request(prompt="p", height=16, width=16, num_frames=34, loop=3)
    task = Task(request=request, output=folder / "a.mp4")
    identity = latents_identity(identity_of(task, EngineSettings(), JobSettings(), {"dit": "d"}))
    files = saved_latents.StateFiles(task.output, identity)
    shape = (4, 10, 2, 2)
    files.save_clip(0, torch.randn(shape))
    corpus = [files.clip_path(0).read_bytes()]
    files.save_step(Position(0, 10), saved_latents.SavedStep(torch.randn(shape), torch.ones(10)))
    corpus.append(files.step_path.read_bytes())
    files.save_step(Position(1, 3), saved_latents.SavedStep(torch.randn(shape), None))
    corpus.append(files.step_path.read_bytes())

    def sealed(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        about = json.loads(data[8 : 8 + length])["__metadata__"]
        found = load(data)
        about["checksum"] = saved_latents._checksum(about, found)
        return save(found, about)

    def read(data: bytes) -> None:
        if hashlib.sha256(data).digest()[0] % 2:
            unusable = (SafetensorError, ValueError, KeyError, TypeError, struct.error)
            with contextlib.suppress(*unusable, RecursionError, AttributeError, RuntimeError):
                data = sealed(data)
        for path in (files.step_path, files.clip_path(0)):
            path.write_bytes(data)
            with contextlib.suppress(UserError):
                position = files.position()
                assert 0 <= position.clip <= 3, position
                assert 0 <= position.step < 30, position
                assert files.load_step().z.isfinite().all()
            with contextlib.suppress(UserError):
                files.refined_prompt()
        saved_latents.read_latents(files.step_path)

    return corpus, read


def tokenizer(folder: Path) -> tuple[list[bytes], Reader]:
    """SentencePiece models (spiece.model)."""
    import sentencepiece

    from opensora_sp.models.text_pieces import load_pieces

    sentences = ["a red ball on blue water", "blue birds fly over a red sea", "a cat and a ball"]
    corpus = []
    for kind, size in (("unigram", 40), ("bpe", 45), ("char", 30)):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences * 20),
            model_writer=model,
            vocab_size=size,
            model_type=kind,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        corpus.append(model.getvalue())

    def read(data: bytes) -> None:
        (folder / "spiece.model").write_bytes(data)
        pieces = load_pieces(folder)
        for text in ("a red ball, é 猫 \u2581", ""):
            assert all(one >= 0 for one in pieces.encode(text))

    return corpus, read


def yaml(folder: Path) -> tuple[list[bytes], Reader]:
    """Configurations."""
    from opensora_sp.request.config_file import read_config
    from opensora_sp.request.settings import parse_command_line, resolve

    corpus = [path.read_bytes() for path in sorted((ROOT / "opensora_sp/configs").glob("*.yaml"))]
    corpus += [
        b"prompt: [a, 'b', \"c\\u00e9\"]\nseed: 5\nimage-size: [64, 64]\nnum_frames: 2s\n",
        b"%YAML 1.1\n---\nseed: !!int 5\nprompt: |\n  long\n  text\nloop: &a 2\nfps: *a\n...\n",
        b"? seed\n: 1\n? [a]\n: {b: c}\n",
        b"[" * 300,
        b"a: " * 300,
        b"- " * 300,
    ]

    def read(data: bytes) -> None:
        path = folder / "config.yaml"
        path.write_bytes(data)
        read_config(str(path))
        resolve(parse_command_line([f"--config={path}"]))

    return corpus, read


def prompts(folder: Path) -> tuple[list[bytes], Reader]:
    """Files of prompts. The last byte chooses the ending of the name."""
    from opensora_sp.request.prompt_files import read_prompt_file
    from opensora_sp.request.prompts import parse_prompt_json, split_loops

    endings = ("txt", "csv", "tsv", "json", "jsonl", "ndjson", "", "md")
    texts = [
        "a red ball\n# a comment\n|0|a|2|b\n",
        'prompt,seed,reference_path,mask_strategy\n"a, b",1,,0\nc,,"x.png",\n',
        "text\tseed\na\t5\n",
        "caption;seed\na;5\n",
        '[{"prompt": "a", "seed": 1}, {"text": "b", "mask_strategy": "0,0,0,0,1,0.5"}, "c"]',
        '{"prompt": "a"}\n"b"\n\n{"caption": "c", "ref": "x.png"}\n',
        'a{"reference_path": "a.png;b.png", "mask_strategy": "0;0,1,0,-1,1"}',
    ]
    corpus = [text.encode(kind) for text in texts for kind in ("utf-8", "utf-16", "utf-8-sig")]
    corpus += ["蓝色的球\n".encode("gbk"), "é\n".encode("cp1252")]
    corpus = [data + bytes([place]) for place, data in enumerate(corpus)]

    def read(data: bytes) -> None:
        path = folder / f"list.{endings[data[-1] % len(endings)] if data else ''}"
        path.write_bytes(data[:-1])
        for entry in read_prompt_file(str(path)).entries:
            with contextlib.suppress(UserError):
                split_loops(parse_prompt_json(entry.prompt).prompt)

    return corpus, read


def captions(_: Path) -> tuple[list[bytes], Reader]:
    """Caption cleaning, of texts as long as prompts may be."""
    from opensora_sp.request.captions import clean_caption
    from opensora_sp.request.prompts import LONGEST_TEXT

    texts = [
        "A <b>red</b> ball &amp; blue http://a.com/x.png 1920x1080 jc6640vc #12 page 3 …",
        "<person> this-is-my-cute-cat 12:30 ''quoted'' free shipping 1.2.3.4 @me",
        "%41%42+c &#65;&#x1F600; Ã© \u4e00 “x” — <!-- c --> <![CDATA[x]]> <!DOCTYPE a>",
        *(unit * 300 for unit in ("1.", "a.", "<a ", "aaa111", "&#", "a-", ". ", "<!", "a@")),
    ]

    def read(data: bytes) -> None:
        clean_caption.__wrapped__(data.decode("utf-8", "replace")[:LONGEST_TEXT])

    return [text.encode() for text in texts], read


def documents(folder: Path) -> tuple[list[bytes], Reader]:
    """JSON of others: checkpoints' config.json and indexes, reports, records, requests, answers."""
    from opensora_sp.benchmark.report.files import read_report
    from opensora_sp.jobs.records import read_record, record_path
    from opensora_sp.models import configs
    from opensora_sp.server.protocol import BadRequest, read_fields, read_json

    embedded = ROOT / "opensora_sp/assets/embedded"
    corpus = [path.read_bytes() for path in sorted(embedded.rglob("*.json"))]
    corpus = [data for data in corpus if len(data) < 10_000]
    corpus += [
        b'{"prompt": "a", "seconds": "4", "size": "64x48", "seed": 5, "n": 1, "model": "default"}',
        b'{"version": 1, "stage": "done", "digest": "x", "identity": {}, "size": 1, "mtime_ns": 2}',
        b'{"weight_map": {"a": "a.bin", "b": "../b.bin"}}',
        b'{"a":' * 70 + b"1" + b"}" * 70,
    ]
    report = ROOT / "docs/benchmarks"
    corpus += [
        p.read_bytes() for p in sorted(report.rglob("*.json"))[:40] if p.stat().st_size < 9000
    ]
    (folder / "a.bin").touch()
    output = folder / "a.mp4"
    record_path(output).parent.mkdir(exist_ok=True)

    def read(data: bytes) -> None:
        for name in ("config.json", "x.index.json", "report.json"):
            (folder / name).write_bytes(data)
        record_path(output).write_bytes(data)
        for look in (
            lambda: configs.read_dit(folder),
            lambda: configs.read_t5(folder),
            lambda: configs.read_vae2d(folder),
            lambda: configs.read_vae3d(folder),
            lambda: configs.read_shards(folder / "x.index.json"),
            lambda: read_report(str(folder / "report.json"), "--baseline"),
            lambda: read_record(output),
        ):
            try:
                look()
            except UserError as error:
                check_line(str(error))
        try:
            read_fields(read_json(data))
        except BadRequest as error:
            raise UserError(str(error)) from None

    return corpus, read


def planted(folder: Path) -> tuple[list[bytes], Reader]:
    """A fault of every kind, each by its name, to see that it is found: not among `all`."""
    secret = folder / "another-file"
    secret.touch()
    opened = watched(secret)

    def read(data: bytes) -> None:
        match data:
            case b"exception":
                raise IndexError("an exception")
            case b"long line":
                raise UserError("a line of " + "a" * 5000)
            case b"memory":
                bytearray(b"x") * (150 << 20)  # more than --memory-mb 50
            case b"much memory":
                bytearray(8 << 30)
            case b"hang":
                while True:
                    pass
            case b"wait":
                signal.pause()
            case b"crash":
                os.abort()
            case b"other file":
                secret.read_bytes()
                if opened():
                    raise AssertionError("another file was opened")

    return [b"a fine case", b"another one"], read


TARGETS: dict[str, Callable[[Path], tuple[list[bytes], Reader]]] = {
    one.__name__: one
    for one in (
        *(pictures, videos, safetensors, tensors, states),
        *(tokenizer, yaml, prompts, captions, documents),
    )
}


# --- a case --------------------------------------------------------------------------------------


def check_line(said: str) -> None:
    """Raise AssertionError for a message that is no single printable line of a readable length."""
    if not said.strip() or not said.isprintable() or len(said) > 2000:
        raise AssertionError(f"the message is no readable line: {ascii(said)[:300]}")


def trouble(read: Reader, data: bytes) -> tuple[str, str] | None:
    """The kind and the details of what is wrong with one case; None where it ends well."""
    try:
        try:
            read(data)
        except UserError as error:
            check_line(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "fuzz" not in f.filename), frames[-1])
        kind = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
        return kind, "".join(traceback.format_exception(error))[-3000:]
    return None


def _peak_kb() -> int:
    # Not ru_maxrss: that of a new process begins with what its parent had.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


class Child:
    """The process that reads the cases. It tells its parent, in lines of JSON, how it goes."""

    def __init__(self, target: str, folder: Path, memory_mb: int) -> None:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        self.corpus, self._read = (TARGETS | {"planted": planted})[target](folder)
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)  # libraries in C write to it
        os.dup2(silent, 2)
        self._current = os.open(folder / "current", os.O_RDWR | os.O_CREAT)
        self.count, self._told, self._began = 0, 0.0, 0.0
        self._memory_kb = memory_mb * 1024
        for data in self.corpus:
            trouble(self._read, data)  # imports and caches
        self._most_kb = _peak_kb() + self._memory_kb
        address_space = (
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        )
        # More: address space is reserved that is never used, most of it by the decoders' threads.
        limit = address_space + 4 * self._memory_kb * 1024
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        self._began = time.process_time()
        self._tell()

    @property
    def spent(self) -> float:
        """Seconds of CPU time since it was ready."""
        return time.process_time() - self._began

    def _tell(self, **said: Any) -> None:
        counts = {"count": self.count, "began": self._began}
        self._out.write(json.dumps(counts | said) + "\n")

    def case(self, data: bytes) -> None:
        """Read one case. What is wrong with it is told; the case lies in the file `current`."""
        os.ftruncate(self._current, 0)
        os.pwrite(self._current, data, 0)
        self.count += 1
        found = trouble(self._read, data)
        if found is None and _peak_kb() > self._most_kb:
            grown = (_peak_kb() - self._most_kb + self._memory_kb) // 1024
            found = ("memory", f"the process grew by {grown} MB")
        self._most_kb = max(self._most_kb, _peak_kb())
        if found is not None:
            self._tell(kind=found[0], details=found[1], data=data.hex())
        elif time.monotonic() - self._told > _REPORT_EVERY:
            self._told = time.monotonic()
            self._tell()

    def run(self, seed: int, seconds: float) -> None:
        """Mutations by chance until the time is over."""
        rng = random.Random(seed)
        while self.spent < seconds:
            try:
                data = mutate(rng, rng.choice(self.corpus), self.corpus)
            except Exception:  # a fault of the mutators, which must not end in silence
                self._tell(kind="the mutators failed", details=traceback.format_exc(), data="")
                continue
            self.case(data)
        self._tell()

    def run_guided(self, seed: int, seconds: float, folder: Path) -> None:
        """Mutations by coverage, with Atheris, until the time is over. It ends the process."""
        import atheris

        def case(data: bytes) -> None:
            self.case(data)
            if self.spent >= seconds:
                self._tell()
                os._exit(0)

        seeds = folder / "corpus"
        seeds.mkdir()
        for number, data in enumerate(self.corpus):
            (seeds / str(number)).write_bytes(data)

        def mutator(data: bytes, most: int, number: int) -> bytes:
            rng = random.Random(number)
            if rng.random() < 0.5:
                return bytes(atheris.Mutate(data, most))
            return mutate(rng, data, self.corpus)[:most]

        # libFuzzer takes seed 0 for none. The parent keeps the limits of time and memory.
        flags = [f"-seed={seed + 1}", "-max_len=400000", "-rss_limit_mb=0", "-timeout=100000"]
        flags += ["-detect_leaks=0", f"-artifact_prefix={folder}/"]
        atheris.Setup([sys.argv[0], *flags, str(seeds)], case, custom_mutator=mutator)
        atheris.Fuzz()


def child_main(options: argparse.Namespace) -> None:
    """What a child process does."""
    target, memory_mb = options.target, options.memory_mb
    with tempfile.TemporaryDirectory(dir=os.environ["FUZZ_FOLDER"]) as name:
        folder = Path(name)
        link = Path(os.environ["FUZZ_FOLDER"]) / "current"
        link.unlink(missing_ok=True)
        link.symlink_to(folder / "current")
        if options.replay is not None:
            Child(target, folder, memory_mb).case(options.replay.read_bytes())
        elif options.guided:
            import atheris

            with atheris.instrument_imports(include=["opensora_sp"]):
                child = Child(target, folder, memory_mb)
            child.run_guided(options.seed, options.seconds, folder)
        else:
            Child(target, folder, memory_mb).run(options.seed, options.seconds)


# --- the parent ----------------------------------------------------------------------------------


def _state(pid: int) -> tuple[float, bool]:
    """The CPU seconds of a process, and whether it runs or would if it were its turn."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, True
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] == "R"


class Limits:
    """What a child may take between two words of its own: CPU time, and time in which it waits."""

    def __init__(self, pid: int, case_seconds: float, still_seconds: float) -> None:
        self._pid, self._case_seconds, self._still_seconds = pid, case_seconds, still_seconds
        self._allowed, self._last = _TO_BEGIN_S, 0.0
        self._spent, self._moved = 0.0, time.monotonic()

    def heard(self) -> None:
        """It said something: its time begins anew."""
        self._last, self._allowed = _state(self._pid)[0], self._case_seconds
        self._moved = time.monotonic()

    def over(self) -> str | None:
        """What it took too much of, or None. Waiting for a processor is no waiting."""
        spent, runs = _state(self._pid)
        if runs or spent > self._spent:
            self._spent, self._moved = max(spent, self._spent), time.monotonic()
        if spent - self._last > self._allowed:
            return f"more than {self._allowed:.0f} s of CPU time"
        if time.monotonic() - self._moved > self._still_seconds:
            return f"nothing but waiting for {self._still_seconds:.0f} s"
        return None


class Campaign:
    """The fuzzing of one target: child after child, until the time is over."""

    def __init__(self, target: str, options: argparse.Namespace, seed: int) -> None:
        self.target, self._options, self._seed = target, options, seed
        self.cases, self.cpu_seconds, self.children = 0, 0.0, 0
        self.stuck = False  # a child ended before its first case: no other is tried
        self.findings: dict[str, dict[str, Any]] = {}

    def keep(self, kind: str, details: str, data: bytes) -> None:
        """Keep the first case of a kind, as a file, and count the others."""
        if kind in self.findings:
            self.findings[kind]["times"] += 1
            return
        name = f"{self.target}-{hashlib.sha256(data).hexdigest()[:8]}"
        self._options.findings.mkdir(parents=True, exist_ok=True)
        (self._options.findings / name).write_bytes(data)
        self.findings[kind] = {"times": 1, "file": name, "details": details}
        print(f"FINDING {self.target}: {kind} ({name})\n{details}", flush=True)

    def run(self, seconds: float) -> None:
        """Fuzz for so many more seconds of CPU time, with limits for every case."""
        end = self.cpu_seconds + seconds
        while end - self.cpu_seconds > LEAST_TURN and not self.stuck:
            self._one_child(end - self.cpu_seconds)

    def replay(self, file: Path) -> None:
        """Read one case in a child, with the same limits."""
        self._one_child(0, file)

    def _one_child(self, seconds: float, file: Path | None = None) -> None:
        with tempfile.TemporaryDirectory(prefix="opensora-sp-fuzz-") as folder:
            seed = self._seed + self.children
            command = [sys.executable, __file__, self.target, "--child", "--seed", str(seed)]
            command += ["--seconds", str(seconds), "--memory-mb", str(self._options.memory_mb)]
            command += ["--guided"] if self._options.guided else []
            command += ["--replay", str(file)] if file is not None else []
            environment = os.environ | {
                "FUZZ_FOLDER": folder,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            }
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
            self.children += 1
            self._began: float | None = None
            why = self._listen(process)
            said = process.stderr.read().decode(errors="replace") if process.stderr else ""
            _, status, usage = os.wait4(process.pid, 0)
            code = process.returncode = os.waitstatus_to_exitcode(status)
            if self._began is None:
                self.stuck = True
            else:
                self.cpu_seconds += max(0.0, usage.ru_utime + usage.ru_stime - self._began)
            current = Path(folder) / "current"
            data = current.read_bytes() if current.exists() else b""
            if why is None and code != 0:
                why = f"the process ended with {code}"
            if why is not None:
                self.keep(why, said[-2000:], data)

    def _listen(self, process: subprocess.Popen[bytes]) -> str | None:
        """Take the child's words until it ends; why it was ended, if it was."""
        assert process.stdout is not None
        cases = self.cases
        options, pending = self._options, b""
        limits = Limits(process.pid, options.case_seconds, options.still_seconds)
        while True:
            if select.select([process.stdout], [], [], 0.2)[0]:
                block = os.read(process.stdout.fileno(), 1 << 20)
                if not block:
                    return None
                limits.heard()
                *lines, pending = (pending + block).split(b"\n")
                for line in lines:
                    said = json.loads(line)
                    self.cases = cases + said["count"]
                    self._began = said["began"]
                    if "kind" in said:
                        self.keep(said["kind"], said["details"], bytes.fromhex(said["data"]))
            elif (why := limits.over()) is not None:
                process.kill()
                return why

    def report(self) -> dict[str, Any]:
        """What was done and found."""
        return {
            "cases": self.cases,
            "cpu_seconds": round(self.cpu_seconds, 1),
            "children": self.children,
            "findings": {kind: one["times"] for kind, one in sorted(self.findings.items())},
        }


# --- the record ----------------------------------------------------------------------------------


def read_runs(out: Path | None) -> list[dict[str, Any]]:
    """The runs that a record holds; none where there is no record yet."""
    if out is None or not out.exists():
        return []
    runs: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["runs"]
    return runs


def children_of(runs: list[dict[str, Any]], target: str) -> int:
    """How many children these runs had for a target: their seeds are used up."""
    return sum(run["targets"][target]["children"] for run in runs if target in run["targets"])


def write_runs(out: Path, runs: list[dict[str, Any]]) -> None:
    """Write a record with its sums, whole or not at all."""
    sums: dict[str, dict[str, Any]] = {}
    for run in runs:
        for target, one in run["targets"].items():
            found = sums.setdefault(target, {"cases": 0, "cpu_seconds": 0.0, "guided_seconds": 0.0})
            found["cases"] += one["cases"]
            seconds = found["cpu_seconds"] + one["cpu_seconds"]
            found["cpu_seconds"] = round(seconds, 1)
            guided = found["guided_seconds"] + one["cpu_seconds"] * run["guided"]
            found["guided_seconds"] = round(guided, 1)
    record = {
        "cases": sum(one["cases"] for one in sums.values()),
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in sums.values()), 1),
        "targets": sums,
        "runs": runs,
    }
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


def _commit() -> str | None:
    """The state of the code, where git is at hand; `-dirty` where files differ from the commit."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def fuzz(options: argparse.Namespace, chosen: list[str]) -> list[Campaign]:
    """Fuzz the targets in turn until the time is over, and keep the record after every turn."""
    earlier = read_runs(options.out)
    campaigns = [
        Campaign(target, options, options.seed + children_of(earlier, target)) for target in chosen
    ]
    run = {
        "begun": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "python": platform.python_version(),
        "guided": options.guided,
        "seed": options.seed,
    }
    each = options.seconds / len(chosen)
    while any(one.cpu_seconds < each - LEAST_TURN and not one.stuck for one in campaigns):
        for campaign in campaigns:
            campaign.run(min(options.turn, each - campaign.cpu_seconds))
            if options.out is not None:
                reports = {one.target: one.report() for one in campaigns if one.children}
                write_runs(options.out, [*earlier, run | {"targets": reports}])
    return campaigns


def main() -> int:
    """Fuzz one target, or all of them one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=[*TARGETS, "all", "planted"])
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of all targets")
    parser.add_argument("--turn", type=float, default=120, help="CPU time of a target at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="by coverage, with Atheris")
    parser.add_argument("--memory-mb", type=int, default=1600, help="of one case")
    parser.add_argument("--case-seconds", type=float, default=20, help="CPU time of one case")
    parser.add_argument("--still-seconds", type=float, default=60, help="in which it only waits")
    parser.add_argument("--findings", type=Path, default=Path("fuzz_findings"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child_main(options)
        return 0
    if options.replay is not None:
        campaign = Campaign(options.target, options, options.seed)
        campaign.replay(options.replay.resolve())
        print("it ends well" if not campaign.findings else "it does not end well")
        return 1 if campaign.findings else 0
    if not options.turn > LEAST_TURN:
        parser.error(f"--turn {options.turn:g}: give more than {LEAST_TURN} seconds")
    if options.target == "planted" and options.out is not None:
        parser.error("planted faults are not for a record: leave --out away")
    chosen = list(TARGETS) if options.target == "all" else [options.target]
    campaigns = fuzz(options, chosen)
    for campaign in campaigns:
        print(f"{campaign.target}: {json.dumps(campaign.report())}", flush=True)
    return 1 if any(one.findings for one in campaigns) else 0


if __name__ == "__main__":
    sys.exit(main())
