"""The video VAE against the reference's results, and what decoding in parts relies on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_sp.base.errors import CheckpointError
from opensora_sp.base.geometry import latent_frames, split_chunks
from opensora_sp.models.temporal_vae import CausalConv3d, TemporalVAEConfig
from opensora_sp.models.video_vae import SPATIAL_SCALE, VideoVAE, VideoVAEConfig

SUITE = Path(__file__).resolve().parents[2] / "opensora_sp_conformance"
CASES = load_file(SUITE / "vae3d" / "cases.safetensors")
NAMES = sorted({name.split(".")[0] for name in CASES})

PUBLISHED_SPATIAL = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "a_key_of_a_later_diffusers": 1,
}


def load(with_encoder: bool = True, **options: object) -> VideoVAE:
    settings: dict[str, object] = {"dtype": torch.float32, "device": "cpu", **options}
    return VideoVAE.load(
        SUITE / "vae3d",
        SUITE / "vae2d",
        with_encoder=with_encoder,
        **settings,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return load()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("case", NAMES)
def test_matches_the_reference_both_ways(vae: VideoVAE, case: str) -> None:
    video = CASES[f"{case}.video"]
    latent = vae.encode(video)
    decoded = vae.decode(CASES[f"{case}.z"], video.shape[2])
    assert latent.shape == CASES[f"{case}.latent_mean"].shape
    assert decoded.shape == CASES[f"{case}.decoded"].shape
    assert (latent - CASES[f"{case}.latent_mean"]).abs().max() <= 1e-4
    assert (decoded - CASES[f"{case}.decoded"]).abs().max() <= 1e-4


def test_published_size_has_exactly_the_published_weights() -> None:
    config = VideoVAEConfig(spatial=PUBLISHED_SPATIAL, temporal=TemporalVAEConfig())
    vae = VideoVAE.on_meta(config)
    assert all(tensor.is_meta for tensor in vae.state_dict().values())
    manifest = json.loads((SUITE / "manifest.json").read_text())["vae3d"]
    ours = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert ours == manifest


def test_chunks_and_latent_frames() -> None:
    assert [latent_frames(n) for n in (1, 4, 5, 16, 17, 18, 51, 102, 204, 408)] == [
        *(1, 1, 2, 4, 5, 6, 15, 30, 60, 120)
    ]
    assert latent_frames(20, 5) == 8
    chunks = split_chunks(39, 17)
    assert [(c.frame_start, c.frames, c.latent_start, c.latents) for c in chunks] == [
        (0, 17, 0, 5),
        (17, 17, 5, 5),
        (34, 5, 10, 2),
    ]


def test_streaming_is_the_whole_and_chunks_are_independent(vae: VideoVAE) -> None:
    frames = 39
    z = normal(2, 4, latent_frames(frames), 2, 3)
    whole = vae.decode(z, frames)
    streamed = list(vae.decode_chunks(z, frames))
    assert [part.shape[2] for part in streamed] == [17, 17, 5]
    assert torch.equal(torch.cat(streamed, dim=2), whole)
    # A chunk, a sample and a group of frames decoded alone are the same bits as inside.
    alone = vae.decode(z[1:, :, 5:10], 17)
    assert torch.equal(alone, whole[1:, :, 17:34])
    latents = vae.decode_chunk_temporal(z[1:, :, 5:10], 17)
    groups = [vae.decode_frames(latents[:, :, i : i + 4]) for i in range(0, 17, 4)]
    assert [group.shape[2] for group in groups] == [4, 4, 4, 4, 1]
    assert torch.equal(torch.cat(groups, dim=2), alone)


def test_the_spatial_vae_sees_fixed_groups(vae: VideoVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = vae.spatial_vae.decode

    def decode(latents: Tensor) -> Tensor:
        seen.append(latents.shape[0])
        return real(latents)

    monkeypatch.setattr(vae.spatial_vae, "decode", decode)
    for _ in vae.decode_chunks(normal(2, 4, 6, 2, 2), 20):
        pass
    assert seen == [4, 4, 4, 4, 1, 4, 4, 4, 4, 1, 3, 3]


def test_batches_and_odd_sizes_encode_like_single_clips(vae: VideoVAE) -> None:
    video = uniform(2, 3, 19, 20, 30)  # neither side is a multiple of 8
    z = vae.encode(video)
    assert z.shape == (2, 4, 6, 2, 3)
    assert torch.equal(z[1:], vae.encode(video[1:]))
    assert torch.equal(z[:, :, 5:], vae.encode(video[:, :, 17:]))
    assert vae.decode(z, 19).shape == (2, 3, 19, 16, 24)


def test_encoding_draws_both_posteriors(vae: VideoVAE) -> None:
    """Against diffusers' own posterior and the temporal VAE's, by hand."""
    video = uniform(1, 3, 6, 16, 16)
    noise = {"spatial": normal(1, 4, 6, 2, 2, seed=1), "temporal": normal(1, 4, 2, 2, 2, seed=2)}
    asked: list[tuple[str, tuple[int, ...]]] = []

    def draw(purpose: str, shape: tuple[int, ...]) -> Tensor:
        asked.append((purpose, shape))
        return noise[purpose]

    z = vae.encode(video, draw)
    assert asked == [("spatial", (1, 4, 6, 2, 2)), ("temporal", (1, 4, 2, 2, 2))]
    posterior = vae.spatial_vae.module.encode(video[0].transpose(0, 1)).latent_dist
    latents = posterior.mean + posterior.std * noise["spatial"][0].transpose(0, 1)
    x = torch.nn.functional.pad(latents.transpose(0, 1)[None] * 0.18215, (0, 0, 0, 0, 2, 0))
    assert vae.temporal_vae.encoder is not None
    assert vae.temporal_vae.quant_conv is not None
    mean, logvar = vae.temporal_vae.quant_conv(vae.temporal_vae.encoder(x)).chunk(2, dim=1)
    sample = mean + (logvar / 2).exp() * noise["temporal"]
    expected = (sample - vae.shift) / vae.scale
    assert (z - expected).abs().max() <= 1e-5
    assert (z - vae.encode(video)).abs().max() > 1e-2


def test_without_encoder_its_weights_are_checked_but_not_kept(
    vae: VideoVAE, tmp_path: Path
) -> None:
    half = load(with_encoder=False)
    names = set(half.state_dict())
    assert names == {n for n in vae.state_dict() if "encoder" not in n and ".quant_conv" not in n}
    assert not any(tensor.is_meta for tensor in half.state_dict().values())
    z = CASES["ragged20.z"]
    assert torch.equal(half.decode(z, 20), vae.decode(z, 20))
    with pytest.raises(RuntimeError, match="without its encoder"):
        half.encode(uniform(1, 3, 1, 16, 16))

    home = copied(tmp_path)
    tensors = load_file(home / "model.safetensors")
    del tensors["temporal_vae.encoder.conv_in.conv.weight"]
    save_file(tensors, home / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"temporal_vae\.encoder\.conv_in\.conv\.weight"):
        VideoVAE.load(home, SUITE / "vae2d", dtype=torch.float32, device="cpu", with_encoder=False)


def copied(tmp_path: Path) -> Path:
    home = tmp_path / "vae3d"
    home.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(SUITE / "vae3d" / name, home / name)
    return home


def test_attention_names_of_older_diffusers(vae: VideoVAE, tmp_path: Path) -> None:
    home = copied(tmp_path)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(home / "model.safetensors")
    for new_part, old_part in old.items():
        tensors = {name.replace(new_part, old_part): t for name, t in tensors.items()}
    assert not any(new_part in name for name in tensors for new_part in old)
    save_file(tensors, home / "model.safetensors")
    # vae2d given as the directory that holds config.json itself
    older = VideoVAE.load(
        home, SUITE / "vae2d" / "vae", dtype=torch.float32, device="cpu", with_encoder=True
    )
    state = older.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in vae.state_dict().items())


def test_bf16_stays_near_float32(vae: VideoVAE) -> None:
    low = load(dtype=torch.bfloat16)
    assert low.scale.dtype == low.shift.dtype == torch.float32
    video, z = CASES["ragged20.video"], CASES["ragged20.z"]
    encoded, decoded = low.encode(video), low.decode(z, 20)
    assert encoded.dtype == torch.float32
    assert decoded.dtype == torch.bfloat16
    assert 1e-5 < relative(encoded, vae.encode(video)) < 5e-2
    assert 1e-5 < relative(decoded, vae.decode(z, 20)) < 5e-2


def test_another_micro_frame_size_moves_the_chunk_borders(vae: VideoVAE) -> None:
    other = load(micro_frame_size=6, micro_batch_size=3)
    z = normal(1, 4, 5, 2, 2)  # 6 + 6 + 1 frames
    parts = list(other.decode_chunks(z, 13))
    assert [part.shape[2] for part in parts] == [6, 6, 1]
    assert (parts[1] - vae.decode(z[:, :, 2:4], 6)).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="13 frames have 5 latent frames, not 4"):
        other.decode(z[:, :, :4], 13)
    with pytest.raises(CheckpointError, match="micro_frame_size is 0"):
        load(micro_frame_size=0)


def test_convolution_sees_no_later_frame() -> None:
    conv = CausalConv3d(2, 3, 3, stride=2)
    x = normal(1, 2, 8, 4, 4)
    later = x.clone()
    later[:, :, 6:] += 1.0  # output frame k ends at input frame 2 k + 1
    changed = (conv(x) != conv(later)).flatten(3).any(dim=3).any(dim=1)[0]
    assert changed.tolist() == [False, False, False, True]


def write_configs(tmp_path: Path, vae3d: object, vae2d: object) -> tuple[Path, Path]:
    homes = tmp_path / "3d", tmp_path / "2d"
    for home, config in zip(homes, (vae3d, vae2d), strict=True):
        home.mkdir()
        (home / "config.json").write_text(json.dumps(config))
    return homes


def test_config_as_published_and_with_other_sizes(tmp_path: Path) -> None:
    published = {
        "model_type": "VideoAutoencoderPipeline",
        "micro_frame_size": 17,
        "vae_2d": {"micro_batch_size": 4, "subfolder": "vae"},
        "vae_temporal": {"from_pretrained": None, "type": "VAE_Temporal_SD"},
    }
    config = VideoVAEConfig.read(*write_configs(tmp_path, published, {"layers_per_block": 2}))
    assert config.temporal == TemporalVAEConfig()
    assert (config.micro_frame_size, config.micro_batch_size) == (17, 4)
    assert SPATIAL_SCALE == 0.18215
    tiny = VideoVAEConfig.read(SUITE / "vae3d", SUITE / "vae2d").temporal
    written = json.loads((SUITE / "vae3d" / "config.json").read_text())["vae_temporal"]
    assert tiny.filters == written["filters"]
    assert list(tiny.channel_multipliers) == written["channel_multipliers"]


@pytest.mark.parametrize(
    ("vae3d", "vae2d", "said"),
    [
        ({"vae_temporal": {"type": "Other"}}, {}, "'Other'"),
        ({"vae_temporal": {"temporal_downsample": [True]}}, {}, "temporal_downsample has 1"),
        ({"vae_temporal": {"filters": 40}}, {}, "filters is 40"),
        ({"micro_frame_size": "17"}, {}, "micro_frame_size '17'"),
        ({}, {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    ],
)
def test_configs_of_other_models_are_refused(
    tmp_path: Path, vae3d: object, vae2d: object, said: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        VideoVAEConfig.read(*write_configs(tmp_path, vae3d, vae2d))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
