"""The trainer of a span: what `peer.training.trainer.Trainer` is to a whole model alone, over a place in a pipeline.

Decides what counts as trained (inner steps that were made), and that whoever reads or changes the weights does so while
no microbatch is under way. It has the other trainer's face, so that rounds do not know which of the two they talk to.
Leaves microbatches to `peer.pipeline.hop`, which tokens and which learning rate to the same `Hooks`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from peer.p2p.transport import Transport
from peer.pipeline.evaluation import EvaluationRules
from peer.pipeline.messages import SHARD_TIME_S, Answer, HopRules
from peer.pipeline.onward import Hosts
from peer.pipeline.place import Place, PlaceParts
from peer.pipeline.steps import Stepped
from peer.rounds.codec import Float32
from peer.training.between_steps import COMMAND_TIMEOUT_S, BetweenSteps, Replica
from peer.training.microbatches import StepResult, Tokens
from peer.training.passes import SpanReplica
from peer.training.trainer import Hooks, Limits
from swarm.errors import DeadlineExceeded, SwarmError

T = TypeVar("T")

# Of the estimate before, at each inner step.
RATE_KEPT = 0.8


class HostedReplica(Replica, SpanReplica, Protocol):
    """A replica that rounds and microbatches both need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanParts:
    """Where the span is, and who is around it."""

    transport: Transport
    rules: HopRules
    first_shard: int
    next_shard: int | None
    step_microbatches: int
    max_in_flight: int
    hosts: Callable[[int], Hosts]
    is_admitted: Callable[[bytes], bool]
    later: Mapping[int, slice] = field(default_factory=dict)
    """shards of the span after its first, each with the replica's values from there on: entrances, too"""
    shares: Mapping[int, float] = field(default_factory=dict)
    """of the work of the span, what a microbatch asks for that enters at one of these shards"""
    evaluation: EvaluationRules | None = None
    """None: no anchors are here to be evaluated"""
    timeout_s: float = SHARD_TIME_S
    """for a microbatch that begins here, there and back"""
    drain_s: float = 30.0


