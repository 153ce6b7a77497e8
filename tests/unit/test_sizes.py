"""The size table, durations, and the shapes that follow from them."""

import json
from pathlib import Path

import pytest

from opensora_sp.base import geometry
from opensora_sp.base.errors import UserError
from opensora_sp.request import sizes


def test_every_pair_of_the_suites_table_resolves_to_its_pixels(suite_dir: Path) -> None:
    table = json.loads((suite_dir / "sizes.json").read_text())
    pairs = 0
    for resolution, ratios in table["image_size_height_width"].items():
        for ratio, size in ratios.items():
            assert sizes.resolve_size(resolution, ratio) == tuple(size)
            pairs += 1
    assert pairs > 100
    for name, frames in table["num_frames"].items():
        assert sizes.resolve_frames(name) == frames


def test_image_size_wins_and_may_be_off_the_table() -> None:
    assert sizes.resolve_size("240p", "9:16", (100, 333)) == (100, 333)
    assert sizes.resolve_size("nonsense", "0:0", [16, 16]) == (16, 16)


@pytest.mark.parametrize(
    ("resolution", "ratio", "told"),
    [
        ("480p", "5:7", ["480p", "5:7", "9:16", "50:27"]),
        ("256", "9:16", ["256", "9:16", "12:25"]),
        ("2880", "9:16", ["2880", "9:16", "no sizes"]),
        ("333p", "9:16", ["333p", "144p", "4k"]),
    ],
)
def test_a_pair_that_the_table_lacks_is_named_with_the_legal_ones(
    resolution: str, ratio: str, told: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        sizes.resolve_size(resolution, ratio)
    assert "\n" not in str(caught.value)
    for word in told:
        assert word in str(caught.value)


@pytest.mark.parametrize("size", [(0, 64), (64, -8), (15, 64), (64,), (64, 64, 64), (64, 20000)])
def test_impossible_image_sizes_are_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="--image-size"):
        sizes.resolve_size("240p", "9:16", size)


@pytest.mark.parametrize("frames", [1, 2, 16, 17, 18, 51, 60, 102, 408, 816])
def test_a_number_of_frames_is_taken_as_it_is(frames: int) -> None:
    assert sizes.resolve_frames(frames) == sizes.resolve_frames(str(frames)) == frames


@pytest.mark.parametrize("frames", ["0", "-3", "2.5", "3s", "", "nan", "٣", 0, -1, True])
def test_other_durations_are_refused(frames: str | int) -> None:
    with pytest.raises(UserError, match="--num-frames"):
        sizes.resolve_frames(frames)


@pytest.mark.parametrize("micro", [1, 4, 8, 17, 20])
def test_latent_frames_are_those_of_the_chunks_one_by_one(micro: int) -> None:
    for frames in range(1, 4 * micro + 3):
        chunks = [min(micro, frames - start) for start in range(0, frames, micro)]
        assert geometry.latent_frames(frames, micro) == sum(-(-n // 4) for n in chunks)


@pytest.mark.parametrize(
    ("frames", "size", "latent", "grid"),
    [
        (51, (240, 426), (15, 30, 53), (15, 27)),
        (51, (426, 240), (15, 53, 30), (27, 15)),
        (204, (480, 854), (60, 60, 106), (30, 53)),
        (408, (720, 1280), (120, 90, 160), (45, 80)),
        (1, (144, 256), (1, 18, 32), (9, 16)),
    ],
)
def test_shapes_of_published_sizes(
    frames: int, size: tuple[int, int], latent: tuple[int, ...], grid: tuple[int, int]
) -> None:
    assert geometry.latent_shape(frames, *size) == latent
    assert geometry.patch_grid(*latent[1:]) == grid


def test_number_of_table_sizes_with_an_odd_latent_side() -> None:
    odd = 0
    for resolution in sizes.resolutions():
        for height, width in sizes.aspect_ratios(resolution).values():
            _, rows, columns = geometry.latent_shape(1, height, width)
            odd += rows % 2 == 1 or columns % 2 == 1
    assert odd == 91


def test_sizes_beyond_the_training_are_told() -> None:
    assert sizes.size_notes(720, 1280, 408) == []
    assert "not in the size table" in sizes.size_notes(720, 1281, 51)[0]
    assert "1080p" in sizes.size_notes(1080, 1920, 51)[0]
    assert "408" in sizes.size_notes(720, 1280, 409)[0]
    assert sizes.is_trained(240, 426)
    assert not sizes.is_trained(2160, 3840)
    assert not sizes.is_trained(96, 160)


@pytest.mark.parametrize(
    ("size", "frames", "said"),
    [
        ((64, 96), 17, ""),
        ((144, 144), 51, ""),
        ((144, 256), 51, ""),
        ((256, 144), 51, "sides from 64 to 144, 144x256"),
        ((240, 426), 51, "sides from 64 to 144"),
        ((48, 64), 1, "1 frame of 48x64"),
        ((64, 64), 52, "up to 51 frames"),
    ],
)
def test_the_embedded_model_is_judged_by_what_it_has_learnt(
    size: tuple[int, int], frames: int, said: str
) -> None:
    notes = sizes.size_notes(*size, frames, embedded=True)
    assert bool(notes) == bool(said)
    assert all(said in note and "size table" not in note for note in notes)
    card = (sizes.TABLE_FILE.parent / "embedded" / "README.md").read_text(encoding="utf-8")
    smallest, largest = sizes.EMBEDDED_SIDES
    assert f"Sizes from {smallest}×{smallest} to {largest}×{largest}" in card
    assert "and {}×{},".format(*sizes.EMBEDDED_LARGEST) in card
    assert f"or {sizes.EMBEDDED_FRAMES} frames" in " ".join(card.split())
