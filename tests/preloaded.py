"""What ranks find imported already. The process that they are forked from imports this, once.

A rank that imports the package and its libraries by itself spends half a second of a core on that,
as long as many a test computes; the suite forks some hundreds.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib import import_module

MODULES = [
    "torch",
    "torch.distributed",
    "transformers.models.t5.modeling_t5",
    "diffusers.models.autoencoders.autoencoder_kl",
    "av",
    "bs4",
    "ftfy",
    "pytest",
    "sentencepiece",
    "opensora_sp.cli.infer",
    "opensora_sp.cli.benchmark",
    "opensora_sp.cli.verify",
    "opensora_sp.models.kernels.int8_linear",
    "opensora_sp.models.text_encoder",
    "opensora_sp.request.captions",
]

for _name in MODULES:
    with suppress(ImportError):  # what is missing fails in the test that needs it
        import_module(_name)
# Collections in the ranks leave alone what all of them share, so its pages stay shared too.
gc.collect()
gc.freeze()
