"""What people name and what is in the way: one line, for every kind of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import file_stem, path
from opensora_sp.engine.text_cache import default_directory
from opensora_sp.jobs.records import read_record, record_path
from opensora_sp.request.config_file import read_config
from opensora_sp.request.naming import output_stems, safe_stem
from opensora_sp.request.preflight import check_save_dir
from opensora_sp.request.prompt_files import read_prompt_file

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
HANG_S = 60

# The interpreter itself may be where only root can read: all is imported before.
AS_NOBODY = """
import encodings.ascii, os, sys, torch, safetensors.torch
from pathlib import Path
from opensora_sp.base import access
from opensora_sp.request.config_file import read_config
from opensora_sp.base.errors import UserError
from opensora_sp.jobs.records import read_record
from opensora_sp.request.preflight import check_checkpoints, check_save_dir
from opensora_sp.request.prompt_files import read_prompt_file
from opensora_sp.jobs.saved_latents import StateFiles
from opensora_sp.engine.text_cache import TextCache
import yaml, av
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
folder = Path({folder!r})
def ask(work):
    try:
        print(work())
    except UserError as error:
        print("refused:", error)
"""


def as_nobody(folder: Path, *lines: str) -> list[str]:
    """What these lines print as a user who may not look into the folder `locked` of `folder`."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    for place in (folder, *folder.parents):
        if not place.stat().st_mode & 0o001:
            place.chmod(place.stat().st_mode | 0o011)
    source = AS_NOBODY.format(nobody=NOBODY, folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", source + "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={"HOME": str(folder), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_folder_of_another_user_is_said_to_be_that(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    (locked / "inner").mkdir(parents=True)
    (locked / "config.json").write_text("{}")
    locked.chmod(0o700)
    secret = tmp_path / "secret.yaml"
    secret.write_text("seed: 1")
    secret.chmod(0o600)
    said = as_nobody(
        tmp_path,
        "for look in (access.exists, access.is_file, access.is_dir):",
        "    ask(lambda: look(folder / 'locked' / 'config.json'))",
        "names = ('dit', 't5', 'vae2d', 'vae3d')",
        "ask(lambda: check_checkpoints({n: str(folder / 'locked') for n in names}))",
        "ask(lambda: check_checkpoints({n: str(folder / 'locked/inner') for n in names}))",
        "ask(lambda: check_save_dir(str(folder / 'locked' / 'inner')))",
        "ask(lambda: read_prompt_file(str(folder / 'locked' / 'config.json')))",
        "ask(lambda: read_config(str(folder / 'secret.yaml')))",
        "ask(lambda: access.exists(folder / 'locked'))",
        "ask(lambda: access.exists(folder / 'absent'))",
    )
    assert len(said) == 10
    assert said[-2:] == ["True", "False"]
    for line in said[:5] + said[6:8]:
        assert "may not be read (permission denied)" in line, line
    assert "may not be" in said[5]


def test_a_state_folder_of_another_user_is_one_line_and_a_cache_is_a_note(tmp_path: Path) -> None:
    for name in (".opensora-sp", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sample_0000.mp4.json").write_text("{}")
        (tmp_path / name).chmod(0o700)
    said = as_nobody(
        tmp_path,
        "sys.stderr = sys.stdout",
        "output = folder / 'sample_0000.mp4'",
        "ask(lambda: read_record(output))",
        "ask(lambda: StateFiles(output, {}).position())",
        "where = {'encoder': 'e', 'max_length': 9, 'dtype': torch.float32, 'width': 4}",
        "ask(lambda: TextCache(folder / 'cache', **where).get('a cat'))",
        "ask(lambda: TextCache(folder / 'cache', **where).put('a cat', torch.zeros(2, 4)))",
    )
    assert ["may not be read (permission denied)" in line for line in said[:2]] == [True, True]
    assert [line.startswith("text cache: ") for line in said[2:]] == [True, False] * 2
    assert said[3::2] == ["None", "None"]


Reader = Callable[[str], object]
READERS: dict[str, Reader] = {
    "--config": read_config,
    "--prompt-path": read_prompt_file,
    "record": lambda name: read_record(Path(name).parent.parent / Path(name).stem),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(reader: str, kind: str, tmp_path: Path) -> None:
    file = record_path(tmp_path / "a.mp4")
    file.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    with pytest.raises(UserError, match=r"(?i)not a regular file|is a directory"):
        READERS[reader](str(file))


@pytest.mark.parametrize("reader", READERS)
def test_reading_is_bounded(reader: str, tmp_path: Path) -> None:
    file = record_path(tmp_path / "a.mp4")
    file.parent.mkdir()
    with file.open("wb") as opened:
        opened.truncate(1 << 40)  # a file of holes: nothing is on the disk
    with pytest.raises(UserError, match=r"larger than [0-9]+ MiB"):
        READERS[reader](str(file))


def test_odd_paths_are_one_line(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 300, "y/" * 2500):
        with pytest.raises(UserError):
            access.exists(tmp_path / name)
        with pytest.raises(UserError):
            access.read_bytes(tmp_path / name, limit=9)
    deep = "/".join(["d" * 200] * 20)  # 4,019 bytes: a path by itself, but no file fits below it
    with pytest.raises(UserError, match="leave room for file names"):
        check_save_dir(f"/{deep}")
    for name in ("y/" * 2500, "a\0b"):
        with pytest.raises(UserError, match="is not a usable path"):
            path().parse("--save-dir", name)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="cannot be looked at"):
        access.is_file(loop)


def test_a_deleted_working_directory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match="the working directory has been deleted"):
        check_save_dir("out")
    assert check_save_dir(str(tmp_path)) == tmp_path


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # nobody's
    assert default_directory() is None
    with pytest.raises(UserError, match="is not a usable path"):
        path().parse("--save-dir", "~/videos")


def test_names_that_some_file_systems_take_for_one_are_two() -> None:
    pairs = [("\u00fcber", "u\u0308ber"), ("\u00c5", "\u212b"), ("\ud55c", "\u1112\u1161\u11ab")]
    pairs += [("\u00dcber", "u\u0308ber"), ("\u03b0", "\u03c5\u0308\u0301")]
    for pair in pairs:
        stems = output_stems(list(enumerate(pair)), sample_name=None, prompt_as_path=True)
        assert stems[1] == f"{stems[0]}_0001" or stems[1].endswith("_0001"), pair
    assert output_stems([(0, "a"), (1, "b")], sample_name=None, prompt_as_path=True) == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["a\x9b31m", "a\x85b", "-x", "--prompt", "a\u202eb", "a\u2028b", "a\u2066b", "\x7fa"]
)
def test_names_that_a_terminal_or_a_program_would_obey(name: str) -> None:
    with pytest.raises(UserError, match="is not a plain file name"):
        file_stem().parse("--sample-name", name)
    stem = safe_stem(name)
    assert not stem.startswith("-")
    assert not set(stem) & set("\x7f\x85\x9b\u2028\u202e\u2066")


def test_ordinary_names_stay() -> None:
    for name in ("a-b", "x y", "猫", "é", "👩‍🚀"):
        assert file_stem().parse("--sample-name", name) == name
        assert safe_stem(name) == name
