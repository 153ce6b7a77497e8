"""Strict loading of checkpoint files into modules that were built on the meta device.

Every name and shape is compared before the first weight is read, so a wrong directory is refused
in a second instead of after minutes; then one tensor at a time goes from the mapped file straight
into the wanted dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora_sp.base import access
from opensora_sp.base.errors import CheckpointError
from opensora_sp.base.value_types import ValueType
from opensora_sp.models.configs import checked, read_config_object, read_shards
from opensora_sp.models.offload import pinned
from opensora_sp.models.tensor_files import corrupt, is_zipped, load_tensor_file, one_line

Shape = tuple[int, ...]

# Pages of a mapped file count as this process's memory until its mapping is dropped, so a 19 GB
# text encoder would look like 19 GB. Mapping anew after this many bytes keeps the count low.
_REMAP_BYTES = 32 << 20
_LFS_MARK = b"version https://git-lfs"
_NAMED_IN_ERRORS = 4


class _SafetensorsFile:
    """One .safetensors file: shapes from its header, tensors mapped on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        handle = self._open()
        self.shapes: dict[str, Shape] = {
            name: tuple(handle.get_slice(name).get_shape())
            for name in handle.keys()  # noqa: SIM118
        }

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(str(self.path), framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise corrupt(self.path, error) from error

    def get(self, name: str) -> Tensor:
        if self._handle is None:
            self._handle = self._open()
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def release(self) -> None:
        self._handle = None


class _PickleFile:
    """One PyTorch .bin file of named tensors, looked into before it is unpickled.

    Files of the older, non-zip form cannot be mapped: they are read whole and kept until the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mappable = is_zipped(path)
        self._tensors: dict[str, Tensor] | None = self._open()
        self.shapes: dict[str, Shape] = {n: tuple(t.shape) for n, t in self._tensors.items()}

    def _open(self) -> dict[str, Tensor]:
        content = load_tensor_file(self.path, mmap=True)
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
        ):
            raise CheckpointError(
                f"{self.path} does not hold a plain dictionary of named tensors: "
                "use the published checkpoint file"
            )
        return content

    def get(self, name: str) -> Tensor:
        if self._tensors is None:
            self._tensors = self._open()
        return self._tensors[name]

    def release(self) -> None:
        if self._mappable:
            self._tensors = None


class WeightFiles:
    """The named weights of one checkpoint, in one file or in the shards of an index.

    `shapes` holds every weight's shape by name and is known without reading any data.
    """

    def __init__(self, directory: Path, homes: Mapping[str, _SafetensorsFile | _PickleFile]):
        self.directory = directory
        self._homes = dict(homes)
        self.shapes: dict[str, Shape] = {n: home.shapes[n] for n, home in self._homes.items()}
        self._mapped_bytes = 0

    @classmethod
    def open(cls, directory: Path, stem: str | Sequence[str]) -> WeightFiles:
        """Find and open the weights called `stem` (several stems: the first one found).

        Looks for stem.safetensors, stem.safetensors.index.json, stem.bin, stem.bin.index.json.

        Raises:
            CheckpointError: no such directory or file, a shard that the index names is absent,
                or a file that is corrupt, cut short or a Git LFS pointer.
        """
        directory = Path(directory)
        _require_directory(directory)
        stems = [stem] if isinstance(stem, str) else list(stem)
        for name in stems:
            for suffix in (".safetensors", ".bin"):
                whole = directory / f"{name}{suffix}"
                if access.is_file(whole):
                    file = _open_file(whole)
                    return cls(directory, dict.fromkeys(file.shapes, file))
                index = directory / f"{name}{suffix}.index.json"
                if access.is_file(index):
                    return cls(directory, _open_shards(index))
        wanted = " or ".join(f"{name}.safetensors or {name}.bin" for name in stems)
        raise CheckpointError(
            f"no weights in {directory}: expected {wanted} (or the .index.json of its shards)"
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights, each once, in order of first use."""
        return tuple(dict.fromkeys(home.path for home in self._homes.values()))

    def file_of(self, name: str) -> Path:
        """The file that holds the weight `name`."""
        return self._homes[name].path

    def get(self, name: str) -> Tensor:
        """The weight `name` on the CPU in its stored dtype, mapped from the file where possible."""
        if self._mapped_bytes > _REMAP_BYTES:
            self.release()
        tensor = self._homes[name].get(name)
        self._mapped_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def release(self) -> None:
        """Drop the mappings; a later `get` maps the file again."""
        for home in {id(home): home for home in self._homes.values()}.values():
            home.release()
        self._mapped_bytes = 0


@dataclass(frozen=True)
class _Target:
    """One weight of a module and every name it answers to (tied weights have several)."""

    names: list[str]
    tensor: Tensor
    sources: list[str] = field(default_factory=list)  # the file's names for it, the best one first

    @property
    def name(self) -> str:
        return self.names[0]


def load_module(
    module: nn.Module,
    weights: WeightFiles,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    prefix: str = "",
    aliases: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
    keep_float32: Callable[[str], bool] | None = None,
    skip: Callable[[str], bool] | None = None,
    in_host_memory: Callable[[str], bool] | None = None,
) -> None:
    """Fill a module built on the meta device with a checkpoint's weights, strictly.

    All parameters and persistent buffers are compared by name and shape first, then read one at
    a time, so the peak is what the module keeps plus one weight. Afterwards the module is in
    eval mode and no weight requires a gradient. Non-persistent buffers are the caller's.

    Args:
        dtype: dtype of every floating weight, unless `keep_float32(name)`; others keep the model's.
        prefix: only the file's names that start with it belong to this module; it is cut off.
        aliases: a name (without prefix) that files use for, or beside, one of the model's names.
        optional: names that either side may lack.
        in_host_memory: weights that stay in host memory, to be copied to `device` when used.
        skip: weights that must be there with the right shape but are not read; they stay on meta.

    Raises:
        CheckpointError: missing, unexpected, mis-shaped or non-finite weights, named with the file.
    """
    targets = [
        target
        for target in _match(module, weights, prefix, aliases or {}, optional)
        if target.sources and not (skip is not None and skip(target.name))
    ]
    for target in targets:
        wanted = target.tensor.dtype
        if wanted.is_floating_point:
            exact = keep_float32 is not None and keep_float32(target.name)
            wanted = torch.float32 if exact else dtype
        stays = in_host_memory is not None and in_host_memory(target.name)
        place = torch.device("cpu" if stays else device)
        value = _read(weights, target.sources[0], wanted, place)
        if stays:
            value = pinned(value, torch.device(device))
        _assign(module, target, value)
    weights.release()
    module.requires_grad_(False)
    module.eval()
    state = module.state_dict(keep_vars=True)
    left = [target.name for target in targets if state[target.name].is_meta]
    assert not left, f"weights left on the meta device: {_some(left)}"


def read_config(directory: Path, kinds: Mapping[str, ValueType] | None = None) -> dict[str, Any]:
    """The checkpoint directory's config.json; its keys in `kinds` are of their kinds.

    Raises:
        CheckpointError: no such directory or file, not a JSON object, or a key of another kind.
    """
    directory = Path(directory)
    _require_directory(directory)
    path = directory / "config.json"
    if not access.is_file(path):
        raise CheckpointError(
            f"no config.json in {directory}: give a published checkpoint directory"
        )
    _refuse_lfs_pointer(path)
    return checked(read_config_object(path), kinds or {}, path)


def _match(
    module: nn.Module,
    weights: WeightFiles,
    prefix: str,
    aliases: Mapping[str, str],
    optional: Collection[str],
) -> list[_Target]:
    """Pair the module's weights with the file's, or refuse naming everything that does not fit."""
    by_identity: dict[int, _Target] = {}
    by_name: dict[str, _Target] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        target = by_identity.setdefault(id(tensor), _Target([], tensor))
        target.names.append(name)
        by_name[name] = target

    problems: dict[str, list[str]] = {"of another shape": [], "missing": [], "unexpected": []}
    culprits: list[Path] = []
    for source, shape in weights.shapes.items():
        name = source.removeprefix(prefix)
        if not source.startswith(prefix):
            continue
        found = by_name.get(name) or by_name.get(aliases.get(name, ""))
        if found is not None:
            found.sources.insert(0 if name in by_name else len(found.sources), source)
            if shape != tuple(found.tensor.shape):
                fits = f"{source} is {list(shape)}, the model's {list(found.tensor.shape)}"
                problems["of another shape"].append(fits)
                culprits.append(weights.file_of(source))
        elif name not in optional:
            problems["unexpected"].append(source)
            culprits.append(weights.file_of(source))
    for target in by_identity.values():
        if not target.sources and not any(name in optional for name in target.names):
            problems["missing"].append(prefix + target.name)
    _refuse_mismatch(problems, culprits or list(weights.files))
    return list(by_identity.values())


def _refuse_mismatch(problems: Mapping[str, Sequence[str]], files: Sequence[Path]) -> None:
    said = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if said:
        raise CheckpointError(
            f"the weights in {_some(map(str, dict.fromkeys(files)))} do not fit the model: "
            f"{'; '.join(said)}; {_remedy(problems, files)}"
        )


def _remedy(problems: Mapping[str, Sequence[str]], files: Sequence[Path]) -> str:
    """What to do: T5 with its decoder can be converted."""
    others = problems["missing"] or problems["of another shape"]
    if not others and all(n.startswith(("decoder.", "lm_head.")) for n in problems["unexpected"]):
        return (
            "that is T5 with its decoder: convert it with `opensora-sp convert t5 "
            f"{files[0].parent} NEW_DIR`"
        )
    return "give the checkpoint that belongs to its config.json"


def _read(weights: WeightFiles, source: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One weight in its final dtype and place, owned by this process and finite."""
    stored = weights.get(source)
    where = f"weight {source} in {weights.file_of(source)}"
    if stored.layout != torch.strided or stored.is_meta or stored.is_quantized:
        raise CheckpointError(f"{where} is no plain tensor ({stored.layout}), but a weight must be")
    if stored.is_floating_point() != dtype.is_floating_point:
        raise CheckpointError(f"{where} is stored as {stored.dtype}, which the model cannot use")
    # A copy, not the mapped pages: the file may be replaced or go away while the model lives.
    value = stored.to(dtype, copy=device.type == "cpu")
    if not _is_finite(value):
        if _is_finite(stored):
            raise CheckpointError(f"{where} does not fit into {dtype}: choose --dtype bf16 or fp32")
        raise CheckpointError(f"{where} has non-finite values (NaN or infinity): download it again")
    return value.to(device)


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; aminmax passes both on and allocates nothing."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # torch compares no 8-bit floats
        tensor = tensor.float()
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _assign(module: nn.Module, target: _Target, value: Tensor) -> None:
    """Put `value` in the place of the target under all its names, keeping ties tied."""
    is_parameter = isinstance(target.tensor, nn.Parameter)
    new = nn.Parameter(value, requires_grad=False) if is_parameter else value
    for name in target.names:
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, new)


def _open_file(path: Path) -> _SafetensorsFile | _PickleFile:
    _refuse_lfs_pointer(path)
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)


def _open_shards(index: Path) -> dict[str, _SafetensorsFile | _PickleFile]:
    """Every weight of the shards that the index lists, with the shard that holds it."""
    _refuse_lfs_pointer(index)
    listed = read_shards(index)
    shards = {shard: _open_file(index.parent / shard) for shard in sorted(set(listed.values()))}
    homes = {name: shard for shard in shards.values() for name in shard.shapes}
    for name, shard in listed.items():
        if name not in shards[shard].shapes:
            raise CheckpointError(f"{index.name} puts the weight {name} in {shard}, which lacks it")
        homes[name] = shards[shard]
    return homes


def _require_directory(directory: Path) -> None:
    if not access.is_dir(directory):
        what = "is a file, not a directory" if access.exists(directory) else "does not exist"
        raise CheckpointError(f"checkpoint directory {directory} {what}")


def _refuse_lfs_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_MARK))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if head == _LFS_MARK:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}"
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f", and {len(listed) - _NAMED_IN_ERRORS} more" if len(listed) > _NAMED_IN_ERRORS else ""
    return ", ".join(listed[:_NAMED_IN_ERRORS]) + more
