"""Properties of what people, files and clients give: read as it was written, or one line.

Text, bytes and files are drawn, so each property holds for more than the cases that a person
thinks of. The suite tries a sample; tests/properties.py tries as many as it has time for.
"""

from __future__ import annotations

import contextlib
import csv
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from plain_captions import clean_plainly
from sampled import few, floats

from opensora_sp.base.deadlines import DEADLINES, parse_deadlines
from opensora_sp.base.errors import CheckpointError, UserError
from opensora_sp.base.outside_json import NotJson, parse_json
from opensora_sp.base.value_types import shown
from opensora_sp.engine.progress import Position
from opensora_sp.jobs.identity import identity_of, latents_identity
from opensora_sp.jobs.records import Record, read_record, record_path, write_record
from opensora_sp.jobs.saved_latents import SavedStep, StateFiles, read_latents
from opensora_sp.models.configs import read_shards
from opensora_sp.request.captions import clean_caption
from opensora_sp.request.config_file import read_config, write_config
from opensora_sp.request.flags.table import all_flags
from opensora_sp.request.prompt_files import read_prompt_file
from opensora_sp.request.prompts import parse_prompt_json, split_loops
from opensora_sp.request.request import EngineSettings, JobSettings, Request, Task
from opensora_sp.request.settings import parse_command_line, resolve
from opensora_sp.request.sizes import (
    aspect_ratios,
    durations,
    resolutions,
    resolve_frames,
    resolve_size,
)

FLAGS = {flag.key: flag for flag in all_flags() if not flag.control}


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="opensora-sp-properties-")


def folder() -> Path:
    """One for all cases, for a thousand folders would take longer than what is tested."""
    return Path(_folder().name)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """What is refused in here is refused in one line that can be printed and read."""
    try:
        yield
    except UserError as error:
        assert_one_line(str(error))


def assert_one_line(said: str) -> None:
    assert said.strip()
    assert said.isprintable(), ascii(said)
    assert len(said) < 1500


def mixed(*pieces: str, most: int = 40) -> st.SearchStrategy[str]:
    """Text of these pieces and of any characters."""
    return st.lists(
        st.sampled_from(pieces) | st.text(max_size=3) | st.characters(), max_size=most
    ).map("".join)


# --- captions ------------------------------------------------------------------------------------

CAPTIONS = mixed(
    *"aB1.-_ /@#:'\"(+—“éﬁ\u4e00\u0130\x1f\u2028",
    *("  ", "\\n", "%41", "http://", "https:", "www:", ".com", ".co", ".mp4", "<person>", "<b>"),
    *("<a ", "</", "<!--", "-->", "&amp;", "&quot", "&#65;", "&#", "1.2.3.4", "123456", "#12"),
    *("jc6640", "1920x1080", "free shipping", "download", "click on it", "page 12", "Ã©", "12:30 "),
    *("aaa111", "x2y", "<!DOCTYPE", "<?php", "]]>"),
)


@few(40)
@given(text=CAPTIONS)
@example(text="<!DOCTYPE[")
@example(text="&#xd800;")
def test_a_caption_is_what_the_plain_rules_make_of_it(text: str) -> None:
    with one_line():
        cleaned = clean_caption.__wrapped__(text)
        assert cleaned == clean_plainly(text)
        assert max(cleaned, default="") < "\ud800" or max(cleaned, default="") > "\udfff"
        cleaned.encode("utf-8")


# --- prompts -------------------------------------------------------------------------------------


@given(
    text=mixed(
        *'{}":,[|0',
        *('{"reference_path": "a"}', '{"mask_strategy": "0"', "null", "|0|", "|1|", "9" * 20),
        *("\\ud800", "NaN", "1e999", '"mask_strategy"'),
    )
)
def test_any_prompt_is_read_or_refused_in_one_line(text: str) -> None:
    with one_line():
        got = parse_prompt_json(text)
        assert got.prompt == text.partition("{")[0]
        assert isinstance(got.reference_path, str)
        assert isinstance(got.mask_strategy, str)
    with one_line():
        segments = split_loops(text)
        assert 0 in segments or text.startswith("|0")
        assert all(isinstance(clip, int) and clip >= 0 for clip in segments)


