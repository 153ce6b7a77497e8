"""The flag table as people read it: `--help`, `--help all`, docs/flags.md, configs/base.yaml.

`python -m opensora_sp.request.flags.docs > docs/flags.md` writes the page, and
`python -m opensora_sp.request.flags.docs base > configs/base.yaml` the configuration.
"""

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opensora_sp.request import sizes
from opensora_sp.request.config_file import write_config
from opensora_sp.request.flags.rules import COMBINATIONS
from opensora_sp.request.flags.table import GROUPS, all_flags
from opensora_sp.request.setting import Setting


@dataclass(frozen=True)
class Program:
    """How the help of one program of the flag table begins and ends.

    command: its name behind `opensora-sp`. first: the flags that most people use, for the short
    help. ranks: whether torchrun may start it.
    """

    command: str
    summary: str
    first: tuple[str, ...]
    examples: str
    ranks: bool = True


PROGRAMS: Mapping[str, Program] = {
    "infer": Program(
        "generate",
        "Generates videos and images from prompts with Open-Sora 1.2 on any number of ranks.",
        (
            *("--prompt", "--prompt-path", "--config", "--resolution", "--aspect-ratio"),
            *("--num-frames", "--image", "--num-sampling-steps", "--seed", "--save-dir"),
            *("--ckpt-path-dit", "--device", "--dtype", "--memory", "--print-config"),
        ),
        """\
  opensora-sp generate --prompt "a red ball rolls to the left"
  torchrun --nproc_per_node 8 --no-python opensora-sp generate --config 720p-16s \\
    --prompt-path prompts.txt --ckpt-path-dit DIR --ckpt-path-t5 DIR \\
    --ckpt-path-vae2d DIR --ckpt-path-vae3d DIR
""",
    ),
    "benchmark": Program(
        "benchmark",
        "Measures generation: the same request and code as generate, run several times.",
        (
            *("--prompt", "--config", "--resolution", "--num-frames", "--num-sampling-steps"),
            *("--ckpt-path-dit", "--warmup-count", "--eval-count", "--benchmark-save-path"),
            *("--baseline", "--peak-tflops", "--profile", "--sweep", "--compare", "--count"),
        ),
        """\
  opensora-sp benchmark --prompt "a red ball" --config 720p-16s
  torchrun --nproc_per_node 4 --no-python opensora-sp benchmark --prompt "a red ball"
  opensora-sp compare before.json after.json
  opensora-sp benchmark --count --resolution 720p --num-frames 16s
""",
    ),
    "plan": Program(
        "plan",
        "Says whether a request fits a device, in which memory mode, and what it costs.",
        (
            *("--device-memory", "--ranks", "--config", "--resolution", "--num-frames"),
            *("--batch-size", "--dtype", "--ckpt-path-dit", "--memory", "--table"),
            *("--flop-rate", "--link-rate"),
        ),
        """\
  opensora-sp plan --device-memory 24GB --resolution 720p --num-frames 16s --ranks 2
  opensora-sp plan --device-memory H100 --table
""",
        ranks=False,
    ),
    "calibrate": Program(
        "calibrate",
        "Finds out which steps need not be computed, and writes schedules for --step-cache.",
        (
            *("--out", "--full-runs", "--prompt", "--prompt-path", "--config", "--resolution"),
            *("--aspect-ratio", "--num-frames", "--image", "--num-sampling-steps"),
            *("--cfg-scale", "--ckpt-path-dit", "--dtype", "--keep-state"),
        ),
        """\
  opensora-sp calibrate --config embedded --out schedules.yaml
  torchrun --nproc_per_node 8 --no-python opensora-sp calibrate --config 720p-4s \\
    --prompt-path prompts.txt --out schedules.yaml --ckpt-path-dit DIR --ckpt-path-t5 DIR \\
    --ckpt-path-vae2d DIR --ckpt-path-vae3d DIR
""",
    ),
}
_WIDTH = 96
_HELP_COLUMN = 34
_NO_BREAK = "\u00a0"


def default_text(flag: Setting) -> str:
    """A flag's default, as a person would type it."""
    if flag.shown_default is not None:
        return flag.shown_default
    if flag.default is None:
        return "none"
    if isinstance(flag.default, float):
        return f"{flag.default:g}"
    return str(flag.default)


