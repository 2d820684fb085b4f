"""A round's loss where nobody hosts the whole model: measured over the spans of several peers.

Decides which peer measures which round: one of those that were counted in the first shard's commit, where none of them
hosts the whole model; and when: once every shard stands at the round. What is measured is the exact anchors of all
shards after that round, hidden states between spans in the run's hop codec. The measuring peer copies its own when its
shards come to the round; the others answer while they stand there, and a round that passes before is not measured.
Leaves microbatches to `peer.pipeline.evaluation`, and losses to `peer.reporting`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any

from peer.checkpoints.gathering import Gathering
from peer.checkpoints.publishing import StateCopy
from peer.hosted import HostedShards
from peer.joining import Joined
from peer.reporting import Reporter
from peer.rounds.exchange import Exchange
from peer.rounds.planning import evaluator
from peer.training.feeding import Training
from swarm import schedule
from swarm.errors import NotFound, ResourceError, SwarmError
from swarm.run_spec import RunSpec

log = logging.getLogger(__name__)

DoBeside = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


def is_wanted(spec: RunSpec, number: int) -> bool:
    """Whether the loss after a round is measured whatever it takes: where the run begins, and of checkpoints."""
    return number == 0 or schedule.is_checkpoint_round(spec, number, 0)


class SpanEvaluation:
    """Of a peer whose span begins with the first shard and is not the whole model."""

    def __init__(self, joined: Joined, hosted: HostedShards, reporter: Reporter, do_beside: DoBeside) -> None:
        self._spec, self._me = joined.run.spec, joined.identity.public_key
        self._hosted, self._reporter, self._do_beside = hosted, reporter, do_beside
        self._gathering = Gathering(joined.folder, [exchange.shard.num_values for exchange in hosted.exchanges])
        self._measuring: asyncio.Task[None] | None = None

    async def begin(self, training: Training) -> None:
        """A run that begins here: its first states are measured."""
        if all(exchange.head.round == 0 for exchange in self._hosted.exchanges):
            for exchange in self._hosted.exchanges:
                await self._copy(exchange, training)

    async def committed(self, shard: int, contributors: set[bytes], training: Training) -> None:
        """A shard stands at a new round, and nobody changes its state until this has returned."""
        exchange = self._hosted.exchange_of(shard)
        number = exchange.head.round
        may = training.evaluating.is_free or is_wanted(self._spec, number)
        if number in self._gathering.rounds or (shard == 0 and may and self._is_evaluator(number, contributors)):
            await self._copy(exchange, training)

    def _is_evaluator(self, number: int, contributors: set[bytes]) -> bool:
        everywhere = self._hosted.surroundings.everywhere()
        if any(all(peer in statuses for statuses in everywhere) for peer in contributors):
            return False  # it has the whole model, and measures that
        return evaluator(number, contributors) == self._me

    async def _copy(self, exchange: Exchange, training: Training) -> None:
        try:
            copy = await asyncio.to_thread(self._gathering.add, exchange.head, exchange.shard)
        except ResourceError as error:  # a loss is not worth the training
            log.warning("round %d is not evaluated: %s", exchange.head.round, error)
            self._gathering.forget(exchange.head.round)
            return
        if copy is not None:
            if self._measuring is not None:
                self._measuring.cancel()
            self._measuring = self._do_beside(self._measure(copy, training))

    async def _measure(self, copy: StateCopy, training: Training) -> None:
        jobs = [asyncio.ensure_future(job) for job in (self._loss_of(copy, training), self._until_lacking())]
        try:
            await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            if not jobs[0].done():  # those who leave last, when a run ends, are not waited for in vain
                raise NotFound("a shard elsewhere has no replica any more")
            self._reporter.measured(copy.round, jobs[0].result())
        except SwarmError as error:
            log.warning("round %d was not evaluated: %s", copy.round, error)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def _loss_of(self, copy: StateCopy, training: Training) -> float:
        await self._until_everywhere(copy.round)
        return await training.evaluate_round(copy.anchor, copy.round)

    async def _until_lacking(self) -> float:
        """Until nobody trains some shard elsewhere."""
        while True:
            if self._hosted.surroundings.lacking:
                return math.nan
            await asyncio.sleep(self._spec.rounds.status_interval_s / 2)

    async def _until_everywhere(self, number: int) -> None:
        """Until all shards elsewhere are said to stand at a round. Raises `NotFound` once one is further on."""
        surroundings = self._hosted.surroundings
        while True:
            worked_towards = [surroundings.standing(shard).round for shard in surroundings.elsewhere]
            if any(found > number + 1 for found in worked_towards):
                raise NotFound("it passed before every shard stood there")
            if all(found == number + 1 for found in worked_towards):
                return
            await asyncio.sleep(self._spec.rounds.status_interval_s / 2)
