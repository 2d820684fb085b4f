"""The arms of the quality benchmark: one training run each, from the same weights, over the same batches.

Decides what differs between them and drives rounds within one process: the shard, the codec, the outer optimizer and
the replicas are those of a peer; only agreement and network are missing, so every round counts every contribution in
full and lands at once. Leaves settings and text to `quality_setting`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from quality_setting import (
    REPLICAS,
    VOCAB,
    Setting,
    Text,
    spec_of,
)

from peer.rounds.codec import Float32
from peer.rounds.paxos import to_message
from peer.rounds.planning import split_parts
from peer.rounds.round_actions import Reduce
from peer.rounds.shard import ReplicaSnapshot, Settling, Shard
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from peer.training.layout import Layout
from peer.training.model import build_config, build_model, layout_of
from swarm import schedule
from swarm.digest import sha256
from swarm.proto.round_pb2 import Member, OpenRound, PartResult, Record, Share
from swarm.run_spec import Robust, RunSpec

NUM_CURVE_POINTS = 8
# A point of the curve but the last is judged on so many fewer sequences.
CURVE_SHARE = 8
KEYS = [bytes([index]) * 32 for index in range(REPLICAS)]
BALLOT = (1, KEYS[0])
CPU = torch.device("cpu")

AnyReplica = Replica | Int8Replica
Point = tuple[int, float]
"""tokens trained by all replicas, validation loss in nats per byte"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    name: str
    in_8_bits: bool = False
    has_wire: bool = False
    """contributions and averages are encoded, and what that loses is owed, as in a run; else plain fp32 averages"""
    codecs: tuple[str, str] | None = None
    """of contributions and of averages, where they are not the setting's; then reducers clip and drop nothing"""
    is_synchronous: bool = False


ARMS = {
    arm.name: arm
    for arm in (
        Arm(name="int8", in_8_bits=True, has_wire=True),
        Arm(name="fp32"),
        Arm(name="sync", is_synchronous=True),
    )
}


def train(arm: Arm, setting: Setting, text: Text, seed: int) -> Iterator[Point]:
    """Validation loss over tokens, about `NUM_CURVE_POINTS` points as they are reached; the last on more sequences.

    Every arm is judged alike: its weights (the anchor, where there are rounds) in fp32.
    """
    spec = spec_for(arm, setting)
    judge = Replica(*_model(spec, seed), spec.inner, CPU)
    due = spacing = setting.total_tokens / NUM_CURVE_POINTS
    weights_over_tokens = (
        synchronous(spec, setting, text, seed)
        if arm.is_synchronous
        else local((Swarm if arm.has_wire else PlainSwarm)(spec, seed), setting, text, seed)
    )
    for tokens, weights in weights_over_tokens:
        is_last = tokens >= setting.num_steps * setting.tokens_per_step
        if is_last or tokens >= due:
            num_sequences = setting.validation_sequences // (1 if is_last else CURVE_SHARE)
            yield tokens, judge.evaluate(weights, text.validation_batches(setting, num_sequences))
        while due <= tokens:
            due += spacing


def spec_for(arm: Arm, setting: Setting) -> RunSpec:
    """The run spec of one arm."""
    spec = spec_of(setting, in_8_bits=arm.in_8_bits, is_synchronous=arm.is_synchronous)
    if arm.codecs is None:
        return spec
    contributions, averages = arm.codecs
    # A copy that nothing checks: run specs have no sparse averages. Clipping would be a second thing that differs.
    rounds = spec.rounds.model_copy(update={"contribution_codecs": (contributions,), "wire_codec": averages})
    return spec.model_copy(update={"rounds": rounds, "robust": Robust(rule="none")})


def synchronous(spec: RunSpec, setting: Setting, text: Text, seed: int) -> Iterator[tuple[int, Float32]]:
    """(tokens so far, weights) after every step on the batches of all replicas at once: the mean of their gradients."""
    replica = _replica(spec, seed, 0)
    tokens = 0
    for step in range(setting.num_steps):
        batches = [text.batch(setting, seed, index, step) for index in range(REPLICAS)]
        replica.step(np.concatenate(batches), schedule.learning_rate(spec.inner, tokens, spec.total_tokens))
        tokens += setting.tokens_per_step
        yield tokens, replica.read()


