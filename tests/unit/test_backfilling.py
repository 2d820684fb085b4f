"""A seed peer that joined late has the whole archive in the end: fetched slowly, proven, and never twice."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from peer.checkpoints import backfilling
from peer.checkpoints.audit import audit
from peer.checkpoints.backfilling import STATES_TO_COME, Backfill, Late
from peer.checkpoints.verify import verify_folder
from peer.p2p.chunk_store import CHUNK_METHOD, ChunkStore
from peer.p2p.fetch import HolderBook
from peer.rounds import blocks
from peer.rounds.archive import Archive, keep_genesis
from peer.rounds.catch_up import STATE_METHOD, Newcomer, extend_log
from peer.rounds.ledger import Ledger
from swarm.errors import NotFound
from swarm.log import genesis_head
from swarm.proto.common_pb2 import Signed
from swarm.proto.round_pb2 import Commit, PartResult, Record
from tests.unit.test_audit import ROUNDS, Run
from tests.unit.test_collecting import DONOR, OPTIONS, Donor

ROOM = 1 << 30


@pytest.fixture(params=[1, 2], ids=["one shard", "two shards"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return Run(tmp_path, num_shards=request.param).make()


@dataclass
class LateSeed:
    """A seed peer that has the log, and nothing of what came before it joined."""

    donor: Donor
    folder: Path
    room_bytes: int = ROOM
    ledgers: list[Ledger] = field(default_factory=list)
    chunks: ChunkStore = field(init=False)

    def backfill(self, bytes_per_s: float = 1e9) -> Backfill:
        """As after a start: only what is on the disk is known."""
        genesis = self.donor.archive.genesis
        chunks = self.chunks = ChunkStore(self.folder / "chunks", self.room_bytes)
        keep_genesis(self.folder, Signed.FromString((self.donor.run.archive / "genesis.sig").read_bytes()))
        shards = []
        for number, about in enumerate(genesis.shards):
            newcomer = Newcomer(
                transport=self.donor,
                ledger=Ledger(self.folder / f"shard-{number}", genesis_head(genesis, number), chunks, OPTIONS),
                chunks=chunks,
                spec=self.donor.run.parts.spec,
                shard=number,
                genesis_digest=about.state_digest,
                num_values=about.num_values,
                book=HolderBook(random.Random(0)),
            )
            asyncio.run(extend_log(newcomer, DONOR))
            shards.append(Late(newcomer=newcomer, at_rest=asyncio.Lock))
        self.ledgers = [late.newcomer.ledger for late in shards]
        return Backfill(shards, lambda: [b"away".ljust(32), DONOR], bytes_per_s)

    def audit(self) -> str:
        spec = self.donor.run.parts.spec
        return audit(
            Archive(self.folder, spec), verify_folder(self.donor.run.checkpoint(ROUNDS), None).provenance, None
        ).outcome


def test_a_late_archive_is_audited_like_the_first_one(run: Run, tmp_path: Path) -> None:
    late = LateSeed(Donor(run), tmp_path / "late")
    backfill = late.backfill()
    assert backfill.told == ""
    with pytest.raises(NotFound):
        late.audit()
    assert asyncio.run(backfill.look())
    total = ROUNDS * run.num_shards
    assert backfill.told == f"{total} of {total}" and late.audit() == "equal"


def test_a_restarted_seed_peer_fetches_only_what_it_lacks(run: Run, tmp_path: Path) -> None:
    late = LateSeed(Donor(run), tmp_path / "late")
    assert asyncio.run(late.backfill().look())
    donor = late.donor = Donor(run)
    again = late.backfill()
    donor.asked.clear()  # the log, which there was nothing new of
    assert asyncio.run(again.look()) and donor.asked == []


def test_a_false_average_is_not_kept_and_is_asked_for_again(tmp_path: Path) -> None:
    """Nor is the round told as archived; the other rounds are."""

    class Liar(Donor):
        lies = True

        async def call(self, peer: bytes, method: str, request: bytes, **limits: Any) -> bytes:
            answer = await super().call(peer, method, request, **limits)
            return bytes([answer[0] ^ 1]) + answer[1:] if self.lies and method == CHUNK_METHOD else answer

    run = Run(tmp_path).make()
    liar = Liar(run)
    liar.lies = False
    late = LateSeed(liar, tmp_path / "late")
    backfill = late.backfill()
    liar.lies = True
    assert not asyncio.run(backfill.look()) and backfill.told == f"0 of {ROUNDS}"
    liar.lies = False
    assert asyncio.run(late.backfill().look()) and late.audit() == "equal"


def state_bytes(run: Run) -> int:
    """Of all shards."""
    values = [shard.num_values for shard in Donor(run).archive.genesis.shards]
    return sum(4 * count + blocks.size_bytes(count) for count in values)


def test_where_the_disk_is_full_the_oldest_rounds_of_every_shard_stay_away(run: Run, tmp_path: Path) -> None:
    """As in an archive that was there from the beginning; what came later is kept."""
    sizes = sum(run.average_of(1, shard).stat().st_size for shard in range(run.num_shards))
    donor = Donor(run)
    for ledger in donor.ledgers:
        ledger._drop_state(0)
    room_bytes = STATES_TO_COME * state_bytes(run) + 3 * sizes + sizes // 3
    late = LateSeed(donor, tmp_path / "late", room_bytes)
    backfill = late.backfill()
    asyncio.run(backfill.look())
    assert backfill.told == f"{3 * run.num_shards} of {ROUNDS * run.num_shards}"
    assert late.chunks.room_bytes() >= STATES_TO_COME * state_bytes(run)
    for ledger, number in itertools.product(late.ledgers, range(1, ROUNDS + 1)):
        (commit,) = ledger.commits(number, 1)
        assert all(late.chunks.has(part.digest) == (number > ROUNDS - 3) for part in _parts(commit)), number
        assert not ledger.lacking(number), "what was given up is not asked for again"


def _parts(commit: Commit) -> list[PartResult]:
    return [part for part in Record.FromString(commit.record).parts if part.digest]


def test_the_first_state_does_not_take_the_room_of_states_to_come(tmp_path: Path) -> None:
    run = Run(tmp_path).make()
    late = LateSeed(Donor(run), tmp_path / "late", 3 * state_bytes(run) - 1)
    asyncio.run(late.backfill().look())
    assert not late.ledgers[0].offer_state(first=True).anchor_chunks
    assert late.chunks.room_bytes() >= STATES_TO_COME * state_bytes(run)


@pytest.mark.parametrize("rounds_at_once", [1, 64])
def test_a_branch_that_is_given_up_meanwhile_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds_at_once: int
) -> None:
    """What is left of the log is archived, and the rest is looked at again once it is there."""

    class Switching(Donor):
        async def call(self, peer: bytes, method: str, request: bytes, **limits: Any) -> bytes:
            if method == STATE_METHOD and late.ledgers[0].head.round == ROUNDS:
                late.ledgers[0].replace_tail(late.ledgers[0].heads[ROUNDS - 2], [])
            return await super().call(peer, method, request, **limits)

    monkeypatch.setattr(backfilling, "ROUNDS_AT_ONCE", rounds_at_once)
    late = LateSeed(Switching(Run(tmp_path).make()), tmp_path / "late")
    backfill = late.backfill()
    assert not asyncio.run(backfill.look())
    assert not any(late.ledgers[0].lacking(number) for number in range(1, ROUNDS - 1))
    assert asyncio.run(backfill.look()) and backfill.told == f"{ROUNDS - 2} of {ROUNDS - 2}"


def test_an_error_of_any_kind_ends_one_look_and_not_the_seed_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Backfill):
        looks = 0

        async def look(self) -> bool:
            self.looks += 1
            if self.looks == 1:
                raise OSError("the log cannot be read")
            looked_again.set()
            return True

    async def run_until_the_second_look() -> None:
        job = asyncio.create_task(Failing([], list).run())
        await asyncio.wait({job, asyncio.create_task(looked_again.wait())}, return_when=asyncio.FIRST_COMPLETED)
        assert looked_again.is_set() and not job.done()
        job.cancel()

    monkeypatch.setattr(backfilling, "ASK_AGAIN_S", 0.0)
    looked_again = asyncio.Event()
    asyncio.run(run_until_the_second_look())


def test_averages_come_no_faster_than_is_allowed(tmp_path: Path) -> None:
    run = Run(tmp_path).make()
    hour_bytes_per_s = run.average_of(1).stat().st_size / 3600
    backfill = LateSeed(Donor(run), tmp_path / "late").backfill(hour_bytes_per_s)
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(backfill.look(), 1.5))
    assert backfill.told in ("", f"0 of {ROUNDS}")
