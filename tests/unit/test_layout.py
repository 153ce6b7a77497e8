"""Split arithmetic on every published size, duration and rank count."""

from __future__ import annotations

import itertools

import pytest

from opensora_sp.base.geometry import latent_shape
from opensora_sp.parallel.layout import Layout, bounds, split
from opensora_sp.request.sizes import aspect_ratios, resolutions

DURATIONS = (1, 17, 51, 97, 102, 204, 408, 816)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_published_size_is_covered_evenly(ranks: int) -> None:
    sizes = sorted({size for name in resolutions() for size in aspect_ratios(name).values()})
    for (height, width), frames in itertools.product(sizes, DURATIONS):
        latent, rows, columns = latent_shape(frames, height, width)
        layout = Layout(frames=latent, size=(rows, columns), ranks=ranks)
        patches = layout.patch_split
        assert sum(patches) == layout.patch_count
        assert max(patches) - min(patches) <= 1
        slices = [layout.patches(rank) for rank in range(ranks)]
        assert [s.start for s in slices] == [0, *[s.stop for s in slices[:-1]]]
        halves = [layout.frame_split(latent, half * latent) for half in range(2)]
        assert all(sum(half) == latent for half in halves)
        together = [a + b for a, b in zip(*halves, strict=True)]
        assert max(together) == -(-2 * latent // ranks)


def test_longer_parts_start_where_told() -> None:
    assert split(7, 4) == (2, 2, 2, 1)
    assert split(7, 4, start=3) == (2, 2, 1, 2)
    assert split(2, 5, start=4) == (1, 0, 0, 0, 1)
    assert split(0, 3) == (0, 0, 0)
    assert bounds((2, 0, 1)) == [(0, 2), (2, 2), (2, 3)]


def test_second_half_starts_where_the_first_one_stopped() -> None:
    # Half h's longer parts start at rank h·(T mod N).
    layout = Layout(frames=15, size=(30, 53), ranks=4)
    assert layout.frame_split(15, 0) == (4, 4, 4, 3)
    assert layout.frame_split(15, 15) == split(15, 4, start=15 % 4) == (4, 4, 3, 4)