def local(swarm: Swarm | PlainSwarm, setting: Setting, text: Text, seed: int) -> Iterator[tuple[int, Float32]]:
    """(tokens so far, anchor) after every round; as in a run, the learning rate follows committed tokens."""
    spec, step = swarm.spec, 0
    for length in round_lengths(spec, setting):
        rate = schedule.learning_rate(spec.inner, step * setting.tokens_per_step, spec.total_tokens)
        for now in range(step, step + length):
            for index, replica in enumerate(swarm.replicas):
                replica.step(text.batch(setting, seed, index, now), rate)
        step += length
        swarm.commit(length * setting.tokens_per_step // REPLICAS)
        yield step * setting.tokens_per_step, swarm.anchor


def round_lengths(spec: RunSpec, setting: Setting) -> list[int]:
    """Inner steps of each round, all of ``setting.num_steps`` together; at least one each."""
    lengths: list[int] = []
    left = setting.num_steps
    while left:
        wanted = schedule.tokens_of_round(spec.rounds, len(lengths) + 1) / setting.tokens_per_step
        lengths.append(min(left, max(1, round(wanted))))
        left -= lengths[-1]
    return lengths


class Group:
    """The replicas of one shard, and its state as each of them holds it; contributions travel in the first rung."""

    def __init__(self, spec: RunSpec, replicas: Sequence[AnyReplica], anchor: Float32, shard: int = 0) -> None:
        self.spec = spec
        self.round = 0
        self.replicas = list(replicas)
        self.keys = KEYS[: len(self.replicas)]
        self.shards = [Shard(spec, shard, anchor.copy()) for _ in self.keys]
        members = [Member(peer_key=key, contributes=True) for key in self.keys]
        self.opened = OpenRound(members=members, parts=split_parts(members, {}, self.shards[0].num_slices))

    @property
    def anchor(self) -> Float32:
        return self.shards[0].anchor

    def average(self, tokens: Sequence[int]) -> None:
        """One round as a peer makes it: offer, encode, reduce, settle, apply, land. ``tokens``: of each replica."""
        self.round += 1
        snapshots = [
            _finite(shard.offer(replica.movement(), trained))
            for shard, replica, trained in zip(self.shards, self.replicas, tokens, strict=True)
        ]
        record, parts = Record(round=self.round, opened_by=to_message(BALLOT)), {}
        for index, part in enumerate(self.opened.parts):
            contributions = [
                (Share(peer_key=key, weight_tokens=trained), snapshot.codec, shard.encode(snapshot, part))
                for key, shard, snapshot, trained in zip(self.keys, self.shards, snapshots, tokens, strict=True)
            ]
            work = Reduce(
                ballot=BALLOT,
                part=index,
                first_slice=part.first_slice,
                num_slices=part.num_slices,
                contributions=tuple(contributions),
            )
            told, average = self.shards[part.reducer].reduce(work)
            result = PartResult(first_slice=part.first_slice, num_slices=part.num_slices)
            result.shares.extend(told.shares)
            result.rejections.extend(told.rejections)
            result.digest = sha256(average)
            parts[result.digest] = average
            record.parts.append(result)
        for key, shard, replica, snapshot in zip(self.keys, self.shards, self.replicas, snapshots, strict=True):
            shard.apply(record, parts, Settling(snapshot, key))
            replica.land(shard.anchor, snapshot.movement)
        if len({shard.state_digest for shard in self.shards}) > 1:
            raise ArithmeticError(f"round {self.round}: replicas hold unequal states")


class Swarm(Group):
    """Replicas of the whole model that all train as much."""

    def __init__(self, spec: RunSpec, seed: int) -> None:
        super().__init__(spec, [_replica(spec, seed, index) for index in range(REPLICAS)], _initial(spec, seed))

    def commit(self, tokens_each: int) -> None:
        self.average([tokens_each] * REPLICAS)


class PlainSwarm:
    """The twin without a single 8-bit number: fp32 replicas, movement, momentum and anchor, averaged in plain numpy."""

    def __init__(self, spec: RunSpec, seed: int) -> None:
        self.spec = spec
        self.round = 0
        self.replicas = [_replica(spec, seed, index) for index in range(REPLICAS)]
        self.anchor = _initial(spec, seed)
        self.momentum = np.zeros_like(self.anchor)

    def commit(self, tokens_each: int) -> None:
        """The same outer step on the plain mean; all replicas trained ``tokens_each``, so all weigh alike."""
        self.round += 1
        movements = [replica.movement() for replica in self.replicas]
        gradient = -np.mean([movement[:] for movement in movements], axis=0, dtype=np.float32)
        factor = np.float32(schedule.outer_momentum(self.spec.outer, self.round))
        self.momentum = factor * self.momentum + gradient
        self.anchor = self.anchor - np.float32(self.spec.outer.learning_rate) * (gradient + factor * self.momentum)
        for replica, movement in zip(self.replicas, movements, strict=True):
            replica.land(self.anchor, movement)


def _finite(snapshot: ReplicaSnapshot | None) -> ReplicaSnapshot:
    if snapshot is None:
        raise FloatingPointError("a replica is not finite")
    snapshot.offer_to(BALLOT)
    return snapshot


def _initial(spec: RunSpec, seed: int) -> Float32:
    return Replica(*_model(spec, seed), spec.inner, CPU).read()


def num_parameters(setting: Setting) -> int:
    return _model(spec_of(setting, in_8_bits=False, is_synchronous=False), 0)[1].num_values


def _model(spec: RunSpec, seed: int) -> tuple[torch.nn.Module, Layout]:
    model = build_model(build_config(spec, VOCAB), seed)
    return model, layout_of(model)


def _replica(spec: RunSpec, seed: int, index: int) -> AnyReplica:
    model, layout = _model(spec, seed)
    if spec.inner.weights == "fp32":
        return Replica(model, layout, spec.inner, CPU)
    return Int8Replica(model, layout, spec.inner, CPU, seed=REPLICAS * seed + index)