# --- prompt files --------------------------------------------------------------------------------

line_text = st.text(
    st.characters(exclude_characters="\n\r\0\ufeff", exclude_categories=["Cs"]), max_size=20
).filter(lambda text: text.strip())
seeds = st.none() | st.integers(0, 2**63 - 1)


@few(15)
@given(prompts=st.lists(st.tuples(line_text, seeds), min_size=1, max_size=6))
def test_a_prompt_file_is_read_as_it_was_written(prompts: list[tuple[str, int | None]]) -> None:
    def entries(path: Path) -> list[tuple[int, str, Any]]:
        return [(e.index, e.prompt, e.own.get("seed")) for e in read_prompt_file(str(path)).entries]

    expected = [(i, text.strip(), seed) for i, (text, seed) in enumerate(prompts)]
    objects = [{"prompt": t} | ({} if s is None else {"seed": s}) for t, s in prompts]
    for name, content in {
        "a.json": json.dumps(objects),
        "b.json": json.dumps(objects, ensure_ascii=False),
        "a.jsonl": "\n".join(map(json.dumps, objects)),
    }.items():
        (folder() / name).write_text(content, encoding="utf-8", newline="")
        assert entries(folder() / name) == expected
    for name, delimiter in (("a.csv", ","), ("b.csv", ";"), ("a.tsv", "\t")):
        with (folder() / name).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow(["prompt", "seed"])
            table.writerows([[t, "" if s is None else s] for t, s in prompts])
        assert entries(folder() / name) == expected


BYTES = st.one_of(
    st.binary(max_size=60),
    mixed(*',;:\t\n\r"{}[', '["', '"]', "prompt", "seed", "# ").map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
    mixed("prompt,seed\n", "a", ",1", "\n", '"').map(lambda t: t.encode("utf-16", "surrogatepass")),
)


@given(content=BYTES, ending=st.sampled_from(["txt", "csv", "tsv", "json", "jsonl", "", "yaml"]))
@example(content=b"prompt\n" + b'"' + b"a" * 140_000, ending="csv")
def test_any_file_is_prompts_or_one_line(content: bytes, ending: str) -> None:
    path = folder() / f"any.{ending}"
    path.write_bytes(content)
    with one_line():
        for entry in read_prompt_file(str(path)).entries:
            assert entry.prompt == entry.prompt.strip() != ""


# --- YAML ----------------------------------------------------------------------------------------

VALUES: dict[str, st.SearchStrategy[str]] = {
    "num_sampling_steps": st.integers(1, 1000).map(str),
    "cfg_scale": floats(1, 100).map(str),
    "seed": st.integers(0, 2**63 - 1).map(str),
    "fps": st.integers(1, 1000).map(str),
    "loop": st.integers(1, 9).map(str),
    "aes": st.none().map(lambda _: "none") | floats(0, 10).map(str),
    "aspect_ratio": st.sampled_from(["9:16", "1:1", "3:4"]),
    "camera_motion": st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
        lambda text: text.strip()
    ),
    "lossless": st.sampled_from(["true", "false", "yes", "n", "0"]),
    "sample_name": st.text("abc09_", min_size=1, max_size=9),
    "dtype": st.sampled_from(["bf16", "fp32"]),
    "verbose": st.sampled_from(["0", "1", "2"]),
}
OWN_VALUES = {key: values for key, values in VALUES.items() if key in FLAGS}


@st.composite
def two_sources(draw: st.DrawFn) -> tuple[dict[str, str], dict[str, str]]:
    keys = st.lists(st.sampled_from(sorted(OWN_VALUES)), unique=True)
    return tuple({key: draw(OWN_VALUES[key]) for key in draw(keys)} for _ in range(2))  # type: ignore[return-value]


