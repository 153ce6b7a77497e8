"""Properties of arithmetic that hold for any input, from splits and exchanges to plans and lists.

What people give is in test_properties_outside.py. tests/properties.py tries more cases of both.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from sampled import few, floats

from opensora_sp.base.errors import UserError
from opensora_sp.base.geometry import latent_frames
from opensora_sp.engine.clips import apply_strategy
from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.progress import Position
from opensora_sp.jobs.schedule import deal, regroup
from opensora_sp.models.tiling import tiles
from opensora_sp.parallel.decode_plan import (
    TEMPORAL_FRAMES,
    Part,
    Unit,
    decoded_frames,
    has_several_groups,
    plan_decode,
)
from opensora_sp.parallel.exchange import Comm, Exchange, Transfer
from opensora_sp.parallel.layout import Layout, bounds, share, split
from opensora_sp.parallel.mesh import Mesh, legal_meshes, plan_mesh
from opensora_sp.parallel.overlap import cut
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.plan import Options, best, decode_flops, plans
from opensora_sp.planner.reasons import unexpected_peaks
from opensora_sp.planner.requests import sizes_of
from opensora_sp.request.mask_strategy import (
    END,
    FrameLayout,
    Group,
    parse_mask_strategy,
    plan_clip,
    plan_strategy,
)
from opensora_sp.request.prompts import parse_prompt_json, prompt_for_loop, split_loops
from opensora_sp.request.request import Request, Task

# --- splits --------------------------------------------------------------------------------------


@given(total=st.integers(0, 5000), parts=st.integers(1, 64), start=st.integers(0, 200))
def test_a_split_covers_all_and_its_parts_differ_by_one_at_most(
    total: int, parts: int, start: int
) -> None:
    sizes = split(total, parts, start)
    assert len(sizes) == parts
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sizes == tuple(share(total, parts, part, start) for part in range(parts))
    # The longer parts come first, counted from `start` round the ring.
    ring = [sizes[(start + i) % parts] for i in range(parts)]
    assert ring == sorted(sizes, reverse=True)
    edges = bounds(sizes)
    assert [stop - begin for begin, stop in edges] == list(sizes)
    assert [begin for begin, _ in edges] == [0, *[stop for _, stop in edges[:-1]]]


@given(
    frames=st.integers(1, 300),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    ranks=st.integers(1, 32),
)
def test_both_branches_together_are_as_even_as_their_frames_allow(
    frames: int, size: tuple[int, int], ranks: int
) -> None:
    layout = Layout(frames=frames, size=size, ranks=ranks)
    held = [patch for rank in range(ranks) for patch in range(1 << 12)[layout.patches(rank)]]
    assert held == list(range(layout.patch_count)), "each patch once, in row-major order"
    # The unconditional branch is laid out behind the conditional one.
    branches = [layout.frame_split(frames, before) for before in (0, frames)]
    assert all(sum(branch) == frames for branch in branches)
    both = [a + b for a, b in zip(*branches, strict=True)]
    assert max(both) == -(-2 * frames // ranks)
    assert min(both) == 2 * frames // ranks


@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=8), ranks=st.integers(1, 16))
def test_any_overlap_chunks_laid_end_to_end_stay_even(counts: list[int], ranks: int) -> None:
    layout = Layout(frames=sum(counts), size=(2, 2), ranks=ranks)
    loads = [0] * ranks
    for count, before in zip(counts, itertools.accumulate([0, *counts[:-1]]), strict=True):
        loads = [a + b for a, b in zip(loads, layout.frame_split(count, before), strict=True)]
    assert tuple(sorted(loads)) == tuple(sorted(split(sum(counts), ranks)))


# --- the decode plan -----------------------------------------------------------------------------


@given(
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    ranks=st.integers(1, 16),
    group=st.integers(1, 8),
)
def test_every_frame_is_decoded_once_in_order_and_in_whole_groups(
    chunks: list[int], ranks: int, group: int
) -> None:
    rounds = plan_decode(chunks, ranks, group)
    assert all(len(units) == ranks for units in rounds)
    parts = [part for units in rounds for unit in units for part in unit]
    seen = [(part.chunk, frame) for part in parts for frame in range(part.start, part.stop)]
    assert seen == [(chunk, frame) for chunk, count in enumerate(chunks) for frame in range(count)]
    assert all(part.start % group == 0 for part in parts)
    assert all(part.stop % group == 0 or part.stop == chunks[part.chunk] for part in parts)
    assert sum(decoded_frames(rounds)) == sum(chunks)


@given(frames=st.integers(1, 60), chunk=st.integers(1, 20), group=st.integers(1, 40))
def test_decoding_is_shared_where_there_is_more_than_one_group(
    frames: int, chunk: int, group: int
) -> None:
    lengths = [min(chunk, frames - start) for start in range(0, frames, chunk)]
    groups = sum(-(-length // group) for length in lengths)
    assert has_several_groups(frames, chunk, group) == (groups > 1)


def cost(unit: Unit) -> int:
    """Frames that a rank decodes spatially, and what its chunks' temporal decoding counts for."""
    return sum(part.frames for part in unit) + TEMPORAL_FRAMES * len({p.chunk for p in unit})


