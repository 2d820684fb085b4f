"""What a volunteer trains: joins the trainer's thread, the token reader and the run's schedules into one replica.

Decides which batch an inner step gets and at which learning rate; leaves steps to the trainer that is built for the
replica, what a peer reads to `swarm.assignment` and `swarm.removals`, and rounds to `peer.rounds.exchange`, whose
`Trainer` each shard of it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from peer.rounds.codec import Float32
from peer.training.allowance import Allowance
from peer.training.between_steps import BetweenSteps, Replica, Stats
from peer.training.data import TokenReader
from peer.training.layout import slices_of
from peer.training.movement import Movement
from peer.training.trainer import Hooks, Limits
from swarm import assignment, schedule
from swarm.assignment import Reading
from swarm.errors import NetworkError, SwarmError, VerificationError
from swarm.log import LogHead
from swarm.removals import Left, Removal, left_to_read
from swarm.run_spec import RunSpec

VALIDATION_SEQUENCES = 64
# Of a peer's time. Where rounds are short, each evaluated by somebody, it would be a tenth and more.
EVALUATION_SHARE = 0.03
RETRY_S = 2.0

R = TypeVar("R", bound=Replica)
Build = Callable[[R, Hooks, Limits], BetweenSteps]
"""makes the trainer of a replica"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Reading:
    """The round that is read for, and the attempted steps at which it began."""

    round: int
    first_step: int


@dataclass(frozen=True, slots=True)
class _Unread:
    """A removal list, and what it leaves to read by round; replaced as a whole: the trainer's thread reads it too."""

    removals: tuple[Removal, ...] = ()
    left: dict[int, Left] = field(default_factory=dict)


