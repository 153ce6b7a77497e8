"""The text encoder of Open-Sora 1.2: T5 v1.1's encoder, from cleaned captions to embeddings.

Legend: B texts, L text tokens (always `max_length`), C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora_sp.base.errors import CheckpointError
from opensora_sp.models.checkpoint import WeightFiles, load_module, read_config
from opensora_sp.models.configs import T5, checked
from opensora_sp.models.kernels.int8_linear import quantize_
from opensora_sp.models.offload import OffloadedModuleList
from opensora_sp.models.text_pieces import PIECES_FILE, load_pieces

_WEIGHT_STEMS = ("pytorch_model", "model")
_LAYERS = "encoder.block."


@dataclass(frozen=True)
class TextEmbedding:
    """What the transformer reads: y [B, L, C] on the device, mask [B, L] int64 on the CPU.

    The mask is 1 on real tokens, the end token included, and 0 on padding.
    """

    y: Tensor
    mask: Tensor


class TextEncoder:
    """T5's encoder and tokenizer from one checkpoint directory; see `load`."""

    def __init__(
        self, model: nn.Module, pieces: Any, *, max_length: int, device: torch.device
    ) -> None:
        self.model = model
        self.pieces = pieces
        self.max_length = max_length
        self.device = device

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int,
        offload_layers: bool = False,
        eight_bits: bool = False,
    ) -> TextEncoder:
        """Read config.json, spiece.model and the weights of `directory`; never asks a hub.

        `max_length` is L, the end token counted. In float16 the second feed-forward matrices
        (`wo`) stay float32, because their sums overflow it. offload_layers: the layers stay in
        host memory and are copied to the device one by one. eight_bits: the layers' matrices
        are kept as int8 with a scale per row.

        Raises:
            CheckpointError: a file that is missing, broken or not T5's, or weights that do not fit.
        """
        model, pieces = cls._open(directory)
        weights = WeightFiles.open(directory, _WEIGHT_STEMS)
        layers = list(model.encoder.block)
        load_module(
            model,
            weights,
            dtype=dtype,
            device=device,
            keep_float32=_is_wo if dtype == torch.float16 else None,
            in_host_memory=_is_in_layers if offload_layers else None,
            skip=_is_in_layers if eight_bits else None,
        )
        if eight_bits:
            # Layer by layer, so that no more than one is ever there in full.
            for number, layer in enumerate(layers):
                _load_layer(layer, number, weights, dtype, device, offloaded=offload_layers)
        if offload_layers:
            model.encoder.block = OffloadedModuleList(layers, device)
        return cls(model, pieces, max_length=max_length, device=device)

    @classmethod
    def check(cls, directory: Path) -> int:
        """Compare every file and every weight's name and shape, reading no weight.

        Returns C, the width of the embeddings. Raises CheckpointError as `load` does.
        """
        model, _ = cls._open(directory)
        weights = WeightFiles.open(directory, _WEIGHT_STEMS)
        load_module(model, weights, dtype=torch.float32, device="cpu", skip=lambda _: True)
        return int(model.config.d_model)

    @staticmethod
    def _open(directory: Path) -> tuple[Any, Any]:
        """The model on the meta device and the tokenizer."""
        config = read_config(directory, T5)
        pieces = load_pieces(directory)
        model = build_t5(config, origin=f"{directory}/config.json")
        vocabulary = model.get_input_embeddings().num_embeddings
        if pieces.vocab_size() > vocabulary:
            raise CheckpointError(
                f"{PIECES_FILE} in {directory} has {pieces.vocab_size()} pieces, more than "
                f"vocab_size {vocabulary} in config.json: give files of one checkpoint"
            )
        return model, pieces

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of cleaned texts, both [B, L] int64 on the CPU.

        A text is cut so that its end token still fits; the rest of L is padding.
        """
        end, pad = self.pieces.eos_id(), self.pieces.pad_id()
        ids = torch.full((len(texts), self.max_length), pad, dtype=torch.int64)  # [B, L]
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            tokens = [*self.pieces.encode(text)[: self.max_length - 1], end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        """The last hidden states of cleaned texts (see captions.clean_caption).

        Texts go through one at a time, so that an embedding does not depend on its neighbours.

        Raises:
            RuntimeError: an embedding is not finite.
        """
        ids, mask = self.tokenize(texts)
        states = []
        for row, text in enumerate(texts):
            state = self.model(
                input_ids=ids[row : row + 1].to(self.device),
                attention_mask=mask[row : row + 1].to(self.device),
            ).last_hidden_state  # [1, L, C]
            if not bool(torch.isfinite(state).all()):
                raise RuntimeError(
                    f"text encoding gave NaN or infinity in {state.dtype} for {text[:60]!r}; "
                    "try --dtype bf16 or fp32"
                )
            states.append(state)
        return TextEmbedding(y=torch.cat(states), mask=mask)


def _load_layer(
    layer: nn.Module,
    number: int,
    weights: WeightFiles,
    dtype: torch.dtype,
    device: torch.device,
    *,
    offloaded: bool,
) -> None:
    """One layer's weights, its matrices in 8 bits; offloaded: in host memory."""
    load_module(
        layer,
        weights,
        dtype=dtype,
        device="cpu" if offloaded else device,
        prefix=f"{_LAYERS}{number}.",
        keep_float32=_is_wo if dtype == torch.float16 else None,
    )
    quantize_(layer, used_on=device if offloaded else None)


def _is_in_layers(name: str) -> bool:
    return name.startswith(_LAYERS)


def build_t5(config: Mapping[str, Any], *, origin: str = "config.json") -> Any:
    """T5's encoder on the meta device, as `config` describes it; unknown keys are ignored.

    Raises:
        CheckpointError: the config, called `origin` in the message, is not of a T5 encoder.
    """
    config = checked(config, T5, origin)
    if config.get("model_type") != "t5":
        raise CheckpointError(
            f"{origin} has model_type {config.get('model_type')!r}, not 't5': "
            "give the directory of T5 v1.1's encoder"
        )
    from accelerate import init_empty_weights
    from transformers import T5Config, T5EncoderModel

    try:
        t5_config = T5Config.from_dict(dict(config))
        with init_empty_weights():
            model = T5EncoderModel(t5_config)
    except Exception as error:  # what a bad value raises differs by version and by key
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{origin} does not describe a T5 encoder: {reason}") from error
    # Emptying the weights cut the tie of the two embeddings; one module has one weight to fill.
    model.set_input_embeddings(model.shared)
    return model


def _is_wo(name: str) -> bool:
    return name.endswith(".wo.weight")
