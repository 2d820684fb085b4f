"""What rounds ask of a replica under training, over whatever trains it; and what training counts.

Decides that snapshots, resets and evaluations happen between two inner steps, and what counts as trained: the tokens of
steps that were good. Leaves how a command comes between two steps to the trainers (`peer.training.trainer` of a whole
model alone, `peer.pipeline.trainer` of a span among others).
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from peer.rounds.codec import Float32
from peer.training.movement import Movement
from swarm.errors import SwarmError

if TYPE_CHECKING:
    from peer.training.microbatches import StepResult, Tokens

T = TypeVar("T")

COMMAND_TIMEOUT_S = 600.0
RATE_WINDOW_S = 10.0


class Replica(Protocol):
    """What the trainer needs of a replica, in 8 bits or fp32. Only the trainer's thread touches it after the start.

    ``values``: of which shard, in the flat vector of the whole; None: all.
    """

    def load(self, anchor: Float32, values: slice | None = None) -> None: ...
    def reset(self, anchor: Float32, values: slice | None = None) -> None: ...
    def movement(self, values: slice | None = None) -> Movement: ...
    def land(self, new_anchor: Float32, snapshot: Movement, values: slice | None = None) -> None: ...
    def step(self, tokens: Tokens, learning_rate: float) -> StepResult: ...
    def evaluate(self, anchor: Float32, batches: Sequence[Tokens]) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts since the start. Two of them give everything between: any number of readers, none disturbs another."""

    tokens: int = 0
    steps: int = 0
    bad_steps: int = 0
    consecutive_bad_steps: int = 0
    tokens_per_s: float = 0.0
    loss_sum: float = 0.0  # nats per token, over good steps
    last_loss: float = math.nan
    last_tokens: int = 0
    """of the last good step"""

    entered_later: Mapping[int, int] = field(default_factory=dict)
    """of the tokens those that passed no shard before this one, by that shard: they entered there"""
    later_per_s: Mapping[int, float] = field(default_factory=dict)
    """the same of ``tokens_per_s``"""

    def tokens_of(self, shard: int) -> int:
        """Tokens that the replica's values of ``shard`` were trained on."""
        return self.tokens - sum(tokens for entrance, tokens in self.entered_later.items() if entrance > shard)

    def tokens_per_s_of(self, shard: int) -> float:
        """Lately, by the replica's values of ``shard``."""
        return max(0.0, self.tokens_per_s - sum(rate for at, rate in self.later_per_s.items() if at > shard))

    def after_idling(self, idle_s: float) -> Stats:
        """The same so long after the last good step: had it been quick, another one would have come by now."""
        most = self.last_tokens / idle_s if idle_s > RATE_WINDOW_S else math.inf
        if self.tokens_per_s <= most:
            return self
        share = most / self.tokens_per_s
        later = {at: share * rate for at, rate in self.later_per_s.items()}
        return replace(self, tokens_per_s=most, later_per_s=later)

    def mean_loss_since(self, earlier: Stats) -> float:
        """Mean training loss of the good steps since ``earlier``; NaN where there were none."""
        steps = self.steps - earlier.steps
        return (self.loss_sum - earlier.loss_sum) / steps if steps else math.nan


