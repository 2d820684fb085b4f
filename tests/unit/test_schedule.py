"""Schedules: where they start, where they end, and that they only go the way they should."""

from __future__ import annotations

import pytest

from swarm import schedule
from swarm.run_spec import Inner, Outer, Rounds, RunSpec

INNER = Inner(learning_rate=1.0, warmup_tokens=100, min_learning_rate_fraction=0.1)


def _spec(total_tokens: int, every_rounds: int) -> RunSpec:
    return RunSpec.model_validate(
        {
            "name": "x",
            "total_tokens": total_tokens,
            "organizer_key": "aa" * 32,
            "publication_key": "bb" * 32,
            "model": {"family": "llama"},
            "data": {"manifest_digest": "aa" * 32, "tokenizer_digest": "aa" * 32},
            "checkpoints": {"every_rounds": every_rounds},
        }
    )


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        ("start", 0, 1 / 101),
        ("last of the warm-up", 99, 100 / 101),
        ("top", 100, 1.0),
        ("half of the cosine", 550, 0.55),
        ("end", 1000, 0.1),
        ("past the end", 5000, 0.1),
    ],
)
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(name: str, tokens: int, expected: float) -> None:
    """Never zero, highest right after the warm-up, the floor at the end and after it."""
    assert schedule.learning_rate(INNER, tokens, 1000) == pytest.approx(expected)


def test_the_learning_rate_never_rises_after_the_warm_up() -> None:
    """From the top on it only falls."""
    rates = [schedule.learning_rate(INNER, tokens, 1000) for tokens in range(100, 1100, 10)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("tokens", [0, 5, 10, 20])
def test_a_run_that_ends_within_its_warm_up_has_a_learning_rate(tokens: int) -> None:
    """No division by zero where the warm-up is as long as the run."""
    inner = Inner(learning_rate=1.0, warmup_tokens=10)
    assert 0 < schedule.learning_rate(inner, tokens, 10) <= 1


@pytest.mark.parametrize(("round_number", "expected"), [(1, 0.0), (2, 0.2), (3, 0.4), (5, 0.8), (6, 0.8), (1000, 0.8)])
def test_outer_momentum_starts_at_none(round_number: int, expected: float) -> None:
    """The first round is plain averaging; the warm-up ends at the full momentum."""
    assert schedule.outer_momentum(Outer(momentum=0.8, momentum_warmup_rounds=4), round_number) == pytest.approx(
        expected
    )


def test_outer_momentum_without_warm_up_is_there_at_once() -> None:
    """Zero warm-up rounds mean full momentum in round 1."""
    assert schedule.outer_momentum(Outer(momentum=0.5, momentum_warmup_rounds=0), 1) == 0.5


@pytest.mark.parametrize(
    ("name", "rounds", "expected"),
    [
        ("constant", Rounds(tokens_per_round=100), [100, 100, 100]),
        (
            "growing",
            Rounds(tokens_per_round=100, first_tokens_per_round=20, growth_rounds=4),
            [20, 40, 60, 80, 100, 100],
        ),
        ("first without growth", Rounds(tokens_per_round=100, first_tokens_per_round=20), [100, 100]),
        ("growth of one round", Rounds(tokens_per_round=9, first_tokens_per_round=3, growth_rounds=1), [3, 9]),
    ],
)
def test_rounds_grow_to_their_length(name: str, rounds: Rounds, expected: list[int]) -> None:
    """The first round is as long as asked, and the rounds after the growth are full."""
    assert [schedule.tokens_of_round(rounds, number + 1) for number in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("name", "round_number", "tokens", "expected"),
    [
        ("before the cadence", 4, 10, False),
        ("at the cadence", 5, 10, True),
        ("again", 10, 10, True),
        ("the run ends here", 7, 100, True),
        ("the run ends beyond its target", 7, 101, True),
        ("one token short", 7, 99, False),
    ],
)
def test_checkpoints_come_at_the_cadence_and_at_the_end(
    name: str, round_number: int, tokens: int, expected: bool
) -> None:
    """A run that ends off the cadence still publishes its last state."""
    assert schedule.is_checkpoint_round(_spec(100, 5), round_number, tokens) is expected
