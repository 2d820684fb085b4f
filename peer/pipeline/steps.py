"""The replica of a span, and what counts towards its next inner step.

Decides that a microbatch counts at most once here, whoever sends it and however often; that no gradient is taken in
that was computed for weights of before an inner step; and what an inner step is made of. Leaves when it is made to
`peer.pipeline.hop`, gradients to the replica. One computation at a time may touch it: whoever has the slot.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from peer.pipeline.hop_codec import can_travel
from peer.pipeline.messages import Answer, Entering
from peer.training.microbatches import Microbatch, StepResult
from peer.training.passes import Passed, SpanReplica
from swarm.errors import Busy

# Ids that are remembered: far more than can be asked for again before their time is over.
MAX_REMEMBERED = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """An inner step that was made, and which microbatches it learned from."""

    result: StepResult
    num_tokens: int
    microbatch_ids: tuple[bytes, ...]
    entered_later: Mapping[int, int]
    """of these tokens those that entered at a later shard than the span's first, by that shard"""


@dataclass(slots=True)
class _Gathered:
    loss: float = 0.0
    """sum of the means of the microbatches"""
    num_tokens: int = 0
    microbatch_ids: list[bytes] = field(default_factory=list)
    entered_later: dict[int, list[int]] = field(default_factory=dict)
    """shard -> tokens of each microbatch that entered there"""
    is_spoiled: bool = False
    """a way back broke off, or its gradients are not finite: nobody knows what of it was taken in"""


class Steps:
    def __init__(
        self,
        replica: SpanReplica,
        learning_rate: Callable[[], float],
        step_microbatches: int,
        later: Mapping[int, slice] | None = None,
    ) -> None:
        """``step_microbatches``: of an inner step, at most. Where that is one, its gradients never wait.

        ``later``: shards after the span's first at which microbatches may enter, and the replica's values from there.
        """
        self._replica, self._learning_rate, self._later = replica, learning_rate, later or {}
        self._known_number = 1 if step_microbatches == 1 else None
        self._gathered = _Gathered()
        self._counted: OrderedDict[bytes, None] = OrderedDict()
        self._has_begun = False
        self.generation = 0
        """of the weights: one more after each inner step, and after whatever else changes them"""

    @property
    def num_gathered(self) -> int:
        """Microbatches that count towards the next inner step."""
        return len(self._gathered.microbatch_ids)

    def forward(self, entering: Entering) -> Passed:
        """Raises `DataError` for what does not fit the span."""
        if not self._has_begun:
            self._replica.begin_step(self._learning_rate(), self._known_number)
            self._has_begun = True
        weight = 1 / entering.tokens[:, 1:].size
        entrance = entering.first_shard if entering.first_shard in self._later else None
        given = Microbatch(tokens=entering.tokens, weight=weight, hidden_BLH=entering.hidden_BLH, entrance=entrance)
        return self._replica.forward(given)

    def backward(self, entering: Entering, passed: Passed, came: Answer | None, generation: int) -> Answer:
        """``came``: from the span after, None in the last one; ``generation``: of the weights on the way there.

        A loss of NaN where the gradient could not travel on. Raises `Busy` where the weights have changed since.
        """
        if generation != self.generation:
            raise Busy("busy: an inner step was made meanwhile, the microbatch was dropped")
        if came is not None and came.gradient_BLH is None:
            return came
        counts = entering.microbatch_id not in self._counted
        try:
            trained = self._replica.backward(passed, came.gradient_BLH if came is not None else None, counts=counts)
        except BaseException:
            self._gathered.is_spoiled |= counts
            if counts and self._known_number is not None:
                self._break_off(entering)
            raise
        is_lost = trained.gradient_BLH is not None and not can_travel(trained.gradient_BLH)
        self._gathered.is_spoiled |= counts and (trained.is_spoiled or is_lost)
        if math.isnan(trained.loss) or is_lost:
            return Answer(loss=math.nan, gradient_BLH=None)
        num_tokens = entering.tokens[:, 1:].size
        answer = Answer(
            loss=came.loss if came is not None else trained.loss / num_tokens, gradient_BLH=trained.gradient_BLH
        )
        if counts:
            self._count(entering, num_tokens, answer.loss)
        return answer

    def finish(self) -> Stepped | None:
        """Make the inner step; None where nothing counted towards it. Microbatches under way come to nothing."""
        gathered, self._gathered = self._gathered, _Gathered()
        has_begun, self._has_begun = self._has_begun, False
        self.generation += 1
        number = len(gathered.microbatch_ids)
        if gathered.is_spoiled or not number:
            if has_begun:
                self._replica.drop_step()
            return None
        entered = [(self._later[shard], len(tokens)) for shard, tokens in gathered.entered_later.items()]
        outcome = self._replica.finish_step(number - sum(count for _, count in entered), entered)
        result = StepResult(
            loss=gathered.loss / number, grad_norm=outcome.grad_norm, ok=outcome.ok, num_microbatches=number
        )
        return Stepped(
            result=result,
            num_tokens=gathered.num_tokens,
            microbatch_ids=tuple(gathered.microbatch_ids),
            entered_later={shard: sum(tokens) for shard, tokens in gathered.entered_later.items()},
        )

    def _break_off(self, entering: Entering) -> None:
        """The step's only microbatch broke off, when some matrices may have learned from it as they were passed.

        That stays. So they must not learn from it again, and what comes next has a step of its own.
        """
        self._remember(entering)
        self.finish()

    def _count(self, entering: Entering, num_tokens: int, loss: float) -> None:
        self._gathered.loss += loss
        self._gathered.num_tokens += num_tokens
        self._gathered.microbatch_ids.append(entering.microbatch_id)
        if entering.first_shard in self._later:
            self._gathered.entered_later.setdefault(entering.first_shard, []).append(num_tokens)
        self._remember(entering)

    def _remember(self, entering: Entering) -> None:
        self._counted[entering.microbatch_id] = None
        if len(self._counted) > MAX_REMEMBERED:
            self._counted.popitem(last=False)
