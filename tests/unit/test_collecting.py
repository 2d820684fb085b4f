"""An auditor without an archive fetches one from seed peers: what is proven is kept, what nobody has is told."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peer.checkpoints import collecting
from peer.checkpoints.audit import AuditReport, audit
from peer.checkpoints.collecting import Sources, collect
from peer.checkpoints.verify import verify_folder
from peer.p2p.chunk_store import CHUNK_METHOD, ChunkStore
from peer.rounds import catch_up
from peer.rounds import momenta as momenta_module
from peer.rounds.archive import Archive, momentum_path
from peer.rounds.catch_up import LOG_METHOD, STATE_METHOD
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.momenta import Momenta
from swarm import digest
from swarm.errors import Busy, DeadlineExceeded, DiskFull, NotFound, Unreachable
from swarm.file_ranges import FileRange
from swarm.log import genesis_head
from swarm.proto.common_pb2 import Signed
from swarm.proto.round_pb2 import LogReply, LogRequest, StateReply, StateRequest
from tests.checkpoint_samples import FakeTransport
from tests.unit.test_audit import Run

DONOR = b"d" * 32
OPTIONS = LedgerOptions(archive=True)


class Donor(FakeTransport):
    """A seed peer with the archive of ``run``; ``asked`` counts its answers by method."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.asked: list[str] = []
        self.archive = Archive(run.archive, run.parts.spec)
        self.chunks = ChunkStore(run.archive / "chunks", 1 << 30)
        self.momenta = Momenta(run.archive)
        self.chunks.add_source(self.momenta)
        self.ledgers = [
            Ledger(run.archive / f"shard-{n}", genesis_head(self.archive.genesis, n), self.chunks, OPTIONS)
            for n in range(run.num_shards)
        ]

    async def call(self, peer: bytes, method: str, request: bytes, **_limits: Any) -> bytes:
        if peer != DONOR:
            raise Unreachable("no such peer")
        self.asked.append(method)
        if method == LOG_METHOD:
            wanted = LogRequest.FromString(request)
            commits = self.ledgers[wanted.shard].commits(wanted.first_round, wanted.max_commits)
            return LogReply(commits=commits).SerializeToString()
        if method == STATE_METHOD:
            state = StateRequest.FromString(request)
            if state.momentum:
                return self.momenta.offer(state.after_round, state.shard).SerializeToString()
            return self.ledgers[state.shard].offer_state(state.after_round, state.first).SerializeToString()
        assert method == CHUNK_METHOD
        return await self.chunks.handle_chunk(b"", request)


