"""Files of `torch.save`, opened only after their content was looked at.

`torch.load(weights_only=True)` is not enough: up to torch 2.5.1 it hands TorchScript archives and
tar files to readers that run what is inside (CVE-2025-32434). So a file is read here in three
steps: it must be a zip archive of `torch.save`, without the entries of a TorchScript archive; its
pickle must name nothing but what tensors are made of; only then torch loads it. Whatever else a
file holds is refused by name, before any of it runs.
"""

from __future__ import annotations

import io
import pickletools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from opensora_sp.base.errors import CheckpointError

_ZIP_MARK = b"PK\x03\x04"
# From this version on torch's own reader of the old form, one pickle after another, was mended.
_OLD_FORM_FROM = (2, 6)
_STRINGS = frozenset(
    {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING"}
    | {"SHORT_BINSTRING"}
)
_MEMO = frozenset({"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"})
_REBUILDS = "torch._utils._rebuild_"
_PLAIN = frozenset(
    {
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch.nn.parameter.Parameter",
        f"{_REBUILDS}tensor",
        f"{_REBUILDS}tensor_v2",
        f"{_REBUILDS}tensor_v3",
        f"{_REBUILDS}parameter",
        f"{_REBUILDS}parameter_with_state",
    }
)
# Tensors without plain memory of their own: nothing here could use them as weights.
_ODD = {
    f"{_REBUILDS}sparse_tensor": "a sparse tensor",
    f"{_REBUILDS}sparse_csr_tensor": "a sparse tensor",
    f"{_REBUILDS}nested_tensor": "a nested tensor",
    f"{_REBUILDS}meta_tensor_no_storage": "a tensor without data (meta)",
    f"{_REBUILDS}qtensor": "a quantised tensor",
    f"{_REBUILDS}device_tensor_from_numpy": "a tensor of another device",
    f"{_REBUILDS}wrapper_subclass": "a tensor of a class of its own",
}


def load_tensor_file(
    path: Path, map_location: torch.device | str = "cpu", *, mmap: bool = False
) -> Any:
    """What `torch.save` wrote into a file: tensors, and plain values around them.

    mmap: map the tensors from the file; a file of the old form, before torch 1.6, is read whole.

    Raises:
        CheckpointError: the file holds code or can hold it, is of a form that is not read, is cut
            short, or cannot be read.
    """
    path = Path(path)
    try:
        zipped = is_zipped(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if zipped:
        _inspect_zip(path)
    else:
        _inspect_old_form(path)
    try:
        return torch.load(
            str(path), map_location=map_location, weights_only=True, mmap=mmap and zipped
        )
    except Exception as error:  # torch.load has no error type of its own
        _, refused, what = str(error).partition("WeightsUnpickler error: ")
        if refused:  # torch's own words advise to run the file without a look at it
            raise CheckpointError(
                f"{path} holds values that torch {torch.__version__} does not read as weights "
                f"({one_line(what)}): use the published checkpoint file"
            ) from None
        raise corrupt(path, error) from error


def is_zipped(path: Path) -> bool:
    """Whether a file has the zip form, whose tensors can be mapped."""
    with path.open("rb") as file:
        return file.read(len(_ZIP_MARK)) == _ZIP_MARK


def corrupt(path: Path, error: Exception) -> CheckpointError:
    """What to say of a file that its reader could not make sense of."""
    size = path.stat().st_size if path.exists() else 0
    return CheckpointError(
        f"{path} ({size} bytes) is corrupt or cut short, download it again: {one_line(error)}"
    )


def _inspect_zip(path: Path) -> None:
    """Refuse an archive that is more than tensors.

    It is opened by the class that torch.load itself uses, so that both see the same entries.
    """
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        entries = list(reader.get_all_records())
        pickled = bytes(reader.get_record("data.pkl")) if "data.pkl" in entries else None
    except Exception as error:
        raise corrupt(path, error) from error
    script = [e for e in entries if e == "constants.pkl" or e.split("/")[0] == "code"]
    if script:
        raise _holds_code(path, f"a TorchScript archive with {script[0]}")
    if pickled is None:
        raise CheckpointError(
            f"{path} is a zip archive, but not one of torch.save: it has no data.pkl; use the "
            "published checkpoint file"
        )
    _inspect_pickle(path, io.BytesIO(pickled))


def _inspect_old_form(path: Path) -> None:
    """Refuse a tar, and on an old torch every file of the form before torch 1.6."""
    if _is_tar(path):
        raise _holds_code(path, "a tar archive, which torch would unpack and run")
    with path.open("rb") as file:
        # Magic number, protocol, system, the object: each a pickle of its own; storages follow.
        for _ in range(4):
            _inspect_pickle(path, file)
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLD_FORM_FROM:
        raise CheckpointError(
            f"{path} has the form of torch before 1.6, which torch {torch.__version__} reads in a "
            "way that can run code: save it anew with torch.save on torch 2.6 or later"
        )


def _is_tar(path: Path) -> bool:
    """Whether torch would read it as a tar. It opens none that is compressed.

    `tarfile.is_tarfile` tries to decompress: 66 bytes that look like LZMA ask for 4 GB there.
    """
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False
    except Exception as error:  # a broken header ends in whatever its fields lead to
        raise corrupt(path, error) from error


def _inspect_pickle(path: Path, pickled: IO[bytes]) -> None:
    """Refuse a pickle that names anything but what tensors are made of; reads it to its end."""
    try:
        for name in _named(pickled):
            if name in _PLAIN or _is_torch_kind(name):
                continue
            if name in _ODD:
                raise CheckpointError(
                    f"{path} holds {_ODD[name]}, which is no weight of this model: "
                    "use the published checkpoint file"
                )
            raise _holds_code(path, name)
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises what its readers happen to meet
        raise corrupt(path, error) from error


def _named(pickled: IO[bytes]) -> Iterator[str]:
    """`module.name` of everything that a pickle would import."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        kind = opcode.name
        if kind in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif kind == "STACK_GLOBAL":
            yield ".".join(strings[-2:]) if len(strings) >= 2 else "an unnamed global"
        elif kind in ("EXT1", "EXT2", "EXT4"):
            yield "an object of the copyreg registry"
        if kind in _STRINGS:
            strings.append(str(argument))
        elif kind not in _MEMO:
            # A name that comes from anywhere but the two strings before it is not looked up.
            strings.clear()


def _is_torch_kind(name: str) -> bool:
    """`torch.FloatStorage`, `torch.bfloat16` and their like: classes and values, not functions."""
    package, _, leaf = name.rpartition(".")
    if package != "torch":
        return False
    return leaf.endswith("Storage") or isinstance(getattr(torch, leaf, None), torch.dtype)


def _holds_code(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds code, not only tensors ({one_line(what)}): do not use this file; take "
        "the published checkpoint, or have it saved as .safetensors"
    )


def one_line(error: Exception | str) -> str:
    """What an error says, on one line of at most 160 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
