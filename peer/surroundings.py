"""What goes on in the shards that are not hosted here: who hosts them, where they stand, when the run is over.

Decides from statuses, which are hints: whom a microbatch may be sent to, whose microbatches are taken in, how far the
other shards are. Where seed peers, whom the organizer's genesis names, say how far a shard is, nobody else is heard.
Leaves reading one's own shards' statuses to `peer.rounds.member`, and routing to `peer.pipeline`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peer.p2p.transport import Transport
from peer.rounds.member import Member
from peer.rounds.pace import Pace, Standing
from peer.rounds.statuses import StatusRules, read_statuses, status_key
from swarm import schedule
from swarm.errors import SwarmError
from swarm.proto.round_pb2 import Status
from swarm.run_spec import RunSpec

log = logging.getLogger(__name__)

Statuses = Mapping[bytes, Status]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurroundingsParts:
    transport: Transport
    spec: RunSpec
    rules: StatusRules
    clock: Callable[[], float]
    """unix time in seconds, corrected against the coordinator's"""
    me: bytes
    pace: Pace


class Surroundings:
    """``members``: of the shards that are hosted here, who look at their own statuses."""

    def __init__(self, parts: SurroundingsParts, members: Sequence[Member]) -> None:
        self._parts = parts
        self._members = {member.parts.exchange.shard.index: member for member in members}
        self._seen: dict[int, Statuses] = {}
        self._lacking: set[int] = set()

    @property
    def elsewhere(self) -> list[int]:
        """The shards that are not hosted here."""
        return [shard for shard in range(self._parts.spec.num_shards) if shard not in self._members]

    def statuses(self, shard: int) -> Statuses:
        """Of everybody else who hosts it."""
        member = self._members.get(shard)
        return member.statuses if member is not None else self._seen.get(shard, {})

    @property
    def peers(self) -> set[bytes]:
        """Everybody else in the run, as far as is known."""
        return {peer for statuses in self.everywhere() for peer in statuses}

    def everywhere(self) -> list[Statuses]:
        """The statuses of everybody else, shard by shard."""
        return [self.statuses(shard) for shard in range(self._parts.spec.num_shards)]

    def hosts(self, shard: int) -> dict[bytes, tuple[str, ...]]:
        """Who trains ``shard``, and where they are reached: a span may be entered at each of its shards."""
        return {
            peer: tuple(status.addresses)
            for peer, status in self.statuses(shard).items()
            if status.trains and not status.leaving
        }

    def is_admitted(self, peer: bytes) -> bool:
        """Whether ``peer`` takes part: its statuses carry the coordinator's admission."""
        return peer in self.peers

    def standing(self, shard: int) -> Standing:
        """Where ``shard`` is, by the newest statuses; at its beginning where there are none."""
        return standing_of(self.statuses(shard), self._parts.rules.founders)

    def end_round(self) -> int | None:
        """The round in which the first shard, which is not hosted here, reached the tokens of the run; None before."""
        founders = self._parts.rules.founders
        ended = [
            status.round - 1
            for peer, status in self.statuses(0).items()
            if peer in founders and schedule.is_finished(self._parts.spec, status.committed_tokens)
        ]
        return min(ended, default=None)

    @property
    def lacking(self) -> list[int]:
        """Shards elsewhere of which nobody trains a replica."""
        return sorted(self._lacking)

    async def look(self) -> None:
        """Read what is said in the shards elsewhere."""
        parts = self._parts
        for shard in self.elsewhere:
            values = await parts.transport.lookup(status_key(shard))
            statuses = read_statuses(values, parts.rules, parts.clock())
            statuses.pop(parts.me, None)  # of a span that we left
            self._seen[shard] = statuses
            parts.pace.note(shard, self.standing(shard))
            self._tell_of_lack(shard)

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            try:
                await self.look()
            except SwarmError as error:
                log.info("the directory did not serve: %s", error)
            await asyncio.sleep(self._parts.spec.rounds.status_interval_s)

    def _tell_of_lack(self, shard: int) -> None:
        is_lacking = not any(status.trains for status in self.statuses(shard).values())
        if is_lacking and shard not in self._lacking:
            log.warning("shard %d has no replica: training waits for one", shard)
        elif shard in self._lacking and not is_lacking:
            log.warning("shard %d has a replica again", shard)
        self._lacking = self._lacking | {shard} if is_lacking else self._lacking - {shard}


def standing_of(statuses: Statuses, founders: Sequence[bytes]) -> Standing:
    """Where a shard is. Founders are believed before others, of whom one could say that it is far ahead."""
    believed = [status.round for peer, status in statuses.items() if peer in founders] or [
        status.round for status in statuses.values()
    ]
    newest = max(believed, default=1)
    return Standing(round=newest, tokens=sum(status.tokens for status in statuses.values() if status.round == newest))