@pytest.fixture(params=[1, 2], ids=["one shard", "two shards"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return Run(tmp_path, num_shards=request.param).make()


def fetch(
    donor: Donor,
    folder: Path,
    last_round: int = 6,
    on_round: Callable[[], object] = lambda: None,
    first_round: int = 0,
) -> AuditReport:
    """What an audit of the checkpoint finds in the archive that ``donor`` gave."""
    parts = donor.run.parts
    sources = Sources(
        transport=donor,
        holders=[b"nobody there".ljust(32), DONOR],
        spec=parts.spec,
        genesis=donor.archive.genesis,
        signed_genesis=Signed.FromString((donor.run.archive / "genesis.sig").read_bytes()),
    )
    earlier = donor.run.checkpoint(first_round)
    start = (earlier, verify_folder(earlier, None).provenance) if first_round else None
    archive = asyncio.run(collect(sources, folder, last_round, start and start[1].manifest, on_round))
    return audit(archive, verify_folder(donor.run.checkpoint(last_round), None).provenance, start)


def test_what_seed_peers_gave_is_audited_as_their_own_folder_is(run: Run, tmp_path: Path) -> None:
    rounds: list[None] = []
    report = fetch(Donor(run), tmp_path / "fetched", 4, lambda: rounds.append(None))
    assert (report.outcome, report.equal_to, len(rounds)) == ("equal", 4, 4 * run.num_shards)


def test_a_second_audit_fetches_only_what_is_new(run: Run, tmp_path: Path) -> None:
    fetch(Donor(run), tmp_path / "fetched", 4)
    later = Donor(run)
    assert fetch(later, tmp_path / "fetched", 6).outcome == "equal"
    assert later.asked == [CHUNK_METHOD] * 2 * run.num_shards  # the averages of two rounds; the log was there


def test_an_average_that_nobody_has_any_more_is_told_by_the_audit(tmp_path: Path) -> None:
    run = Run(tmp_path).make()
    run.average_of(3).unlink()
    report = fetch(Donor(run), tmp_path / "fetched")
    assert (report.outcome, report.missing) == ("missing", (3, 3))


def test_a_log_or_first_state_that_nobody_has_ends_the_audit_by_name(tmp_path: Path) -> None:
    run = Run(tmp_path).make()
    with pytest.raises(NotFound, match="up to round 6 only"):
        fetch(Donor(run), tmp_path / "fetched", 7)
    donor = Donor(run)
    donor.ledgers[0]._drop_state(0)
    with pytest.raises(NotFound, match="state of round 0"):
        fetch(donor, tmp_path / "other")


def test_averages_that_do_not_fit_on_the_disk_are_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path).make()
    monkeypatch.setattr(collecting.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    donor = Donor(run)
    with pytest.raises(DiskFull, match="re-applies take"):
        fetch(donor, tmp_path / "fetched")
    assert CHUNK_METHOD not in donor.asked


# ---- from an earlier checkpoint on ----------------------------------------------------------------------------------


def test_an_audit_from_an_earlier_checkpoint_fetches_its_momentum_and_only_the_rounds_after_it(
    run: Run, tmp_path: Path
) -> None:
    rounds: list[None] = []
    donor = Donor(run)
    for number in (1, 2):
        for shard in range(run.num_shards):
            run.average_of(number, shard).unlink()
    report = fetch(donor, tmp_path / "fetched", 6, lambda: rounds.append(None), first_round=2)
    assert (report.outcome, report.from_round, report.equal_to) == ("equal", 2, 6)
    assert len(rounds) == 4 * run.num_shards
    again = Donor(run)
    assert fetch(again, tmp_path / "fetched", 6, first_round=2).outcome == "equal"
    assert again.asked == []


def test_momentum_that_nobody_kept_or_that_is_not_the_checkpoints_is_told_by_name(tmp_path: Path) -> None:
    run = Run(tmp_path).make()
    path = momentum_path(run.archive, 2)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(NotFound, match="momentum after round 2"):
        fetch(Donor(run), tmp_path / "one", first_round=2)
    path.unlink()
    with pytest.raises(NotFound, match="momentum after round 2"):
        fetch(Donor(run), tmp_path / "two", first_round=2)
    assert not momentum_path(tmp_path / "one", 2).exists()


def test_momentum_on_this_disk_that_went_bad_is_fetched_again(tmp_path: Path) -> None:
    run = Run(tmp_path).make()
    fetch(Donor(run), tmp_path / "fetched", first_round=2)
    momentum_path(tmp_path / "fetched", 2).write_bytes(b"torn")
    assert fetch(Donor(run), tmp_path / "fetched", first_round=2).outcome == "equal"


def test_momentum_of_a_branch_that_was_given_up_is_not_offered_once_another_lies_there(tmp_path: Path) -> None:
    path, momenta = momentum_path(tmp_path, 4), Momenta(tmp_path)
    assert not momenta.offer(4, 0).momentum_chunks
    size_bytes = digest.STATE_CHUNK_BYTES + 5
    for filling in (b"a", b"b"):
        path.write_bytes(filling * size_bytes)
        os.utime(path, ns=(0, ord(filling)))
        chunks = list(momenta.offer(4, 0).momentum_chunks)
        assert chunks == digest.chunk_digests(memoryview(filling * size_bytes))
        assert [momenta(chunk) for chunk in chunks] == [filling * digest.STATE_CHUNK_BYTES, filling * 5]
    path.unlink()
    assert momenta.offer(4, 0) == StateReply() and momenta(chunks[0]) is None


def momenta_of(folder: Path, count: int) -> Momenta:
    for number in range(count):
        momentum_path(folder, number).write_bytes(b"%d" % number)
    return Momenta(folder)


def test_each_momentum_is_read_once_however_many_lie_there_and_is_served_whatever_else_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed peer keeps a hundred checkpoints, of every shard: questions about all of them must cost little."""
    count, reads = 300, list[Path]()
    source, read_range = momenta_of(tmp_path, count), momenta_module.read_range
    monkeypatch.setattr(momenta_module, "read_range", lambda place: [reads.append(place.path), read_range(place)][1])
    first = source.offer(0, 0).momentum_chunks[0]
    for _ in range(2):
        replies = [source.offer(number, 0) for number in range(count)]
    assert len(reads) == count
    assert source(first) == b"0" and source(replies[-1].momentum_chunks[0]) == b"299"


def test_what_is_told_of_a_momentum_goes_with_its_file(tmp_path: Path) -> None:
    source = momenta_of(tmp_path, 3)
    for number in range(2):
        source.offer(number, 0)
    momentum_path(tmp_path, 0).unlink()
    source.offer(2, 0)
    assert list(source._told) == [momentum_path(tmp_path, number) for number in (1, 2)]


def test_who_asks_while_a_momentum_is_read_is_told_so_at_once_unless_theirs_was_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = momenta_of(tmp_path, 3)
    known, read_range, heard = source.offer(0, 0), momenta_module.read_range, list[str]()

    def read(place: FileRange) -> bytes | None:
        assert source.offer(0, 0) == known
        for number in (1, 2):  # the one that is being read, and another
            with pytest.raises(Busy) as caught:
                source.offer(number, 0)
            heard.append(str(caught.value))
        return read_range(place)

    monkeypatch.setattr(momenta_module, "read_range", read)
    assert source.offer(1, 0).momentum_chunks and len(heard) == 2
    monkeypatch.setattr(momenta_module, "read_range", read_range)
    assert source.offer(2, 0).momentum_chunks


def test_an_audit_asks_again_while_the_seed_peer_reads_the_momentum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catch_up, "MOMENTUM_PAUSE_S", 0)
    run = Run(tmp_path).make()
    donor = Donor(run)
    offer, refusals = donor.momenta.offer, [Busy("reads"), DeadlineExceeded("reads still")]

    def reading(round_number: int, shard: int) -> StateReply:
        if refusals:
            raise refusals.pop()
        return offer(round_number, shard)

    monkeypatch.setattr(donor.momenta, "offer", reading)
    assert fetch(donor, tmp_path / "fetched", first_round=2).outcome == "equal" and not refusals
    monkeypatch.setattr(catch_up, "MOMENTUM_WAIT_S", 0)
    refusals.append(Busy("never ends"))
    with pytest.raises(NotFound, match="momentum after round 2"):
        fetch(donor, tmp_path / "other", first_round=2)
