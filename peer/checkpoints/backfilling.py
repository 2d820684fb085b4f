"""What the archive of a seed peer that joined late lacks, fetched from the other seed peers.

The log is there from the genesis on, as it proves the state that a peer starts from. Decides the order of the rest (the
state of round 0, then averages, newest first, as a full archive gives up its oldest rounds), how fast it is fetched,
and how often what nobody had is asked for. What lies here already is not fetched, so a restarted peer goes on. Believes
nothing: everything has its digest in the log or the genesis. Leaves room for the states of later rounds, which the run
cannot go on without. Leaves fetching to `peer.p2p.fetch`, files to the ledger.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from peer.checkpoints.sources import Pace
from peer.p2p.fetch import fetch_chunk
from peer.rounds import blocks
from peer.rounds.catch_up import Newcomer, fetch_first_state
from peer.rounds.ledger import Ledger
from swarm.errors import DiskFull, NetworkError, NotFound, SwarmError

# Running peers come first: half of a home's uplink, and the seed peers serve others beside.
BYTES_PER_S = 4e6
ASK_AGAIN_S = 60.0
_ANSWER_S = 120.0
ROUNDS_AT_ONCE = 64
# Of every shard: one is written beside the two that are kept, and at a fresh start one of those is still to come.
STATES_TO_COME = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """A shard's archive. ``at_rest``: nobody else writes states or changes the log while it is held."""

    newcomer: Newcomer
    at_rest: Callable[[], AbstractAsyncContextManager[object]]


class Backfill:
    def __init__(
        self, shards: Sequence[Late], holders: Callable[[], Sequence[bytes]], bytes_per_s: float = BYTES_PER_S
    ) -> None:
        """``holders``: the other seed peers, as they are known when asked."""
        self._shards, self._holders, self._pace = shards, holders, Pace(bytes_per_s)
        self._rounds_lacking: int | None = None

    @property
    def told(self) -> str:
        """How many rounds of how many are whole here, of all shards; nothing before that was looked at."""
        total = sum(late.newcomer.ledger.head.round for late in self._shards)
        return "" if self._rounds_lacking is None else f"{total - self._rounds_lacking} of {total}"

    async def run(self) -> None:
        """Fetch what is not here yet, until cancelled."""
        while True:
            try:
                if await self.look():
                    await asyncio.Event().wait()
            except Exception as error:  # a seed peer serves the run, whatever its archive lacks
                log.warning("the archive is not filled for now: %s", error, exc_info=error)
            await asyncio.sleep(ASK_AGAIN_S)

    async def look(self) -> bool:
        """Ask once for everything that is missing; whether the archive is as whole as its disk limit lets it be."""
        lacking = [await _lacking(late) for late in self._shards]
        self._rounds_lacking = sum(map(len, lacking))
        complete = True
        for late in self._shards:
            complete = await self._obtain_first_state(late) and complete
        rounds = [(number, late) for late, numbers in zip(self._shards, lacking, strict=True) for number in numbers]
        return await self._obtain_rounds(sorted(rounds, key=lambda item: -item[0])) and complete

    async def _obtain_first_state(self, late: Late) -> bool:
        ledger = late.newcomer.ledger
        if ledger.offer_state(first=True).anchor_chunks:
            return True
        try:
            await self._see_to_room(late, _state_bytes(late))
            state = await fetch_first_state(late.newcomer, self._holders())
            async with late.at_rest():
                await asyncio.to_thread(ledger.save_state, 0, state)
        except DiskFull as error:
            log.warning("the archive lacks the state of round 0: %s", error)
        except SwarmError as error:
            log.info("the state of round 0 cannot be had: %s", error)
            return False
        return True

    async def _obtain_rounds(self, rounds: Sequence[tuple[int, Late]]) -> bool:
        """Round by round: where room is for some of them only, an auditor needs those of every shard."""
        complete = True
        for number, late in rounds:
            try:
                await self._obtain_round(late, number)
                self._rounds_lacking = (self._rounds_lacking or 0) - 1
            except DiskFull as error:
                log.warning("the archive goes back to round %d only: %s", number + 1, error)
                for each in self._shards:
                    async with each.at_rest():
                        await asyncio.to_thread(each.newcomer.ledger.release_rounds, number + 1)
                break
            except NetworkError as error:
                log.info("round %d of shard %d cannot be had: %s", number, late.newcomer.shard, error)
                complete = False
        return complete

    async def _obtain_round(self, late: Late, number: int) -> None:
        newcomer = late.newcomer
        async with late.at_rest():
            lacking = await asyncio.to_thread(newcomer.ledger.lacking, number)
        for part in lacking:
            await self._see_to_room(late, part.size_bytes)
            await self._pace.spend(part.size_bytes)
            holders = self._holders()
            if not holders:
                raise NotFound("no other seed peer is known")
            data = await fetch_chunk(
                newcomer.transport, part.digest, part.size_bytes, holders, _ANSWER_S, newcomer.book
            )
            await newcomer.chunks.keep(data)

    async def _see_to_room(self, late: Late, size_bytes: int) -> None:
        """Raises `DiskFull` where so much more would take the room of states to come."""
        room_bytes = await asyncio.to_thread(late.newcomer.chunks.room_bytes)
        if room_bytes < size_bytes + STATES_TO_COME * sum(map(_state_bytes, self._shards)):
            raise DiskFull("the disk limit leaves no more room beside the run's states", "raise the disk limit")


def _state_bytes(late: Late) -> int:
    num_values = late.newcomer.num_values
    return 4 * num_values + blocks.size_bytes(num_values)


async def _lacking(late: Late) -> list[int]:
    """The rounds with an average that is not here, newest first; a few at a time, as no round waits for a long log."""
    ledger, found = late.newcomer.ledger, list[int]()
    last = ledger.head.round
    while last > 0:
        async with late.at_rest():
            last = min(last, ledger.head.round)  # a branch may have been given up since
            numbers = range(last, max(0, last - ROUNDS_AT_ONCE), -1)
            found += await asyncio.to_thread(_lacking_of, ledger, numbers)
        last -= ROUNDS_AT_ONCE
    return found


def _lacking_of(ledger: Ledger, numbers: Sequence[int]) -> list[int]:
    return [number for number in numbers if ledger.lacking(number)]
