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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from peer.p2p.transport import Transport
from peer.pipeline.messages import Answer, HopRules
from peer.pipeline.onward import Hosts
from peer.pipeline.place import Place, PlaceParts
from peer.pipeline.steps import Stepped
from peer.rounds.codec import Float32
from peer.training.microbatches import StepResult, Tokens
from peer.training.passes import SpanReplica
from peer.training.trainer import COMMAND_TIMEOUT_S, Hooks, Limits, Replica, Snapshot, Stats, after_step
from swarm.errors import DeadlineExceeded, SwarmError

T = TypeVar("T")


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


class SpanTrainer:
    def __init__(self, replica: HostedReplica, span: SpanParts, hooks: Hooks, limits: Limits) -> None:
        self._replica, self._span, self._hooks, self._limits = replica, span, hooks, limits
        self._stats = Stats()  # replaced as a whole
        self._last_end_s = 0.0
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
                next_batch=hooks.next_batch if span.first_shard == 0 else None,
                on_step=self._stepped,
                on_answer=self._answered,
                limits=limits,
            )
        )

    @property
    def stats(self) -> Stats:
        return self._stats

    @property
    def failure(self) -> SwarmError | None:
        """Why training ended by itself, or None."""
        return self._failure

    @property
    def waits_for(self) -> str:
        """Why microbatches do not come back, in words; empty while they do."""
        source = self._place.source
        return source.waits_for if source is not None else ""

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
        """Run ``function`` between two inner steps, with nothing under way, and give its result or raise its error.

        Raises `DeadlineExceeded` after ``timeout_s`` (the function may still run then, if it had begun), and what
        ended the training if it ended.
        """
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

    async def snapshot(self, timeout_s: float = COMMAND_TIMEOUT_S) -> Snapshot:
        """The movement between two steps, and the tokens behind it."""
        return await self.call(self._snapshot, timeout_s)

    async def land(self, new_anchor: Float32, snapshot: Snapshot, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Put the replica onto ``new_anchor``; what it learned since ``snapshot`` stays and is pending."""
        await self.call(lambda: self._land(new_anchor, snapshot), timeout_s)

    async def load(self, anchor: Float32, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Put the replica onto ``anchor`` as it is; its own movement is dropped, its moments stay."""
        await self.call(lambda: self._replace(self._replica.load, anchor), timeout_s)

    async def reset(self, anchor: Float32, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Start again from ``anchor`` with fresh moments; nothing is pending afterwards."""
        await self.call(lambda: self._replace(self._replica.reset, anchor), timeout_s)

    async def evaluate(self, anchor: Float32, batches: Sequence[Tokens], timeout_s: float = COMMAND_TIMEOUT_S) -> float:
        """Mean loss of the ``anchor`` of a whole model over ``batches``, in nats per token."""
        return await self.call(lambda: self._replica.evaluate(anchor, batches), timeout_s)

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
        self._stats = after_step(self._stats, stepped.result, stepped.num_tokens, now_s - self._last_end_s)
        self._last_end_s = now_s
        self._tell_of_bad_steps()

    def _answered(self, tokens: Tokens, answer: Answer) -> None:
        """A microbatch whose loss is not finite is in no inner step: the source alone hears of it."""
        if math.isnan(answer.loss):
            bad = StepResult(loss=math.nan, grad_norm=math.nan, ok=False)
            self._stats = after_step(self._stats, bad, 0, 0.0)
            self._tell_of_bad_steps()

    def _tell_of_bad_steps(self) -> None:
        bad = self._stats.consecutive_bad_steps
        if bad and bad % self._limits.max_bad_steps == 0:
            self._hooks.on_bad(bad)

    def _snapshot(self) -> Snapshot:
        stats = self._stats
        return Snapshot(
            movement=self._replica.movement(),
            tokens=stats.pending_tokens,
            steps=stats.pending_steps,
            total_tokens=stats.tokens,
            total_steps=stats.steps,
        )

    def _land(self, new_anchor: Float32, snapshot: Snapshot) -> None:
        self._replica.land(new_anchor, snapshot.movement)
        self._stats = replace(
            self._stats,
            pending_tokens=self._stats.tokens - snapshot.total_tokens,
            pending_steps=self._stats.steps - snapshot.total_steps,
        )

    def _replace(self, replace_weights: Callable[[Float32], None], anchor: Float32) -> None:
        replace_weights(anchor)
        self._stats = replace(self._stats, pending_tokens=0, pending_steps=0, consecutive_bad_steps=0)
