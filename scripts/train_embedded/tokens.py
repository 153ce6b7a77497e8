"""The embedded T5's vocabulary, learnt from the world's captions and some plain English.

The published layout of the tokenizer: spiece.model with T5's ids, and two JSON files.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from scripts.train_embedded.architecture import EXTRA_IDS, VOCABULARY
from scripts.train_embedded.captions import TRAINED, UNTRAINED, caption
from scripts.train_embedded.world import draw_scene

SEED = 13
CAPTIONS = 6000
# Sentences in the manner of other people's prompts: every letter, and common pieces of words.
ENGLISH = Path(__file__).with_name("english.txt")


def train_vocabulary() -> bytes:
    """The SentencePiece model, as bytes; the same on every run."""
    import sentencepiece

    rng = np.random.default_rng(SEED)
    lines = ENGLISH.read_text(encoding="utf-8").splitlines() * 3
    for _ in range(CAPTIONS):
        scene = draw_scene(rng, (64, 96), 17 if rng.random() < 0.8 else 1)
        lines.append(caption(scene, rng, (*TRAINED, *UNTRAINED)))
    model = io.BytesIO()
    # Sentences and model pass through memory, as file names would be stored inside the model.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_files() -> dict[str, dict[str, Any]]:
    """special_tokens_map.json and tokenizer_config.json."""
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    extra = [f"<extra_id_{index}>" for index in range(EXTRA_IDS)]
    special: dict[str, Any] = {**names, "additional_special_tokens": extra}
    config = {
        **special,
        "extra_ids": EXTRA_IDS,
        "model_max_length": 512,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    }
    return {"special_tokens_map.json": special, "tokenizer_config.json": config}
