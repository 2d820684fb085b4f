"""The data manifest: what it may say, and that its bytes say it the same way every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swarm import data_manifest
from swarm.data_manifest import MAX_TOKEN_SHARD_BYTES, DataManifest, parse, token_shard_name
from swarm.digest import sha256
from swarm.errors import DataError, DigestError

DIGEST = "ab" * 32


def values(**changes: Any) -> dict[str, Any]:
    shard = {"digest": DIGEST, "num_tokens": 1000}
    return {
        "tokenizer_digest": DIGEST,
        "vocab_size": 300,
        "end_of_text_id": 0,
        "dtype": "uint16",
        "train": [{**shard, "file": "train-00000.bin"}, {**shard, "file": "train-00001.bin", "num_tokens": 7}],
        "validation": [{**shard, "file": "validation-00000.bin"}],
        "sources": [{"path": "x", "digest": DIGEST, "documents": 3, "text_bytes": 9}],
        **changes,
    }


def shards(*names: str, num_tokens: int = 9) -> list[dict[str, Any]]:
    return [{"file": name, "digest": DIGEST, "num_tokens": num_tokens} for name in names]


def test_canonical_bytes_parse_to_the_same_manifest() -> None:
    manifest = DataManifest.model_validate(values())
    raw = manifest.canonical_bytes()
    assert parse(raw, sha256(raw).hex()) == manifest
    assert parse(raw).canonical_bytes() == raw
    assert (manifest.train_tokens, manifest.validation_tokens) == (1007, 1000)
    assert manifest.size_bytes(manifest.train[0]) == 2000


def test_names_of_token_shards_stay_in_order_beyond_five_digits() -> None:
    assert token_shard_name("train", 7) == "train-00007.bin"
    assert token_shard_name("validation", 123456) == "validation-123456.bin"


BAD = {
    "unknown key": (values(trian=[]), "did you mean 'train'"),
    "ids beyond uint16": (values(vocab_size=65537), "do not fit in uint16"),
    "end of text beyond the vocabulary": (values(end_of_text_id=300), "not below vocab_size"),
    "no train tokens": (values(train=[]), "train"),
    "a shard of the other split": (values(train=shards("validation-00000.bin")), "not train-00000.bin"),
    "a file twice": (values(train=shards("train-00000.bin", "train-00000.bin")), "not train-00001.bin"),
    "a path": (values(train=shards("../train-00000.bin")), "train.0.file"),
    "uint32 beyond the size limit": (
        values(
            dtype="uint32", vocab_size=99999, train=shards("train-00000.bin", num_tokens=MAX_TOKEN_SHARD_BYTES // 4 + 1)
        ),
        "larger than",
    ),
    "another format": (values(format=2), "format"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_a_manifest_that_does_not_hold_together_is_refused(case: tuple[dict[str, Any], str]) -> None:
    with pytest.raises(DataError, match="data manifest") as caught:
        parse(json.dumps(case[0]).encode())
    assert case[1] in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "binary", "deep"])
def test_bytes_that_are_no_json_are_refused(raw: bytes) -> None:
    with pytest.raises(DataError, match="not JSON"):
        parse(raw)


def test_a_flipped_byte_is_noticed_by_the_digest() -> None:
    raw = DataManifest.model_validate(values()).canonical_bytes()
    with pytest.raises(DigestError, match="does not have the digest"):
        parse(raw.replace(b"300", b"301"), sha256(raw).hex())


def test_a_folder_without_a_manifest_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: No such file") as caught:
        data_manifest.load(tmp_path)
    assert "swarm data prepare" in caught.value.advice