@given(
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    ranks=st.integers(3, 5),
    group=st.integers(2, 5),
)
def test_the_last_round_costs_no_more_than_the_best_of_all_cuts(
    chunks: list[int], ranks: int, group: int
) -> None:
    groups = [
        Part(chunk, start, min(start + group, count))
        for chunk, count in enumerate(chunks)
        for start in range(0, count, group)
    ]
    best = min(
        max(cost(tuple(groups[a:b])) for a, b in itertools.pairwise((0, *cut, len(groups))))
        for cut in itertools.combinations_with_replacement(range(len(groups) + 1), ranks - 1)
    )
    assert max(cost(unit) for unit in plan_decode(chunks, ranks, group)[-1]) == best


# --- exchanges -----------------------------------------------------------------------------------


@few(25)
@given(
    ranks=st.integers(1, 6),
    streams=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 5)), min_size=1, max_size=2),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    chunks=st.integers(1, 4),
)
def test_what_is_exchanged_comes_whole_and_goes_back_where_it_was(
    ranks: int, streams: list[tuple[int, int]], size: tuple[int, int], chunks: int
) -> None:
    """All ranks in one process: what they send is handed over when all have sent."""
    channels = 2
    layout = Layout(frames=max(frames for _, frames in streams), size=size, ranks=ranks)
    patches = layout.patch_count
    places = bounds(layout.patch_split)
    calls: list[tuple[torch.Tensor, torch.Tensor, list[int], list[int]]] = []

    def all_to_all(recv: torch.Tensor, send: torch.Tensor, *sizes: Any, **_: Any) -> Any:
        calls.append((recv, send, *sizes))
        return SimpleNamespace(wait=lambda: None)

    def handed(transfers: list[Transfer]) -> list[torch.Tensor]:
        for me, (recv, _, arriving, _) in enumerate(calls):
            sent = [send.split(leaving)[me] for _, send, _, leaving in calls]
            assert [part.numel() for part in sent] == list(arriving)
            recv.copy_(torch.cat(sent))
        calls.clear()
        return [transfer.wait() for transfer in transfers]

    exchanges = [Exchange(Comm(None, rank, ranks), layout) for rank in range(ranks)]
    wholes = [
        torch.arange(batch * frames * patches * channels, dtype=torch.float32)
        .add(1000.0 * number)
        .view(batch, frames, patches, channels)
        for number, (batch, frames) in enumerate(streams)
    ]
    held = [0] * ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", all_to_all)
        for chunk in itertools.chain(*cut(streams, chunks)):
            part = wholes[chunk.stream][:, chunk.start : chunk.stop]
            local = [part[:, :, start:stop] for start, stop in places]
            sends = [ex.to_frames(h, chunk) for ex, h in zip(exchanges, local, strict=True)]
            frames_of = handed(sends)
            # Every rank has whole frames, in the order of the ranks.
            assert torch.equal(torch.cat(frames_of), part.flatten(0, 1))
            held = [had + len(frames) for had, frames in zip(held, frames_of, strict=True)]
            backs = [
                ex.to_patches(frames, chunk, part.shape[0])
                for ex, frames in zip(exchanges, frames_of, strict=True)
            ]
            for got, expected in zip(handed(backs), local, strict=True):
                assert torch.equal(got, expected)
    assert max(held) - min(held) <= 1, "over all chunks together"


# --- noise ---------------------------------------------------------------------------------------

