"""What is said on screens of every kind, and what is not said to them raw."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from opensora_sp.base.errors import PromptFault, UserError, printable
from opensora_sp.base.screen import (
    MOST_SHOWN,
    note,
    one_line,
    result,
    robust_screen,
    warn_once,
)

LOG = logging.getLogger("opensora_sp.jobs.run")
ROOT = Path(__file__).resolve().parents[2]
PLAN = ["launch/plan.py", "--device-memory", "48GB"]
INFER = ["launch/infer.py", "--device", "cpu", "--dtype", "fp32", "--image-size", "32", "48"]
INFER += ["--num-frames", "image", "--num-sampling-steps", "1"]


def started(command: list[str], **how: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **how.pop("env", {})}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stderr=how.pop("stderr", subprocess.PIPE),
        timeout=300,
        **how,
    )


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("nul\0", "nul\\x00"),
        ("c1\x9b31m", "c1\\x9b31m"),
        ("file\udcff", "file\\udcff"),
        ("lone\ud800", "lone\\ud800"),
        ("right\u202eleft", "right\\u202eleft"),
        ("bell\x07 back\x08 del\x7f", "bell\\x07 back\\x08 del\\x7f"),
        ("a\nred  ball\tü 一只猫 🐈", "a red ball ü 一只猫 🐈"),
    ],
)
def test_messages_are_one_printable_line(raw: str, shown: str) -> None:
    assert one_line(raw) == shown
    assert printable(one_line(raw)).isprintable()


@pytest.mark.parametrize("unit", ["x", "\x1b", "wörd ", "\udcff", "\n"])
def test_messages_are_bounded_and_keep_both_ends(unit: str) -> None:
    said = one_line(f"--prompt-path {unit * 100_000}: give another file")
    assert len(said) <= MOST_SHOWN
    assert said.startswith("--prompt-path")
    assert said.endswith("give another file")
    few = "a value of a few lines,\n" * 5 + "end"
    assert one_line(few) == " ".join(few.split())


class Broken(io.StringIO):
    """A screen that takes `good` writes and then fails."""

    def __init__(self, error: Exception, good: int = 0) -> None:
        super().__init__()
        self.error, self.good = error, good

    def write(self, text: str) -> int:
        self.good -= 1
        if self.good < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
        (ValueError("I/O operation on closed file"), "closed file"),
    ],
)
def test_a_screen_that_is_gone_is_done_without(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = Broken(error, good=2), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with robust_screen():
        for _ in range(3):
            print("line")
        note("still heard")
    assert sys.stdout is out
    assert sys.stderr is err
    assert out.getvalue() == "line\n"
    lines = err.getvalue().splitlines()
    assert lines[-1] == "note: still heard"
    assert len(lines) == 1 + bool(said)
    assert said in lines[0]


def test_standard_error_that_is_gone_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(OSError(errno.ENOSPC, "full")))
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    with robust_screen():
        note("nobody hears it")
        result("made.mp4")
    assert out.getvalue() == "made.mp4\n"


def test_trouble_of_a_kind_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # two commands of one process
        with robust_screen():
            warn_once(LOG, "record", "first")
            warn_once(LOG, "record", "second")
            warn_once(LOG, "state", "third")
    assert capsys.readouterr().err.splitlines() == ["note: first", "note: third"] * 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252", "ascii:strict"])
@pytest.mark.parametrize(
    "command",
    [
        PLAN,
        [*PLAN, "--table"],
        ["launch/infer.py", "--print-config", "--prompt", "ä 一只猫 \udcff"],
        ["launch/benchmark.py", "--help"],
        ["launch/verify.py", "--help"],
    ],
    ids=["plan", "table", "print-config", "benchmark", "verify"],
)
def test_any_encoding_shows_what_it_can(command: list[str], encoding: str) -> None:
    done = started(command, env={"PYTHONIOENCODING": encoding}, stdout=subprocess.PIPE)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0 or b"error: " in done.stderr
    if command is PLAN:
        times = {"ascii": b"\\xd7", "utf-8": "×".encode()}.get(encoding.partition(":")[0], b"\xd7")
        assert times in done.stdout


@pytest.mark.parametrize("kind", ["full", "closed pipe", "closed", "all closed"])
def test_plan_ends_well_on_a_screen_that_takes_nothing(kind: str, tmp_path: Path) -> None:
    if kind == "full":
        with open("/dev/full", "wb") as full:
            done = started(PLAN, stdout=full)
        assert b"standard output takes nothing more (No space left on device)" in done.stderr
    elif kind == "closed pipe":
        read, write = os.pipe()
        os.close(read)
        done = started(PLAN, stdout=write)
        os.close(write)
        assert done.stderr == b""
    else:
        ends = ">&-" if kind == "closed" else ">&- 2>&- <&-"
        script = f'exec "$0" "$@" {ends}'
        done = subprocess.run(
            ["sh", "-c", script, sys.executable, *PLAN],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            timeout=60,
        )
        assert done.stderr == b""
    assert done.returncode == 0


def test_a_list_is_made_whole_on_a_full_ascii_screen(tmp_path: Path) -> None:
    folder = tmp_path / "ä"
    command = [*INFER, "--prompt", "ä", "b", "c", "--save-dir", str(folder)]
    with open("/dev/full", "wb") as full:
        done = started(command, stdout=full, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert len(list(folder.glob("*.png"))) == 3
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"standard output takes nothing more") == 1


def test_a_path_is_printed_so_that_it_opens(tmp_path: Path) -> None:
    names = [b"by\xffte", b"esc\x1b[31m", "ä".encode()]
    folders = [os.fsencode(tmp_path) + b"/" + name for name in names]
    several = (
        "import sys; from opensora_sp.cli.infer import main\n"
        "argv, folders = sys.argv[1:-3], sys.argv[-3:]\n"
        "sys.exit(sum(main([*argv, '--save-dir', folder]) for folder in folders))"
    )
    command = ["-c", several, *INFER[1:], "--prompt", "x", *map(os.fsdecode, folders)]
    done = started(command, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    printed = done.stdout.removesuffix(b"\n").split(b"\n")
    assert [os.path.dirname(path) for path in printed] == folders
    assert all(os.path.isfile(path) for path in printed)
    assert b"\x1b[31m" not in done.stderr


@pytest.mark.parametrize("closed", [False, True])
def test_a_library_that_writes_to_standard_output_is_not_heard(closed: bool) -> None:
    code = (
        "import os, sys\n"
        "from opensora_sp.base.screen import nothing_on_stdout\n"
        + ("os.close(1)\n" if closed else "print('before')\n")
        + "with nothing_on_stdout():\n"
        + "    os.write(1, b'[Gloo] Rank 0\\n')\n" * (not closed)
        + "    made = True\n"
        "os.write(2, b'made' * made)\n" + "print('after')\n" * (not closed)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=not closed
    )
    assert done.stderr.startswith(b"made")
    assert done.stdout == (b"" if closed else b"before\nafter\n")


# Standard error of a run as it was when every line was printed and none was logged.
FIRST_RUN = """\
note: 1 frame of 32x48 (height x width): the small embedded model has learnt sides from 64 to 144, \
144x256, and up to 51 frames; others look worse (--config embedded is a size that it knows)
note: --flash-attn has no effect: --attention chooses the kernel
note: no --ckpt-path flags: the small embedded model is used
note: CPU threads of a rank: 1
1 frame of 32x48 as 1x4x6 latents (6 patches a frame), 1 step, torch.float32 on 1 x cpu \
(1 × 1 × 1 (replicas × guidance × sequence))
sample_0000.png is told: 'a red ball aesthetic score: 6.5.'
sample_0001.png is told: 'ein ball 👍 aesthetic score: 6.5.'
note: prompt 'Ein Ball 一只猫 👍': not read are '一只猫', which caption cleaning drops; the \
model is told 'ein ball 👍 aesthetic score: 6.5.': write it in English (--llm-refine true \
translates)
note: prompt 'Ein Ball 一只猫 👍': the text encoder has no letters for '👍', which all read \
alike to it: write it in English (--llm-refine true translates)
done in N s
done in N s
"""
SECOND_RUN = """\
note: 1 frame of 32x48 (height x width): the small embedded model has learnt sides from 64 to 144, \
144x256, and up to 51 frames; others look worse (--config embedded is a size that it knows)
note: --flash-attn has no effect: --attention chooses the kernel
note: no --ckpt-path flags: the small embedded model is used
note: CPU threads of a rank: 1
note: sample_0000.png is there already and is another request's, so this one becomes \
{folder}/sample_0000_2.png
note: --resume: nothing of this run has been begun in its --save-dir, so all of it starts from the \
beginning
1 frame of 32x48 as 1x4x6 latents (6 patches a frame), 1 step, torch.float32 on 1 x cpu \
(1 × 1 × 1 (replicas × guidance × sequence))
sample_0000_2.png is told: 'a blue ball aesthetic score: 6.5.'
done in N s
"""


def test_the_screen_shows_what_it_showed_before_anything_was_logged(tmp_path: Path) -> None:
    more = ["--save-dir", str(tmp_path / "out"), "--text-cache", "off", "--verbose", "2"]
    more += ["--cpu-threads", "1", "--flash-attn", "true"]

    def heard(*words: str) -> str:
        done = started([*INFER, *more, *words], stdout=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        text = re.sub(r"done in [0-9.]+ s", "done in N s", done.stderr.decode())
        # As a terminal shows it: a bar goes back to the start of its line, and leaves it to others.
        kept = [line.split("\r")[-1] for line in text.split("\n")]
        return "\n".join(line for line in kept if "denoise:" not in line)

    assert heard("--prompt", "a red ball", "Ein Ball 一只猫 👍") == FIRST_RUN
    said = SECOND_RUN.replace("{folder}", str(tmp_path / "out"))
    assert heard("--prompt", "a blue ball", "--resume") == said


def test_what_a_thread_says_does_not_stand_in_a_progress_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with robust_screen(), tqdm(total=2, desc="denoise") as bar:
        bar.update()
        logging.getLogger("opensora_sp.jobs").info("done in 1 s")
        note("a note")
        bar.update()
        result("x.mp4")
    captured = capsys.readouterr()
    shown = [line.split("\r")[-1] for line in captured.err.split("\n")]
    assert {"done in 1 s", "note: a note"} <= set(shown)
    assert captured.out == "x.mp4\n"


@pytest.mark.parametrize("level", ["INFO", "WARNING", "ERROR"])
def test_what_is_logged_is_shown_bounded_and_printable(
    level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with robust_screen():
        LOG.log(getattr(logging, level), "%s is \x1b[31mred\x1b[0m 100%%\nover", "a" * 2000)
        LOG.debug("not this")
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "\\x1b[31mred" in err
    head = {"INFO": "aaa", "WARNING": "note: aaa", "ERROR": "error: aaa"}[level]
    assert err.startswith(head)
    assert len(err.splitlines()) == (2 if level == "INFO" else 1)
    assert (len(err) < MOST_SHOWN + 20) == (level != "INFO")


def test_an_error_is_one_printable_line_in_python_too() -> None:
    error = UserError("a\nb \x1b[31m\x00\u2028c \udcff é 猫")
    assert str(error) == "a b \\x1b[31m\\x00 c \\udcff é 猫"
    fault = pickle.loads(pickle.dumps(PromptFault("x\x07", 3)))
    assert (str(fault), fault.place) == ("x\\x07", 3)
