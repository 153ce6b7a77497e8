"""Embeddings on disk: found again, never a wrong one, and never a reason to fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.text_cache import TextCache, default_directory
from opensora_sp.engine.weight_digests import text_encoder_digest
from opensora_sp.models.text_encoder import TextEncoder
from opensora_sp.parallel.session import alone
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.runtime import Runtime


def cache(folder: Path, encoder: str = "t5", length: int = 8, dtype: str = "float32") -> TextCache:
    return TextCache(
        folder, encoder=encoder, max_length=length, dtype=getattr(torch, dtype), width=4
    )


def test_what_decides_an_embedding_decides_its_file(tmp_path: Path) -> None:
    tokens = torch.randn(3, 4)
    cache(tmp_path).put("a cat", tokens)
    found = cache(tmp_path).get("a cat")
    assert found is not None
    assert torch.equal(found, tokens)
    assert cache(tmp_path).get("a cat.") is None
    for other in (("other",), ("t5", 9), ("t5", 8, "bfloat16")):
        assert cache(tmp_path, *other).get("a cat") is None  # type: ignore[arg-type]


@pytest.mark.parametrize("harm", ["cut", "empty", "changed", "another caption's"])
def test_a_damaged_file_is_said_and_replaced(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = torch.randn(3, 4)
    cache(tmp_path).put("a cat", tokens)
    cache(tmp_path).put("a dog", tokens + 1)
    path, other = cache(tmp_path).path("a cat"), cache(tmp_path).path("a dog")
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-5],
            "empty": b"",
            "changed": content[:-1] + bytes([content[-1] ^ 1]),
            "another caption's": other.read_bytes(),
        }[harm]
    )
    assert cache(tmp_path).get("a cat") is None
    assert "text cache:" in caplog.text
    caplog.clear()
    cache(tmp_path).put("a cat", tokens)
    assert cache(tmp_path).get("a cat") is not None
    assert caplog.text == ""


def test_a_place_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    blocked = cache(tmp_path / "file")
    for caption in ("a", "b"):
        assert blocked.get(caption) is None
        blocked.put(caption, torch.zeros(1, 4))
    assert caplog.text.count("text cache:") == 1


def test_what_was_unused_for_longest_goes_first(tmp_path: Path) -> None:
    store = cache(tmp_path)
    for age, caption in enumerate(["new", "old", "oldest"]):
        store.put(caption, torch.zeros(8, 4))
        os.utime(store.path(caption), (1e9 - age, 1e9 - age))
    assert store.get("oldest") is not None  # used now
    store.prune(2 * store.path("new").stat().st_size)
    assert [store.get(c) is not None for c in ("new", "old", "oldest")] == [True, False, True]


def test_a_prompt_seen_before_needs_no_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def texts() -> list[torch.Tensor]:
        pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32", text_cache=tmp_path / "text")
        text = pipeline.text.broadcast(["a cat", "a longer caption of a dog"], 16)
        return [*text.tokens, text.masks]

    first = texts()
    monkeypatch.setattr(TextEncoder, "load", lambda *_, **__: pytest.fail("T5 is loaded again"))
    again = texts()
    assert len(first) == len(again) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    pipeline = Pipeline.load(
        session=alone("cpu"),
        dtype="fp32",
        text_cache=tmp_path / "text",
        runtime=Runtime(text_weights="int8"),
    )
    with pytest.raises(pytest.fail.Exception, match="loaded again"):  # other embeddings
        pipeline.text.broadcast(["a cat"], 16)


def test_the_encoder_is_known_by_its_content(tmp_path: Path) -> None:
    import shutil

    source = embedded_checkpoints().t5
    one, two = (Path(shutil.copytree(source, tmp_path / name)) for name in ("one", "two"))
    assert text_encoder_digest(one) == text_encoder_digest(two) == text_encoder_digest(source)
    for name in ("spiece.model", "config.json"):
        content = (two / name).read_bytes()
        (two / name).write_bytes(content[:-2] + b" " + content[-2:])
        assert text_encoder_digest(two) != text_encoder_digest(one)
        (two / name).write_bytes(content)
    assert text_encoder_digest(two) == text_encoder_digest(one)


def test_the_default_place_follows_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_directory() == Path("/somewhere/opensora-sp/text")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setenv("HOME", "/home/me")
    assert default_directory() == Path("/home/me/.cache/opensora-sp/text")
