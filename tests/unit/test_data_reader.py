"""The token reader: batches equal to the plain definition, nothing unverified used, a cache that keeps its limit."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer.training.data import (
    MAX_VALIDATION_SHARDS,
    ReaderOptions,
    TokenReader,
    sequences_in,
    validation_readings,
)
from swarm.assignment import Reading
from swarm.data_manifest import DataManifest, TokenShard, token_shard_name
from swarm.digest import sha256
from swarm.errors import DataError, DigestError, DiskFull, NotFound

LARGE = 1 << 30


class Data:
    """Token shards in memory, their manifest, and a fetch that counts what it serves."""

    def __init__(self, train: Sequence[int], validation: Sequence[int], dtype: str = "uint16") -> None:
        self.tokens: dict[str, np.ndarray] = {}
        self.blobs: dict[bytes, bytes] = {}
        self.fetched: list[bytes] = []
        self.manifest = DataManifest(
            tokenizer_digest="ab" * 32,
            vocab_size=500 if dtype == "uint16" else 100_000,
            end_of_text_id=0,
            dtype=dtype,  # type: ignore[arg-type]
            train=self._shards("train", train, dtype),
            validation=self._shards("validation", validation, dtype),
            sources=(),
        )

    def _shards(self, split: str, counts: Sequence[int], dtype: str) -> tuple[TokenShard, ...]:
        found = []
        for index, count in enumerate(counts):
            top = 500 if dtype == "uint16" else 100_000
            name = token_shard_name(split, index)
            tokens = np.random.default_rng((index, count, len(split))).integers(0, top, count)
            raw = tokens.astype("<u2" if dtype == "uint16" else "<u4").tobytes()
            self.tokens[name] = tokens
            self.blobs[sha256(raw)] = raw
            found.append(TokenShard(file=name, digest=sha256(raw).hex(), num_tokens=count))
        return tuple(found)

    async def fetch(self, digest: bytes, size: int) -> bytes:
        self.fetched.append(digest)
        raw = self.blobs[digest]
        assert len(raw) == size
        return raw

    def reader(self, cache: Path, length: int = 10, max_cache_bytes: int = LARGE) -> TokenReader:
        options = ReaderOptions(sequence_length=length, cache=cache, max_cache_bytes=max_cache_bytes)
        return TokenReader(self.manifest, options, self.fetch)


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def file_of(data: Data, index: int) -> str:
    return f"{data.manifest.train[index].digest}.bin"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(2, 400), st.integers(1, 40), st.sampled_from(["uint16", "uint32"]))
def test_a_batch_is_what_the_plain_definition_says(
    tmp_path: Path, draw: st.DataObject, num_tokens: int, length: int, dtype: str
) -> None:
    data = Data([num_tokens, 500], [500], dtype)
    reader = data.reader(tmp_path / "cache", length)
    count = len([start for start in range(0, num_tokens, length) if start + length + 1 <= num_tokens])
    assert reader.sequences_per_shard()[0] == count == sequences_in(num_tokens, length)
    if not count:
        return
    chosen = tuple(draw.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=9)))
    asyncio.run(reader.ensure(0))
    batch = reader.batch(Reading(token_shard=0, sequences=chosen))
    tokens = data.tokens["train-00000.bin"]
    assert batch.dtype == np.int64
    assert batch.tolist() == [tokens[i * length : i * length + length + 1].tolist() for i in chosen]


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 200))
def test_validation_is_spread_evenly_over_a_bounded_number_of_shards(counts: list[int], most: int) -> None:
    found = validation_readings(counts, most)
    assert len(found) <= MAX_VALIDATION_SHARDS
    assert sum(len(reading.sequences) for reading in found) <= most
    assert bool(found) == any(counts)
    for reading in found:
        assert len(set(reading.sequences)) == len(reading.sequences) > 0
        assert all(0 <= sequence < counts[reading.token_shard] for sequence in reading.sequences)


def test_validation_reads_every_sequence_of_small_data_and_a_spread_of_large_data() -> None:
    assert validation_readings([2, 0, 1], 99) == [
        Reading(token_shard=0, sequences=(0, 1)),
        Reading(token_shard=2, sequences=(0,)),
    ]
    assert validation_readings([100, 100], 4) == [
        Reading(token_shard=0, sequences=(0, 50)),
        Reading(token_shard=1, sequences=(0, 50)),
    ]


def test_validation_batches_are_full_but_the_last_and_always_the_same(tmp_path: Path) -> None:
    data = Data([500], [31, 5, 42])
    reader = data.reader(tmp_path / "cache")
    asyncio.run(reader.ensure_validation(6))
    batches = list(reader.validation_batches(6, 4))
    assert [batch.shape for batch in batches] == [(4, 11), (2, 11)]
    again = list(reader.validation_batches(6, 4))
    assert all((first == second).all() for first, second in zip(batches, again, strict=True))
    first, second = data.tokens["validation-00000.bin"], data.tokens["validation-00002.bin"]
    starts = [*(first[i * 10 : i * 10 + 11] for i in range(3)), *(second[i * 10 : i * 10 + 11] for i in range(3))]
    assert np.concatenate(batches).tolist() == [row.tolist() for row in starts]


def test_a_token_shard_is_fetched_once_and_found_again_after_a_restart(tmp_path: Path) -> None:
    data = Data([100, 100], [100])

    async def use() -> None:
        reader = data.reader(tmp_path)
        await asyncio.gather(*(reader.ensure(1) for _ in range(5)))

    asyncio.run(use())
    asyncio.run(use())
    assert len(data.fetched) == 1
    assert cached(tmp_path) == {file_of(data, 1)}


@pytest.mark.parametrize("damage", [b"", b"\0" * 200, b"x" * 7], ids=["empty", "flipped", "cut short"])
def test_a_damaged_cache_file_is_fetched_again(damage: bytes, tmp_path: Path) -> None:
    data = Data([100], [100])
    asyncio.run(data.reader(tmp_path).ensure(0))
    (tmp_path / file_of(data, 0)).write_bytes(damage)
    reader = data.reader(tmp_path)
    asyncio.run(reader.ensure(0))
    assert len(data.fetched) == 2
    assert (
        reader.batch(Reading(token_shard=0, sequences=(0,)))[0].tolist() == data.tokens["train-00000.bin"][:11].tolist()
    )


@pytest.mark.parametrize("change", [lambda raw: raw[:-2], lambda raw: raw[:-1] + b"\xff", lambda raw: b""])
def test_bytes_that_are_not_the_token_shard_are_refused_and_not_kept(change: object, tmp_path: Path) -> None:
    data = Data([100], [100])
    digest = bytes.fromhex(data.manifest.train[0].digest)
    good = data.blobs[digest]

    async def hostile(_digest: bytes, _size: int) -> bytes:
        return change(good)  # type: ignore[operator, no-any-return]

    options = ReaderOptions(sequence_length=10, cache=tmp_path, max_cache_bytes=LARGE)
    reader = TokenReader(data.manifest, options, hostile)
    with pytest.raises(DigestError, match="train-00000"):
        asyncio.run(reader.ensure(0))
    assert cached(tmp_path) == set()
    with pytest.raises(DataError, match="before it was fetched"):
        reader.batch(Reading(token_shard=0, sequences=(0,)))


def test_a_failed_fetch_leaves_the_reader_usable(tmp_path: Path) -> None:
    data = Data([100], [100])
    answers = [NotFound("nobody has it"), None]

    async def flaky(digest: bytes, size: int) -> bytes:
        error = answers.pop(0)
        if error is not None:
            raise error
        return await data.fetch(digest, size)

    async def use() -> None:
        options = ReaderOptions(sequence_length=10, cache=tmp_path, max_cache_bytes=LARGE)
        reader = TokenReader(data.manifest, options, flaky)
        with pytest.raises(NotFound):
            await reader.ensure(0)
        await reader.ensure(0)

    asyncio.run(use())


def test_the_least_recently_used_token_shard_makes_room_and_validation_stays(tmp_path: Path) -> None:
    data = Data([100] * 4, [100])

    async def use() -> None:
        reader = data.reader(tmp_path, max_cache_bytes=600)  # three files of 200 bytes
        await reader.ensure_validation(9)
        for index, age in ((0, 30), (1, 20)):
            await reader.ensure(index)
            os.utime(tmp_path / file_of(data, index), (age, age))
        os.utime(tmp_path / f"{data.manifest.validation[0].digest}.bin", (1, 1))
        await reader.ensure(2)
        # The shard that is being read stays readable although its file made room.
        assert len(reader.batch(Reading(token_shard=1, sequences=(0,)))) == 1

    asyncio.run(use())
    assert cached(tmp_path) == {file_of(data, 0), file_of(data, 2), f"{data.manifest.validation[0].digest}.bin"}


def test_a_cache_limit_too_small_for_a_token_shard_is_disk_full(tmp_path: Path) -> None:
    data = Data([100], [100])
    reader = data.reader(tmp_path, max_cache_bytes=399)
    asyncio.run(reader.ensure_validation(9))
    with pytest.raises(DiskFull, match="of which validation needs 200") as caught:
        asyncio.run(reader.ensure(0))
    assert "more space" in caught.value.advice


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data([100], [100])

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    reader = data.reader(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        asyncio.run(reader.ensure(0))
    assert cached(tmp_path) == set()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123").write_bytes(b"half")
    Data([100], [100]).reader(tmp_path)
    assert cached(tmp_path) == set()


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    data = Data([100], [100])
    data.manifest = data.manifest.model_copy(update={"vocab_size": 2})
    reader = data.reader(tmp_path)
    asyncio.run(reader.ensure(0))
    with pytest.raises(DataError, match="beyond the vocabulary"):
        reader.batch(Reading(token_shard=0, sequences=(0,)))


@pytest.mark.parametrize(
    ("train", "validation", "split"),
    [([10, 3], [100], "train"), ([100], [10], "validation")],
    ids=["train", "held out"],
)
def test_data_without_a_whole_sequence_is_refused_at_once(
    train: list[int], validation: list[int], split: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"no {split} token shard holds a sequence of 10 tokens"):
        Data(train, validation).reader(tmp_path)


@pytest.mark.parametrize(
    ("shard", "sequence", "said"), [(0, 9, "no sequence 9"), (0, -1, "no sequence"), (5, 0, "no token shard 5")]
)
def test_a_reading_out_of_range_is_refused(shard: int, sequence: int, said: str, tmp_path: Path) -> None:
    data = Data([100], [100])
    reader = data.reader(tmp_path)
    asyncio.run(reader.ensure(0))
    with pytest.raises(DataError, match=said):
        reader.batch(Reading(token_shard=shard, sequences=(0, sequence)))
