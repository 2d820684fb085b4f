"""The tokenizer of a run: deterministic, lossless, and text never forges its special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import tokenizer
from swarm.errors import DataError

TEXTS = ["the cat sat on the mat\n", "the dog sat on the log\n", "naïve café, 東京\n"] * 20
TRAINED = tokenizer.train(iter(TEXTS), 280)


def test_training_twice_gives_the_same_bytes() -> None:
    assert tokenizer.train(iter(TEXTS), 280).raw == TRAINED.raw
    assert TRAINED.vocab_size == 280


@given(st.text(max_size=100))
def test_every_text_decodes_to_itself(text: str) -> None:
    (ids,) = TRAINED.encode([text])
    assert TRAINED.decode(ids) == text
    assert all(0 <= token < TRAINED.vocab_size for token in ids)


def test_text_does_not_forge_the_end_of_text() -> None:
    (ids,) = TRAINED.encode(["a <|endoftext|> b"])
    assert TRAINED.end_of_text_id not in ids


def test_a_saved_tokenizer_loads_with_the_same_ids(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(TRAINED.raw)
    loaded = tokenizer.load(path)
    assert loaded.raw == TRAINED.raw
    assert loaded.encode(TEXTS) == TRAINED.encode(TEXTS)
    assert (loaded.vocab_size, loaded.end_of_text_id) == (TRAINED.vocab_size, TRAINED.end_of_text_id)


def test_a_tokenizer_that_pads_and_truncates_encodes_whole_texts() -> None:
    values = json.loads(TRAINED.raw)
    values["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    loaded = tokenizer.parse(json.dumps(values).encode(), "x")
    assert loaded.encode(TEXTS) == TRAINED.encode(TEXTS)


def _without_end_of_text() -> bytes:
    return TRAINED.raw.replace(b"<|endoftext|>", b"<|something|>")


BAD_TOKENIZERS = {
    "empty": b"",
    "not JSON": b"hello",
    "not UTF-8": b"\xff",
    "another JSON file": b'{"model_type": "llama"}',
    "cut short": TRAINED.raw[:-20],
    "no end-of-text": _without_end_of_text(),
}


@pytest.mark.parametrize("raw", BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS.keys())
def test_a_file_that_is_no_tokenizer_is_refused_by_name(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tok.json"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"tok\.json"):
        tokenizer.load(path)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        tokenizer.load(tmp_path / "tok.json")
