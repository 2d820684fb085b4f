"""What a pipeline costs in loss: two shards of two replicas each, beside two whole models, after equal tokens.

Both arms go through the same code in one process, microbatch by microbatch: `Steps` counts them and makes inner steps,
hops cross in int8, rounds are those of a peer with the run's codecs and outer optimizer. A source reads the same
batches in both arms. In the pipeline each microbatch goes on to a replica of the next shard that is drawn at random,
and rounds of the shards are staggered: the second's open half a round after the first's. Rounds land at once, and
nobody fails. Leaves tables to `pipeline`.
"""

from __future__ import annotations

import dataclasses
import itertools
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from hops_wires import CodecWire
from quality_arms import Group
from quality_setting import QUICK, SMALL, VOCAB, Setting, read_text, spec_of

from peer.pipeline.messages import Answer, Entering
from peer.pipeline.steps import Steps
from peer.training import model
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from swarm import schedule
from swarm.sharding import from_sizes, whole

CPU = torch.device("cpu")
REPLICAS = 2
STEP_MICROBATCHES = 2
SEEDS = (0, 1)
FULL = dataclasses.replace(
    SMALL,
    **{"hidden": 128, "intermediate": 344, "layers": 4, "heads": 4, "sequences": 2, "total_tokens": 327_680},
    **{"warmup_tokens": 65_536, "first_tokens_per_round": 4_096, "tokens_per_round": 20_480, "growth_rounds": 40},
    **{"validation_sequences": 256},
)
SHORT = dataclasses.replace(
    QUICK, layers=2, sequences=2, length=64, total_tokens=8_192, tokens_per_round=2_048, validation_sequences=32
)


class Arm:
    """A run of ``num_shards`` shards with `REPLICAS` replicas each."""

    def __init__(self, setting: Setting, seed: int, num_shards: int) -> None:
        self.setting, self.seed = setting, seed
        # A copy that nothing checks: in both arms embedding and head are two matrices.
        spec = spec_of(setting, in_8_bits=True, is_synchronous=False).model_copy(update={"num_shards": 2})
        self.spec, self.config = spec, model.build_config(spec, VOCAB)
        self.wire = CodecWire("int8")
        self._random = np.random.default_rng([seed, 77])
        self.groups: list[Group] = []
        self.steps: list[list[Steps]] = []
        for shard, span in enumerate(from_sizes([setting.layers // num_shards] * num_shards)):
            anchor = model.initial_anchor(self.config, seed, span)
            group = Group(spec, [self._replica(span, anchor, index) for index in range(REPLICAS)], anchor, shard)
            self.groups.append(group)
            rate = self._rate_of(shard)
            self.steps.append([Steps(replica, rate, STEP_MICROBATCHES) for replica in group.replicas])
        self.committed = [0] * num_shards
        self.trained = [[0] * REPLICAS for _ in range(num_shards)]
        """tokens of inner steps since the last round, by shard and replica"""
        self.passed = 0

    def train(self) -> float:
        """The validation loss of the anchors after all tokens."""
        text, setting = read_text(), self.setting
        for number in range(setting.total_tokens // (setting.sequences * setting.length)):
            source, step = number % REPLICAS, number // REPLICAS
            self.microbatch(text.batch(setting, self.seed, source, step), number, source)
            for shard in range(len(self.groups)):
                if self.passed >= self._opens_at(shard):
                    self.commit(shard)
        for shard in range(len(self.groups)):
            self.commit(shard)
        span = whole(setting.layers)
        built = model.build_span(self.config, span)
        judge = Replica(built, model.layout_of(built), self.spec.inner, CPU)
        weights = np.concatenate([group.anchor for group in self.groups])
        return judge.evaluate(weights, text.validation_batches(setting, setting.validation_sequences))

    def microbatch(self, tokens: np.ndarray, number: int, source: int) -> None:
        """There and back over all shards."""
        draws = self._random.integers(0, REPLICAS, len(self.groups) - 1)
        way = [self.steps[shard][index] for shard, index in enumerate([source, *draws])]
        entering = Entering(microbatch_id=number.to_bytes(16, "big"), tokens=tokens, time_left_s=1.0)
        entered, halves = [], []
        for steps in way:
            entered.append(entering)
            halves.append(steps.forward(entering))
            if steps is not way[-1]:
                crossed = self.wire.onward(halves[-1].result_BLH, tokens)
                entering = dataclasses.replace(entering, hidden_BLH=crossed)
        came: Answer | None = None
        for steps, entering, half in zip(reversed(way), reversed(entered), reversed(halves), strict=True):
            came = steps.backward(entering, half, came, steps.generation)
            if came.gradient_BLH is not None:
                came = dataclasses.replace(came, gradient_BLH=self.wire.back(came.gradient_BLH))
        self.passed += tokens[:, 1:].size
        for shard, index in enumerate([source, *draws]):
            self._step_if_due(shard, int(index))

    def commit(self, shard: int) -> None:
        trained = self.trained[shard]
        if sum(trained):
            # A weight of 0 is refused; who has not moved may weigh one token.
            self.groups[shard].average([max(1, tokens) for tokens in trained])
            self.committed[shard] += sum(trained)
            self.trained[shard] = [0] * REPLICAS

    def _step_if_due(self, shard: int, index: int) -> None:
        steps = self.steps[shard][index]
        if steps.num_gathered >= STEP_MICROBATCHES:
            stepped = steps.finish()
            if stepped is None:
                raise FloatingPointError("an inner step came to nothing")
            self.trained[shard][index] += stepped.num_tokens

    def _opens_at(self, shard: int) -> float:
        """Tokens after which the next round of ``shard`` opens: later shards by their part of a round."""
        rounds, done = self.spec.rounds, self.groups[shard].round
        of_round = schedule.tokens_of_round
        due = sum(of_round(rounds, number) for number in range(1, done + 2))
        return due + shard / len(self.groups) * of_round(rounds, done + 2)

    def _rate_of(self, shard: int) -> Any:
        return lambda: schedule.learning_rate(self.spec.inner, self.committed[shard], self.spec.total_tokens)

    def _replica(self, span: Any, anchor: Any, index: int) -> Int8Replica:
        built = model.build_span(self.config, span)
        replica = Int8Replica(built, model.layout_of(built), self.spec.inner, CPU, seed=REPLICAS * self.seed + index)
        replica.load(anchor)
        return replica


def loss_of(job: tuple[Setting, int, int]) -> float:
    """In a process of its own: ``(setting, seed, shards)``."""
    torch.set_num_threads(1)
    return Arm(*job).train()


def measure_loss(*, quick: bool) -> dict[str, Any]:
    """The pipeline's loss above that of whole models, in percent: the mean over seeds."""
    setting, seeds = (SHORT, SEEDS[:1]) if quick else (FULL, SEEDS)
    jobs = [(setting, seed, shards) for seed, shards in itertools.product(seeds, (1, 2))]
    with get_context("spawn").Pool(2) as pool:
        losses = dict(zip([job[1:] for job in jobs], pool.imap(loss_of, jobs), strict=True))
    gaps = [100 * (losses[seed, 2] / losses[seed, 1] - 1) for seed in seeds]
    return {
        "loss_gap_percent": round(sum(gaps) / len(gaps), 3),
        "loss_gap_by_seed_percent": [round(gap, 3) for gap in gaps],
        "loss_whole": [round(losses[seed, 1], 5) for seed in seeds],
        "loss_pipeline": [round(losses[seed, 2], 5) for seed in seeds],
        "loss_setting": dataclasses.asdict(setting) | {"step_microbatches": STEP_MICROBATCHES, "replicas": REPLICAS},
    }
