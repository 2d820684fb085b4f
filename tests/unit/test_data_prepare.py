"""Preparing data: the split, the layout of tokens, and options that cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import data_prepare, token_shards, tokenizer
from coordinator.data_prepare import PrepareOptions, document_hash, is_validation, prepare
from coordinator.token_shards import TokenShardWriter
from swarm.data_manifest import DataManifest
from swarm.digest import sha256
from swarm.errors import ConfigError, DataError


def quiet(_progress: data_prepare.Progress) -> None:
    pass


def json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(folder: Path, manifest: DataManifest, split: str) -> list[str]:
    """The documents of a split, decoded from its files."""
    shards = manifest.train if split == "train" else manifest.validation
    raw = b"".join((folder / shard.file).read_bytes() for shard in shards)
    ids = np.frombuffer(raw, "<u2" if manifest.dtype == "uint16" else "<u4").tolist()
    text = tokenizer.load(folder / "tokenizer.json").decode(ids)
    assert text.endswith(tokenizer.END_OF_TEXT)
    return text.split(tokenizer.END_OF_TEXT)[:-1]


def test_every_document_is_in_exactly_one_split_and_duplicates_never_in_both(tmp_path: Path) -> None:
    texts = [f"document {index % 60}: naïve café\n" for index in range(90)]
    source = json_lines(tmp_path / "x.jsonl", texts)
    options = PrepareOptions(
        sources=(source,), out=tmp_path / "out", vocab_size=300, validation_fraction=0.3, token_shard_tokens=64
    )
    manifest = prepare(options, quiet)
    train = documents_of(tmp_path / "out", manifest, "train")
    held_out = documents_of(tmp_path / "out", manifest, "validation")
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert set(held_out) == {text for text in texts if is_validation(document_hash(text), 0.3)}
    assert [shard.num_tokens for shard in manifest.train[:-1]] == [64] * (len(manifest.train) - 1)


def test_the_manifest_says_what_was_read(tmp_path: Path) -> None:
    texts = [f"document {index}" for index in range(50)]
    good = json_lines(tmp_path / "good.jsonl", texts)
    bad = json_lines(tmp_path / "bad.jsonl", ["ä" * 10])
    bad.write_text(bad.read_text() + "oops\n")
    seen: list[data_prepare.Progress] = []
    options = PrepareOptions(
        sources=(good, bad), out=tmp_path / "out", vocab_size=300, validation_fraction=0.2, licence="CC0-1.0"
    )
    manifest = prepare(options, seen.append)
    first, second = manifest.sources
    assert (first.path, first.licence, first.documents, first.malformed) == (str(good), "CC0-1.0", 50, 0)
    assert first.digest == sha256(b"".join(document_hash(text) for text in texts)).hex()
    assert (second.documents, second.text_bytes, second.malformed) == (1, 20, 1)
    last = seen[-1]
    assert last.bytes_done == last.bytes_total == good.stat().st_size + bad.stat().st_size
    assert (last.documents, last.malformed) == (51, 1)
    assert last.tokens == manifest.train_tokens + manifest.validation_tokens
    assert last.examples == (f"{bad}:2: not JSON",)
    assert {progress.phase for progress in seen} == {"train tokenizer", "tokenize"}
    assert (tmp_path / "out" / "manifest.json").read_bytes() == manifest.canonical_bytes()


def test_a_document_longer_than_a_batch_comes_through_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_prepare, "_BATCH_CHARACTERS", 1000)
    texts = ["word " * 40_000 + "end", "another ä\n" * 20_000, *(f"short {index}" for index in range(20))]
    source = json_lines(tmp_path / "x.jsonl", texts)
    options = PrepareOptions(sources=(source,), out=tmp_path / "out", vocab_size=300, validation_fraction=0.3)
    manifest = prepare(options, quiet)
    found = [text for split in ("train", "validation") for text in documents_of(tmp_path / "out", manifest, split)]
    assert sorted(found) == sorted(texts)


def test_the_tokenizer_learns_from_train_documents_within_its_budget_from_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_prepare, "MAX_TRAINING_BYTES", 1000)
    sources = tuple(
        json_lines(tmp_path / f"{name}.jsonl", [f"{name} {index:04d}" for index in range(count)])
        for name, count in (("small", 5), ("large", 500), ("other", 500))
    )
    options = PrepareOptions(sources=sources, out=tmp_path / "out", validation_fraction=0.1)
    texts = list(data_prepare._training_texts(options, 0, quiet))
    assert not any(is_validation(document_hash(text), 0.1) for text in texts)
    by_source = {
        name: sum(len(text) for text in texts if text.startswith(name)) for name in ("small", "large", "other")
    }
    assert by_source["small"] <= 50
    assert abs(by_source["large"] - by_source["other"]) <= 20
    assert 950 <= sum(by_source.values()) <= 1030


def test_a_vocabulary_beyond_16_bits_makes_32_bit_token_shards(tmp_path: Path) -> None:
    values = json.loads(tokenizer.train(iter(["abc"]), 257).raw)
    values["model"]["vocab"]["far away"] = 70_000
    path = tmp_path / "wide.json"
    path.write_text(json.dumps(values))
    source = json_lines(tmp_path / "x.jsonl", [f"document {index}" for index in range(30)])
    options = PrepareOptions(sources=(source,), out=tmp_path / "out", tokenizer=path, validation_fraction=0.3)
    manifest = prepare(options, quiet)
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    assert manifest.tokenizer_digest == sha256(path.read_bytes()).hex()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == path.read_bytes()
    shard = manifest.train[0]
    assert (tmp_path / "out" / shard.file).stat().st_size == 4 * shard.num_tokens
    assert len(documents_of(tmp_path / "out", manifest, "train")) > 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=40), min_size=1, max_size=20), st.integers(1, 30))
def test_token_shards_hold_every_document_once_and_all_but_the_last_are_full(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = TokenShardWriter(folder, "train", "uint16", size)
    for ids in documents:
        writer.append(ids[:3])
        writer.append(ids[3:])
        writer.end_document(sha256(bytes(len(ids)) + str(ids).encode()))
    writer.close()
    raw = [(folder / shard.file).read_bytes() for shard in writer.shards]
    assert [sha256(data).hex() for data in raw] == [shard.digest for shard in writer.shards]
    assert [len(data) // 2 for data in raw] == [shard.num_tokens for shard in writer.shards]
    assert all(shard.num_tokens == size for shard in writer.shards[:-1])
    ordered = sorted(documents, key=lambda ids: sha256(bytes(len(ids)) + str(ids).encode()))
    assert np.frombuffer(b"".join(raw), "<u2").tolist() == [token for ids in ordered for token in ids]


def test_a_window_is_left_when_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shards, "WINDOW_TOKENS", 200)
    writer = TokenShardWriter(tmp_path, "train", "uint16", 1)
    for index in range(6):  # a window holds four documents of one token
        writer.append([index])
        writer.end_document(bytes([9 - index]))
    writer.close()
    written = [int.from_bytes((tmp_path / shard.file).read_bytes(), "little") for shard in writer.shards]
    assert written == [3, 2, 1, 0, 5, 4]


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"sources": ()}, "no source"),
    "vocabulary below the bytes": ({"vocab_size": 256}, "from 257"),
    "no validation": ({"validation_fraction": 0.0}, "between 0 and 1"),
    "only validation": ({"validation_fraction": 1.0}, "between 0 and 1"),
    "not a number": ({"validation_fraction": float("nan")}, "between 0 and 1"),
    "tiny token shards": ({"token_shard_tokens": 1}, "from 64"),
    "huge token shards": ({"token_shard_tokens": 1 << 30}, "from 64"),
    "a long licence": ({"licence": "x" * 5000}, "at most 4096"),
}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_that_cannot_work_are_refused(case: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    values, said = case
    with pytest.raises(ConfigError, match=said):
        PrepareOptions(**{"sources": (tmp_path,), "out": tmp_path / "out", **values})


UNUSABLE: dict[str, tuple[list[str] | None, str, str]] = {
    "a source that is missing": (None, "does not exist", "that is there"),
    "no documents": ([], "holds no documents", "--include"),
    "only white space": ([" ", "\n"], "holds no documents", "--include"),
    "one document": (["one"], "only one document", "add text"),
    "one document many times": (["one"] * 9, "only one document", "add text"),
    "no document held out": (["one", "two"], "none of the 2 documents", "--validation-fraction 0."),
}


@pytest.mark.parametrize("case", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_sources_that_make_no_run_are_refused_with_advice(
    case: tuple[list[str] | None, str, str], tmp_path: Path
) -> None:
    texts, said, advice = case
    source = tmp_path / "x.jsonl"
    if texts is not None:
        json_lines(source, texts)
    options = PrepareOptions(sources=(source,), out=tmp_path / "out", vocab_size=257, validation_fraction=1e-9)
    with pytest.raises(DataError, match=said) as caught:
        prepare(options, quiet)
    assert advice in caught.value.advice
    assert {path.name for path in tmp_path.iterdir()} <= {"x.jsonl"}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9], ids=["too small", "too large"])
def test_the_advised_validation_fraction_works(fraction: float, tmp_path: Path) -> None:
    source = json_lines(tmp_path / "x.jsonl", [f"document {index}" for index in range(12)])
    values: dict[str, Any] = {"sources": (source,), "out": tmp_path / "out", "vocab_size": 257}
    with pytest.raises(DataError) as caught:
        prepare(PrepareOptions(**values, validation_fraction=fraction), quiet)
    advised = float(caught.value.advice.split("--validation-fraction ")[1].split()[0])
    manifest = prepare(PrepareOptions(**values, validation_fraction=advised), quiet)
    assert manifest.validation_tokens > 0


def test_malformed_sources_are_named_where_nothing_is_left(tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text("oops\n")
    with pytest.raises(DataError, match=r"1 malformed; .*x\.jsonl:1: not JSON"):
        prepare(PrepareOptions(sources=(source,), out=tmp_path / "out"), quiet)
