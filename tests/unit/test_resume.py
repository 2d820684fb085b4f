"""A restarted replica: it applies what lies on its disk, and owes what it owed, less what commits took since."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from peer import joining, starting
from peer.rounds import resume
from peer.rounds.blocks import Blocks
from peer.rounds.ledger import Ledger
from peer.rounds.planning import SLICE_VALUES
from peer.rounds.shard import Shard
from swarm import digest
from swarm.log import LogHead, next_head
from swarm.proto.round_pb2 import Ballot, Commit, PartResult, Record, Rejection, Share, Vote
from swarm.run_spec import Checkpoints
from tests.signed_averages import sign_averages
from tests.unit.test_ledger import RUN_ID, VOTE_CONTEXT, VOTER, open_ledger
from tests.unit.test_shard import ALL, NUM_VALUES, SPEC, make_shard, moved

ME, OTHER = b"m" * 32, b"p" * 32
SLICES = -(-NUM_VALUES // SLICE_VALUES)


def owing(shard: Shard, seed: int = 1) -> Shard:
    shard.feedback = Blocks(NUM_VALUES)
    shard.feedback.write(ALL, moved(shard, seed), 1)
    return shard


def commit(
    ledger: Ledger, shard: Shard, counted: bytes = OTHER, *, rejected: bytes = b"", keeps_parts: bool = True
) -> LogHead:
    """A round whose first part (one slice) counts ``counted`` and whose second counts nobody we know."""
    codec, parts, results = shard.codec, {}, []
    for first, count, key in ((0, 1, counted), (1, SLICES - 1, OTHER)):
        values = min(count * SLICE_VALUES, NUM_VALUES - first * SLICE_VALUES)
        data = codec.encode(np.full(values, 0.01 * (ledger.head.round + 1), np.float32))
        share = Share(peer_key=key, weight_tokens=5, norm=1e6)
        result = PartResult(first_slice=first, num_slices=count, size_bytes=len(data), shares=[share])
        if rejected and not first:
            result.rejections.append(Rejection(peer_key=rejected, cosine=-0.5, min_cosine=0.1))
        result.digest = digest.sha256(data)
        parts[result.digest] = data
        results.append(result)
    head = ledger.head
    record = Record(
        shard=0,
        round=head.round + 1,
        log_digest=head.log_digest,
        state_digest=shard.state_digest,
        parts=results,
        next_voters=[VOTER.public_key],
        total_tokens=head.total_tokens + (5 if counted == OTHER else 10),
        codec=codec.name,
    )
    sign_averages(record, RUN_ID)
    raw = record.SerializeToString()
    vote = Vote(round=record.round, ballot=Ballot(number=1, leader=VOTER.public_key), record_digest=digest.sha256(raw))
    signed = VOTER.sign(VOTE_CONTEXT, RUN_ID, vote.SerializeToString())
    after = next_head(head, raw, record)
    ledger.append(Commit(record=raw, votes=[signed]), after, parts if keeps_parts else {})
    shard.apply(record, parts)
    return after


def restarted(folder: Path, head: LogHead) -> tuple[LogHead, Shard]:
    """A process that finds the state of the beginning, and what else lies on its disk."""
    shard, seen = make_shard(), list[int]()
    found = resume.resume(open_ledger(folder), head, shard, ME, lambda head, _: seen.append(head.round))
    assert seen == list(range(head.round, found.round + 1)), "every state on the way is seen"
    return found, shard


def test_what_was_owed_is_owed_after_a_restart(tmp_path: Path) -> None:
    ledger, shard = open_ledger(tmp_path), owing(make_shard())
    resume.save(ledger, ledger.head, shard)
    head, again = restarted(tmp_path, ledger.head)
    assert head == ledger.head
    assert again.feedback is not None and shard.feedback is not None
    assert again.feedback.data.tobytes() == shard.feedback.data.tobytes()


def test_rounds_on_the_disk_are_applied_before_training_begins(tmp_path: Path) -> None:
    """And what is owed is that of the round up to which it was booked."""
    ledger, shard = open_ledger(tmp_path), make_shard()
    genesis = ledger.head
    for seed in range(3):
        head = commit(ledger, shard)
        resume.save(ledger, head, owing(shard, seed))
    found, again = restarted(tmp_path, genesis)
    assert found == head and again.state_digest == shard.state_digest
    assert again.owed(ALL).tobytes() == shard.owed(ALL).tobytes()


def test_what_a_commit_took_since_is_not_owed_again(tmp_path: Path) -> None:
    """A crash between a commit and the booking: its parts that counted us took what was offered, the others nothing."""
    ledger, shard = open_ledger(tmp_path), owing(make_shard())
    genesis = ledger.head
    resume.save(ledger, genesis, shard)
    commit(ledger, shard, counted=ME)
    _, again = restarted(tmp_path, genesis)
    assert not again.owed(ALL)[:SLICE_VALUES].any()
    assert np.array_equal(again.owed(ALL)[SLICE_VALUES:], shard.owed(ALL)[SLICE_VALUES:])


def test_what_a_reducer_rejected_is_not_owed_again_either(tmp_path: Path) -> None:
    """A rejected contribution is discarded; a restart must not bring it back."""
    ledger, shard = open_ledger(tmp_path), owing(make_shard())
    genesis = ledger.head
    resume.save(ledger, genesis, shard)
    commit(ledger, shard, rejected=ME)
    _, again = restarted(tmp_path, genesis)
    assert not again.owed(ALL)[:SLICE_VALUES].any() and again.owed(ALL)[SLICE_VALUES:].any()


def test_a_round_whose_averages_are_not_here_is_left_to_the_exchange(tmp_path: Path) -> None:
    """Which fetches them; what was owed after it cannot be owed before it."""
    ledger, shard = open_ledger(tmp_path), make_shard()
    genesis = ledger.head
    first = commit(ledger, shard)
    last = commit(ledger, shard, keeps_parts=False)
    resume.save(ledger, last, owing(shard))
    found, again = restarted(tmp_path, genesis)
    assert found == first and again.feedback is None


@pytest.mark.parametrize("damage", ["a byte", "a size", "nothing there", "another log"])
def test_a_file_that_cannot_be_ours_is_forgotten(tmp_path: Path, damage: str) -> None:
    """What is owed is a replica's own affair: it goes on without."""
    ledger = open_ledger(tmp_path)
    resume.save(ledger, ledger.head, owing(make_shard()))
    path = ledger.folder / "debt"
    raw = bytearray(path.read_bytes())
    if damage == "nothing there":
        path.unlink()
    else:
        raw[{"a byte": -1, "a size": 0, "another log": 8}[damage]] ^= 1
        path.write_bytes(raw[:-1] if damage == "a size" else raw)
    assert restarted(tmp_path, ledger.head)[1].feedback is None


