"""The shards that a peer hosts: a replica, a member and a log for each, over one network, one disk and one trainer.

Wiring only: builds them from what joining found, and says of all together what the runtime asks. What a replica does
among the others of its shard is `peer.rounds.member`'s; when a shard's turn comes, `peer.rounds.pace`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from peer.joining import Joined, ShardStart
from peer.rounds.answering import answer_peers
from peer.rounds.exchange import Exchange
from peer.rounds.exchange_parts import Committed, ExchangeParts
from peer.rounds.member import Member, MemberParts, Words
from peer.rounds.mending import Incident
from peer.rounds.pace import Pace
from peer.training.feeding import ShardTraining, Training
from peer.training.layout import slices_of
from swarm import schedule
from swarm.digest import over_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Told of every shard's news, with the shard's number."""

    on_commit: Callable[[int, Committed], Awaitable[None]]
    on_incident: Callable[[int, Incident], None]


class HostedShards:
    """All shards of the run, in order."""

    def __init__(
        self,
        joined: Joined,
        starts: tuple[ShardStart, ...],
        training: Training | None,
        words: Words,
        listeners: Listeners,
    ) -> None:
        self._spec = joined.run.spec
        pieces = slices_of([start.shard.num_values for start in starts])
        pace = Pace(len(starts))
        members = []
        for number, (start, values) in enumerate(zip(starts, pieces, strict=True)):
            trainer = ShardTraining(training, values) if training is not None else None
            exchange = _exchange(joined, number, start, trainer, listeners)
            parts = MemberParts(
                identity=joined.identity,
                transport=joined.transport,
                exchange=exchange,
                ledger=joined.ledgers[number],
                chunks=joined.chunks,
                rules=joined.status_rules,
                words=words,
                clock=joined.clock,
                pace=pace,
            )
            members.append(Member(parts))
        self.members = tuple(members)

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        return tuple(member.parts.exchange for member in self.members)

    @property
    def first(self) -> Exchange:
        """The first shard's: its rounds say what is read, at which learning rate, and when the run is over."""
        return self.members[0].parts.exchange

    @property
    def round(self) -> int:
        """The newest round that every shard has committed."""
        return min(exchange.head.round for exchange in self.exchanges)

    @property
    def is_finished(self) -> bool:
        """The first shard has the tokens of the run, and the others followed it to its last round."""
        head = self.first.head
        return schedule.is_finished(self._spec, head.total_tokens) and self.round == head.round

    @property
    def state_digest(self) -> bytes:
        """Of all shards as they stand."""
        return over_shards([exchange.shard.state_digest for exchange in self.exchanges])

    @property
    def log_digest(self) -> bytes:
        return over_shards([exchange.head.log_digest for exchange in self.exchanges])

    @property
    def live_peers(self) -> list[bytes]:
        """Who may hold what we lack, by the newest statuses."""
        return list(dict.fromkeys(peer for exchange in self.exchanges for peer in exchange.live_peers))

    def progress(self, tokens_per_s: float) -> list[dict[str, int]]:
        """Of every shard: the round that is committed, who trains it, and how fast; ``tokens_per_s``: of this peer."""
        told = []
        for number, member in enumerate(self.members):
            training = [status for status in member.statuses.values() if status.trains and not status.leaving]
            told.append(
                {
                    "shard": number,
                    "round": member.parts.exchange.head.round,
                    "replicas": len(training) + member.parts.words.trains,
                    "tokens/s": round(tokens_per_s + sum(status.tokens_per_s for status in training)),
                }
            )
        return told

    async def serve(self) -> None:
        await answer_peers(self.members)

    def jobs(self) -> list[Coroutine[Any, Any, None]]:
        """What runs until it is cancelled."""
        return [member.run() for member in self.members]

    async def leave(self) -> None:
        """Tell the others that we go."""
        hearings = [exchange.hearing.leave() for exchange in self.exchanges]
        await asyncio.gather(*hearings, *(member.tell() for member in self.members))

    async def reset_replica(self) -> None:
        """Back onto the anchors, with fresh moments."""
        for exchange in self.exchanges:
            await exchange.reset_replica()


def _exchange(
    joined: Joined, number: int, start: ShardStart, trainer: ShardTraining | None, listeners: Listeners
) -> Exchange:
    async def on_commit(committed: Committed) -> None:
        await listeners.on_commit(number, committed)

    parts = ExchangeParts(
        identity=joined.identity,
        transport=joined.transport,
        shard=start.shard,
        ledger=joined.ledgers[number],
        chunks=joined.chunks,
        founders=joined.founders,
        trainer=trainer,
        run_blocking=asyncio.to_thread,
        on_commit=on_commit,
        on_incident=lambda incident: listeners.on_incident(number, incident),
    )
    return Exchange(parts, start.head)
