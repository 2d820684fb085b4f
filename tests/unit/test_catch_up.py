"""A newcomer's state: the newest that can be had whole, whoever offered a newer one; its own disk before a download."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from peer.p2p.chunk_store import CHUNK_METHOD, ChunkStore
from peer.p2p.fetch import HolderBook
from peer.rounds.catch_up import LOG_METHOD, STATE_METHOD, Newcomer, obtain_state
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.shard import Shard
from swarm.digest import sha256
from swarm.errors import NotFound
from swarm.identity import Identity
from swarm.log import LogHead, genesis_head
from swarm.proto.round_pb2 import ChunkReply, ChunkRequest, LogReply, LogRequest
from tests.simulation.memory_transport import MemoryNetwork
from tests.simulation.virtual_time import run
from tests.unit.test_ledger import GENESIS, SHARD, commit_after
from tests.unit.test_shard import SPEC, make_shard

AFTER_ROUND_1, AFTER_ROUND_2 = make_shard(seed=5), make_shard(seed=6)
STATES_BEFORE = (SHARD, AFTER_ROUND_1, *[AFTER_ROUND_2] * 12)
"""what the log says: so many rounds that replaying all of them is dearer than fetching a state"""
NEWCOMER = Identity(b"n" * 32)


class World:
    """Donors that all hold the same log, each with states of its own and some of their chunks missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = MemoryNetwork()
        self.donors: list[bytes] = []

    async def donor(self, states: dict[int, Shard], *, lacks_chunks: bool = False, rounds: int = 14) -> None:
        identity = Identity(bytes([100 + len(self.network.peers)]) * 32)
        folder = self.folder / identity.peer_id
        chunks = ChunkStore(folder / "chunks", 1 << 28, read_in_thread=False)
        ledger = make_ledger(folder, chunks)
        for number, before in enumerate(STATES_BEFORE[:rounds]):
            data = b"average of round %d" % number
            commit, head = commit_after(ledger.head, data, before.state_digest)
            ledger.append(commit, head, {sha256(data): data})
        for round_number, shard in states.items():
            ledger.save_state(round_number, shard)
        transport = self.network.join(identity)

        async def log(caller: bytes, request: bytes) -> bytes:
            wanted = LogRequest.FromString(request)
            return LogReply(commits=ledger.commits(wanted.first_round, wanted.max_commits)).SerializeToString()

        async def state(caller: bytes, request: bytes) -> bytes:
            return ledger.offer_state().SerializeToString()

        await transport.serve(LOG_METHOD, log)
        await transport.serve(STATE_METHOD, state)
        if not lacks_chunks:
            await transport.serve(CHUNK_METHOD, chunks.handle_chunk)
        self.donors.append(identity.public_key)

    async def obtain(self) -> tuple[LogHead, Shard]:
        chunks = ChunkStore(self.folder / "newcomer" / "chunks", 1 << 28, read_in_thread=False)
        newcomer = Newcomer(
            transport=self.network.join(NEWCOMER),
            ledger=make_ledger(self.folder / "newcomer", chunks),
            chunks=chunks,
            spec=SPEC,
            shard=0,
            genesis_digest=SHARD.state_digest,
            num_values=SHARD.num_values,
            book=HolderBook(random.Random(0)),
        )
        return await obtain_state(newcomer, self.donors)


def make_ledger(folder: Path, chunks: ChunkStore) -> Ledger:
    return Ledger(folder / "shard-0", genesis_head(GENESIS, 0), chunks, LedgerOptions())


def test_the_newest_offered_state_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        await world.donor({0: SHARD})
        await world.donor({2: AFTER_ROUND_2})
        head, shard = await world.obtain()
        assert head.round == 2 and shard.state_digest == AFTER_ROUND_2.state_digest

    run(main())


@pytest.mark.parametrize("first", [True, False])
def test_a_state_whose_chunks_nobody_has_is_passed_over_for_the_next_newest(tmp_path: Path, first: bool) -> None:
    """In whichever order the holders are asked."""

    async def main() -> None:
        world = World(tmp_path)
        if first:
            await world.donor({2: AFTER_ROUND_2}, lacks_chunks=True)
        await world.donor({0: SHARD})
        await world.donor({1: AFTER_ROUND_1})
        if not first:
            await world.donor({2: AFTER_ROUND_2}, lacks_chunks=True)
        head, shard = await world.obtain()
        assert head.round == 1 and shard.state_digest == AFTER_ROUND_1.state_digest

    run(main())


def test_chunks_that_came_before_a_newcomer_failed_are_not_fetched_again(tmp_path: Path) -> None:
    """Each is on its disk as soon as it is here, whatever becomes of the others."""

    async def main() -> None:
        world = World(tmp_path)
        await world.donor({2: AFTER_ROUND_2})
        anchor, momentum = ({*chunks} for chunks in AFTER_ROUND_2.chunk_digests())
        lacking, asked = {*momentum}, list[bytes]()
        donor = world.network.peers[world.donors[0]]
        whole = donor._handlers[CHUNK_METHOD]

        async def handle(caller: bytes, request: bytes) -> bytes:
            asked.append(ChunkRequest.FromString(request).digest)
            if asked[-1] in lacking:
                await asyncio.sleep(1.0)  # the others are here by then
                return ChunkReply().SerializeToString()
            return await whole(caller, request)

        await donor.serve(CHUNK_METHOD, handle)
        with pytest.raises(NotFound):
            await world.obtain()
        assert anchor < {*asked}
        lacking.clear()
        asked.clear()
        head, _ = await world.obtain()
        assert head.round == 2 and {*asked} == momentum

    run(main())


@pytest.mark.parametrize(("missed", "fetched"), [(4, False), (6, True)])
def test_a_state_is_fetched_once_replaying_would_take_more_bytes(tmp_path: Path, missed: int, fetched: bool) -> None:
    """A state takes 5.02 bytes a value, a round in int8 1.02."""

    async def main() -> None:
        world = World(tmp_path)
        await world.donor({0: SHARD}, rounds=missed)
        await world.obtain()
        world.donors.clear()
        await world.donor({0: SHARD, 2: AFTER_ROUND_2}, rounds=missed)
        head, _ = await world.obtain()
        assert head.round == (2 if fetched else 0)

    run(main())


def test_a_newcomer_is_told_when_no_offered_state_can_be_had(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        await world.donor({2: AFTER_ROUND_2}, lacks_chunks=True)
        await world.donor({0: SHARD}, lacks_chunks=True)
        with pytest.raises(NotFound, match="nobody offers a state"):
            await world.obtain()

    run(main())


def test_a_peer_that_stood_still_starts_from_its_own_state_where_no_other_can_be_had(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        await world.donor({0: SHARD})
        await world.obtain()
        world.donors.clear()
        await world.donor({2: AFTER_ROUND_2}, lacks_chunks=True)
        head, shard = await world.obtain()
        assert head.round == 0 and shard.state_digest == SHARD.state_digest

    run(main())
