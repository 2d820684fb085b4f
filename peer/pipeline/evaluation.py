"""A microbatch through the anchors of one round, span after span: its loss, and nothing else comes of it.

Decides how much of this peer's time others may ask for: a round's evaluation is begun where what was spent before is
made up for, or where the run wants the loss of that round, and a round has so many sequences, whoever asks. It holds
the compute slot like any other computation, and needs no place in the gate, as no activations stay; but only a few of
others wait here at once. Leaves which round is measured, by whom and when to `peer.span_evaluation`, and whether its
anchors are here to whoever hosts the shards.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, replace

from peer.pipeline.messages import Answer, Entering
from peer.pipeline.onward import Onward
from peer.pipeline.slot import Slot
from peer.rounds.codec import Float32
from peer.training.allowance import Allowance
from peer.training.microbatches import Microbatch, Tokens
from peer.training.passes import Measured, SpanReplica
from swarm.errors import Busy, DataError, DeadlineExceeded

# Of one round: an evaluation, once more where its peer went away, and what was asked for again.
MAX_SEQUENCES_A_ROUND = 256
# Of one evaluation at once: several spans then compute at the same time.
MAX_AT_ONCE = 4
# Of others at once, each of whom waits for the spans after ours: a peer answers so many calls of all kinds, and whoever
# took them all would keep it out of rounds.
MAX_ANSWERED = 8

Anchors = Callable[[int, int], AbstractAsyncContextManager[Sequence[Float32]]]
"""(shard, round) -> the anchors after that round of the hosted shards from this one on, unchanged meanwhile. Raises
`Busy` where one is not there yet or about to change, and `NotFound` where one is further on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRules:
    """``allowance``: of this peer's time; ``is_wanted``: whether the run wants a round's loss, whatever it takes."""

    anchors: Anchors
    allowance: Allowance
    is_wanted: Callable[[int], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationParts:
    rules: EvaluationRules
    replica: SpanReplica
    slot: Slot
    later: Mapping[int, slice]
    """see `peer.pipeline.place.PlaceParts`"""
    onward: Onward | None
    """None where the span has the head"""
    timeout_s: float
    """for one microbatch of our own"""


class Evaluation:
    def __init__(self, parts: EvaluationParts) -> None:
        self._parts = parts
        self._round = -1
        self._sequences = 0
        self._answered: Counter[bytes] = Counter()
        self._one_at_a_time = asyncio.Lock()
        self._has_ended = False

    async def answer(self, caller: bytes, read: Callable[[], Awaitable[Entering]]) -> Answer:
        """For another peer. Raises `Busy` where too much is asked for, before anything is read, and as `Anchors`."""
        clock = asyncio.get_running_loop().time
        came_s = clock()
        with self._admitted(caller):
            async with self._one_at_a_time:
                entering = await read()  # in its turn: decoded hidden states are large, and one's alone are held
                shard, number = entering.first_shard, entering.round
                if number is None:
                    raise DataError("an evaluation without a round")
                async with self._parts.rules.anchors(shard, number) as anchors:
                    if self._has_ended:
                        raise Busy("busy: this peer is leaving")
                    self._count(number, len(entering.tokens))
                    measured = await self._measure(entering, anchors)
            entering = replace(entering, hidden_BLH=None)
            return await self._go_on(entering, measured, came_s + entering.time_left_s - clock())

    def end(self) -> None:
        """Answer nobody any more: nothing is computed from here on."""
        self._has_ended = True

    async def mean_loss(self, anchor: Float32, batches: Sequence[Tokens], number: int) -> float:
        """Of ``anchor``, that of our span after round ``number``, and of those that the spans after ours have.

        In nats per token. Raises `NetworkError` where it is not to be had in time, and `DataError` where it is not
        finite or there are no batches.
        """
        at_once = asyncio.Semaphore(MAX_AT_ONCE)

        async def one(tokens: Tokens) -> float:
            async with at_once:
                entering = Entering(microbatch_id=b"", tokens=tokens, time_left_s=self._parts.timeout_s, round=number)
                measured = await self._measure(entering, (anchor,))
                answer = await self._go_on(entering, measured, entering.time_left_s)
                return answer.loss * tokens[:, 1:].size

        jobs = [asyncio.ensure_future(one(tokens)) for tokens in batches]
        try:
            losses = await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        loss = math.fsum(losses) / max(1, sum(tokens[:, 1:].size for tokens in batches))
        if not batches or not math.isfinite(loss):
            raise DataError(f"{len(batches)} validation batches have no finite loss")
        return loss

    @contextmanager
    def _admitted(self, caller: bytes) -> Iterator[None]:
        if self._answered.total() >= MAX_ANSWERED or self._answered[caller] >= MAX_AT_ONCE:
            raise Busy("busy: enough evaluations are under way")
        self._answered[caller] += 1
        try:
            yield
        finally:
            self._answered[caller] -= 1
            if not self._answered[caller]:
                del self._answered[caller]

    def _count(self, number: int, num_sequences: int) -> None:
        rules = self._parts.rules
        if number > self._round:
            if not rules.allowance.is_free and not rules.is_wanted(number):
                raise Busy("busy: enough of the time went into evaluations lately")
            self._round, self._sequences = number, 0
        if number < self._round or self._sequences + num_sequences > MAX_SEQUENCES_A_ROUND:
            raise Busy(f"busy: round {number} was evaluated")
        self._sequences += num_sequences

    async def _measure(self, entering: Entering, anchors: Sequence[Float32]) -> Measured:
        parts = self._parts
        entrance = entering.first_shard if entering.first_shard in parts.later else None
        values = parts.later.get(entering.first_shard)
        given = Microbatch(tokens=entering.tokens, weight=0.0, hidden_BLH=entering.hidden_BLH, entrance=entrance)

        took_s = 0.0

        def measure() -> Measured:
            nonlocal took_s
            began_s = time.monotonic()
            try:
                return parts.replica.measure(given, anchors, values)
            finally:
                took_s = time.monotonic() - began_s

        try:
            return await parts.slot.run(measure, trains=False)
        finally:  # whoever hung up meanwhile, or asked for what failed, had the time all the same
            parts.rules.allowance.spend(took_s)

    async def _go_on(self, entering: Entering, measured: Measured, left_s: float) -> Answer:
        onward = self._parts.onward
        if onward is None:
            loss = measured.loss / entering.tokens[:, 1:].size
            return Answer(loss=loss if math.isfinite(loss) else math.nan, gradient_BLH=None)
        if left_s <= 0:
            raise DeadlineExceeded("no time is left for the spans after this one")
        return await onward.ask(entering, measured.hidden_BLH, left_s)
