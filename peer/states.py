"""What becomes of a round's states: copies for a checkpoint, a measured loss, signatures.

Decides which rounds are copied and by whom they are measured. A peer that hosts the whole model copies every shard's
state when it stands at the round, makes the checkpoint of them and signs it; one that hosts a part of it signs the
states that it has. Leaves checkpoints to `peer.checkpoints`, measuring to `peer.training.feeding`, and measuring over
the spans of several peers to `peer.span_evaluation`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from peer.checkpoints.attesting import Attester
from peer.checkpoints.gathering import Gathering
from peer.checkpoints.publishing import CheckpointMaker, StateCopy
from peer.hosted import HostedShards
from peer.joining import Joined, checkpoint_template
from peer.reporting import Reporter
from peer.rounds.exchange import Exchange
from peer.rounds.planning import evaluator
from peer.span_evaluation import SpanEvaluation
from peer.starting import Start
from peer.training.feeding import Training
from swarm import schedule
from swarm.errors import SwarmError

log = logging.getLogger(__name__)


class States:
    def __init__(
        self, joined: Joined, hosted: HostedShards, start: Start, reporter: Reporter, on_ready: Callable[[int], None]
    ) -> None:
        """``on_ready`` is told the round whose checkpoint this peer now serves."""
        self._joined, self._hosted, self._reporter = joined, hosted, reporter
        template = checkpoint_template(joined)
        self.checkpoints = CheckpointMaker(template, joined.chunks, on_ready)
        self.attester = Attester(joined.client, template.layout)
        self._due, self._gathering = start.due, start.gathering
        is_first_span = hosted.shards[0] == 0 and not hosted.is_whole
        self._over_spans = SpanEvaluation(joined, hosted, reporter, self.do_beside) if is_first_span else None
        self._to_evaluate: set[int] = set()
        self.beside: set[asyncio.Task[None]] = set()

    def resume(self) -> int:
        """Go on with what lies on disk; the newest checkpoint that is served from there (0: none)."""
        newest = self.checkpoints.resume(self._joined.run.spec.run_id)
        for copy in self._due:
            if copy.round > newest:
                self.checkpoints.offer(copy)
        return newest

    def jobs(self) -> list[Coroutine[Any, Any, None]]:
        """What runs until it is cancelled."""
        return [self.checkpoints.run() if self._gathering is not None else self.attester.run()]

    async def begin(self, training: Training) -> None:
        """A run that begins here: its first states are measured."""
        if self._over_spans is not None:
            await self._over_spans.begin(training)
        if self._gathering is not None and all(exchange.head.round == 0 for exchange in self._hosted.exchanges):
            self._to_evaluate.add(0)
            for exchange in self._hosted.exchanges:
                await self._copy(exchange, self._gathering, training)

    async def committed(self, shard: int, contributors: set[bytes], training: Training | None) -> None:
        """A shard stands at a new round, and nobody changes its state until this has returned."""
        exchange = self._hosted.exchange_of(shard)
        number = exchange.head.round
        if self._gathering is None:
            if self._is_checkpoint_round(number):
                self.attester.sign(exchange.head, exchange.shard)
            if self._over_spans is not None and training is not None:
                await self._over_spans.committed(shard, contributors, training)
            return
        may = training is not None and (training.evaluating.is_free or self._is_checkpoint_round(number))
        if shard == 0 and may and self._is_evaluator(number, contributors):
            self._to_evaluate = {number, *(n for n in self._to_evaluate if n >= number - 2)}
        if self._is_checkpoint_round(number) or {number} & {*self._to_evaluate, *self._gathering.rounds}:
            await self._copy(exchange, self._gathering, training)
            if shard == 0:
                await self._copy_late(number, self._gathering, training)

    async def ended(self) -> None:
        """The run has ended elsewhere: its last round has a checkpoint, which its commit did not say."""
        for exchange in self._hosted.exchanges if self._gathering is None else ():
            async with exchange.at_rest():
                if exchange.head.round == self._hosted.end_round:
                    self.attester.sign(exchange.head, exchange.shard)

    def _is_checkpoint_round(self, number: int) -> bool:
        """At the run's cadence, and when the run ends, which the first shard says for all."""
        if self._hosted.shards[0] == 0:
            return self._joined.is_checkpoint_round(number)
        return schedule.is_checkpoint_round(self._joined.run.spec, number, 0) or number == self._hosted.end_round

    def _is_evaluator(self, number: int, contributors: set[bytes]) -> bool:
        """One of those who hold the whole model, as far as is known here: of one shard, all."""
        me = self._joined.identity.public_key
        others = [set(member.statuses) for member in self._hosted.members[1:]]
        return evaluator(number, {peer for peer in contributors if peer == me or all(peer in s for s in others)}) == me

    async def _copy_late(self, number: int, gathering: Gathering, training: Training | None) -> None:
        """Shards that came first to a round, before it was known that the round is wanted."""
        for exchange in self._hosted.exchanges[1:]:
            async with exchange.at_rest():
                if exchange.head.round == number and number in gathering.rounds:
                    await self._copy(exchange, gathering, training)

    async def _copy(self, exchange: Exchange, gathering: Gathering, training: Training | None) -> None:
        copy = await asyncio.to_thread(gathering.add, exchange.head, exchange.shard)
        if copy is None:
            return
        if self._joined.is_checkpoint_round(copy.round):
            self.checkpoints.offer(copy)
        if copy.round in self._to_evaluate and training is not None:
            self._to_evaluate.discard(copy.round)
            self.do_beside(self._evaluate(copy, training))

    async def _evaluate(self, copy: StateCopy, training: Training) -> None:
        try:
            self._reporter.measured(copy.round, await training.evaluate(copy.anchor))
        except SwarmError as error:
            log.warning("round %d was not evaluated: %s", copy.round, error)

    def do_beside(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(job)
        self.beside.add(task)
        task.add_done_callback(self.beside.discard)
        return task
