"""What a peer reads: anybody computes the same, in range, and no sequence twice before the token shard is used up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.assignment import reading, token_shard_of
from swarm.errors import DataError

SEEDS = st.integers(0, 2**63 - 1)
KEYS = st.binary(min_size=32, max_size=32)
ROUNDS = st.integers(1, 2**40)
SHARDS = st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any)


@given(SEEDS, KEYS, ROUNDS, st.integers(0, 10_000), SHARDS, st.integers(1, 16))
def test_a_reading_is_a_pure_function_and_in_range(
    seed: int, key: bytes, round_number: int, step: int, shards: list[int], batch: int
) -> None:
    found = reading(seed, key, round_number, step, shards, batch)
    assert found == reading(seed, key, round_number, step, tuple(shards), batch)
    assert found.token_shard == token_shard_of(seed, key, round_number, shards)
    assert len(found.sequences) == batch
    assert all(0 <= sequence < shards[found.token_shard] for sequence in found.sequences)


@given(SEEDS, KEYS, ROUNDS, SHARDS, st.integers(1, 16))
def test_a_token_shard_is_read_without_replacement_until_it_is_used_up(
    seed: int, key: bytes, round_number: int, shards: list[int], batch: int
) -> None:
    count = shards[token_shard_of(seed, key, round_number, shards)]
    steps = -(-count // batch)
    drawn = [s for step in range(steps) for s in reading(seed, key, round_number, step, shards, batch).sequences]
    assert sorted(drawn[:count]) == list(range(count))


def test_peers_and_rounds_and_seeds_read_differently() -> None:
    shards = [1000] * 10
    drawn = {
        reading(seed, bytes([peer] * 32), round_number, 0, shards, 4)
        for seed in range(3)
        for peer in range(10)
        for round_number in range(1, 11)
    }
    assert len(drawn) == 300


def test_token_shards_are_drawn_in_proportion_to_their_sequences_and_empty_ones_never() -> None:
    shards = [0, 100, 0, 300, 0]
    drawn = [token_shard_of(7, b"k" * 32, round_number, shards) for round_number in range(2000)]
    assert set(drawn) == {1, 3}
    assert 0.70 < drawn.count(3) / len(drawn) < 0.80


@pytest.mark.parametrize("shards", [[], [0], [0, 0]], ids=["none", "an empty one", "only empty ones"])
def test_data_without_a_whole_sequence_is_refused(shards: list[int]) -> None:
    with pytest.raises(DataError, match="no token shard holds a whole sequence"):
        reading(0, b"k" * 32, 1, 0, shards, 1)
