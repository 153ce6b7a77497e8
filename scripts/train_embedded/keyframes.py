"""A temporal VAE that keeps key frames, set by hand: what its training starts from.

The encoder hands on the latents of every group's last frame, and is not trained at all. The
decoder fades from one key frame to the next; training teaches it to move what moved. Both are made
of the model's own layers: residual branches start at zero, convolutions copy, and two tricks make
norm and activation linear. A group of channels that holds large constants is divided by nearly
the same number whatever else it holds, and silu(x) - silu(-x) is x.

On the way the four latents are channels 0 to 3, their negatives 4 to 7, the constants 8 and 9.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from opensora_sp.models.temporal_vae import (
    CausalConv3d,
    ResBlock,
    TemporalDecoder,
    TemporalEncoder,
    TemporalVAE,
)

CONSTANT = 4.0
USUAL = 0.5  # size of the latents beside the constants
LOG_VARIANCE = -12.0
CARRIED = 10  # channels


@torch.no_grad()
def start_from_key_frames(vae: TemporalVAE) -> None:
    """Set the weights of both halves; the decoder's further channels stay as they were drawn."""
    assert isinstance(vae.encoder, TemporalEncoder)
    assert isinstance(vae.quant_conv, CausalConv3d)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.conv.weight)
            if isinstance(module.conv3, CausalConv3d):
                _carry(module.conv3.conv)
    _set_encoder(vae.encoder)
    _set_decoder(vae.decoder)
    for conv in (vae.quant_conv.conv, vae.post_quant_conv.conv):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(_bias(conv))
        for channel in range(conv.weight.shape[0]):
            _now(conv)[channel, channel] = 1


def _set_encoder(encoder: TemporalEncoder) -> None:
    _split(encoder.conv_in.conv)
    strided = [conv.conv for conv in encoder.conv_blocks if isinstance(conv, CausalConv3d)]
    for conv in strided:
        _carry(conv)  # the last tap of a stride of two is the later frame
    # conv_in has no bias, so the constants join here.
    _bias(strided[0])[8], _bias(strided[0])[9] = CONSTANT, -CONSTANT
    first = encoder.block_res_blocks[-1][0]  # type: ignore[index]
    _gather(first, encoder.norm1, encoder.conv2.conv)
    _bias(encoder.conv2.conv)[4:] = LOG_VARIANCE


def _set_decoder(decoder: TemporalDecoder) -> None:
    _split(decoder.conv1.conv)
    _bias(decoder.conv1.conv)[8:CARRIED] = torch.tensor([CONSTANT, -CONSTANT])
    for block in decoder.conv_blocks:
        if isinstance(block, CausalConv3d):
            weight = block.conv.weight
            weight[: 2 * CARRIED] = 0
            _bias(block.conv)[: 2 * CARRIED] = 0
            for channel in range(CARRIED):  # outputs 2c and 2c + 1 are the earlier and later frame
                share = 0.5 if channel < 8 else 1.0
                middle = weight.shape[-1] // 2
                weight[2 * channel, channel, -1, middle, middle] = share
                weight[2 * channel, channel, -2, middle, middle] = 1 - share
                weight[2 * channel + 1, channel, -1, middle, middle] = 1
    first = decoder.block_res_blocks[0][0]  # type: ignore[index]
    _gather(first, decoder.norm1, decoder.conv_out.conv)


def _now(conv: nn.Conv3d) -> torch.Tensor:
    """The weights [out, in] of the present frame's middle pixel, as a view."""
    return conv.weight[:, :, -1, conv.weight.shape[3] // 2, conv.weight.shape[4] // 2]


def _bias(conv: nn.Conv3d) -> torch.Tensor:
    assert conv.bias is not None
    return conv.bias


def _carry(conv: nn.Conv3d) -> None:
    """The carried channels pass unchanged."""
    conv.weight[:CARRIED] = 0
    for channel in range(CARRIED):
        _now(conv)[channel, channel] = 1
    if conv.bias is not None:
        conv.bias[:CARRIED] = 0


def _split(conv: nn.Conv3d) -> None:
    """Four latents become themselves and their negatives."""
    conv.weight[:CARRIED] = 0
    if conv.bias is not None:
        conv.bias[:CARRIED] = 0
    for channel in range(4):
        _now(conv)[channel, channel], _now(conv)[4 + channel, channel] = 1, -1


def _gather(last: nn.Module, norm: nn.GroupNorm, out: nn.Conv3d) -> None:
    """Through the last widening, the norm and the output: each latent in a group of its own."""
    assert isinstance(last, ResBlock)
    assert isinstance(last.conv3, CausalConv3d)
    size = norm.num_channels // norm.num_groups
    rows = last.conv3.conv.weight
    nn.init.zeros_(rows)
    nn.init.zeros_(out.weight)
    if out.bias is not None:
        nn.init.zeros_(out.bias)
    for group in range(4):
        first = group * size
        _now(last.conv3.conv)[first, group] = 1
        _now(last.conv3.conv)[first + 1, 4 + group] = 1
        middle = first + 1 + size // 2
        _now(last.conv3.conv)[first + 2 : middle, 8] = 1
        _now(last.conv3.conv)[middle : first + size, 9] = 1
        _now(out)[group, first], _now(out)[group, first + 1] = 1, -1
    spread = math.sqrt((2 * USUAL**2 + (size - 2) * CONSTANT**2) / size)
    nn.init.constant_(norm.weight, spread)
    nn.init.zeros_(norm.bias)
