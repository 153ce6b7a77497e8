"""Files of prompts as people bring them: other encodings, headings, brackets, comments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.cli.infer import main
from opensora_sp.request.prompt_files import PromptFile, read_prompt_file
from opensora_sp.request.request import Request
from opensora_sp.request.settings import build_job, parse_command_line, resolve

TWO = [(0, "a red ball, rolling"), (1, "café 猫")]


def read(folder: Path, name: str, content: str | bytes, *part: Any) -> PromptFile:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompt_file(str(file), *part)


def prompts(file: PromptFile) -> list[tuple[int, str]]:
    return [(entry.index, entry.prompt) for entry in file.entries]


def requests(folder: Path, name: str, content: str, *argv: str) -> list[Request]:
    (folder / name).write_text(content, encoding="utf-8")
    given = ["--prompt-path", str(folder / name), "--save-dir", str(folder / "out"), *argv]
    return [task.request for task in build_job(resolve(parse_command_line(given))).tasks]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    data = (mark + end.join(prompt for _, prompt in TWO) + end).encode(encoding)
    assert prompts(read(tmp_path, "list.txt", data)) == TWO


@pytest.mark.parametrize(
    ("encoding", "text", "said"),
    [
        ("gbk", "一只红色的球\n一个蓝色方块\n", "GBK"),
        ("big5", "一隻紅色的球\n", "BIG5"),
        ("shift_jis", "赤いボールが転がる\n", "SHIFT_JIS"),
        ("euc-kr", "빨간 공이 굴러간다\n", "EUC-KR"),
        ("latin-1", "ein roter Ball in München\n", "WINDOWS-1252"),
        ("utf-16-le", "a red ball\n", "NUL"),
    ],
)
def test_other_encodings_are_refused_with_what_converts_them(
    tmp_path: Path, encoding: str, text: str, said: str
) -> None:
    for name in ("list.txt", "list.csv", "list.json", "list.jsonl"):
        with pytest.raises(UserError, match=f"{said}.*iconv -f .* -t UTF-8") as caught:
            read(tmp_path, name, text.encode(encoding))
        assert "\n" not in str(caught.value)


def test_other_kinds_of_file_are_refused_by_name(tmp_path: Path) -> None:
    for data, said in (
        (b"PK\x03\x04", "docx"),
        (b"%PDF-1.7", "PDF"),
        (b"{\\rtf1 a}", "RTF"),
        (b"\x89PNG\r\n", "picture"),
    ):
        with pytest.raises(UserError, match=said):
            read(tmp_path, "list.txt", data)
    with pytest.raises(UserError, match=r"YAML, which is not read.*jsonl"):
        read(tmp_path, "list.yaml", "- a red ball\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", 'prompt\n"a red ball, rolling"\ncafé 猫\n'),
        ("list.csv", '\ufeffid,Text\r\n1,"a red ball, rolling"\r\n\r\n2,café 猫\r\n'),
        ("list.csv", "caption;id\na red ball, rolling;1\ncafé 猫;2"),
        ("list.tsv", "id\tprompt\n1\ta red ball, rolling\n2\tcafé 猫\n"),
        ("list.txt", 'text,ref\n"a red ball, rolling",\ncafé 猫,\n'),
        ("list.json", json.dumps([prompt for _, prompt in TWO], indent=2)),
        ("list.json", json.dumps([{"text": prompt, "id": 3} for _, prompt in TWO])),
        ("list", json.dumps([prompt for _, prompt in TWO])),
        ("list.jsonl", "".join(json.dumps({"prompt": p}) + "\n" for _, p in TWO)),
        ("list.ndjson", "".join(json.dumps(p, ensure_ascii=False) + "\r\n" for _, p in TWO)),
        ("list.txt", "".join(json.dumps({"prompt": p}) + "\n" for _, p in TWO)),
    ],
)
def test_named_fields(tmp_path: Path, name: str, content: str) -> None:
    assert prompts(read(tmp_path, name, content)) == TWO


def test_places_stay_those_of_the_whole_file(tmp_path: Path) -> None:
    for name, content in (
        ("list.csv", "prompt\na\n \nc\nd\n"),
        ("list.json", '["a", "", "c", "d"]'),
        ("list.jsonl", '"a"\n\n"c"\n"d"\n'),
        ("list.txt", "a\n# no\nc\nd\n"),
    ):
        assert prompts(read(tmp_path, name, content)) == [(0, "a"), (2, "c"), (3, "d")]
        assert prompts(read(tmp_path, name, content, 1, 3)) == [(2, "c")]
        with pytest.raises(UserError, match=r"--start-index 9 is beyond .*: the last one is 3$"):
            read(tmp_path, name, content, 9)
        with pytest.raises(UserError, match=r"holds no prompt in .* 1 to 2"):
            read(tmp_path, name, content, 1, 2)


def test_an_entry_has_references_strategy_and_seed_of_its_own(tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(picture)
    table = f"prompt,ref,mask_strategy,seed\na,{picture},0,\nb,,,7\n"
    lines = [
        {"prompt": "a", "reference_path": str(picture), "mask_strategy": "0", "seed": None},
        {"prompt": "b", "seed": 7},
    ]
    for name, content in (
        ("list.csv", table),
        ("list.json", json.dumps(lines)),
        ("list.jsonl", "\n".join(map(json.dumps, lines))),
    ):
        first, second = requests(tmp_path, name, content, "--seed", "5")
        assert (first.reference_path, first.mask_strategy, first.seed) == (str(picture), "0", 5)
        assert (second.reference_path, second.mask_strategy, second.seed) == ("", "", 7)
        with pytest.raises(UserError, match="references of its own: leave --image out"):
            requests(tmp_path, name, content, "--image", str(picture))


def test_comments_and_unread_fields_are_told(tmp_path: Path) -> None:
    file = read(tmp_path, "list.txt", "# mine\n#cat on a roof\n##\n#1 cat\n")
    assert prompts(file) == [(1, "#cat on a roof"), (3, "#1 cat")]
    assert "2 lines" in file.notes[0]
    assert "lines 1, 3" in file.notes[0]
    file = read(tmp_path, "list.csv", "prompt,cfg_scale,id\na,3,4\n")
    assert "not read: 'cfg_scale', 'id'" in file.notes[0]
    assert not read(tmp_path, "list.txt", "a\n").notes


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("list.csv", "a red ball\na blue square\n", "none of which is 'prompt'"),
        ("list.csv", "prompt\na red ball, rolling\n", "line 2 has 2 cells"),
        ("list.csv", 'prompt\n"a red\n', "not CSV"),
        ("list.csv", "prompt,prompt\na,b\n", "twice"),
        ("list.csv", "prompt,seed\na,x\n", "line 2: seed 'x' is not"),
        ("list.csv", "prompt\n", "holds no prompt"),
        ("list.json", '{"prompt": "a"}', "not an array"),
        ("list.json", '["a",]', "not readable JSON"),
        ("list.json", '["a", 3]', "entry 1 is neither"),
        ("list.json", '[{"words": "a"}]', "has no field 'prompt'"),
        ("list.json", '[{"prompt": ["a"]}]', "entry 0: prompt"),
        ("list.json", '[{"prompt": "a", "prompt": "b"}]', "twice"),
        ("list.json", "[" * 100_000, "nested too deeply"),
        ("list.json", '[{"prompt": "a", "seed": ' + "1" * 5000 + "}]", "not readable JSON"),
        ("list.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not readable JSON"),
        ("list.jsonl", '{"prompt": "a", "seed": -1}\n', "line 1: seed -1"),
        ("list.txt", '[\n"a",\n"b"\n', "begins as JSON"),
    ],
)
def test_what_is_not_clear_is_refused(
    tmp_path: Path, name: str, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    argv = ["--prompt-path", str(tmp_path / name), "--save-dir", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert len(error) < 600