@few(15)
@given(sources=two_sources(), dashes=st.booleans())
def test_a_flag_wins_over_the_file_and_the_file_over_the_default(
    sources: tuple[dict[str, str], dict[str, str]], dashes: bool
) -> None:
    in_file, typed = sources
    path = folder() / "merged.yaml"
    path.write_text(
        write_config({k.replace("_", "-") if dashes else k: v for k, v in in_file.items()}),
        encoding="utf-8",
    )
    argv = [word for key, value in typed.items() for word in (f"--{key}={value}",)]
    with one_line():
        got = resolve(parse_command_line([f"--config={path}", *argv]))
        plain = resolve(parse_command_line([]))
        for key, flag in FLAGS.items():
            text = typed.get(key, in_file.get(key))
            if text is None:
                assert got[key] == plain[key]
            elif key != "num_frames":
                assert got[key] == flag.kind.parse(flag.name, text)


YAML = mixed(
    *"[]{}?'\"|>,\t\n",
    *("a: b", "- ", "? ", "&a ", "*a", "!!int ", "!!python/", "%YAML 1.1", "---", "...", "seed"),
    *(": ", "\\U00110000"),
)


@given(text=YAML)
@example(text="[" * 5000)
@example(text="a: &a [*a]")
def test_any_yaml_is_keys_with_text_or_one_line(text: str) -> None:
    path = folder() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with one_line():
        for key, value in read_config(str(path)).items():
            assert isinstance(key, str)
            for one in value if isinstance(value, list) else [value]:
                assert one is None or isinstance(one, str)


# --- value types and sizes -----------------------------------------------------------------------

NUMBERS = mixed(*"1-+._:e ٣", "E9", "nan", "inf", "0x1", "true", "none", "9" * 400, most=8)


@given(key=st.sampled_from(sorted(FLAGS)), text=NUMBERS)
@example(key="cfg_scale", text="1" * 5000)
@example(key="seed", text="9" * 5000)
def test_any_text_is_a_legal_value_or_one_line(key: str, text: str) -> None:
    kind = FLAGS[key].kind
    with one_line():
        value = kind.parse(FLAGS[key].name, text)
        kind.check(FLAGS[key].name, value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert kind.parse(FLAGS[key].name, repr(value)) == value


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    )
)
def test_any_value_is_shown_on_one_short_line(value: Any) -> None:
    assert len(shown(value)) <= 80
    assert shown(value).isprintable()
    for key, flag in FLAGS.items():
        if key in ("seed", "cfg_scale", "sample_name", "save_dir", "lossless"):
            with one_line():
                flag.kind.check(flag.name, value)
                assert not isinstance(value, (list, dict, bytes))


@given(
    resolution=st.sampled_from([*resolutions(), "144P ", "8k", ""]),
    ratio=st.sampled_from(["9:16", "16:9", "1:1", "3:4", "0.5", ""]) | st.text(max_size=5),
    frames=st.sampled_from(sorted(durations())) | NUMBERS | st.integers(),
)
def test_a_size_is_one_of_the_table_or_one_line(
    resolution: str, ratio: str, frames: str | int
) -> None:
    with one_line():
        size = resolve_size(resolution, ratio)
        assert size == aspect_ratios(resolution.strip().lower())[ratio.strip()]
        assert min(size) >= 16
    with one_line():
        count = resolve_frames(frames)
        assert 1 <= count <= 100_000


@given(text=mixed("step=", "5", "decode", "=off", ",", ";", "nan", "inf", "1e300", "-", most=8))
def test_deadlines_are_within_their_range_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        found = parse_deadlines(text)
        assert set(found) == set(DEADLINES)
        assert all(seconds > 0 for seconds in found.values())  # False for NaN


