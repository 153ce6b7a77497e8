"""The mesh of a world, and which backend serves which device."""

from __future__ import annotations

from itertools import product

import pytest
import torch.distributed as dist

from opensora_sp.base.errors import UserError
from opensora_sp.parallel import backend
from opensora_sp.parallel.backend import is_available, pick_backend, pick_device, require_backend
from opensora_sp.parallel.backend_table import BACKENDS, DEVICES, Backend
from opensora_sp.parallel.mesh import Mesh, Place, legal_meshes, plan_mesh
from opensora_sp.request.flags.rules import COMBINATIONS


@pytest.mark.parametrize(
    ("world", "guided", "expected"),
    [
        (1, True, Mesh()),
        (2, True, Mesh(guidance=2)),
        (2, False, Mesh(sequence=2)),
        (3, True, Mesh(sequence=3)),
        (8, True, Mesh(guidance=2, sequence=4)),
        (8, False, Mesh(sequence=8)),
    ],
)
def test_guidance_first_where_the_ranks_are_even(world: int, guided: bool, expected: Mesh) -> None:
    assert plan_mesh(world, guided=guided) == expected


def test_what_a_person_fixes_is_kept() -> None:
    assert plan_mesh(8, guided=True, guidance=1) == Mesh(sequence=8)
    assert plan_mesh(8, guided=True, replicas=2) == Mesh(replicas=2, guidance=2, sequence=2)
    assert plan_mesh(6, guided=True, sequence=3) == Mesh(guidance=2, sequence=3)
    assert plan_mesh(8, guided=True, sequence=2, replicas=None) == Mesh(
        replicas=2, guidance=2, sequence=2
    )


@pytest.mark.parametrize(
    ("fixed", "told"),
    [
        ({"guidance": 2}, ["--guidance-parallel 2", "3 ranks", "1×1×3"]),
        ({"sequence": 1}, ["--sequence-parallel 1", "legal", "1×1×3"]),
        ({"replicas": 2, "sequence": 3}, ["--replicas 2", "--sequence-parallel 3"]),
    ],
)
def test_impossible_products_list_the_legal_ones(fixed: dict[str, int], told: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        plan_mesh(3, guided=True, **fixed)
    for words in told:
        assert words in str(caught.value)


@pytest.mark.parametrize("world", range(1, 9))
def test_every_rank_has_one_place_and_every_group_its_ranks(world: int) -> None:
    for mesh in legal_meshes(world, guided=True):
        assert mesh.size == world
        assert [mesh.rank(mesh.place(rank)) for rank in range(world)] == list(range(world))
        for groups, size in (
            (mesh.sequence_groups(), mesh.sequence),
            (mesh.guidance_groups(), mesh.guidance),
        ):
            assert sorted(rank for group in groups for rank in group) == list(range(world))
            assert {len(group) for group in groups} == {size}
        for pair in mesh.guidance_groups():
            assert [mesh.place(rank).guidance for rank in pair] == list(range(mesh.guidance))
            assert len({mesh.place(rank).sequence for rank in pair}) == 1
    # Sequence varies fastest: its exchange is between neighbours.
    assert Mesh(guidance=2, sequence=4).place(5) == Place(replica=0, guidance=1, sequence=1)


def test_each_backend_serves_its_device_and_gloo_all() -> None:
    for name, row in BACKENDS.items():
        assert pick_backend(None, row.device).name == name
        assert pick_backend("gloo", row.device).name == "gloo"
    with pytest.raises(UserError, match="nccl serves cuda devices, not --device cpu"):
        pick_backend("nccl", "cpu")
    with pytest.raises(UserError, match=f"unknown, choose one of {', '.join(BACKENDS)}"):
        pick_backend("mpi", "cpu")


def test_the_flags_refuse_the_pairs_that_no_session_could_open() -> None:
    (rule,) = (c for c in COMBINATIONS if c.features == "--device + --backend")
    refused = {pair for pair in product(DEVICES, BACKENDS) if rule.meets(_chosen(*pair))}
    assert refused >= {("cpu", "nccl"), ("cpu", "eccl"), ("cuda", "eccl"), ("gcu", "nccl")}
    for device, name in product(DEVICES, BACKENDS):
        if (device, name) not in refused:
            assert pick_backend(name, device).name == name
            continue
        with pytest.raises(UserError, match=f"{name} serves .* not --device {device}"):
            pick_backend(name, device)
    assert not rule.meets(_chosen(None, "nccl"))  # which device is there is not known yet


def _chosen(device: str | None, backend: str) -> dict[str, str | None]:
    return {"device": device, "backend": backend}


def test_a_torch_without_the_devices_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match=r"--backend nccl: this torch .* built for cuda"):
        require_backend(BACKENDS["nccl"])
    with pytest.raises(UserError, match="--backend newer: "):  # of a torch that never heard of it
        require_backend(Backend(name="newer", device="new"))
    require_backend(BACKENDS["gloo"])
    require_backend(BACKENDS["eccl"])  # its plugin brings it


def test_devices_that_the_environment_hides_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "is_available", lambda device: device == "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        UserError, match=r"visible \(CUDA_VISIBLE_DEVICES='' in .*; found here: cpu"
    ):
        pick_device("cuda")


def test_a_device_that_is_not_there_is_named_with_what_is() -> None:
    assert pick_device("cpu") == "cpu"
    if is_available("gcu"):
        pytest.skip("a gcu is there")
    with pytest.raises(UserError, match="--device gcu: "):
        pick_device("gcu")