class Training:
    def __init__(
        self, spec: RunSpec, peer_key: bytes, reader: TokenReader, limits: Limits, *, reads: bool = True
    ) -> None:
        """``reads``: whether batches are read here; those of a later span come from other peers."""
        self._reads = reads
        self._spec, self._peer_key, self._reader, self._limits = spec, peer_key, reader, limits
        self._all = Left(counts=tuple(reader.sequences_per_shard()), kept={})
        self._unread = _Unread()
        self._reading = _Reading(1, 0)
        self._attempts = 0
        self._committed_tokens = 0
        self._readable: set[int] = set()
        self._prefetching: asyncio.Task[None] | None = None
        self.evaluating = Allowance(EVALUATION_SHARE)
        """for evaluations: ours, and what others ask of our span"""
        self._trainer: BetweenSteps | None = None
        self.failed = asyncio.Event()
        self.failure: SwarmError | None = None

    @property
    def trainer(self) -> BetweenSteps:
        if self._trainer is None:
            raise SwarmError("training has not begun")
        return self._trainer

    @property
    def stats(self) -> Stats:
        return self._trainer.stats if self._trainer is not None else Stats()

    @property
    def service_tokens_per_s(self) -> float:
        """What could be trained if nothing was ever waited for; 0 before that was seen."""
        return self._trainer.service_tokens_per_s if self._trainer is not None else 0.0

    @property
    def waits_for(self) -> str:
        """What training waits for, in words; empty while it goes on."""
        return self._trainer.waits_for if self._trainer is not None else ""

    @property
    def tokens(self) -> int:
        """Tokens trained since the start."""
        return self.stats.tokens

    async def start(
        self, replica: R, anchors: Sequence[Float32], head: LogHead, on_bad: Callable[[int], None], build: Build[R]
    ) -> None:
        """Begin from ``anchors``, of all shards hosted, in order; the first one's stands at ``head``.

        ``on_bad`` is told of repeated bad steps.
        """
        loop = asyncio.get_running_loop()
        for anchor, values in zip(anchors, slices_of([len(anchor) for anchor in anchors]), strict=True):
            replica.load(anchor, values)
        hooks = Hooks(
            next_batch=self._next_batch,
            learning_rate=self._learning_rate,
            on_failed=lambda error: _quietly(loop, self.failed.set),
            on_bad=lambda count: _quietly(loop, on_bad, count),
        )
        self._trainer = build(replica, hooks, self._limits)
        self.follow(head)
        self._trainer.start()

    def follow(self, head: LogHead) -> None:
        """Read for the round after ``head`` from now on, with the learning rate of its committed tokens.

        Of several shards the first one's rounds, of those that are hosted here, say when.
        """
        self._committed_tokens = head.total_tokens
        self._reading = _Reading(head.round + 1, self._attempts)
        self._prefetch_beside()

    def remove(self, removals: Sequence[Removal]) -> None:
        """Read these documents no more, each from its round on."""
        self._unread = _Unread(tuple(removals))
        if self._trainer is not None:
            self._prefetch_beside()

    def _prefetch_beside(self) -> None:
        if self._reads and (self._prefetching is None or self._prefetching.done()):
            self._prefetching = asyncio.get_running_loop().create_task(self._prefetch())

    async def snapshot(self, shard: int = 0, values: slice | None = None) -> tuple[Movement, int]:
        """See `peer.rounds.exchange_parts.Trainer`; ``values``: of ``shard``, None: all."""
        snapshot = await self.trainer.snapshot(values)
        return snapshot.movement, snapshot.stats.tokens_of(shard)

    async def land(
        self, anchor: Float32, snapshot: Movement | None, round_number: int, values: slice | None = None
    ) -> None:
        """See `peer.rounds.exchange_parts.Trainer`; ``values``: of which shard, None: all."""
        if snapshot is None:
            await self.trainer.reset(anchor, values)
        else:
            await self.trainer.land(anchor, snapshot, values)

    async def evaluate(self, anchor: Float32) -> float:
        """Mean loss of ``anchor`` (nats per token) on the run's held-out sequences; always the same ones."""
        batches = await self._held_out()
        began_s = time.monotonic()
        try:
            return await self.trainer.evaluate(anchor, batches)
        finally:  # one that fails took its time, too
            self.evaluating.spend(time.monotonic() - began_s)

    async def evaluate_round(self, anchor: Float32, number: int) -> float:
        """As `evaluate`, where ``anchor`` is our span's after round ``number``: the spans after it go on."""
        return await self.trainer.evaluate_round(anchor, await self._held_out(), number)

    async def _held_out(self) -> list[npt.NDArray[np.int64]]:
        await self._reader.ensure_validation(VALIDATION_SEQUENCES)
        return list(self._reader.validation_batches(VALIDATION_SEQUENCES, self._spec.inner.microbatch_sequences))

    async def stop(self, timeout_s: float) -> None:
        if self._prefetching is not None:
            self._prefetching.cancel()
        if self._trainer is not None:
            await self._trainer.stop(timeout_s)

    def _next_batch(self, attempts: int) -> npt.NDArray[np.int64] | None:
        """In the trainer's thread: the batch of this step, or None while its token shard is not here."""
        self._attempts = attempts
        reading = self._reading
        left = self._left_in(reading.round, self._unread)  # once: another list may come before the draw
        if self._token_shard(reading.round, left) not in self._readable:
            return None
        chosen = assignment.reading(
            self._spec.seed,
            self._peer_key,
            reading.round,
            attempts - reading.first_step,
            left.counts,
            self._spec.inner.microbatch_sequences,
        )
        shard = chosen.token_shard
        sequences = tuple(left.sequence(shard, index) for index in chosen.sequences)
        return self._reader.batch(Reading(token_shard=shard, sequences=sequences))

    def _learning_rate(self) -> float:
        return schedule.learning_rate(self._spec.inner, self._committed_tokens, self._spec.total_tokens)

    def _token_shard(self, round_number: int, left: Left) -> int:
        return assignment.token_shard_of(self._spec.seed, self._peer_key, round_number, left.counts)

    def _left_in(self, round_number: int, unread: _Unread) -> Left:
        """What may be read in a round; the same for everybody who has the same list."""
        if not any(removal.from_round <= round_number for removal in unread.removals):
            return self._all
        found = unread.left.get(round_number)
        if found is None:
            manifest, length = self._reader.manifest, self._spec.data.sequence_length
            found = left_to_read(manifest, length, unread.removals, round_number)
            unread.left[round_number] = found
            for past in [number for number in tuple(unread.left) if number < round_number - 1]:
                unread.left.pop(past, None)
        return found

    async def _prefetch(self) -> None:
        """Make the token shard of this round readable, then that of the next; retried until it works."""
        while True:
            now, unread = self._reading.round, self._unread
            try:
                shards = [self._token_shard(number, self._left_in(number, unread)) for number in (now, now + 1)]
                for shard in dict.fromkeys(shards):
                    await self._reader.ensure(shard)
                    self._readable = (self._readable | {shard}) & set(shards)
                    self.trainer.wake()
            except (NetworkError, VerificationError) as error:
                log.warning("token shard not yet here: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            except SwarmError as error:  # a full disk, or nothing left to read: this needs the person
                self.failure = error
                self.failed.set()
                return
            if self._reading.round == now and self._unread is unread:
                return


@dataclass(frozen=True, slots=True)
class ShardTraining:
    """The `peer.rounds.exchange_parts.Trainer` of one shard's rounds: ``values`` of all that is trained here."""

    training: Training
    shard: int
    values: slice

    async def snapshot(self) -> tuple[Movement, int]:
        return await self.training.snapshot(self.shard, self.values)

    async def land(self, anchor: Float32, snapshot: Movement | None, round_number: int) -> None:
        await self.training.land(anchor, snapshot, round_number, self.values)

    @property
    def tokens(self) -> int:
        return self.training.stats.tokens_of(self.shard)


def _quietly(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Call on the event loop from the trainer's thread; a loop that has ended needs no news."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)
