"""The shards that a peer hosts: a replica, a member and a log for each, over one network, one disk and one trainer.

Wiring only: builds them from what joining found, and says of all together what the runtime asks. What a replica does
among the others of its shard is `peer.rounds.member`'s; when a shard's turn comes, `peer.rounds.pace`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from peer.joining import Joined
from peer.rounds.answering import answer_peers
from peer.rounds.codec import Float32
from peer.rounds.exchange import Exchange
from peer.rounds.exchange_parts import Committed, ExchangeParts
from peer.rounds.ledger import Ledger
from peer.rounds.member import Member, MemberParts, Words
from peer.rounds.mending import Incident
from peer.rounds.momenta import Momenta
from peer.rounds.pace import Pace
from peer.starting import ShardStart
from peer.surroundings import Surroundings, SurroundingsParts
from peer.training.feeding import ShardTraining, Training
from peer.training.layout import slices_of
from swarm import schedule
from swarm.digest import over_shards
from swarm.errors import Busy, NotFound
from swarm.placement import bottlenecks


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Told of every shard's news, with the shard's number."""

    on_commit: Callable[[int, Committed], Awaitable[None]]
    on_incident: Callable[[int, Incident], None]


class HostedShards:
    """The shards of this peer's span, in order."""

    def __init__(
        self,
        joined: Joined,
        starts: tuple[ShardStart, ...],
        training: Training | None,
        words: Words,
        listeners: Listeners,
    ) -> None:
        self._spec = joined.run.spec
        self._momenta = None if joined.options.trains else Momenta(joined.folder)
        pieces = slices_of([start.shard.num_values for start in starts])
        pace = Pace(self._spec.num_shards)
        members = []
        for start, values, ledger in zip(starts, pieces, joined.ledgers, strict=True):
            trainer = ShardTraining(training, start.shard.index, values) if training is not None else None
            exchange = _exchange(joined, ledger, start, trainer, listeners)
            parts = MemberParts(
                identity=joined.identity,
                transport=joined.transport,
                exchange=exchange,
                ledger=ledger,
                chunks=joined.chunks,
                rules=joined.status_rules,
                words=words,
                clock=joined.clock,
                pace=pace,
            )
            members.append(Member(parts))
        self.members = tuple(members)
        self.surroundings = Surroundings(
            SurroundingsParts(
                transport=joined.transport,
                spec=self._spec,
                rules=joined.status_rules,
                clock=joined.clock,
                me=joined.identity.public_key,
                pace=pace,
            ),
            self.members,
        )

    def exchange_of(self, shard: int) -> Exchange:
        """Of a shard that is hosted here."""
        return self.members[shard - self.shards[0]].parts.exchange

    @asynccontextmanager
    async def anchors_after(self, shard: int, number: int) -> AsyncIterator[Sequence[Float32]]:
        """Those of ``shard`` and of the hosted ones after it, if all stand at a round; they do not change meanwhile.

        Raises `Busy` where one is not there yet or about to change, and `NotFound` where one is further on.
        """
        exchanges = [exchange for exchange in self.exchanges if exchange.shard.index >= shard]
        async with AsyncExitStack() as stack:
            for exchange in exchanges:
                if exchange.at_rest().locked():
                    raise Busy(f"busy: shard {exchange.shard.index} is about to change")
                await stack.enter_async_context(exchange.at_rest())
                if exchange.head.round > number:
                    raise NotFound(f"shard {exchange.shard.index} is in round {exchange.round}")
                if exchange.head.round < number:
                    raise Busy(f"busy: shard {exchange.shard.index} is in round {exchange.round}")
            yield [exchange.shard.anchor for exchange in exchanges]

    @property
    def shards(self) -> list[int]:
        return [exchange.shard.index for exchange in self.exchanges]

    @property
    def is_whole(self) -> bool:
        return len(self.members) == self._spec.num_shards

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        return tuple(member.parts.exchange for member in self.members)

    @property
    def first(self) -> Exchange:
        """The first one's that is hosted here: its rounds say what is read, and at which learning rate."""
        return self.members[0].parts.exchange

    @property
    def round(self) -> int:
        """The newest round that every shard has committed."""
        return min(exchange.head.round for exchange in self.exchanges)

    @property
    def end_round(self) -> int | None:
        """The round in which the first shard of the run had the tokens of the run; None before."""
        if self.shards[0] > 0:
            return self.surroundings.end_round()
        head = self.first.head
        return head.round if schedule.is_finished(self._spec, head.total_tokens) else None

    @property
    def is_finished(self) -> bool:
        """The first shard has the tokens of the run, and the others, wherever they are, followed it to that round."""
        end, elsewhere = self.end_round, self.surroundings.elsewhere
        if end is None or self.round < end:
            return False
        return all(self.surroundings.standing(shard).round > end for shard in elsewhere)

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

    def progress(self) -> list[dict[str, Any]]:
        """Of every shard: its committed round, who trains it, how fast, how fast they could, if it bounds the run."""
        mine = {exchange.shard.index: exchange.head.round for exchange in self.exchanges}
        words, told, could = self.members[0].parts.words, list[dict[str, Any]](), list[float]()
        for shard in range(self._spec.num_shards):
            statuses = self.surroundings.statuses(shard).values()
            training = [status for status in statuses if status.trains and not status.leaving]
            here = shard in mine and words.trains and not words.leaving
            speed = words.shard_tokens_per_s.get(shard, 0.0) + sum(status.tokens_per_s for status in training)
            could.append(words.service_tokens_per_s * here + sum(status.service_tokens_per_s for status in training))
            told.append(
                {
                    "shard": shard,
                    "here": here,
                    "round": mine.get(shard, self.surroundings.standing(shard).round - 1),
                    "replicas": len(training) + here,
                    "tokens/s": round(speed),
                    "could tokens/s": round(could[-1]),
                }
            )
        bounding = bottlenecks([shard["replicas"] for shard in told], could)
        return [{**shard, "bottleneck": shard["shard"] in bounding} for shard in told]

    async def serve(self) -> None:
        await answer_peers(self.members, self._momenta)

    def jobs(self) -> list[Coroutine[Any, Any, None]]:
        """What runs until it is cancelled."""
        elsewhere = [] if self.is_whole else [self.surroundings.run()]
        return [*(member.run() for member in self.members), *elsewhere]

    async def leave(self) -> None:
        """Tell the others that we go."""
        hearings = [exchange.hearing.leave() for exchange in self.exchanges]
        await asyncio.gather(*hearings, *(member.tell() for member in self.members))

    async def reset_replica(self) -> None:
        """Back onto the anchors, with fresh moments."""
        for exchange in self.exchanges:
            await exchange.reset_replica()


def _exchange(
    joined: Joined, ledger: Ledger, start: ShardStart, trainer: ShardTraining | None, listeners: Listeners
) -> Exchange:
    number = start.shard.index

    async def on_commit(committed: Committed) -> None:
        await listeners.on_commit(number, committed)

    parts = ExchangeParts(
        identity=joined.identity,
        transport=joined.transport,
        shard=start.shard,
        ledger=ledger,
        chunks=joined.chunks,
        founders=joined.founders,
        trainer=trainer,
        run_blocking=asyncio.to_thread,
        on_commit=on_commit,
        on_incident=lambda incident: listeners.on_incident(number, incident),
    )
    return Exchange(parts, start.head)
