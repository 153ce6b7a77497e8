"""The strict loader: every way a checkpoint can be wrong is one line that names it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora_sp.base.errors import CheckpointError
from opensora_sp.models import checkpoint
from opensora_sp.models.checkpoint import WeightFiles, load_module, read_config


class Model(nn.Module):
    """Parameters, a floating and an integer buffer, a buffer that no checkpoint holds, a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 5, bias=False)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.second.weight
        self.register_buffer("scale", torch.zeros(2))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(7), persistent=False)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "first.weight": torch.randn(4, 3, generator=generator),
        "first.bias": torch.randn(4, generator=generator),
        "second.weight": torch.randn(5, 4, generator=generator),
        "scale": torch.randn(2, generator=generator),
        "steps": torch.tensor([3, 4]),
    }


def on_meta() -> Model:
    with torch.device("meta"):
        return Model()


def write(directory: Path, tensors: dict[str, Tensor], form: str = "safetensors") -> Path:
    """Write `tensors` as model.* in one of the forms that checkpoints are published in."""
    directory.mkdir(parents=True, exist_ok=True)
    save: Callable[[dict[str, Tensor], Path], object] = (
        save_file if "safetensors" in form else torch.save
    )
    suffix = "safetensors" if "safetensors" in form else "bin"
    if form.endswith("shards"):
        names = list(tensors)
        index = {}
        for number, part in enumerate((names[:2], names[2:])):
            shard = f"model-{number}.{suffix}"
            save({name: tensors[name] for name in part}, directory / shard)
            index.update(dict.fromkeys(part, shard))
        (directory / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    elif form == "old bin":
        torch.save(tensors, directory / "model.bin", _use_new_zipfile_serialization=False)
    else:
        save(tensors, directory / f"model.{suffix}")
    return directory


def load(directory: Path, **options: object) -> Model:
    model = on_meta()
    settings: dict[str, object] = {"dtype": torch.float32, "device": "cpu", **options}
    load_module(model, WeightFiles.open(directory, "model"), **settings)  # type: ignore[arg-type]
    return model


# Torch before 2.6 is not trusted with the old form: tests/unit/test_tensor_files.py.
OLD_BIN = ["old bin"] if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6) else []


@pytest.mark.parametrize(
    "form", ["safetensors", "safetensors shards", "bin", "bin shards", *OLD_BIN]
)
def test_every_published_form_loads_exactly(tmp_path: Path, form: str) -> None:
    tensors = weights()
    model = load(write(tmp_path, tensors, form))
    state = model.state_dict()
    assert state.pop("tied.weight").data_ptr() == model.second.weight.data_ptr()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name
        # Owned memory: the weight must not be a window on the mapped file.
        assert state[name].untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dtype_goes_to_floating_weights_except_those_kept(tmp_path: Path) -> None:
    write(tmp_path, weights())
    model = load(tmp_path, dtype=torch.bfloat16, keep_float32=lambda name: name == "scale")
    assert not model.training
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert kinds == {
        "first.weight": torch.bfloat16,
        "first.bias": torch.bfloat16,
        "second.weight": torch.bfloat16,
        "tied.weight": torch.bfloat16,
        "scale": torch.float32,
        "steps": torch.int64,
    }
    assert torch.equal(model.get_parameter("first.bias"), weights()["first.bias"].bfloat16())


def test_prefix_alias_optional_and_skip(tmp_path: Path) -> None:
    tensors = weights()
    renamed = {f"net.{name}": tensor for name, tensor in tensors.items()}
    renamed["other.weight"] = torch.zeros(1)  # outside the prefix: not this call's
    renamed["net.old.weight"] = renamed.pop("net.second.weight")  # alias instead of the name
    renamed["net.old.bias"] = torch.zeros(4)  # alias beside the name: the name wins
    renamed["net.leftover"] = torch.zeros(9)  # optional on the file's side
    del renamed["net.steps"]  # optional on the model's side
    write(tmp_path, renamed)
    model = load(
        tmp_path,
        prefix="net.",
        aliases={"old.weight": "second.weight", "old.bias": "first.bias"},
        optional=("leftover", "steps"),
        skip=lambda name: name == "first.weight",
    )
    assert torch.equal(model.get_parameter("tied.weight"), tensors["second.weight"])
    assert torch.equal(model.get_parameter("first.bias"), tensors["first.bias"])
    assert model.get_parameter("first.weight").is_meta
    assert model.get_buffer("steps").is_meta

    renamed["net.first.weight"] = torch.zeros(4, 4)  # skipped weights are checked all the same
    write(tmp_path, renamed)
    with pytest.raises(CheckpointError, match=r"net\.first\.weight is \[4, 4\]"):
        load(tmp_path, prefix="net.", skip=lambda name: name == "first.weight")


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights().items() if key != name}