# --- JSON ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**38), 10**38)
    | floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@few(40)
@given(value=JSON, ascii_only=st.booleans())
def test_json_is_read_as_it_was_written(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text) == value
    with contextlib.suppress(UnicodeEncodeError):
        assert parse_json(text.encode()) == value


@given(text=mixed(*'[]},"1-:', '{"a":', "e9", "NaN", "\\u", "d800", "null"))
@example(text="[" * 100_000)
@example(text='{"a":1,"a":1}')
@example(text="1e400")
def test_any_text_is_json_or_not(text: str) -> None:
    with contextlib.suppress(NotJson):
        value = parse_json(text)
        assert json.loads(text) == value
        assert json.loads(json.dumps(value, allow_nan=False)) == value


@few(40)
@given(value=JSON, shards=st.dictionaries(st.text(max_size=5), JSON | st.just("a.bin"), max_size=4))
@example(value=None, shards={"w": "../x.bin"})
@example(value=None, shards={"w": "a" * 300})
@example(value=None, shards={"w": ["a.bin"]})
def test_an_index_names_neighbours_only(value: Any, shards: dict[str, Any]) -> None:
    index = folder() / "model.bin.index.json"
    (folder() / "a.bin").touch()
    for content in (value, {"weight_map": value}, {"weight_map": shards}):
        index.write_text(json.dumps(content))
        try:
            found = read_shards(index)
        except CheckpointError as error:
            assert_one_line(str(error))
        else:
            assert all((folder() / name).parent == folder() for name in found.values())
            assert all((folder() / name).is_file() for name in found.values())


FIELDS = "prompt seconds size seed n model priority fps image steps x resolution aspect_ratio"
FIELDS += " num_frames guidance_scale cfg_scale loop"
BODIES = st.dictionaries(
    st.sampled_from(FIELDS.split()),
    st.sampled_from(["a", "4", "64x48", "", "none", "16", 4, 0, -1, 1.5, True, None, [], {}])
    | JSON,
    max_size=6,
)


@given(body=BODIES)
@example(body={"prompt": "a", "seconds": "9" * 400})
@example(body={"prompt": "a", "fps": 1e300})
def test_any_request_to_the_server_is_arguments_or_one_line(body: dict[str, Any]) -> None:
    from opensora_sp.server.protocol import BadRequest, read_fields, read_json

    try:
        asked = read_fields(read_json(json.dumps({"prompt": "a"} | body).encode()))
    except BadRequest as error:
        assert_one_line(str(error))
    else:
        assert all(isinstance(word, str) and "\0" not in word for word in asked.arguments)
        assert 1 <= asked.priority <= 1000
        with one_line():
            resolve(parse_command_line(asked.arguments))


# --- files of an earlier run ---------------------------------------------------------------------

SHAPE = (4, 10, 2, 2)


