"""Weight files that would run code are refused by name, and nothing of them runs.

The archives here are harmless: what they would run makes a file beside them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Copies

from opensora_sp.base.errors import CheckpointError, UserError
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.models.tensor_files import load_tensor_file
from opensora_sp.request.embedded import EMBEDDED
from opensora_sp.request.request import Checkpoints
from opensora_sp.verification.weights import check_directory

ROOT = Path(__file__).resolve().parents[2]
OLD_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6)


class _Marker:
    """Unpickled by somebody who does not look, it makes a directory."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.place),)


def torchscript(file: Path, marker: Path) -> None:
    """An archive as torch.jit.save writes it: its code runs when a module of it is called."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.save(torch.jit.script(Module()), str(file))


def disguised(file: Path, marker: Path) -> None:
    """Plain tensors in an archive that also has TorchScript's entries."""
    torch.save({"a": torch.ones(1)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/constants.pkl", pickle.dumps(()))


def script_code(file: Path, marker: Path) -> None:
    torch.save({"a": torch.ones(1)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/code/__torch__.py", "op_version_set = 1")


def old_tar(file: Path, marker: Path) -> None:
    """The form of torch 0.1: a tar whose first member is unpickled."""
    with tarfile.open(file, "w") as archive:
        content = pickle.dumps(_Marker(marker), protocol=2)
        member = tarfile.TarInfo("sys_info")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def old_pickle(file: Path, marker: Path) -> None:
    torch.save({"a": _Marker(marker)}, file, _use_new_zipfile_serialization=False)


def bare_pickle(file: Path, marker: Path) -> None:
    file.write_bytes(pickle.dumps(_Marker(marker), protocol=2))


def zipped_pickle(file: Path, marker: Path) -> None:
    torch.save({"a": torch.ones(1), "b": _Marker(marker)}, file)


def newer_protocol(file: Path, marker: Path) -> None:
    torch.save({"b": _Marker(marker)}, file, pickle_protocol=4)


HOSTILE = [
    (torchscript, "TorchScript archive"),
    (disguised, "constants.pkl"),
    (script_code, "code/__torch__.py"),
    (old_tar, "tar archive"),
    (old_pickle, "posix.mkdir"),
    (bare_pickle, "posix.mkdir"),
    (zipped_pickle, "posix.mkdir"),
    (newer_protocol, "posix.mkdir"),
]


@pytest.mark.parametrize(("make", "found"), HOSTILE)
def test_code_in_a_weight_file_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path, Path], None], found: str
) -> None:
    file, marker = tmp_path / "pytorch_model.bin", tmp_path / "it-ran"
    make(file, marker)
    with pytest.raises(CheckpointError, match="do not use this file") as caught:
        load_tensor_file(file)
    assert found in str(caught.value)
    assert str(file) in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("mmap", [False, True])
def test_what_torch_saves_is_read(tmp_path: Path, mmap: bool) -> None:
    """Weights of every kind that a checkpoint or a training state holds."""
    file = tmp_path / "state.pt"
    content = {
        "model": OrderedDict(
            weight=torch.nn.Parameter(torch.ones(2, 3)), half=torch.ones(1).half()
        ),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.ones(2, 3).bfloat16()}}},
        "step": 4,
        "rates": [1e-3, 0.5],
        "names": ("a", None, True),
        "bits": torch.arange(4, dtype=torch.uint8),
        "shape": torch.Size([1, 2]),
    }
    torch.save(content, file)
    loaded = load_tensor_file(file, mmap=mmap)
    assert loaded["model"]["weight"].equal(content["model"]["weight"])  # type: ignore[index]
    assert loaded["optimizer"]["state"][0]["m"].dtype == torch.bfloat16
    assert {k: loaded[k] for k in ("step", "rates", "names", "shape")} == {
        k: content[k] for k in ("step", "rates", "names", "shape")
    }


def test_the_old_form_is_read_where_torch_can_be_trusted_with_it(tmp_path: Path) -> None:
    file = tmp_path / "old.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    if OLD_TORCH:
        with pytest.raises(CheckpointError, match="save it anew"):
            load_tensor_file(file)
    else:
        assert load_tensor_file(file, mmap=True)["a"].equal(torch.ones(2))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.eye(2).to_sparse_csr(), "sparse"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_one_line(tmp_path: Path, tensor: Callable[[], Any], said: str) -> None:
    file = tmp_path / "odd.bin"
    torch.save({"a": tensor()}, file)
    with pytest.raises(CheckpointError, match="no weight of this model") as caught:
        load_tensor_file(file)
    assert said in str(caught.value)


