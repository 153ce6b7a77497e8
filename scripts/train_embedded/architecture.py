"""Sizes of the embedded model: the config.json of its four directories."""

from __future__ import annotations

from typing import Any

DIT: dict[str, Any] = {
    "architectures": ["STDiT3"],
    "model_type": "STDiT3",
    "hidden_size": 96,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "input_size": [None, None, None],
    "input_sq_size": 512,
    "caption_channels": 64,
    "model_max_length": 300,
    "pred_sigma": True,
    "qk_norm": True,
    "class_dropout_prob": 0.1,
    "drop_path": 0.0,
    "torch_dtype": "bfloat16",
}
VOCABULARY = 448
EXTRA_IDS = 100  # T5's sentinels <extra_id_0> ... follow the vocabulary
T5: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "vocab_size": 640,  # VOCABULARY + EXTRA_IDS, rounded up to a multiple of 128 as in T5 v1.1
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "dropout_rate": 0.1,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "torch_dtype": "float32",
}
VAE2D: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    # Few groups: one channel a group would take the picture's own brightness out.
    "norm_num_groups": 2,
    "sample_size": 64,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
VAE3D: dict[str, Any] = {
    "architectures": ["VideoAutoencoderPipeline"],
    "model_type": "VideoAutoencoderPipeline",
    "cal_loss": False,
    "freeze_vae_2d": False,
    "from_pretrained": None,
    "micro_frame_size": 17,
    "vae_2d": {"type": "VideoAutoencoderKL", "subfolder": "vae", "micro_batch_size": 4},
    "vae_temporal": {
        "type": "VAE_Temporal",
        "in_out_channels": 4,
        "latent_embed_dim": 4,
        "embed_dim": 4,
        "filters": 16,
        "num_res_blocks": 2,
        "channel_multipliers": [1, 2, 2, 4],
        "temporal_downsample": [False, True, True],
        "num_groups": 4,
    },
    "torch_dtype": "bfloat16",
}
