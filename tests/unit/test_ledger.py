"""The ledger: what was acknowledged is found again, what was torn is cut, what is damaged is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.p2p.chunk_store import ChunkStore
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.paxos import Acceptor
from swarm import digest
from swarm.errors import DigestError, DiskFull, EarlierVersion, NotFound, ProtocolError
from swarm.identity import Identity
from swarm.log import VOTE_CONTEXT, LogHead, genesis_head, next_head
from swarm.proto.common_pb2 import Genesis, ShardGenesis
from swarm.proto.round_pb2 import Ballot, Commit, PartResult, Record, Share, Vote
from tests.signed_averages import sign_averages
from tests.unit.test_shard import SPEC, make_shard

VOTER = Identity(b"v" * 32)
RUN_ID = b"r" * 20
SHARD = make_shard()
GENESIS = Genesis(
    run_id=RUN_ID,
    voters=[VOTER.public_key],
    shards=[ShardGenesis(state_digest=SHARD.state_digest, num_values=SHARD.num_values)],
)


def open_ledger(folder: Path, *, archive: bool = False) -> Ledger:
    chunks = ChunkStore(folder / "chunks", 1 << 28)
    return Ledger(folder / "shard-0", genesis_head(GENESIS, 0), chunks, LedgerOptions(archive=archive))


def commit_after(
    head: LogHead, data: bytes, state_digest: bytes = SHARD.state_digest, *, signed: bool = True
) -> tuple[Commit, LogHead]:
    record = Record(
        shard=0,
        round=head.round + 1,
        log_digest=head.log_digest,
        state_digest=state_digest,
        parts=[
            PartResult(
                num_slices=1,
                digest=digest.sha256(data),
                size_bytes=len(data),
                shares=[Share(peer_key=b"p" * 32, weight_tokens=5)],
            )
        ],
        next_voters=[VOTER.public_key],
        total_tokens=head.total_tokens + 5,
        codec="int8",
    )
    if signed:
        sign_averages(record, RUN_ID)
    raw = record.SerializeToString()
    vote = Vote(
        shard=0,
        round=record.round,
        ballot=Ballot(number=1, leader=VOTER.public_key),
        record_digest=digest.sha256(raw),
    )
    commit = Commit(record=raw, votes=[VOTER.sign(VOTE_CONTEXT, RUN_ID, vote.SerializeToString())])
    return commit, next_head(head, raw, record)


def fill(ledger: Ledger, rounds: int) -> None:
    for _ in range(rounds):
        data = f"average of {ledger.head.round}".encode()
        commit, head = commit_after(ledger.head, data)
        ledger.append(commit, head, {digest.sha256(data): data})


def test_the_log_is_found_again_with_its_parts(tmp_path: Path) -> None:
    fill(open_ledger(tmp_path), 3)
    ledger = open_ledger(tmp_path)
    assert ledger.head.round == 3 and ledger.head.total_tokens == 15
    commits = ledger.commits(2, 10)
    assert len(commits) == 2
    record = Record.FromString(commits[0].record)
    assert list(ledger.parts_of(record).values()) == [b"average of 1"]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_tail_is_cut_and_the_log_goes_on(tmp_path: Path, cut: int) -> None:
    fill(open_ledger(tmp_path), 3)
    log = tmp_path / "shard-0" / "log"
    log.write_bytes(log.read_bytes()[:-cut])
    ledger = open_ledger(tmp_path)
    assert ledger.head.round == 2
    fill(ledger, 2)
    assert open_ledger(tmp_path).head.round == 4


def test_a_flipped_byte_in_the_log_is_not_believed(tmp_path: Path) -> None:
    fill(open_ledger(tmp_path), 3)
    log = tmp_path / "shard-0" / "log"
    raw = bytearray(log.read_bytes())
    raw[len(raw) // 2] ^= 1
    log.write_bytes(raw)
    with pytest.raises(DigestError, match="damaged"):
        open_ledger(tmp_path)


def test_a_log_of_an_earlier_version_is_told_by_its_version_and_what_can_be_done(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    fill(ledger, 1)
    commit, head = commit_after(ledger.head, b"an average", signed=False)
    ledger.append(commit, head, {})
    with pytest.raises(EarlierVersion) as refused:
        open_ledger(tmp_path)
    assert f"round 2 in {tmp_path / 'shard-0' / 'log'} was written by version 1" in str(refused.value)
    assert "program that wrote it" in refused.value.advice and "--from" in refused.value.advice


def test_a_vote_survives_a_restart_and_belongs_to_its_round(tmp_path: Path) -> None:
    cast = Acceptor(promised=(3, b"l" * 32), accepted=(2, b"k" * 32), record=Record(round=4).SerializeToString())
    open_ledger(tmp_path).save_acceptor(4, cast, {})
    ledger = open_ledger(tmp_path)
    assert ledger.load_acceptor(4) == cast
    assert ledger.load_acceptor(5) == Acceptor()


def test_a_vote_is_never_replaced_by_one_of_an_earlier_round(tmp_path: Path) -> None:
    cast = Acceptor(promised=(3, b"l" * 32))
    open_ledger(tmp_path).save_acceptor(7, cast, {})
    ledger = open_ledger(tmp_path)
    with pytest.raises(ProtocolError, match="round 5"):
        ledger.save_acceptor(5, Acceptor(promised=(9, b"h" * 32)), {})
    assert open_ledger(tmp_path).load_acceptor(7) == cast


def test_nobody_votes_in_a_round_that_the_log_already_holds(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    fill(ledger, 3)
    with pytest.raises(ProtocolError, match="over"):
        ledger.save_acceptor(3, Acceptor(promised=(1, b"l" * 32)), {})


def test_an_archive_that_reached_its_disk_limit_gives_up_its_oldest_rounds(tmp_path: Path) -> None:
    chunks = ChunkStore(tmp_path / "chunks", 10_000)
    ledger = Ledger(tmp_path / "shard-0", genesis_head(GENESIS, 0), chunks, LedgerOptions(archive=True))
    for number in range(20):
        data = bytes([number]) * 1000
        commit, head = commit_after(ledger.head, data)
        ledger.append(commit, head, {digest.sha256(data): data})
    assert ledger.head.round == 20
    assert chunks.has(digest.sha256(bytes([19]) * 1000)) and not chunks.has(digest.sha256(bytes([0]) * 1000))


STATE_BYTES = sum(map(len, SHARD.state_bytes()))
PART_BYTES = STATE_BYTES // 8


def full_archive(folder: Path) -> tuple[Ledger, ChunkStore]:
    """Room for a state, and averages of twelve rounds in all of it."""
    chunks = ChunkStore(folder / "chunks", STATE_BYTES + 4 * PART_BYTES)
    ledger = Ledger(folder / "shard-0", genesis_head(GENESIS, 0), chunks, LedgerOptions(archive=True))
    for number in range(12):
        commit, head = commit_after(ledger.head, bytes([number]) * PART_BYTES)
        ledger.append(commit, head, {part_of(number): bytes([number]) * PART_BYTES})
    assert not ledger.lacking(1)
    return ledger, chunks


def part_of(number: int) -> bytes:
    return digest.sha256(bytes([number]) * PART_BYTES)


def test_a_full_archive_gives_up_its_oldest_rounds_for_the_state_that_a_round_writes(tmp_path: Path) -> None:
    ledger, chunks = full_archive(tmp_path)
    ledger.save_state(12, SHARD)
    assert ledger.read_state(12, SHARD.num_values) is not None
    assert [chunks.has(part_of(number)) for number in (0, 11)] == [False, True]


def test_a_full_archive_gives_up_its_oldest_rounds_for_a_vote(tmp_path: Path) -> None:
    ledger, chunks = full_archive(tmp_path)
    average = b"a" * PART_BYTES
    accepted(ledger, average)
    assert chunks.get(digest.sha256(average)) == average
    assert [chunks.has(part_of(number)) for number in (0, 11)] == [False, True]


def test_a_state_that_finds_no_room_leaves_none_of_its_bytes_pinned(tmp_path: Path) -> None:
    chunks = ChunkStore(tmp_path / "chunks", STATE_BYTES - 1)
    ledger = Ledger(tmp_path / "shard-0", genesis_head(GENESIS, 0), chunks, LedgerOptions())
    with pytest.raises(DiskFull):
        ledger.save_state(0, SHARD)
    assert chunks.room_bytes() == STATE_BYTES - 1 and not ledger.offer_state().anchor_chunks


SMALL_DISK_BYTES = 10_000


def small_ledger(folder: Path) -> tuple[Ledger, ChunkStore]:
    chunks = ChunkStore(folder / "chunks", SMALL_DISK_BYTES)
    return Ledger(folder / "shard-0", genesis_head(GENESIS, 0), chunks, LedgerOptions()), chunks


def crowd(chunks: ChunkStore, first: int) -> None:
    """Twice as many bytes as the disk limit allows."""
    for number in range(first, first + 20):
        chunks.put(bytes([number]) * 1000)


def accepted(ledger: Ledger, data: bytes) -> Acceptor:
    """An acceptance of the next round that names ``data``, made durable."""
    commit, _ = commit_after(ledger.head, data)
    acceptor = Acceptor(promised=(1, b"l" * 32), accepted=(1, b"l" * 32), record=commit.record)
    ledger.save_acceptor(ledger.head.round + 1, acceptor, {digest.sha256(data): data})
    return acceptor


def test_bytes_that_an_acceptance_needs_are_not_evicted_before_or_after_a_restart(tmp_path: Path) -> None:
    """A later leader that adopts the record finds them here, however much else was stored meanwhile."""
    data = b"average" * 100
    ledger, chunks = small_ledger(tmp_path)
    accepted(ledger, data)
    crowd(chunks, 0)
    assert chunks.get(digest.sha256(data)) == data
    ledger, chunks = small_ledger(tmp_path)
    crowd(chunks, 100)
    assert chunks.get(digest.sha256(data)) == data
    assert ledger.load_acceptor(1).record


def test_a_later_promise_leaves_the_bytes_of_an_earlier_acceptance_pinned(tmp_path: Path) -> None:
    data = b"average" * 100
    ledger, chunks = small_ledger(tmp_path)
    promise = accepted(ledger, data).promise((9, b"m" * 32))
    assert promise is not None
    ledger.save_acceptor(1, promise, {})
    crowd(chunks, 0)
    assert chunks.get(digest.sha256(data)) == data


def test_bytes_of_an_acceptance_that_lost_make_room_once_its_round_is_decided(tmp_path: Path) -> None:
    data, other = b"average" * 100, b"another" * 100
    ledger, chunks = small_ledger(tmp_path)
    accepted(ledger, data)
    commit, head = commit_after(ledger.head, other)
    ledger.append(commit, head, {digest.sha256(other): other})
    crowd(chunks, 0)
    assert not chunks.has(digest.sha256(data)) and chunks.has(digest.sha256(other))


def test_a_damaged_vote_is_an_error_and_never_a_fresh_vote(tmp_path: Path) -> None:
    open_ledger(tmp_path).save_acceptor(4, Acceptor(promised=(3, b"l" * 32)), {})
    path = tmp_path / "shard-0" / "acceptor"
    path.write_bytes(path.read_bytes().replace(b"3", b"4", 1))
    with pytest.raises(DigestError, match="damaged"):
        open_ledger(tmp_path).load_acceptor(4)


def test_only_a_state_that_the_log_proves_is_offered(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    assert not ledger.offer_state().anchor_chunks
    ledger.save_state(0, SHARD)
    assert ledger.offer_state().round == 0 and ledger.offer_state().anchor_chunks
    fill(ledger, 2)
    ledger.save_state(2, SHARD)
    assert ledger.offer_state().round == 0, "no commit names the digest of the state after round 2 yet"
    fill(ledger, 1)
    assert ledger.offer_state().round == 2


def test_a_state_is_found_again_and_one_with_a_damaged_chunk_is_passed_over(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.save_state(0, SHARD)
    fill(ledger, 4)
    later = make_shard(seed=9)
    ledger.save_state(4, later)
    found = open_ledger(tmp_path).load_state(SPEC, 0, SHARD.num_values)
    assert found is not None and found[0].round == 4 and found[1].state_digest == later.state_digest
    chunk = later.chunk_digests()[0][0].hex()
    path = tmp_path / "chunks" / chunk[:2] / chunk
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    found = open_ledger(tmp_path).load_state(SPEC, 0, SHARD.num_values)
    assert found is not None and found[0].round == 0, "the older state is whole"


def test_a_part_that_is_gone_is_named(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    commit, head = commit_after(ledger.head, b"never stored")
    ledger.append(commit, head, {})
    with pytest.raises(NotFound, match="round 1"):
        ledger.parts_of(Record.FromString(commit.record))


# ---- another branch -------------------------------------------------------------------------------------------------


def branch_after(ledger: Ledger, fork_round: int, rounds: int) -> tuple[LogHead, list[tuple[Commit, LogHead]]]:
    """Another log from ``fork_round`` on."""
    fork = head = ledger.heads[fork_round]
    tail = []
    for number in range(rounds):
        commit, head = commit_after(head, b"branch %d" % number)
        tail.append((commit, head))
    return fork, tail


def test_a_tail_is_replaced_and_found_again(tmp_path: Path) -> None:
    """Commits from the fork on are the branch's, and the vote and the states of what was given up are gone."""
    ledger = open_ledger(tmp_path)
    fill(ledger, 6)
    ledger.save_state(3, SHARD)
    ledger.save_state(6, SHARD)
    ledger.save_acceptor(7, Acceptor(promised=(3, b"l" * 32)), {})
    fork, tail = branch_after(ledger, 4, 5)
    ledger.replace_tail(fork, tail)
    for found in (ledger, open_ledger(tmp_path)):
        assert found.head == tail[-1][1] and found.head.round == 9
        assert found.commits(5, 100) == [commit for commit, _ in tail]
        assert len(found.commits(1, 4)) == 4
        assert found.load_acceptor(7) == found.load_acceptor(10) == Acceptor()
        assert found.offer_state().round == 3 and not found.offer_state(6).anchor_chunks
    ledger.save_acceptor(10, Acceptor(promised=(1, b"l" * 32)), {})
    commit, head = commit_after(ledger.head, b"next")
    ledger.append(commit, head, {})
    assert open_ledger(tmp_path).head == head


