"""The saved state of a video: latents of finished clips and of the last saved step, on disk.

The files are beside the output's record in `.opensora-sp/`. OUTPUT.clip0000.safetensors holds the
final latents of a clip, and OUTPUT.step.safetensors those of the clip that is being denoised. Both
are whole latents [4,T,H,W] in float32, so they do not depend on the mesh. With a step cache the
velocities are there too that fill the steps left out. Noise is keyed, so there is no generator to
save. Decoded frames are made again from the clips.

Each file has the identity of its request and a checksum over its content, and appears whole or not
at all. A file is accepted only if its shape, steps and clips are possible for the request.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from opensora_sp.base import access, geometry
from opensora_sp.base.atomic import atomic_output, reported
from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import parse_json
from opensora_sp.base.value_types import shown
from opensora_sp.engine.progress import Position
from opensora_sp.jobs.identity import Identity, difference
from opensora_sp.jobs.records import FOLDER
from opensora_sp.parallel.agreement import checksum
from opensora_sp.request.step_schedule import FILLS

_FORMAT = "opensora-sp latents 2"
# In this older format the checksum covers the tensors only.
_FORMAT_BEFORE = "opensora-sp latents 1"
# Values of latents that are read for a comparison: those of over two hours of 720p.
_MOST_VALUES = 2**31
_VELOCITY_STEPS = "steps of the velocities"
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class SavedStep:
    """The latents z [4,T,H,W] of a clip after a step, and its frame mask [T], if any.

    held: with a step cache, the velocities [4,T,H,W] of computed steps, by step, ascending.
    """

    z: Tensor
    mask: Tensor | None
    held: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StateFiles:
    """The files of the saved state of one output.

    identity: what decides the latents. refined: the prompt that a language model made, which a
    resumed run uses again. about: the device and the mesh, for information.
    """

    output: Path
    identity: Identity
    refined: str | None = None
    about: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.output.parent / FOLDER

    @property
    def step_path(self) -> Path:
        """The file of the clip that is being denoised."""
        return self.folder / f"{self.output.name}.step.safetensors"

    def clip_path(self, clip: int) -> Path:
        """The file of a finished clip."""
        return self.folder / f"{self.output.name}.clip{clip:04d}.safetensors"

    def finished_clips(self) -> int:
        """How many clips from the first on are saved."""
        clip = 0
        while self._is_there(self.clip_path(clip)):
            clip += 1
        return clip

    def position(self) -> Position:
        """How far the video has come. All files are read and checked.

        Raises UserError for a file that is damaged or of another request. Nothing is deleted.
        """
        clips = self.finished_clips()
        for clip in range(clips):
            self.load_clip(clip)
        if not self._is_there(self.step_path):
            return Position(clips)
        saved = self._read_step()[0]
        clip, step = saved.clip, saved.step
        if clip > clips:
            self._refuse(self.step_path, f"is of clip {clip}, but clip {clips} is not there")
        # The step may be of a clip that has been finished since. Then it is not needed.
        return Position(clips, step if clip == clips else 0)

    def refined_prompt(self) -> str | None:
        """The refined prompt of the saved state; None without one."""
        paths = [self.step_path, self.clip_path(0)]
        for path in paths:
            if self._is_there(path):
                return self._read(path)[0].get("refined")
        return None

    def save_step(self, position: Position, saved: SavedStep) -> None:
        """Save the clip that is being denoised."""
        tensors = {"latents": saved.z}
        if saved.mask is not None:
            tensors["mask"] = saved.mask
        if saved.held:
            tensors["velocities"] = torch.stack(list(saved.held.values()))
        self._write(self.step_path, tensors, position, tuple(saved.held))

    def save_clip(self, clip: int, latents: Tensor) -> None:
        """Save the final latents [4,T,H,W] of a clip, and remove the file of its steps."""
        self._write(self.clip_path(clip), {"latents": latents}, Position(clip + 1))
        self.step_path.unlink(missing_ok=True)

    def load_step(self) -> SavedStep:
        """Load what `save_step` saved. Raises UserError as `position` does."""
        _, tensors, steps = self._read_step()
        held = dict(zip(steps, tensors.get("velocities", ()), strict=True))
        return SavedStep(tensors["latents"], tensors.get("mask"), held)

    def load_clip(self, clip: int) -> Tensor:
        """Load what `save_clip` saved, [4,T,H,W]. Raises UserError as `position` does."""
        path = self.clip_path(clip)
        about, tensors = self._read(path)
        found = self._position(path, about)
        if found != Position(clip + 1):
            self._refuse(
                path,
                f"says that it is of clip {found.clip - 1}, but its name says {clip}",
            )
        return tensors["latents"]

    def exists(self) -> bool:
        """Whether anything is saved."""
        return access.exists(self.step_path) or access.exists(self.clip_path(0))

    def remove(self) -> None:
        """Delete the saved state of this output."""
        self.step_path.unlink(missing_ok=True)
        clips = re.compile(re.escape(self.output.name) + r"\.clip\d{4,}\.safetensors")
        found = [path for path in self.folder.glob("*.safetensors") if clips.fullmatch(path.name)]
        # The last clip first, so that an interruption leaves a valid state.
        for path in sorted(found, reverse=True):
            path.unlink(missing_ok=True)

    def _write(
        self,
        path: Path,
        tensors: dict[str, Tensor],
        position: Position,
        velocity_steps: Sequence[int] = (),
    ) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}
        about = {
            "format": _FORMAT,
            "identity": json.dumps(self.identity, sort_keys=True),
            "clip": str(position.clip),
            "step": str(position.step),
            "torch": torch.__version__,
            "made on": self.about,
        }
        if self.refined is not None:
            about["refined"] = self.refined
        if velocity_steps:
            about[_VELOCITY_STEPS] = " ".join(map(str, velocity_steps))
        about["checksum"] = _checksum(about, tensors)
        with atomic_output(path) as temporary, reported(path):
            try:
                save_file(tensors, str(temporary), metadata=about)
            except SafetensorError as error:  # raised for a full disk, among others
                raise OSError(str(error)) from error

    def _read(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                about: dict[str, str] = file.metadata() or {}
                before: Any = parse_json(about["identity"])
                if not isinstance(before, dict):
                    raise ValueError("its identity is not an object")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {name: list(one.get_shape()) for name, one in slices.items()}
                dtypes = {name: one.get_dtype() for name, one in slices.items()}
                # For another request the difference is reported, and not the shapes.
                if not difference(before, self.identity):
                    self._check_tensors(path, shapes, dtypes)
                tensors = {name: file.get_tensor(name) for name in shapes}
            whole = about["checksum"] == _checksum(about, tensors)
        except PermissionError:
            self._refuse(path, "may not be read (permission denied)")
        except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
            self._refuse(path, f"is damaged ({type(error).__name__}: it was cut short or changed)")
        if about.get("format") not in (_FORMAT, _FORMAT_BEFORE) or not whole:
            self._refuse(path, "is damaged (its checksum or format is not right)")
        if found := difference(before, self.identity):
            raise UserError(
                f"{path} is the saved state of another request, {found}: ask for the same, choose "
                "another --sample-name or --save-dir, or begin again with --overwrite"
            )
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                self._refuse(path, f"holds values in its {name} that are NaN or infinite")
        mask = tensors.get("mask")
        if mask is not None and not bool(((mask >= 0) & (mask <= 1)).all()):
            self._refuse(path, "holds a mask with values that are not from 0 to 1")
        return about, tensors

    def _is_there(self, path: Path) -> bool:
        if access.is_file(path):
            return True
        if access.exists(path):
            self._refuse(path, "is not a regular file")
        return False

    def _read_step(self) -> tuple[Position, dict[str, Tensor], list[int]]:
        about, tensors = self._read(self.step_path)
        position = self._position(self.step_path, about)
        loop, steps = self._of_request("loop"), self._of_request("steps")
        if not (position.clip < loop and 0 < position.step < steps):
            self._refuse(
                self.step_path,
                f"says that it stands at clip {position.clip}, step {position.step}, but the "
                f"request has {loop} clips (from 0) of {steps} steps",
            )
        return position, tensors, self._velocity_steps(about, tensors, position.step)

    def _velocity_steps(
        self, about: Mapping[str, str], tensors: Mapping[str, Tensor], before: int
    ) -> list[int]:
        """The steps of the saved velocities, ascending, all before the step where the clip is."""
        said = about.get(_VELOCITY_STEPS, "").split()
        steps = [int(one) if _NUMBER.fullmatch(one) else -1 for one in said]
        ascending = all(one < other for one, other in pairwise([-1, *steps, before]))
        if not ascending or len(steps) != len(tensors.get("velocities", ())):
            self._refuse(
                self.step_path,
                f"says that its velocities are of the steps {shown(' '.join(said))}",
            )
        return steps

    def _position(self, path: Path, about: Mapping[str, str]) -> Position:
        numbers = [about.get("clip", ""), about.get("step", "")]
        if not all(_NUMBER.fullmatch(number) for number in numbers):
            self._refuse(
                path, f"says that it stands at clip {shown(numbers[0])}, step {shown(numbers[1])}"
            )
        return Position(*map(int, numbers))

    def _check_tensors(
        self, path: Path, shapes: Mapping[str, list[int]], dtypes: Mapping[str, str]
    ) -> None:
        """Check names, shapes and dtypes from the header, before the tensors are read."""
        names = ("num_frames", "height", "width", "micro_frame_size")
        latent = geometry.latent_shape(*(self._of_request(name) for name in names))
        expected = {"latents": [4, *latent]}
        if "mask" in shapes and path == self.step_path:
            expected["mask"] = [latent[0]]
        if self.identity.get("step cache", "off") != "off" and path == self.step_path:
            count = shapes.get("velocities", [1])[:1]
            expected["velocities"] = [min(max(1, *count), len(FILLS)), 4, *latent]
        if shapes != expected:
            self._refuse(path, f"holds {shown(shapes)}, but the request has {shown(expected)}")
        if set(dtypes.values()) != {"F32"}:
            self._refuse(path, f"holds {shown(dtypes)}, but states are float32")

    def _of_request(self, name: str) -> int:
        return int(self.identity["request"][name])

    def _refuse(self, path: Path, problem: str) -> NoReturn:
        raise UserError(
            f"{path} {problem}: move it away to go on from what is saved before it, or begin "
            "again with --overwrite"
        )


def read_latents(path: Path) -> tuple[dict[str, str], Tensor]:
    """The latents of any file, of whatever request, and the metadata of the file.

    For comparisons. It reads what `StateFiles` writes, and any safetensors file with a floating
    tensor called latents, [4,T,H,W] or [1,4,T,H,W], such as a person keeps from Python.

    Returns:
        The metadata, {} where there is none, and [4,T,H,W] float32.

    Raises:
        UserError: the file is no such file, is damaged, or holds NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            about: dict[str, str] = file.metadata() or {}
            names = list(file.keys())
            if "latents" not in names:
                raise UserError(
                    f"{path} holds no tensor called latents but {shown(names)}: give saved latents"
                )
            shape = list(file.get_slice("latents").get_shape())
            if shape[:-3] not in ([4], [1, 4]) or 0 in shape:
                raise UserError(
                    f"{path} holds latents {shape}, but latents are [4, T, H, W]: give those of "
                    "one clip"
                )
            if math.prod(shape) > _MOST_VALUES:
                raise UserError(
                    f"{path} holds latents {shape}, but at most {_MOST_VALUES} values are read"
                )
            of_program = about.get("format") in (_FORMAT, _FORMAT_BEFORE)
            names = names if of_program else ["latents"]
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole file of saved latents: {reason}") from None
    if of_program and about.get("checksum") != _checksum(about, tensors):
        raise UserError(f"{path} is damaged (its checksum is not right): give a whole file")
    latents = tensors["latents"]
    if not latents.is_floating_point():
        raise UserError(f"{path} holds latents of {latents.dtype}, which are no floating numbers")
    if not bool(latents.isfinite().all()):
        raise UserError(f"{path} holds latents that are NaN or infinite: nothing can be compared")
    return about, latents.reshape(shape[-4:]).float()


def _checksum(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A short hash of a state: its names, its tensors and its metadata.

    In the older format it is a hash of the tensors only.
    """
    names = sorted(tensors)
    of_tensors = checksum(tensors[name] for name in names)
    if about.get("format") == _FORMAT_BEFORE:
        return of_tensors
    said = {key: value for key, value in about.items() if key != "checksum"}
    text = json.dumps([said, names, of_tensors], sort_keys=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).hexdigest()
