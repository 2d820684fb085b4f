"""Schedules over committed tokens and rounds: pure functions of the run spec."""

from __future__ import annotations

import math

from swarm.run_spec import Inner, Outer, Rounds, RunSpec


def learning_rate(inner: Inner, committed_tokens: int, total_tokens: int) -> float:
    """Linear warm-up over ``warmup_tokens``, then a cosine down to ``min_learning_rate_fraction``."""
    if committed_tokens < inner.warmup_tokens:
        return inner.learning_rate * (committed_tokens + 1) / (inner.warmup_tokens + 1)
    span = max(1, total_tokens - inner.warmup_tokens)
    progress = min(1.0, (committed_tokens - inner.warmup_tokens) / span)
    floor = inner.min_learning_rate_fraction
    return inner.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def outer_momentum(outer: Outer, round_number: int) -> float:
    """Momentum of round ``round_number`` (from 1): none in the first, then linearly up to its full value."""
    if outer.momentum_warmup_rounds == 0:
        return outer.momentum
    return outer.momentum * min(1.0, (round_number - 1) / outer.momentum_warmup_rounds)


def tokens_of_round(rounds: Rounds, round_number: int) -> int:
    """Tokens, over all replicas, after which round ``round_number`` (from 1) opens."""
    first = rounds.first_tokens_per_round
    if first is None or round_number > rounds.growth_rounds:
        return rounds.tokens_per_round
    share = (round_number - 1) / rounds.growth_rounds
    return round(first + (rounds.tokens_per_round - first) * share)


def max_weight_tokens(rounds: Rounds, round_number: int) -> int:
    """What one contribution to round ``round_number`` may weigh: four times the round."""
    return 4 * tokens_of_round(rounds, round_number)


def is_checkpoint_round(spec: RunSpec, round_number: int, total_tokens: int) -> bool:
    """Whether a checkpoint is published after this round: at the spec's cadence, and when the run ends."""
    return round_number % spec.checkpoints.every_rounds == 0 or is_finished(spec, total_tokens)


def is_finished(spec: RunSpec, total_tokens: int) -> bool:
    return total_tokens >= spec.total_tokens