drawn_for = st.builds(
    Request,
    prompt=st.just("p"),
    seed=st.integers(0, 2**63 - 1),
    prompt_index=st.integers(0, 10**6),
    sample_index=st.integers(0, 99),
    height=st.just(16),
    width=st.just(16),
    num_frames=st.just(5),
)


@given(
    requests=st.lists(drawn_for, min_size=1, max_size=4),
    clip=st.integers(0, 9),
    step=st.none() | st.integers(0, 999),
    order=st.randoms(use_true_random=False),
)
def test_noise_is_of_its_name_alone_in_every_batch(
    requests: list[Request], clip: int, step: int | None, order: Any
) -> None:
    together = draw_noise(requests, clip, step)
    shuffled = list(range(len(requests)))
    order.shuffle(shuffled)
    torch.manual_seed(order.randrange(2**32))  # whatever was drawn before
    again = draw_noise([requests[i] for i in shuffled], clip, step)
    assert torch.equal(again, together[shuffled])
    for one, request in zip(together, requests, strict=True):
        assert torch.equal(draw_noise([request], clip, step)[0], one)
        others = [
            draw_noise([request], clip + 1, step),
            draw_noise([request], clip, 0 if step is None else step + 1),
            draw_noise([request], clip, 0 if step is None else None),
            draw_noise([dataclasses.replace(request, seed=request.seed ^ 1)], clip, step),
            draw_noise([dataclasses.replace(request, prompt_index=10**7)], clip, step),
            draw_noise([dataclasses.replace(request, sample_index=100)], clip, step),
        ]
        assert not any(bool((other[0] == one).any()) for other in others)
    # Names that are written alike are not one name: 1 and 23 against 12 and 3.
    names = {(r.seed, r.prompt_index, r.sample_index) for r in requests}
    assert len({tuple(one.flatten().tolist()) for one in together}) == len(names)


# --- the planner ---------------------------------------------------------------------------------

sides = st.integers(16, 200) | st.integers(16, 4096)
shapes = st.builds(
    Shape,
    height=sides,
    width=sides,
    num_frames=st.just(1) | st.integers(1, 500),
    batch=st.integers(1, 7),
    guided=st.booleans(),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    micro_batch=st.integers(1, 17),
    micro_frames=st.sampled_from([5, 9, 17, 33]),
    encodes=st.booleans(),
)
options_of = st.builds(
    Options,
    serial_guidance=st.booleans(),
    vae_decode=st.sampled_from(["auto", "rank0", "shared"]),
    t5_on_cpu=st.booleans(),
    t5_int8=st.booleans(),
    chunks=st.integers(1, 8),
)
memories = st.integers(0, 100).map(lambda step: 1e8 * 2000 ** (step / 100))  # to 200 GB


@few(30)
@example(
    shape=Shape(
        height=16,
        width=16,
        num_frames=187,  # 189 are dealt more evenly among 7 ranks
        batch=1,
        guided=False,
        dtype="bf16",
        micro_batch=7,
        micro_frames=33,
        encodes=False,
    ),
    options=Options(chunks=1),
    embedded=False,
    ranks=7,
    more=2,
    memory=1e8,
    factor=1.0,
    side="num_frames",
)
@example(
    shape=Shape(
        height=16,
        width=16,
        num_frames=11,  # three groups, of chunks of 5 frames, though one group may have 11
        batch=1,
        guided=False,
        dtype="bf16",
        micro_batch=11,
        micro_frames=5,
        encodes=False,
    ),
    options=Options(chunks=1),
    embedded=False,
    ranks=3,
    more=1,
    memory=1e8,
    factor=1.0,
    side="num_frames",
)
@given(
    shape=shapes,
    options=options_of,
    embedded=st.booleans(),
    ranks=st.integers(1, 12),
    more=st.integers(1, 8),
    memory=memories,
    factor=st.sampled_from([1.0, 1.5, 4.0, 16.0]),
    side=st.sampled_from(["height", "width", "num_frames", "batch"]),
)
def test_more_memory_more_ranks_and_smaller_sizes_are_never_worse_without_a_reason(
    shape: Shape,
    options: Options,
    embedded: bool,
    ranks: int,
    more: int,
    memory: float,
    factor: float,
    side: str,
) -> None:
    models = sizes_of(None) if embedded else ModelSizes()
    candidates = plans(shape, ranks, models, options)
    chosen = [best(candidates, given) for given in (memory, memory * factor)]
    if chosen[0] is not None:
        assert chosen[1] is not None
        assert candidates.index(chosen[1]) <= candidates.index(chosen[0]), "a slower mode"
    larger = plans(
        dataclasses.replace(shape, **{side: getattr(shape, side) + more}), ranks, models, options
    )
    # Ranks share the decoding by whole groups of frames, and a longer video may be dealt more
    # evenly: its busiest rank may have less than that of a shorter one, by a chunk at most.
    chunk = decode_flops(dataclasses.replace(shape, num_frames=shape.micro_frames), 1, models)
    for small, large in zip(candidates, larger, strict=True):
        for one, other in zip(small.stages, large.stages, strict=True):
            assert one.total <= other.total, one.name
        low, high = small.cost, large.cost
        assert low.text + low.denoise <= (high.text + high.denoise) * (1 + 1e-9)
        spare = chunk if side == "num_frames" else 0.0
        assert low.decode <= (high.decode + spare) * (1 + 1e-9)
        alone = [decode_flops(plan.shape, 1, models) for plan in (small, large)]
        assert alone[0] <= alone[1] * (1 + 1e-9)
    for fewer, plan in zip(candidates, plans(shape, ranks + more, models, options), strict=True):
        if plan.peak > fewer.peak:
            assert "would need less" in " ".join(unexpected_peaks(plan))
    for before, after in itertools.pairwise(candidates):
        if after.peak > before.peak:
            assert f"needs less than {after.mode}" in " ".join(unexpected_peaks(after))


