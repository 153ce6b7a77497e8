"""docs/porting.md against the program's own parser: names, defaults, and what is not taken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opensora_sp.request.flags.docs import default_text
from opensora_sp.request.flags.foreign import FOREIGN, explain
from opensora_sp.request.flags.table import all_flags
from opensora_sp.request.settings import parse_command_line, resolve

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "porting.md").read_text(encoding="utf-8")
FLAGS = {flag.name: flag for flag in all_flags()}
NO_DEFAULT = (
    *("--ckpt-path-dit", "--ckpt-path-t5", "--ckpt-path-vae2d", "--ckpt-path-vae3d"),
    *("--image-size", "--sample-name", "--prompt", "--prompt-path", "--start-index", "--end-index"),
    *("--num-sample", "--prompt-as-path", "--loop", "--reference-path", "--mask-strategy"),
    *("--flow", "--camera-motion", "--verbose", "--prompt-generator"),
)
# The vendor's command lines and the defaults that its guide states, by flag.
VENDOR = {
    **dict.fromkeys(NO_DEFAULT, ""),
    **{"--device": "gcu", "--num-frames": "51", "--resolution": "240p", "--aspect-ratio": "9:16"},
    **{"--save-dir": "./samples/samples/", "--batch-size": "1", "--seed": "42", "--dtype": "bf16"},
    **{"--fps": "24", "--save-fps": "24", "--frame-interval": "1", "--num-sampling-steps": "30"},
    **{"--cfg-scale": "7", "--condition-frame-length": "5", "--align": "5", "--aes": "6.5"},
    **{"--watermark": "False", "--model-max-length": "300", "--micro-batch-size": "4"},
    **{"--micro-frame-size": "17", "--enable-compile": "False", "--flash-attn": "False"},
    **{"--layernorm-kernel": "False", "--qk-norm": "True", "--llm-refine": "False"},
    **{"--warmup-count": "1", "--eval-count": "1"},
    "--benchmark-save-path": "./benchmark/report-opensora-v1.2.json",
}
# What Open-Sora 1.2's script has beside those, without the words that its training has.
OPEN_SORA_ALONE = {"--ckpt-path", "--data-path", "--outputs"}


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    part = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def name_of(cell: str) -> str:
    return cell.split("`")[1]


COMMON = table("Flags that all three have")
ALONE = table("Flags of the vendor's scripts alone")


def test_every_flag_of_the_vendor_s_is_on_the_page_once() -> None:
    found = {name_of(row[0]): row[1] for row in COMMON + ALONE}
    assert len(found) == len(COMMON) + len(ALONE)
    assert found == VENDOR


@pytest.mark.parametrize("row", COMMON + ALONE, ids=lambda row: row[0])
def test_a_flag_of_the_vendor_s_is_one_of_ours_with_its_default(row: list[str]) -> None:
    """A default that is another one here has a sentence that says so."""
    flag, default, differs = FLAGS[name_of(row[0])], row[1], row[-1]
    if default and default != default_text(flag):
        assert differs
    assert ("effect" in differs) == ("accepted" in flag.help)


def test_the_other_flags_of_open_sora_s_script_are_answered_as_the_page_says() -> None:
    rows = {name_of(cells[0]): cells[1] for cells in table("Flags of Open-Sora 1.2's script alone")}
    assert {name for name in rows if name.startswith("--")} == OPEN_SORA_ALONE
    for name in OPEN_SORA_ALONE:
        answered(name, rows[name])
    text = PAGE.split("The flags of its training script (")[1].split(")")[0]
    for name in re.findall(r"`(--[a-z-]+)`", text):
        answered(name, "not taken")


def test_the_keys_of_open_sora_s_configurations_are_answered_as_the_page_says() -> None:
    rows = table("Keys of Open-Sora 1.2's configurations")
    assert len(rows) > 15
    for key, here in rows:
        answered("--" + name_of(key).rpartition(".")[2].replace("_", "-"), here)


def answered(name: str, here: str) -> None:
    """The program takes this flag, or its refusal names those of the page, or says why not."""
    named = set(re.findall(r"`(--[a-z0-9-]+)`", here))
    assert named <= FLAGS.keys()
    if name in named:
        return
    said = explain(name)
    assert said is not None, name
    (entry,) = [one for one in FOREIGN if name.removeprefix("--") in one.names]
    if here.startswith("not taken"):
        assert said.startswith("not supported"), name
    else:
        assert named, name
        assert named <= set(entry.use), name


def test_open_sora_s_configuration_written_out_is_what_is_done_without_it(tmp_path: Path) -> None:
    text = PAGE.split("```yaml\n")[1].split("```")[0]
    file = tmp_path / "sample.yaml"
    file.write_text(text, encoding="utf-8")
    values = resolve(parse_command_line(["--config", str(file)]))
    defaults = resolve(parse_command_line([]))
    other = {key for key in values if values[key] != defaults[key]}
    # The published model has room for 300 tokens, which is what the default stands for.
    assert other == {"prompt_path", "model_max_length"}
    assert values["model_max_length"] == 300