def help_text(program: str = "infer", *, whole: bool = True) -> str:
    """What `--help all` prints for one program; without `whole`, what `--help` prints."""
    about = PROGRAMS[program]
    command = f"opensora-sp {about.command}"
    lines = [f"usage: {command} [flags]"]
    if about.ranks:
        lines.append(f"       torchrun --nproc_per_node N --no-python {command} [flags]")
    lines += ["", about.summary]
    if whole:
        lines.append("A BOOL is true or false. Flags may be spelt with _ for -.")
        for title, flags in GROUPS:
            own = [flag for flag in flags if flag.program in (None, program)]
            if own:
                lines += ["", f"{title}:"]
                for flag in own:
                    lines += _help_entry(flag)
    else:
        table = {flag.name: flag for flag in all_flags()}
        lines += ["", "the flags that most people use:"]
        for name in about.first:
            lines += _help_entry(table[name])
        lines += ["", f"{command} --help all lists every flag; docs/flags.md explains them."]
    return "\n".join(lines) + "\n\nexamples:\n" + about.examples


def help_entries(keys: Sequence[str]) -> list[str]:
    """The lines of help of some flags, by their keys."""
    table = {flag.key: flag for flag in all_flags()}
    return [line for key in keys for line in _help_entry(table[key])]


def _help_entry(flag: Setting) -> list[str]:
    said = flag.help
    if flag.nargs != 0 and (flag.default is not None or flag.shown_default is not None):
        default = f"(default: {default_text(flag)})"
        said += " " + default.replace(" ", _NO_BREAK)
    wrapped = [line.replace(_NO_BREAK, " ") for line in textwrap.wrap(said, _WIDTH - _HELP_COLUMN)]
    head = f"  {flag.usage}"
    first = [f"{head:<{_HELP_COLUMN}}{wrapped[0]}"]
    if len(head) >= _HELP_COLUMN:
        first = [head, " " * _HELP_COLUMN + wrapped[0]]
    return first + [" " * _HELP_COLUMN + line for line in wrapped[1:]]


def docs_page() -> str:
    """The whole of docs/flags.md."""
    parts = [
        "# Flags",
        "<!-- Written by `python -m opensora_sp.request.flags.docs > docs/flags.md`: edit the "
        "declarations named in opensora_sp/request/flags/table.py, not this page. -->",
        "Every flag is also a YAML key for `--config` (with `_` for `-`); a flag wins over the "
        "file, the file over the default. `--print-config` prints what results. Booleans take a "
        "value: `true t yes y 1` or `false f no n 0`, in any case. A request that cannot be run "
        "ends with one line on the error stream and exit code 2, before torch is imported.",
    ]
    for title, flags in GROUPS:
        rows = [
            (
                f"`{flag.usage}`",
                default_text(flag) if flag.nargs != 0 else "off",
                flag.kind.allowed if flag.nargs != 0 else "",
                flag.help,
            )
            for flag in flags
        ]
        parts.append(f"## {title}\n\n" + _table(("flag", "default", "legal", "meaning"), rows))
    parts.append(
        "## Which features go together\n\nAll do, except:\n\n"
        + _table(
            ("features", "outcome", "what is said"),
            [(c.features, c.outcome, _said(c.text)) for c in COMBINATIONS],
        )
    )
    parts.append("## Sizes\n\n" + _sizes())
    return "\n\n".join(parts) + "\n"


def _said(text: str) -> str:
    """A combination's text, with the names of its values in the place of values."""
    return re.sub(r"\{(\w+)(!r)?\}", lambda match: match[1].upper(), text)


def _sizes() -> str:
    rows = []
    for name in sizes.resolutions():
        ratios = sizes.aspect_ratios(name)
        landscape = ratios.get("9:16")
        rows.append(
            (
                name,
                "x".join(map(str, landscape)) if landscape else "",
                ", ".join(ratios) or "none",
                "no" if name in sizes.UNTRAINED else "yes",
            )
        )
    durations = ", ".join(f"`{k}` {v}" for k, v in sizes.durations().items() if not k.isdigit())
    return (
        _table(("resolution", "pixels at 9:16 (height x width)", "aspect ratios", "trained"), rows)
        + f"\n\nDurations in frames: {durations}."
    )


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def base_config() -> str:
    """The whole of configs/base.yaml: every default of what is a YAML key of every program."""
    parts = [
        "# Every default, written out: flags win over a file given by --config. docs/flags.md "
        "explains\n# them all; null means that the program chooses. Written by\n"
        "# `python -m opensora_sp.request.flags.docs base > configs/base.yaml`.\n"
    ]
    for title, flags in GROUPS:
        own = {f.key: f.default for f in flags if not f.control and f.program is None}
        if own:
            parts.append(f"# {title}\n{write_config(own)}")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(base_config() if sys.argv[1:] == ["base"] else docs_page())
