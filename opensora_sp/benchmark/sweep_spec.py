"""The file of a sweep: the sizes and meshes that it measures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import number, shown
from opensora_sp.benchmark.report.files import Report
from opensora_sp.request import sizes
from opensora_sp.request.config_file import read_config

_KEYS = ("resolutions", "durations", "meshes", "point_timeout")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement of a sweep: a size of the table or HxW, a duration, a mesh.

    height, width: the size in pixels. frames: the number of frames.
    """

    resolution: str
    duration: str
    guidance: int
    sequence: int
    height: int
    width: int
    frames: int

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.guidance * self.sequence

    @property
    def mesh(self) -> str:
        """The mesh as in the sweep's file, guidance x sequence."""
        return f"{self.guidance}x{self.sequence}"

    @property
    def name(self) -> str:
        """The name of the point's files."""
        return f"{self.resolution}-{self.duration}-{self.mesh}"

    def flags(self) -> list[str]:
        """The flags of the point. They set the whole size, so that no other setting changes it."""
        named = _size_of(self.resolution) is None
        return [
            *(("--resolution", self.resolution) if named else ()),
            *("--image-size", str(self.height), str(self.width)),
            *("--num-frames", str(self.frames)),
            *("--guidance-parallel", str(self.guidance)),
            *("--sequence-parallel", str(self.sequence)),
        ]

    def differences(self, report: Report) -> str | None:
        """The differences of a report from this point; None where there are none."""
        first, run = report["request"]["first"], report["run"]
        mesh = run["mesh"]
        wanted = {
            "height": (self.height, first["height"]),
            "width": (self.width, first["width"]),
            "frames": (self.frames, first["num_frames"]),
            "ranks": (self.ranks, run["ranks"]),
            "guidance": (self.guidance, mesh["guidance"]),
            "sequence": (self.sequence, mesh["sequence"]),
            "replicas": (1, mesh["replicas"]),
        }
        wrong = [
            f"{k} {found} instead of {own}" for k, (own, found) in wanted.items() if own != found
        ]
        return ", ".join(wrong) or None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep's file. point_timeout: seconds that each point may take.

    aspect_ratio: of the resolutions that are names of the size table.
    """

    resolutions: tuple[str, ...]
    durations: tuple[str, ...]
    meshes: tuple[tuple[int, int], ...]
    point_timeout: float | None = None
    aspect_ratio: str = "9:16"

    def points(self) -> Iterator[Point]:
        """The points, mesh by mesh, so that one table is complete before the next begins."""
        sizes_of = {name: self._size(name) for name in self.resolutions}
        for guidance, sequence in self.meshes:
            for resolution in self.resolutions:
                for duration in self.durations:
                    yield Point(
                        resolution=resolution,
                        duration=duration,
                        guidance=guidance,
                        sequence=sequence,
                        height=sizes_of[resolution][0],
                        width=sizes_of[resolution][1],
                        frames=sizes.resolve_frames(duration),
                    )

    def _size(self, resolution: str) -> tuple[int, int]:
        return sizes.resolve_size(resolution, self.aspect_ratio, _size_of(resolution))


def _size_of(resolution: str) -> tuple[int, int] | None:
    """(height, width) of a resolution that is written as HxW."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", resolution)
    return (int(found[1]), int(found[2])) if found else None


def read_sweep(path: str, aspect_ratio: str = "9:16") -> Sweep:
    """Read a sweep's file. Raises UserError for a key that is missing, unknown or illegal.

    aspect_ratio: of the resolutions that are names of the size table.
    """
    raw = read_config(path, "--sweep")
    what = f"--sweep {shown(path)}"
    if unknown := sorted(set(raw) - set(_KEYS)):
        raise UserError(f"{what}: {shown(unknown[0])} is not a key; there are {', '.join(_KEYS)}")
    lists: dict[str, tuple[str, ...]] = {}
    for key in _KEYS[:3]:
        value = raw.get(key)
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(isinstance(entry, str) and entry for entry in entries):
            raise UserError(f"{what}: {key} needs one entry or a list of them")
        lists[key] = tuple(dict.fromkeys(str(entry) for entry in entries))
    meshes = []
    for text in lists["meshes"]:
        found = re.fullmatch(r"([12])x([1-9]\d{0,3})", text)
        if found is None:
            raise UserError(
                f"{what}: the mesh {shown(text)} is not guidance x sequence, such as 1x1, 2x1, "
                "2x4 (guidance 1 or 2, sequence up to 9999)"
            )
        meshes.append((int(found[1]), int(found[2])))
    timeout = raw.get("point_timeout")
    if isinstance(timeout, list):
        raise UserError(f"{what}: point_timeout needs one number of seconds")
    limit = number(0, above=True).parse("point_timeout", timeout) if timeout else None
    sweep = Sweep(
        resolutions=lists["resolutions"],
        durations=lists["durations"],
        meshes=tuple(meshes),
        point_timeout=limit,
        aspect_ratio=aspect_ratio,
    )
    try:
        # Names of sizes and durations become file names, so unknown ones are refused here.
        list(sweep.points())
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    return sweep
