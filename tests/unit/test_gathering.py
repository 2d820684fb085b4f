"""Copies of all shards after one round: whole once the last has come, and dropped when one can no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peer.checkpoints.gathering import MAX_ROUNDS, Gathering
from peer.rounds.shard import Shard
from swarm.log import LogHead
from tests.unit.small_models import small_spec

SPEC = small_spec("llama")
SIZES = (300, 500)


def shard(index: int, value: float) -> Shard:
    return Shard(SPEC, index, np.full(SIZES[index], value, np.float32))


def head(index: int, number: int) -> LogHead:
    return LogHead(
        run_id=b"r" * 20,
        shard=index,
        round=number,
        log_digest=bytes([index, number]) * 16,
        voters=(b"v" * 32,),
        total_tokens=1000 * number + index,
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_model_of_a_round_is_its_shards_one_after_the_other(tmp_path: Path, order: tuple[int, int]) -> None:
    """As they stood then, whatever they did since; and no file is left."""
    gathering, shards = Gathering(tmp_path, SIZES), [shard(0, 1), shard(1, 2)]
    first, last = order
    assert gathering.add(head(first, 5), shards[first]) is None and gathering.rounds == (5,)
    shards[first].anchor += 10
    copy = gathering.add(head(last, 5), shards[last])
    shards[last].anchor += 10
    assert copy is not None and (copy.round, copy.total_tokens) == (5, 5000)
    np.testing.assert_array_equal(copy.anchor, np.repeat(np.float32([1, 2]), SIZES))
    assert [state.log_digest for state in copy.states] == [head(index, 5).log_digest for index in (0, 1)]
    assert [state.state_digest for state in copy.states] == [shard.state_digest for shard in shards]
    copy.anchor[0] = 7  # whoever reads it may write: it is theirs alone
    assert gathering.rounds == () and list(tmp_path.iterdir()) == []


def test_a_round_that_a_shard_passed_without_a_copy_is_dropped(tmp_path: Path) -> None:
    gathering = Gathering(tmp_path, SIZES)
    gathering.add(head(0, 5), shard(0, 1))
    gathering.add(head(0, 6), shard(0, 1))
    assert gathering.rounds == (5, 6)
    assert gathering.add(head(1, 6), shard(1, 1)) is not None
    assert gathering.rounds == (), "shard 1 never comes to round 5 any more"


def test_a_copy_of_another_branch_takes_the_place_of_the_first(tmp_path: Path) -> None:
    gathering = Gathering(tmp_path, SIZES)
    gathering.add(head(0, 5), shard(0, 1))
    gathering.add(head(0, 5), shard(0, 3))
    copy = gathering.add(head(1, 5), shard(1, 2))
    assert copy is not None and copy.anchor[0] == 3
    assert copy.states[0].state_digest == shard(0, 3).state_digest


def test_copies_that_wait_are_few(tmp_path: Path) -> None:
    gathering = Gathering(tmp_path, SIZES)
    for number in range(1, 10):
        gathering.add(head(0, number), shard(0, number))
    assert gathering.rounds == tuple(range(10 - MAX_ROUNDS, 10))
    copy = gathering.add(head(1, 9), shard(1, 0))
    assert copy is not None and copy.anchor[0] == 9


def test_a_round_that_is_forgotten_begins_anew(tmp_path: Path) -> None:
    gathering = Gathering(tmp_path, SIZES)
    gathering.add(head(0, 5), shard(0, 1))
    for number in (5, 6):
        gathering.forget(number)
    assert gathering.rounds == ()
    assert gathering.add(head(1, 5), shard(1, 2)) is None, "shard 0 is not there any more"
    gathering.forget(5)