def test_other_archives_and_cut_files_say_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/notes.txt", "no weights")
    with pytest.raises(CheckpointError, match=r"not one of torch\.save|corrupt or cut short"):
        load_tensor_file(file)
    torch.save({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="corrupt or cut short"):
        load_tensor_file(file)
    file.write_bytes(b"\x80\x02}q\x00")  # a pickle without its end
    with pytest.raises(CheckpointError, match="corrupt or cut short"):
        load_tensor_file(file)


# ---- everywhere somebody else's file is loaded -------------------------------------------------


def script(*argv: str) -> subprocess.CompletedProcess[str]:
    """One of the repository's programs, run as a person runs it."""
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def hostile_t5(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The embedded text encoder as a file that would run code, and the marker it would leave."""
    folder, marker = tmp_path / "t5", tmp_path / "it-ran"
    shutil.copytree(EMBEDDED / "t5", folder)
    for weights in [*folder.glob("*.bin"), *folder.glob("*.index.json")]:
        weights.unlink()
    disguised(folder / "pytorch_model.bin", marker)
    yield folder, marker
    assert not marker.exists()


def test_a_long_name_of_what_is_imported_is_shortened(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    entries = {"data.pkl": b"c" + b"a" * 9000 + b"\nb\n.", "version": b"3\n"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"model/{name}", content)
    with pytest.raises(UserError, match="holds code, not only tensors") as refused:
        load_tensor_file(path)
    assert len(str(refused.value)) < 600


def test_the_command_refuses_it(hostile_t5: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = hostile_t5
    paths = {name: EMBEDDED / name for name in ("dit", "vae2d", "vae3d")} | {"t5": folder}
    argv = ["--prompt", "a red ball", "--device", "cpu", "--text-cache", "off"]
    argv += ["--save-dir", str(tmp_path / "out")]
    argv += [f"--ckpt-path-{name}={path}" for name, path in paths.items()]
    said = tmp_path / "said"
    assert Copies(argv, [os.environ], said).finish() == [2], said.read_text()
    assert "holds code, not only tensors" in said.read_text()
    assert "Traceback" not in said.read_text()


def test_the_python_api_refuses_it(hostile_t5: tuple[Path, Path]) -> None:
    folder, _ = hostile_t5
    checkpoints = Checkpoints(
        dit=EMBEDDED / "dit", t5=folder, vae2d=EMBEDDED / "vae2d", vae3d=EMBEDDED / "vae3d"
    )
    with pytest.raises(UserError, match="holds code, not only tensors"):
        Pipeline.load(checkpoints)


def test_the_check_refuses_it(hostile_t5: tuple[Path, Path]) -> None:
    folder, _ = hostile_t5
    assert any("holds code" in str(finding.wrong) for finding in check_directory(folder))
    done = script("scripts/download_weights.py", "--check", str(folder))
    assert done.returncode == 1
    assert "holds code, not only tensors" in done.stdout


@pytest.mark.parametrize("make", [disguised, zipped_pickle])
def test_the_training_scripts_refuse_it(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    from scripts.train_embedded.latents import shard_path
    from scripts.train_embedded.restore import restore
    from scripts.train_embedded.shards import Shards
    from scripts.train_embedded.state import read_state

    marker, shard = tmp_path / "it-ran", shard_path(tmp_path, 0)
    shard.parent.mkdir(parents=True, exist_ok=True)
    make(tmp_path / "flow.pt", marker)
    make(shard, marker)
    with pytest.raises(CheckpointError, match="holds code"):
        read_state(tmp_path / "flow.pt", torch.device("cpu"))
    with pytest.raises(CheckpointError, match="holds code"):
        Shards(tmp_path, None).refresh()
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    make(next((model / "t5").glob("*.bin")), marker)
    with pytest.raises(CheckpointError, match="holds code"):
        restore(model, tmp_path / "states", step=0, again=False)
    assert not marker.exists()


def test_a_file_that_looks_compressed_is_not_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that LZMA reads as a dictionary of 4 GB, found by fuzzing; and packed archives."""
    for opener in ("gzopen", "bz2open", "xzopen"):
        monkeypatch.setattr(tarfile.TarFile, opener, lambda *_, **__: pytest.fail("decompressed"))
    file = tmp_path / "model.bin"
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    packed = [pack(tar.getvalue()) for pack in (gzip.compress, bz2.compress, lzma.compress)]
    for content in (b"\0" + b"\xff" * 50 + b"\x8a\x0a\x94\x03", *packed):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="is corrupt or cut short"):
            load_tensor_file(file)
    file.write_bytes(tar.getvalue())
    with pytest.raises(CheckpointError, match="a tar archive, which torch would unpack"):
        load_tensor_file(file)