def changed(name: str, value: Tensor) -> dict[str, Tensor]:
    return {**weights(), name: value}


@pytest.mark.parametrize("form", ["safetensors", "bin shards"])
@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (without("first.bias"), ["1 missing", "first.bias"]),
        (without("second.weight"), ["1 missing", "second.weight"]),
        (changed("extra", torch.zeros(1)), ["1 unexpected", "extra"]),
        (changed("scale", torch.zeros(3)), ["scale is [3]", "[2]"]),
        (changed("first.bias", torch.tensor([1.0, 2.0, float("nan"), 3.0])), ["first.bias", "NaN"]),
        (changed("scale", torch.tensor([1.0, float("-inf")])), ["scale", "non-finite"]),
        (changed("first.weight", torch.ones(4, 3, dtype=torch.int8)), ["first.weight", "int8"]),
    ],
)
def test_weights_that_do_not_fit_are_named_with_their_file(
    tmp_path: Path, form: str, tensors: dict[str, Tensor], said: list[str]
) -> None:
    write(tmp_path, tensors, form)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "model.safetensors" in message if form == "safetensors" else "model-" in message
    for part in said:
        assert part in message


def test_many_mismatches_are_counted_not_listed(tmp_path: Path) -> None:
    write(tmp_path, {f"stray.{index}": torch.zeros(1) for index in range(100)})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "100 unexpected" in message
    assert "and 96 more" in message
    assert "5 missing" in message
    assert len(message) < 700


def test_a_weight_too_large_for_fp16_is_an_overflow_not_a_bad_file(tmp_path: Path) -> None:
    write(tmp_path, changed("scale", torch.tensor([1.0, 1e6])))
    load(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"scale .* does not fit into torch\.float16"):
        load(tmp_path, dtype=torch.float16)


def _no_directory(home: Path) -> Path:
    return home / "absent"


def _no_weights(home: Path) -> Path:
    (home / "config.json").write_text("{}")
    return home


def _shard_absent(home: Path) -> Path:
    write(home, weights(), "bin shards")
    (home / "model-1.bin").unlink()
    return home


def _cut(name: str, form: str) -> Callable[[Path], Path]:
    def build(home: Path) -> Path:
        path = write(home, weights(), form) / name
        path.write_bytes(path.read_bytes()[:-40])
        return home

    return build


def _text(name: str, text: str) -> Callable[[Path], Path]:
    def build(home: Path) -> Path:
        (home / name).write_text(text)
        return home

    return build


def _shard_lacks_weight(home: Path) -> Path:
    write(home, weights(), "safetensors shards")
    save_file({"scale": torch.zeros(2)}, home / "model-1.safetensors")
    return home


def _nested(home: Path) -> Path:
    torch.save({"state_dict": weights()}, home / "model.bin")
    return home


def _index_to(shard: str) -> Callable[[Path], Path]:
    """An index that leads out of its directory, to a file that is there."""

    def build(home: Path) -> Path:
        inner = home / "inner"
        inner.mkdir()
        torch.save(weights(), home / "elsewhere.bin")
        index = {"weight_map": dict.fromkeys(weights(), shard)}
        (inner / "model.bin.index.json").write_text(json.dumps(index))
        return inner

    return build


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code in a checkpoint was run')",)


