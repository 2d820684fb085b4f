"""The race to a loss: every side trains the same, and a side that misses the loss makes no speedup."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import time_to_loss
from loss_ours import _speed
from loss_rivals import seconds_per_step, steps_to_loss
from loss_task import FULL, QUICK, Task

from swarm import run_file
from swarm.run_spec import RunSpec

RANDOM = np.random.default_rng(0)


class RandomText:
    """Text without anything to learn but how often tokens come."""

    def __init__(self) -> None:
        self.validation = [RANDOM.integers(0, 512, (4, QUICK.length + 1))]
        self.asked = 0

    def batch(self, random: np.random.Generator, sequences: int) -> Any:
        self.asked = sequences
        return random.integers(0, 512, (sequences, QUICK.length + 1))


def spec(task: Task) -> RunSpec:
    rules = task.run_file("rival").model_dump(exclude={"data", "mirrors"})
    keys = {"organizer_key": "0" * 64, "publication_key": "1" * 64}
    digests = {"manifest_digest": "0" * 64, "tokenizer_digest": "0" * 64, "sequence_length": task.length}
    return RunSpec(**rules, **keys, data=digests)


@pytest.mark.parametrize("task", [FULL, QUICK], ids=["full", "quick"])
def test_our_side_is_started_with_a_run_file_that_the_public_command_reads(task: Task) -> None:
    """Same arithmetic as the rivals: fp32 weights, fp32 moments; averages are plain."""
    made = task.run_file("rounds")
    assert run_file.parse(run_file.render(made)) == made
    assert (made.inner.weights, made.inner.optimizer) == ("fp32", "adamw")
    assert (made.outer.momentum, made.outer.learning_rate) == (0, 1)


def test_without_rounds_the_first_round_is_never_reached() -> None:
    """What trains alone is the same but for the length of its rounds."""
    rounds, alone = FULL.run_file("x"), FULL.run_file("x", has_rounds=False, ends=False)
    assert alone.rounds.tokens_per_round > 100 * FULL.total_tokens and alone.rounds.first_tokens_per_round is None
    assert (alone.inner, alone.model) == (rounds.inner, rounds.model)


def test_a_synchronous_step_reads_what_all_peers_accumulate() -> None:
    """Steps are counted until the loss is reached; a loss that is not reached is None, never the last step."""
    text = RandomText()
    easy, impossible = quick_to(100.0), quick_to(0.1)
    assert steps_to_loss(easy, spec(QUICK), text, 2, 16_384) == 16  # the first time that it is judged
    assert text.asked == QUICK.peers * 2 * QUICK.sequences
    assert steps_to_loss(impossible, spec(QUICK), text, 2, 4_096) is None


def quick_to(target_loss: float) -> Task:
    return dataclasses.replace(QUICK, target_loss=target_loss)


def test_a_step_takes_as_long_as_its_slowest_peer() -> None:
    """The median over steps, the maximum over peers; one step says nothing."""
    answers = [{"seconds": [1.0, 2.0, 9.0]}, {"seconds": [1.0, 3.0, 3.0]}]
    assert seconds_per_step(answers) == 3.0
    assert seconds_per_step([*answers, {"seconds": [1.0]}]) is None


def test_a_side_that_misses_the_loss_makes_no_speedup() -> None:
    """Otherwise it is the rival's best time over ours."""
    ours = {"seconds_to_loss": 10.0, "tokens_per_s": 95.0}
    found = {"hivemind": {"seconds_to_loss": 200.0}, "ddp": {"seconds_to_loss": None}}
    speeds = {"alone": 100.0, "resting_with_rounds": 18.0, "resting_alone": 20.0}
    assert time_to_loss.keys_of(ours, found, speeds) == {
        "speedup_over_hivemind": 20.0,
        "speedup_over_ddp": None,
        "inner_step_fraction": 0.95,
        "inner_step_fraction_with_idle_cores": 0.9,
    }
    missed = time_to_loss.keys_of({**ours, "seconds_to_loss": None}, found, speeds)
    assert missed["speedup_over_hivemind"] is None


def test_a_peers_speed_is_counted_from_its_first_inner_steps_on() -> None:
    """Words from before training began do not slow it."""
    told = [(0, 0.0), (0, 50.0), (1000, 60.0), (3000, 70.0)]
    words = [{"my tokens": tokens, "at_s": at_s} for tokens, at_s in told]
    assert _speed(SimpleNamespace(name="peer", of=lambda kind: words)) == 200.0  # type: ignore[arg-type]