# --- tiles ---------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 60)),
    tokens=st.none() | st.integers(1, 5000),
)
@example(shape=(2, 3, 5), tokens=1)
def test_tiles_cover_every_token_once_within_their_bound(
    shape: tuple[int, int, int], tokens: int | None
) -> None:
    batch, frames, patches = shape
    seen = torch.zeros(frames, patches, dtype=torch.int64)
    found = list(tiles(shape, tokens))
    for some_frames, some_patches in found:
        part = seen[some_frames, some_patches]
        part += 1
        # One token of every sample is the least that a tile can hold.
        assert tokens is None or part.numel() * batch <= max(tokens, batch)
        if tokens is not None and batch * patches <= tokens:
            assert part.shape[1] == patches, "whole frames as long as one fits"
    assert bool((seen == 1).all())
    assert found == sorted(found, key=lambda tile: (tile[0].start, tile[1].start))
    assert tokens is not None or len(found) == 1


# --- strategies ----------------------------------------------------------------------------------

starts = st.integers(-12, 12)
groups_of = st.builds(
    Group,
    loop=st.integers(0, 2),
    ref=st.integers(0, 2),
    ref_start=starts | st.just(END),
    target_start=starts,
    length=st.integers(0, 12),
    edit_ratio=floats(0, 1).map(lambda ratio: round(ratio, 4)),
)
aligns = st.none() | st.integers(1, 6)


def written(group: Group) -> str:
    """The group as a person writes it."""
    return ",".join(map(str, dataclasses.astuple(group)))


@given(groups=st.lists(groups_of, min_size=1, max_size=5), fields=st.integers(1, 6))
def test_a_strategy_is_read_as_it_was_written(groups: list[Group], fields: int) -> None:
    assert parse_mask_strategy(";".join(map(written, groups))) == groups
    # What is left out is the default.
    short = ";".join(",".join(written(group).split(",")[:fields]) for group in groups)
    names = [field.name for field in dataclasses.fields(Group)]
    assert parse_mask_strategy(short) == [
        Group(**{name: getattr(group, name) for name in names[:fields]}) for group in groups
    ]


@given(text=st.text(alphabet="0123456789,;.-end +_x", max_size=30))
def test_any_text_is_a_strategy_or_one_line(text: str) -> None:
    groups, refusal = None, ""
    try:
        groups = parse_mask_strategy(text)
    except UserError as error:
        refusal = str(error)
    if groups is None:
        assert refusal.startswith("mask strategy ")
        assert "\n" not in refusal
    else:
        assert parse_mask_strategy(";".join(map(written, groups))) == groups


