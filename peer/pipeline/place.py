"""A peer's place in a pipeline, built once: slot, gate, steps, the way onward, the calls it answers, the data it reads.

Only wiring. Computations run in one thread of their own, which owns the replica.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import SystemRandom
from typing import Any

from peer.p2p.transport import Transport
from peer.pipeline.evaluation import Evaluation, EvaluationParts, EvaluationRules
from peer.pipeline.gate import Gate
from peer.pipeline.hop import Hop, HopParts
from peer.pipeline.messages import ID_BYTES, SHARD_TIME_S, Answer, HopRules
from peer.pipeline.onward import Hosts, Onward, OnwardParts
from peer.pipeline.serving import Serving, ServingParts
from peer.pipeline.slot import Slot
from peer.pipeline.source import Source, SourceParts
from peer.pipeline.steps import Stepped, Steps
from peer.training.microbatches import Tokens
from peer.training.passes import SpanReplica
from peer.training.trainer import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceParts:
    replica: SpanReplica
    transport: Transport
    rules: HopRules
    first_shard: int
    next_shard: int | None
    """where the span ends; None where it has the head"""
    step_microbatches: int
    max_in_flight: int
    """what the memory plan allows, see `swarm.fitting.in_flight`"""
    learning_rate: Callable[[], float]
    hosts: Callable[[int], Hosts]
    """shard -> whose span begins with it, as the directory says now"""
    is_admitted: Callable[[bytes], bool]
    limits: Limits
    later: Mapping[int, slice] = field(default_factory=dict)
    """shards of the span after its first, each with the replica's values from there on: entrances, too"""
    next_batch: Callable[[int], Tokens | None] | None = None
    """for a span that begins with the first shard"""
    on_step: Callable[[Stepped], None] = lambda stepped: None
    """called in the computing thread: be quick, and never block"""
    on_answer: Callable[[Tokens, Answer], None] = lambda tokens, answer: None
    evaluation: EvaluationRules | None = None
    """None: it has no anchors"""
    timeout_s: float = SHARD_TIME_S
    drain_s: float = 30.0


class Place:
    """`begin`, then `end`. ``jobs`` run between; one that ends by itself raised what training cannot go on after."""

    def __init__(self, parts: PlaceParts) -> None:
        self._parts = parts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pipeline", initializer=self._prepare_thread)
        self.slot = Slot(self._compute)
        self.onward = self._build_onward()
        self.hop = Hop(
            HopParts(
                steps=Steps(parts.replica, parts.learning_rate, parts.step_microbatches, parts.later),
                gate=Gate(step_microbatches=parts.step_microbatches, max_in_flight=parts.max_in_flight),
                slot=self.slot,
                onward=self.onward,
                drain_s=parts.drain_s,
                on_step=parts.on_step,
            )
        )
        self.source = self._build_source()
        self.evaluation = self._build_evaluation()
        self.jobs: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        parts = self._parts
        entrances = [*parts.later, *([parts.first_shard] if parts.first_shard else [])]
        if entrances:
            serving = ServingParts(
                hop=self.hop,
                rules=parts.rules,
                entrances=entrances,
                is_admitted=parts.is_admitted,
                run=asyncio.to_thread,
                evaluation=self.evaluation,
            )
            await Serving(serving).begin(parts.transport)
        self.jobs.append(asyncio.ensure_future(self.hop.run()))
        if self.source is not None:
            self.jobs.append(asyncio.ensure_future(self.source.run()))

    async def end(self) -> None:
        """Admit nothing more, and let go of what is under way; a computation that has begun is finished."""
        self.hop.pause()
        if self.evaluation is not None:
            self.evaluation.end()
        for job in self.jobs:
            job.cancel()
        await asyncio.gather(*self.jobs, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _prepare_thread(self) -> None:
        if self._parts.limits.num_threads is not None:
            import torch

            torch.set_num_threads(self._parts.limits.num_threads)

    def _compute(self, function: Callable[[], Any]) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._within_limits, function)

    def _within_limits(self, function: Callable[[], Any]) -> Any:
        """In the computing thread: ``function``, then the rest that the person's share of time asks for."""
        began_s = time.monotonic()
        try:
            return function()
        finally:
            time.sleep((time.monotonic() - began_s) * (1 / self._parts.limits.max_duty - 1))

    def _build_onward(self) -> Onward | None:
        parts, next_shard = self._parts, self._parts.next_shard
        if next_shard is None:
            return None
        return Onward(
            OnwardParts(
                transport=parts.transport,
                rules=parts.rules,
                first_shard=next_shard,
                hosts=lambda: parts.hosts(next_shard),
                draw=SystemRandom().random,
                run=asyncio.to_thread,
            )
        )

    def _build_evaluation(self) -> Evaluation | None:
        parts = self._parts
        if parts.evaluation is None:
            return None
        return Evaluation(
            EvaluationParts(
                rules=parts.evaluation,
                replica=parts.replica,
                slot=self.slot,
                later=parts.later,
                onward=self._build_onward(),  # of its own: who has no anchors of a round trains all the same
                timeout_s=parts.timeout_s,
            )
        )

    def _build_source(self) -> Source | None:
        parts = self._parts
        if parts.next_batch is None:
            return None
        return Source(
            SourceParts(
                hop=self.hop,
                next_batch=parts.next_batch,
                new_id=lambda: secrets.token_bytes(ID_BYTES),
                timeout_s=parts.timeout_s,
                # With nothing to wait for, one at a time leaves room for those of others.
                max_in_flight=1 if parts.next_shard is None else parts.max_in_flight,
                on_answer=parts.on_answer,
            )
        )
