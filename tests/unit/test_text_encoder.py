"""The T5 encoder: conformance, the published layout, what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora_sp.base.errors import CheckpointError
from opensora_sp.models.kernels.int8_linear import EightBitLinear
from opensora_sp.models.text_encoder import TextEncoder, build_t5

CPU = torch.device("cpu")
XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "a_key_of_another_version": 1,
}


def load(directory: Path, dtype: torch.dtype = torch.float32, max_length: int = 20) -> TextEncoder:
    return TextEncoder.load(directory, dtype=dtype, device=CPU, max_length=max_length)


@pytest.fixture
def t5_copy(suite_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(suite_dir / "t5", tmp_path / "t5"))


def test_conformance(suite_dir: Path) -> None:
    asked = json.loads((suite_dir / "t5" / "cases.json").read_text("utf-8"))
    expected = load_file(suite_dir / "t5" / "cases.safetensors")
    encoder = load(suite_dir / "t5", max_length=asked["max_length"])
    ids, mask = encoder.tokenize(asked["prompts"])
    assert torch.equal(ids, expected["input_ids"].long())
    assert torch.equal(mask, expected["mask"].long())
    embedding = encoder.encode(asked["prompts"])
    assert torch.equal(embedding.mask, mask)
    assert (embedding.y - expected["embedding"]).abs().max() <= 1e-4


def test_published_size_has_exactly_the_manifest(suite_dir: Path) -> None:
    manifest = json.loads((suite_dir / "manifest.json").read_text("utf-8"))["t5"]
    model = build_t5(XXL)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    alias = "encoder.embed_tokens.weight"  # the file may leave it out, a version of T5 may too
    manifest.setdefault(alias, manifest["shared.weight"])
    shapes.setdefault(alias, shapes["shared.weight"])
    assert shapes == manifest
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_ids_are_those_of_transformers_tokenizer(suite_dir: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(suite_dir / "t5"), local_files_only=True)
    cases = json.loads((suite_dir / "prompts.json").read_text("utf-8"))["caption_cleaning"]
    texts = [case["clean"] for case in cases] + ["", " a  b ", "ＡＢ½ é", "日 x 日日", "a" * 200]
    wanted = reference(
        texts, max_length=40, padding="max_length", truncation=True, return_tensors="pt"
    )
    ids, mask = load(suite_dir / "t5", max_length=40).tokenize(texts)
    assert torch.equal(ids, wanted["input_ids"])
    assert torch.equal(mask, wanted["attention_mask"])


def test_a_long_text_keeps_its_end_token(suite_dir: Path) -> None:
    encoder = load(suite_dir / "t5", max_length=3)
    ids, mask = encoder.tokenize(["a red ball moves left", ""])
    assert ids[:, -1].tolist() == [1, 0]
    assert ids[1].tolist() == [1, 0, 0]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_an_embedding_does_not_depend_on_its_neighbours(suite_dir: Path) -> None:
    encoder = load(suite_dir / "t5", torch.bfloat16)
    texts = ["a cat", "the sea at night", ""]
    together = encoder.encode(texts).y
    assert together.dtype == torch.bfloat16
    for row, text in enumerate(texts):
        assert torch.equal(together[row : row + 1], encoder.encode([text]).y)


def test_float16_keeps_wo_in_float32(suite_dir: Path) -> None:
    encoder = load(suite_dir / "t5", torch.float16)
    kept = {n for n, p in encoder.model.named_parameters() if p.dtype == torch.float32}
    assert kept
    assert all(name.endswith("DenseReluDense.wo.weight") for name in kept)
    assert encoder.encode(["a cat"]).y.dtype == torch.float16


def test_eight_bits_are_near_and_take_half_the_memory(suite_dir: Path) -> None:
    texts = ["a red ball moves left", "two cats"]
    whole = load(suite_dir / "t5")
    wanted = whole.encode(texts).y
    for offloaded in (False, True):
        encoder = TextEncoder.load(
            suite_dir / "t5",
            dtype=torch.float32,
            device=CPU,
            max_length=20,
            offload_layers=offloaded,
            eight_bits=True,
        )
        # What a run of the same rounded weights gives, whichever way they come to the device.
        rounded = load(suite_dir / "t5")
        with torch.no_grad():
            for name, weight in rounded.model.named_parameters():
                if name.startswith("encoder.block.") and weight.ndim == 2 and "bias" not in name:
                    step = weight.abs().amax(1, keepdim=True) / 127
                    weight.copy_((weight / step).round() * step)
        found = encoder.encode(texts).y
        assert torch.allclose(found, rounded.encode(texts).y, atol=1e-5)
        away = (found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
        assert 0 < away < 0.1  # attention of random weights multiplies a difference
        left = [m for m in encoder.model.modules() if isinstance(m, torch.nn.Linear)]
        assert not left
    with pytest.raises(AssertionError):  # the rounding is no accident of the comparison
        assert torch.allclose(found, wanted, atol=1e-5)


def test_eight_bits_in_float16_multiply_wo_in_float32(suite_dir: Path) -> None:
    encoder = TextEncoder.load(
        suite_dir / "t5", dtype=torch.float16, device=CPU, max_length=20, eight_bits=True
    )
    kept = {n: m for n, m in encoder.model.named_modules() if isinstance(m, EightBitLinear)}
    assert {m.dtype for n, m in kept.items() if n.endswith(".wo")} == {torch.float32}
    assert {m.dtype for n, m in kept.items() if not n.endswith(".wo")} == {torch.float16}
    assert {m.weight.dtype for m in kept.values()} == {torch.int8}


def test_a_row_of_zeros_stays_one() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -0.5]])
    made = EightBitLinear.of(weight)(torch.eye(2)).T
    assert torch.equal(made[0], weight[0])
    assert torch.allclose(made, weight, atol=0.5 / 127)


def test_non_finite_embeddings_name_the_stage_and_text(suite_dir: Path) -> None:
    encoder = load(suite_dir / "t5")
    next(encoder.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"text encoding gave NaN .* 'a cat'"):
        encoder.encode(["a cat"])


def _drop_pieces(directory: Path) -> None:
    (directory / "spiece.model").unlink()


def _break_pieces(directory: Path) -> None:
    (directory / "spiece.model").write_bytes(b"\x00nonsense")


def _repeat_a_piece_that_is_no_text(directory: Path) -> None:
    """SentencePiece's own message quotes the piece, and Python cannot decode it."""
    piece = b"\x0a\x0c\x0a\x03a\xe2(\x15" + bytes(4) + b"\x18\x01"
    unknown = b"\x0a\x0e\x0a\x05<unk>\x15" + bytes(4) + b"\x18\x02"
    (directory / "spiece.model").write_bytes(unknown + piece + piece)


def _drop_weights(directory: Path) -> None:
    (directory / "pytorch_model.bin.index.json").unlink()


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))

    return edit


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "does not exist"),
        (_drop_pieces, "no spiece.model in"),
        (_break_pieces, "not a SentencePiece model"),
        (_repeat_a_piece_that_is_no_text, "not a SentencePiece model"),
        (_drop_weights, "no weights in"),
        (_edit_config(model_type="STDiT3"), "model_type 'STDiT3', not 't5'"),
        (_edit_config(num_layers="two"), "num_layers 'two' is not a whole number"),
        (_edit_config(feed_forward_proj="gated-x-y"), "does not describe a T5 encoder"),
        (_edit_config(vocab_size=64), "109 pieces, more than vocab_size 64"),
        (_edit_config(num_layers=3), r"encoder\.block\.2\."),
        (_edit_config(d_ff=65), r"wi_0\.weight"),
    ],
)
def test_wrong_directories_are_refused(
    t5_copy: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(t5_copy)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(t5_copy)
    assert "\n" not in str(caught.value)


def test_only_pieces_config_and_weights_are_needed(t5_copy: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (t5_copy / name).unlink()
    assert load(t5_copy).encode(["a cat"]).mask.sum() > 2