@given(
    groups=st.lists(groups_of, min_size=1, max_size=5),
    clip=st.integers(0, 2),
    references=st.lists(st.integers(1, 120), min_size=3, max_size=3),
    frames=st.integers(1, 120),
    micro=st.sampled_from([17, 10, 5]),
    align=aligns,
)
def test_what_is_placed_lies_inside_the_reference_and_the_clip(
    groups: list[Group],
    clip: int,
    references: list[int],
    frames: int,
    micro: int,
    align: int | None,
) -> None:
    layout = FrameLayout(frames, micro)
    mine = [group for group in groups if group.loop == clip]
    placements, refusal = None, ""
    try:
        placements = plan_clip(groups, clip, references, layout, align)
    except UserError as error:
        refusal = str(error)
    if placements is None:
        assert "\n" not in refusal
        # Nothing is refused but a start before the first frame, or an end that is not there.
        assert any(
            group.ref_start == END
            or group.ref_start < -latent_frames(references[group.ref], micro)
            or group.target_start < -layout.latents
            for group in mine
        )
        return
    assert len(placements) == len(mine)
    for group, placed in zip(mine, placements, strict=True):
        assert (placed.ref, placed.edit_ratio) == (group.ref, group.edit_ratio)
        assert 0 <= placed.length <= group.length
        available = latent_frames(references[placed.ref], micro)
        if placed.frames is not None:
            first, count = placed.frames
            assert first >= 0
            assert first + count == references[placed.ref], "the last frames of the reference"
            assert count == layout.frames_shown(placed.target_start, placed.length)
            available = latent_frames(count, micro)
        assert min(placed.ref_start, placed.target_start) >= 0
        if placed.length:
            assert placed.ref_start + placed.length <= available
            assert placed.target_start + placed.length <= layout.latents
        if align is not None:
            assert placed.ref_start % align == placed.target_start % align == 0


@given(
    groups=st.lists(
        groups_of.map(lambda g: dataclasses.replace(g, loop=0, ref_start=g.target_start)),
        min_size=1,
        max_size=5,
    ),
    lengths=st.lists(st.integers(12, 20), min_size=3, max_size=3),
    latents=st.integers(12, 20),
    align=aligns,
)
def test_where_groups_overlap_the_later_one_holds_in_latents_and_mask_alike(
    groups: list[Group], lengths: list[int], latents: int, align: int | None
) -> None:
    placements = plan_strategy(groups, 0, lengths, latents, align)
    references = [
        torch.arange(length, dtype=torch.float32).add(100.0 * (number + 1)).view(1, length, 1, 1)
        for number, length in enumerate(lengths)
    ]
    z = torch.zeros(1, latents, 1, 1)
    mask = apply_strategy(z, references, placements)
    for frame in range(latents):
        covering = [p for p in placements if 0 <= frame - p.target_start < p.length]
        if covering:
            last = covering[-1]
            source = frame - last.target_start + last.ref_start
            assert float(z[0, frame]) == 100.0 * (last.ref + 1) + source
            assert float(mask[frame]) == pytest.approx(last.edit_ratio)
        else:
            assert (float(z[0, frame]), float(mask[frame])) == (0.0, 1.0)


# --- meshes --------------------------------------------------------------------------------------


@given(replicas=st.integers(1, 6), guidance=st.integers(1, 2), sequence=st.integers(1, 12))
def test_ranks_and_places_are_one_to_one_and_every_group_is_a_part_of_the_world(
    replicas: int, guidance: int, sequence: int
) -> None:
    mesh = Mesh(replicas=replicas, guidance=guidance, sequence=sequence)
    world = list(range(mesh.size))
    places = [mesh.place(rank) for rank in world]
    assert len(set(places)) == mesh.size
    assert [mesh.rank(place) for place in places] == world
    for groups in (mesh.sequence_groups(), mesh.guidance_groups()):
        assert sorted(rank for group in groups for rank in group) == world
    for group in mesh.sequence_groups():
        assert len({(places[r].replica, places[r].guidance) for r in group}) == 1
        assert [places[r].sequence for r in group] == list(range(sequence))
    for group in mesh.guidance_groups():
        assert len({(places[r].replica, places[r].sequence) for r in group}) == 1
        assert [places[r].guidance for r in group] == list(range(guidance))
    for rank in world:
        video = mesh.replica_ranks(rank)
        assert rank in video
        assert [r for r in world if places[r].replica == places[rank].replica] == video