@pytest.mark.parametrize("fork_round", [0, 3, 6])
def test_a_branch_may_be_shorter_and_leave_anywhere(tmp_path: Path, fork_round: int) -> None:
    ledger = open_ledger(tmp_path)
    fill(ledger, 6)
    fork, tail = branch_after(ledger, fork_round, 2)
    ledger.replace_tail(fork, tail)
    assert open_ledger(tmp_path).heads == ledger.heads and ledger.head.round == fork_round + 2


@pytest.mark.parametrize("moment", ["before the log", "after the log"])
def test_a_crash_while_a_tail_is_replaced_leaves_one_log_and_the_vote_that_belongs_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """With the old log the vote still binds; with the new one it is nobody's."""
    cast = Acceptor(promised=(3, b"l" * 32))
    ledger = open_ledger(tmp_path)
    fill(ledger, 6)
    ledger.save_state(6, SHARD)
    ledger.save_acceptor(7, cast, {})
    fork, tail = branch_after(ledger, 4, 5)

    def crash(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if moment == "before the log":
            patched.setattr("peer.rounds.ledger.write_durably", crash)
        else:
            patched.setattr(Path, "unlink", lambda self, **_: crash() if self.name == "acceptor" else None)
        with pytest.raises(KeyboardInterrupt):
            ledger.replace_tail(fork, tail)
    found = open_ledger(tmp_path)
    assert (found.head.round, found.load_acceptor(7)) == ((6, cast) if moment == "before the log" else (9, Acceptor()))


def test_the_state_of_a_fork_is_kept_for_those_who_may_ask(tmp_path: Path) -> None:
    """However many rounds the branch goes on, and after a restart."""
    head = LogHead(
        run_id=RUN_ID,
        shard=0,
        round=0,
        log_digest=digest.log_genesis(RUN_ID, 0),
        voters=(VOTER.public_key, b"x" * 32, b"y" * 32),
        total_tokens=0,
    )
    ledger = Ledger(tmp_path / "shard-0", head, ChunkStore(tmp_path / "chunks", 1 << 28), LedgerOptions())
    ledger.save_state(0, SHARD)
    commit, after = commit_after(head, b"branch")
    vote = Vote.FromString(commit.votes[0].payload)
    vote.gone.extend([b"x" * 32, b"y" * 32])
    signed = VOTER.sign(VOTE_CONTEXT, RUN_ID, vote.SerializeToString())
    ledger.append(Commit(record=commit.record, votes=[signed]), after, {})
    fill(ledger, 9)
    for number in (2, 4, 6, 8):
        ledger.save_state(number, SHARD)
    found = Ledger(tmp_path / "shard-0", head, ChunkStore(tmp_path / "chunks", 1 << 28), LedgerOptions())
    for number in (10, 12):
        found.save_state(number, SHARD)
    assert found.read_state(0, SHARD.num_values) is not None
    assert found.read_state(4, SHARD.num_values) is None