def after_step(
    stats: Stats,
    result: StepResult,
    num_tokens: int,
    elapsed_s: float,
    entered_later: Mapping[int, int] | None = None,
) -> Stats:
    """The counts after one step that ended ``elapsed_s`` after the one before. Bad steps count no tokens.

    ``entered_later``: see `Stats`.
    """
    if not result.ok:
        return replace(stats, bad_steps=stats.bad_steps + 1, consecutive_bad_steps=stats.consecutive_bad_steps + 1)
    keep = math.exp(-elapsed_s / RATE_WINDOW_S) if stats.steps else 0.0
    elapsed_s = max(elapsed_s, 1e-9)
    rate, entered = num_tokens / elapsed_s, entered_later or {}
    before, speeds = stats.entered_later, stats.later_per_s
    at_all = sorted({*before, *entered})
    return replace(
        stats,
        tokens=stats.tokens + num_tokens,
        steps=stats.steps + 1,
        consecutive_bad_steps=0,
        tokens_per_s=keep * stats.tokens_per_s + (1 - keep) * rate,
        loss_sum=stats.loss_sum + result.loss,
        last_loss=result.loss,
        last_tokens=num_tokens,
        entered_later={at: before.get(at, 0) + entered.get(at, 0) for at in at_all},
        later_per_s={at: keep * speeds.get(at, 0.0) + (1 - keep) * entered.get(at, 0) / elapsed_s for at in at_all},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The movement between two steps, and what had been counted then."""

    movement: Movement
    stats: Stats


class BetweenSteps(ABC):
    """A trainer, as rounds and the runtime see it.

    ``values``: of which shard, in the flat vector of all that is trained here; None: all.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._stats = Stats()  # replaced as a whole, under the lock
        self._counting = threading.Lock()
        self._counted_at_s = 0.0
        """when the last good step was"""

    @property
    def stats(self) -> Stats:
        return self._stats.after_idling(time.monotonic() - self._counted_at_s)

    @property
    @abstractmethod
    def failure(self) -> SwarmError | None:
        """Why training ended by itself, or None."""

    @property
    def waits_for(self) -> str:
        """What training waits for, in words; empty while it goes on."""
        return ""

    @property
    def service_tokens_per_s(self) -> float:
        """What could be trained if nothing was ever waited for; 0 before that was seen."""
        return self._stats.tokens_per_s

    @abstractmethod
    def start(self) -> None:
        """Begin to train. Once per trainer."""

    @abstractmethod
    def pause(self) -> None:
        """Begin nothing new; what is under way is finished, and commands are still carried out."""

    @abstractmethod
    def wake(self) -> None:
        """There may be a batch now."""

    @abstractmethod
    async def stop(self, timeout_s: float) -> None:
        """End, and finish what is being computed. Raises `DeadlineExceeded` if that takes longer."""

    @abstractmethod
    async def call(self, function: Callable[[], T], timeout_s: float = COMMAND_TIMEOUT_S) -> T:
        """Run ``function`` between two inner steps, and give its result or raise its error.

        Raises `DeadlineExceeded` after ``timeout_s`` (the function may still run then, if it had begun), and what
        ended the training if it ended.
        """

    def _count(
        self, result: StepResult, num_tokens: int, elapsed_s: float, entered_later: Mapping[int, int] | None = None
    ) -> int:
        """Count a step that was made, in whichever thread; gives how many were bad in a row.

        Bad steps count no tokens. ``entered_later``: see `Stats`.
        """
        with self._counting:
            self._stats = after_step(self._stats, result, num_tokens, elapsed_s, entered_later)
            if result.ok:
                self._counted_at_s = time.monotonic()
            return self._stats.consecutive_bad_steps

    async def snapshot(self, values: slice | None = None, timeout_s: float = COMMAND_TIMEOUT_S) -> Snapshot:
        return await self.call(lambda: Snapshot(movement=self._replica.movement(values), stats=self._stats), timeout_s)

    async def land(self, new_anchor: Float32, snapshot: Movement, values: slice | None = None) -> None:
        """Put the replica onto ``new_anchor``; what it learned since ``snapshot`` stays."""
        await self.call(lambda: self._replica.land(new_anchor, snapshot, values))

    async def reset(self, anchor: Float32, values: slice | None = None) -> None:
        """Start again from ``anchor`` with fresh moments."""

        def reset() -> None:
            self._replica.reset(anchor, values)
            with self._counting:
                self._stats = replace(self._stats, consecutive_bad_steps=0)

        await self.call(reset)

    async def evaluate(self, anchor: Float32, batches: Sequence[Tokens]) -> float:
        """Mean loss of the ``anchor`` of a whole model over ``batches``, in nats per token; training goes on after.

        ``anchor`` must not change before this returns.
        """
        return await self.call(lambda: self._replica.evaluate(anchor, batches))

    async def evaluate_round(self, anchor: Float32, batches: Sequence[Tokens], number: int) -> float:
        """As `evaluate`, where ``anchor`` is that of a span after round ``number``: the spans after it go on.

        Raises `NetworkError` where they have not that round's anchors, or not in time.
        """
        raise SwarmError("a model that is trained alone is evaluated alone")