@given(
    world=st.integers(1, 64),
    guided=st.booleans(),
    replicas=st.none() | st.integers(1, 8),
    guidance=st.none() | st.integers(1, 2),
    sequence=st.none() | st.integers(1, 16),
)
def test_a_planned_mesh_fills_the_world_as_it_was_asked_or_the_legal_ones_are_listed(
    world: int, guided: bool, replicas: int | None, guidance: int | None, sequence: int | None
) -> None:
    def fits(mesh: Mesh) -> bool:
        asked = ((replicas, mesh.replicas), (guidance, mesh.guidance), (sequence, mesh.sequence))
        return all(want in (None, has) for want, has in asked)

    every = [
        Mesh(replicas=r, guidance=g, sequence=s)
        for r, g in itertools.product(range(1, world + 1), (1, 2) if guided else (1,))
        for s in [world // (r * g)]
        if r * g * s == world
    ]
    assert sorted(legal_meshes(world, guided), key=str) == sorted(every, key=str)
    mesh, refusal = None, ""
    try:
        mesh = plan_mesh(
            world, guided=guided, replicas=replicas, guidance=guidance, sequence=sequence
        )
    except UserError as error:
        refusal = str(error)
    if mesh is None:
        assert not any(map(fits, every))
        assert "\n" not in refusal
    else:
        assert mesh in every
        assert fits(mesh)


# --- prompts -------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_characters="|{", exclude_categories=["Cs"]), max_size=20)


@given(texts=st.dictionaries(st.integers(1, 50), words, max_size=6), first=words)
def test_each_clip_has_the_last_text_that_began_before_it(
    texts: dict[int, str], first: str
) -> None:
    segments = {0: first, **texts}
    prompt = "".join(f"|{clip}|{text}" for clip, text in segments.items())
    assert split_loops(prompt) == segments
    held = first
    for clip in range(55):
        held = segments.get(clip, held)
        assert prompt_for_loop(prompt, clip) == held


@given(text=words, reference=words, strategy=words, keys=st.sets(st.integers(0, 1)))
def test_json_behind_a_prompt_is_read_as_it_was_written(
    text: str, reference: str, strategy: str, keys: set[int]
) -> None:
    pairs = [("reference_path", reference), ("mask_strategy", strategy)]
    carried = dict(pair for number, pair in enumerate(pairs) if number in keys)
    got = parse_prompt_json(text + json.dumps(carried), reference_path="a.png", mask_strategy="0")
    assert got.prompt == text
    assert got.reference_path == carried.get("reference_path", "a.png")
    assert got.mask_strategy == carried.get("mask_strategy", "0")


# --- lists ---------------------------------------------------------------------------------------

TASKS = [
    Task(
        request=Request(prompt="p", prompt_index=i, height=32, width=48, loop=3, steps=10),
        output=Path(f"sample_{i:04d}.mp4"),
    )
    for i in range(12)
]
positions = st.none() | st.builds(Position, st.integers(0, 3), st.just(0) | st.integers(0, 9))


def batches_of(sizes: Sequence[int]) -> list[list[Task]]:
    """The first tasks in batches of these sizes."""
    edges = itertools.pairwise((0, *itertools.accumulate(sizes)))
    return [TASKS[start:stop] for start, stop in edges]


@given(
    sizes=st.lists(st.integers(1, 3), max_size=4),
    found=st.lists(positions, min_size=len(TASKS), max_size=len(TASKS)),
    replicas=st.integers(1, 6),
)
def test_every_unfinished_task_is_dealt_exactly_once(
    sizes: list[int], found: list[Position | None], replicas: int
) -> None:
    batches = batches_of(sizes)
    standing = dict(zip(TASKS, found, strict=True))
    works = regroup(batches, standing)
    left = [task for batch in batches for task in batch if standing[task] is not None]
    assert sorted(t.output for w in works for t in w.tasks) == [task.output for task in left]
    for work in works:
        assert {standing[task] for task in work.tasks} == {work.start}
        assert any(set(work.tasks) <= set(batch) for batch in batches)
    lists = deal(works, replicas)
    assert len(lists) == replicas
    assert sorted(map(id, itertools.chain(*lists))) == sorted(map(id, works))
    for mine in lists:
        assert mine == [work for work in works if any(work is one for one in mine)], "in order"
    # Each went to the first of those that had least to do, so nobody waits longer than one work.
    loads = [0] * replicas
    for work in works:
        least = next(i for i, dealt in enumerate(lists) if any(work is one for one in dealt))
        assert least == loads.index(min(loads))
        loads[least] += work.steps + len(work.tasks)