def test_a_peer_that_never_owed_writes_nothing(tmp_path: Path) -> None:
    """A seed peer, say."""
    ledger = open_ledger(tmp_path)
    resume.save(ledger, ledger.head, make_shard())
    assert not (ledger.folder / "debt").exists()


def test_checkpoints_of_rounds_on_the_disk_are_due_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash may have come between a checkpoint's round and the checkpoint, and rounds after it lie here already."""
    ledger, shard = open_ledger(tmp_path), make_shard()
    genesis, digests = ledger.head, [shard.state_digest]
    for _ in range(5):
        commit(ledger, shard)
        digests.append(shard.state_digest)

    async def from_the_beginning(joined: Any, number: int) -> tuple[LogHead, Shard]:
        return genesis, make_shard()

    monkeypatch.setattr(starting, "_starting_state", from_the_beginning)
    spec = SPEC.model_copy(update={"checkpoints": Checkpoints(every_rounds=2), "total_tokens": 1000})
    identity = SimpleNamespace(public_key=ME)
    options = SimpleNamespace(trains=False)
    run = SimpleNamespace(spec=spec)
    joined: Any = SimpleNamespace(run=run, ledgers=(ledger,), folder=tmp_path, identity=identity, options=options)
    joined.is_checkpoint_round = functools.partial(joining.Joined.is_checkpoint_round, joined)
    start = asyncio.run(starting.find_start(joined))
    assert start.shards[0].head == ledger.head and start.shards[0].shard.state_digest == shard.state_digest
    assert [(copy.round, copy.states[0].state_digest) for copy in start.due] == [
        (2, digests[2]),
        (4, digests[4]),
    ]
    assert not np.array_equal(start.due[0].anchor, start.due[1].anchor), "each is of its own round"