class SpanTrainer(BetweenSteps):
    def __init__(self, replica: HostedReplica, span: SpanParts, hooks: Hooks, limits: Limits) -> None:
        super().__init__(replica)
        self._hooks, self._limits, self._shares = hooks, limits, span.shares
        self._last_end_s = 0.0
        self._computed_s = 0.0
        self._service_tokens_per_s = 0.0
        self._failure: SwarmError | None = None
        self._watching: asyncio.Task[None] | None = None
        self._place = Place(
            PlaceParts(
                replica=replica,
                transport=span.transport,
                rules=span.rules,
                first_shard=span.first_shard,
                next_shard=span.next_shard,
                step_microbatches=span.step_microbatches,
                max_in_flight=span.max_in_flight,
                learning_rate=hooks.learning_rate,
                hosts=span.hosts,
                is_admitted=span.is_admitted,
                later=span.later,
                next_batch=hooks.next_batch if span.first_shard == 0 else None,
                on_step=self._stepped,
                on_answer=self._answered,
                limits=limits,
                evaluation=span.evaluation,
                timeout_s=span.timeout_s,
                drain_s=span.drain_s,
            )
        )

    @property
    def failure(self) -> SwarmError | None:
        """Why training ended by itself, or None."""
        return self._failure

    @property
    def waits_for(self) -> str:
        """Why microbatches do not come back, in words; empty while they do."""
        source = self._place.source
        return source.waits_for if source is not None else ""

    @property
    def service_tokens_per_s(self) -> float:
        return self._service_tokens_per_s

    def start(self) -> None:
        """Begin to train, and to answer. Once per trainer, where an event loop runs."""
        self._last_end_s = time.monotonic()
        self._watching = asyncio.ensure_future(self._watch())

    def pause(self) -> None:
        """Admit no further microbatch; those under way are finished, and commands are still carried out."""
        self._place.hop.pause()

    def resume(self) -> None:
        self._place.hop.pause(is_paused=False)

    def wake(self) -> None:
        """The source looks for a batch by itself, several times a second."""

    async def call(self, function: Callable[[], T], timeout_s: float = COMMAND_TIMEOUT_S) -> T:
        """See `BetweenSteps`; no microbatch is under way then."""
        if self._failure is not None:
            raise self._failure
        if self._watching is None or self._watching.done():
            raise SwarmError("the trainer does not run")
        try:
            return await asyncio.wait_for(self._place.hop.between_steps(function), timeout_s)
        except asyncio.TimeoutError as error:
            raise DeadlineExceeded(f"the trainer did not answer within {timeout_s:.0f} s") from error
        except asyncio.CancelledError:
            if self._failure is not None:  # training ended meanwhile
                raise self._failure from None
            raise

    async def evaluate_round(self, anchor: Float32, batches: Sequence[Tokens], number: int) -> float:
        """See `peer.pipeline.evaluation.Evaluation.mean_loss`; training goes on meanwhile."""
        if self._place.evaluation is None:
            raise SwarmError("no anchors are here to be evaluated")
        return await self._place.evaluation.mean_loss(anchor, batches, number)

    async def stop(self, timeout_s: float) -> None:
        """End; a computation in progress is finished. Raises `DeadlineExceeded` if that takes longer."""
        if self._watching is None:
            return
        self._watching.cancel()
        done, _ = await asyncio.wait([self._watching], timeout=timeout_s)
        if not done:
            raise DeadlineExceeded(f"a computation is still running after {timeout_s:.0f} s")

    async def _watch(self) -> None:
        """Train until cancelled, or until something ends it that is no fault of other peers."""
        try:
            await self._place.begin()
            await asyncio.gather(*self._place.jobs)
        except SwarmError as error:
            self._fail(error)
        except Exception as error:  # an error of any kind must not vanish with the task
            failure = SwarmError(f"training ended by {type(error).__name__}: {error}", "run again with --debug")
            failure.__cause__ = error
            self._fail(failure)
        finally:
            await self._place.end()

    def _fail(self, failure: SwarmError) -> None:
        self._failure = failure
        # A hook that fails must not keep the rest from ending in order.
        with contextlib.suppress(Exception):
            self._hooks.on_failed(failure)

    def _stepped(self, stepped: Stepped) -> None:
        now_s = time.monotonic()
        elapsed_s, self._last_end_s = now_s - self._last_end_s, now_s
        self._measure(stepped)
        self._tell_of_bad_steps(self._count(stepped.result, stepped.num_tokens, elapsed_s, stepped.entered_later))

    def _measure(self, stepped: Stepped) -> None:
        """Tokens of a step by what it was computed in, whatever was waited for between.

        What entered later passed a part of the span, and counts for so much: others reckon with all of its work.
        """
        computed_s = self._place.slot.computed_s
        spared = sum(tokens * (1 - self._shares.get(shard, 1)) for shard, tokens in stepped.entered_later.items())
        num_tokens = stepped.num_tokens - spared
        rate, self._computed_s = num_tokens / max(computed_s - self._computed_s, 1e-9), computed_s
        kept = RATE_KEPT if self._service_tokens_per_s else 0.0
        self._service_tokens_per_s = kept * self._service_tokens_per_s + (1 - kept) * rate

    def _answered(self, tokens: Tokens, answer: Answer) -> None:
        """A microbatch whose loss is not finite is in no inner step: the source alone hears of it."""
        if math.isnan(answer.loss):
            bad = StepResult(loss=math.nan, grad_norm=math.nan, ok=False)
            self._tell_of_bad_steps(self._count(bad, 0, 0.0))

    def _tell_of_bad_steps(self, bad: int) -> None:
        if bad and bad % self._limits.max_bad_steps == 0:
            self._hooks.on_bad(bad)