@cache
def state() -> tuple[StateFiles, bytes, bytes, Record]:
    """A state with one clip and a step of the second, and the bytes of the step and of a record."""
    request = Request(prompt="p", height=16, width=16, num_frames=34, loop=3, steps=100)
    task = Task(request=request, output=folder() / "a.mp4")
    identity = latents_identity(identity_of(task, EngineSettings(), JobSettings(), {"dit": "d"}))
    made = StateFiles(task.output, identity)
    made.save_clip(0, torch.randn(SHAPE))
    made.save_step(Position(1, 10), SavedStep(torch.randn(SHAPE), torch.ones(10)))
    task.output.write_bytes(b"a video")
    write_record(task.output, identity, "done")
    record = read_record(task.output)
    assert record is not None
    return made, made.step_path.read_bytes(), record_path(task.output).read_bytes(), record


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bytes changed, cut, put in, taken out or repeated, at up to three places."""
    kinds = ["set", "flip", "cut", "insert", "remove", "copy", *["digit"] * 4]
    places = floats(0, 1, exclude_max=True)
    steps = draw(
        st.lists(
            st.tuples(st.sampled_from(kinds), places, places, st.integers(0, 255)),
            min_size=1,
            max_size=3,
        )
    )

    def apply(content: bytes) -> bytes:
        data = bytearray(content)
        for kind, first, second, value in steps:
            # Headers are at the beginning, and matter most.
            at, other = int(len(data) * first**2), int(len(data) * second)
            if kind == "set" and data:
                data[at] = value
            elif kind == "flip" and data:
                data[at] ^= 1 << value % 8
            elif kind == "cut":
                del data[at:]
            elif kind == "digit":
                # The beginning of a value that says where a state stands, or what it is.
                keys = (b'"step":"', b'"clip":"', b'"size": ', b'"checksum":"', b'"latents":')
                found = data.find(keys[value % len(keys)])
                data[found + 8 : found + 9] = b"%d" % (value // 5 % 10)
            elif kind == "insert":
                data[at:at] = bytes([value]) * (1 + value % 3)
            elif kind == "remove":
                del data[at : at + 1 + value % 9]
            else:
                data[at : at + 8] = data[other : other + 8]
        return bytes(data)

    return apply


@few(80)
@given(damaged=damage())
def test_a_changed_state_is_refused_or_is_the_same(damaged: Callable[[bytes], bytes]) -> None:
    files, step, _, _ = state()
    files.step_path.write_bytes(step)
    whole, position = files.load_step(), files.position()
    changed = damaged(step)
    assume(changed != step)
    files.step_path.write_bytes(changed)
    for read in (
        lambda: files.load_step().z,
        lambda: files.position(),
        lambda: read_latents(files.step_path)[1],
    ):
        with one_line():
            got = read()
            if isinstance(got, Position):
                assert got == position
            else:
                assert torch.equal(got, whole.z)
    files.step_path.write_bytes(step)


@few(50)
@given(damaged=damage())
def test_a_changed_record_is_none_or_of_the_same_identity(
    damaged: Callable[[bytes], bytes],
) -> None:
    files, _, content, record = state()
    record_path(files.output).write_bytes(damaged(content))
    with one_line():
        found = read_record(files.output)
        if found is not None:
            assert found.identity == record.identity
            if found.fits(files.output):
                assert found.size == record.size
                assert record.sha256 in (found.sha256, record.sha256)
    record_path(files.output).write_bytes(content)


@few(20)
@given(damaged=damage())
def test_changed_files_of_the_server_are_whole_or_nothing(
    damaged: Callable[[bytes], bytes],
) -> None:
    pytest.importorskip("dbos")
    from opensora_sp.server.beat import Sign, beat_path, read_beat
    from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec, JobStore

    store, name = JobStore(folder()), "video_" + "0" * 24
    store.put_spec(JobSpec(name, 1.5, ("--prompt=a",), {"prompt": "a"}))
    store.put_progress(name, JobProgress("denoise", 3, 30, 4.5))
    store.put_result(name, JobResult(2.5, "video.mp4", stages={"text": 1.0}, peaks=(1, None)))
    for path in sorted(store.folder(name).glob("*.json")):
        path.write_bytes(damaged(path.read_bytes()))
    with contextlib.suppress(KeyError):
        spec = store.spec(name)
        assert all(isinstance(word, str) for word in spec.arguments)
        assert isinstance(spec.priority, int)
        assert isinstance(spec.shown, dict)
    progress, result = store.progress(name), store.result(name)
    assert progress is None or 0 <= progress.percent <= 99 or progress.step < 0
    assert result is None or isinstance(result.finished_at, float)
    store.output(name)
    beat = {"pid": 1, "state": "ready", "at": 1.0, "idle": True, "stage": "x", "still_s": 0.0}
    beat_path(folder()).write_bytes(damaged(json.dumps(beat).encode()))
    sign = read_beat(folder())
    assert sign is None or isinstance(sign, Sign)