def _code_in_pickle(home: Path) -> Path:
    torch.save({"first.bias": _Trap()}, home / "model.bin")
    return home


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (_no_directory, "absent does not exist"),
        (_no_weights, "expected model.safetensors or model.bin"),
        (_shard_absent, "the shard 'model-1.bin'"),
        (_cut("model.safetensors", "safetensors"), "corrupt or cut short"),
        (_cut("model.bin", "bin"), "corrupt or cut short"),
        (_cut("model-1.safetensors", "safetensors shards"), "model-1.safetensors ("),
        (_text("model.safetensors", LFS), "Git LFS pointer"),
        (_text("model.bin", LFS), "Git LFS pointer"),
        (_text("model.bin.index.json", LFS), "Git LFS pointer"),
        (_text("model.safetensors", ""), "model.safetensors (0 bytes)"),
        (_text("model.bin", ""), "model.bin (0 bytes)"),
        (_text("model.bin.index.json", "{"), "is not readable JSON"),
        (_text("model.bin.index.json", "{}"), "has no weight_map"),
        (_shard_lacks_weight, "which lacks it"),
        (_index_to("../elsewhere.bin"), "which is not in"),
        (_index_to("/etc/hostname"), "which is not in"),
        (_nested, "plain dictionary of named tensors"),
        (_code_in_pickle, "holds code, not only tensors"),
    ],
)
def test_unusable_files_are_one_clear_line(
    tmp_path: Path, build: Callable[[Path], Path], said: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        WeightFiles.open(build(tmp_path), "model")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    for text, said in (("{,", "not readable JSON"), ("[1]", "not a list"), (LFS, "LFS pointer")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"depth": 28}')
    assert read_config(tmp_path) == {"depth": 28}


def test_the_first_stem_found_wins(tmp_path: Path) -> None:
    write(tmp_path, weights())
    save_file({"scale": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert set(WeightFiles.open(tmp_path, ("absent", "other", "model")).shapes) == {"scale"}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_nothing_is_read_before_everything_fits(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {**weights(), "last": torch.zeros(1)}, form)
    read: list[str] = []
    real = WeightFiles.get

    def get(self: WeightFiles, name: str) -> Tensor:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(WeightFiles, "get", get)
    with pytest.raises(CheckpointError, match="last"):
        load(tmp_path)
    assert read == []
    load(tmp_path, optional=("last",))
    assert sorted(read) == sorted(weights())


@pytest.mark.parametrize("form", ["safetensors", "bin shards"])
def test_one_stored_weight_lives_at_a_time_and_mappings_are_dropped(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, weights(), form)
    monkeypatch.setattr(checkpoint, "_REMAP_BYTES", 1)
    alive: list[weakref.ref[Tensor]] = []
    released: list[int] = []
    real_get, real_release = WeightFiles.get, WeightFiles.release

    def get(self: WeightFiles, name: str) -> Tensor:
        assert not [ref for ref in alive if ref() is not None], "an earlier weight is still held"
        tensor = real_get(self, name).clone()
        alive.append(weakref.ref(tensor))
        return tensor

    def release(self: WeightFiles) -> None:
        released.append(len(alive))
        real_release(self)

    monkeypatch.setattr(WeightFiles, "get", get)
    monkeypatch.setattr(WeightFiles, "release", release)
    model = load(tmp_path, dtype=torch.bfloat16)
    assert len(alive) == len(weights())
    assert released == [1, 2, 3, 4, 5]  # before every read but the first, and at the end
    assert torch.equal(model.get_buffer("steps"), weights()["steps"])


def test_links_as_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "blobs", weights(), "bin shards")
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert set(load(snapshot).state_dict()) == set(load(tmp_path / "blobs").state_dict())


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no 8-bit floats")
def test_eight_bit_floats_are_read_and_their_nan_is_named(tmp_path: Path) -> None:
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.is_floating_point() else tensor
        for name, tensor in weights().items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    state = load(tmp_path).state_dict()
    assert all(torch.equal(state[name], t.float()) for name, t in tensors.items() if name in state)
    name = next(name for name, tensor in tensors.items() if tensor.element_size() == 1)
    spoilt = tensors[name].float()
    spoilt.view(-1)[0] = float("nan")
    save_file(tensors | {name: spoilt.to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="non-finite values"):
        load(tmp_path)
