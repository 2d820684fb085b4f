"""The arms of the quality benchmark: one training run each, from the same weights, over the same batches.

Decides what differs between them and drives rounds within one process: the shard, the codec, the outer optimizer and
the replicas are those of a peer; only agreement and network are missing, so every round counts every contribution in
full and lands at once. Leaves settings and text to `quality_setting`.
"""

from __future__ import annotations

from collections.abc import Iterator
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

from peer.rounds.codec import Codec, Float32
from peer.rounds.planning import num_slices, split_parts
from peer.rounds.round_actions import Reduce
from peer.rounds.shard import Shard
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from peer.training.layout import Layout
from peer.training.model import build_config, build_model, layout_of
from swarm import schedule
from swarm.digest import sha256
from swarm.proto.round_pb2 import Member, OpenRound, PartResult, Record, Share
from swarm.run_spec import RunSpec

NUM_CURVE_POINTS = 8
# A point of the curve but the last is judged on so many fewer sequences.
CURVE_SHARE = 8
KEYS = [bytes([index]) * 32 for index in range(REPLICAS)]
CPU = torch.device("cpu")

AnyReplica = Replica | Int8Replica
Point = tuple[int, float]
"""tokens trained by all replicas, validation loss in nats per byte"""


def _check_plain(data: bytes | memoryview, num_values: int) -> None:
    if len(data) != 4 * num_values:
        raise ValueError("not as many fp32 values as they should be")


PLAIN = Codec(
    name="fp32",
    block_values=1,
    sparse=False,
    encode=lambda values: values.astype("<f4").tobytes(),
    decode=lambda data, num_values: np.frombuffer(data, "<f4", num_values).astype(np.float32),
    check=_check_plain,
    encoded_size=lambda num_values: 4 * num_values,
)
"""The wire of the fp32 twin: the values themselves. No run can choose it, so it is no codec of a peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    name: str
    in_8_bits: bool = False
    is_synchronous: bool = False


ARMS = {
    arm.name: arm
    for arm in (
        Arm(name="int8", in_8_bits=True),
        Arm(name="fp32"),
        Arm(name="sync", is_synchronous=True),
    )
}


def train(arm: Arm, setting: Setting, text: Text, seed: int) -> Iterator[Point]:
    """Validation loss over tokens, about `NUM_CURVE_POINTS` points as they are reached; the last on more sequences.

    Every arm is judged alike: its weights (the anchor, where there are rounds) in fp32.
    """
    spec = spec_of(setting, in_8_bits=arm.in_8_bits, is_synchronous=arm.is_synchronous)
    judge = Replica(*_model(spec, seed), spec.inner, CPU)
    due = spacing = setting.total_tokens / NUM_CURVE_POINTS
    run = synchronous if arm.is_synchronous else local
    for tokens, weights in run(spec, setting, text, seed):
        is_last = tokens >= setting.num_steps * setting.tokens_per_step
        if is_last or tokens >= due:
            num_sequences = setting.validation_sequences // (1 if is_last else CURVE_SHARE)
            yield tokens, judge.evaluate(weights, text.validation_batches(setting, num_sequences))
        while due <= tokens:
            due += spacing


def synchronous(spec: RunSpec, setting: Setting, text: Text, seed: int) -> Iterator[tuple[int, Float32]]:
    """(tokens so far, weights) after every step on the batches of all replicas at once: the mean of their gradients."""
    replica = _replica(spec, seed, 0)
    tokens = 0
    for step in range(setting.num_steps):
        batches = [text.batch(setting, seed, index, step) for index in range(REPLICAS)]
        replica.step(np.concatenate(batches), schedule.learning_rate(spec.inner, tokens, spec.total_tokens))
        tokens += setting.tokens_per_step
        yield tokens, replica.read()


def local(spec: RunSpec, setting: Setting, text: Text, seed: int) -> Iterator[tuple[int, Float32]]:
    """(tokens so far, anchor) after every round; as in a run, the learning rate follows committed tokens."""
    swarm = Swarm(spec, seed)
    step = 0
    while step < setting.num_steps:
        tokens = step * setting.tokens_per_step
        rate = schedule.learning_rate(spec.inner, tokens, spec.total_tokens)
        length = schedule.tokens_of_round(spec.rounds, swarm.round + 1)
        until = min(setting.num_steps, step + max(1, round(length / setting.tokens_per_step)))
        for now in range(step, until):
            for index, replica in enumerate(swarm.replicas):
                replica.step(text.batch(setting, seed, index, now), rate)
        step = until
        swarm.commit((until * setting.tokens_per_step - tokens) // REPLICAS)
        yield until * setting.tokens_per_step, swarm.shards[0].anchor


class Swarm:
    """Replicas and the shard that each of them holds."""

    def __init__(self, spec: RunSpec, seed: int) -> None:
        self.round = 0
        self.replicas = [_replica(spec, seed, index) for index in range(REPLICAS)]
        anchor = Replica(*_model(spec, seed), spec.inner, CPU).read()
        self.shards = [Shard(spec, 0, anchor.copy()) for _ in KEYS]
        if spec.inner.weights == "fp32":
            for shard in self.shards:
                shard.codec = PLAIN
        members = [Member(peer_key=key, contributes=True) for key in KEYS]
        self.opened = OpenRound(members=members, parts=split_parts(members, {}, num_slices(len(anchor))))

    def commit(self, tokens_each: int) -> None:
        """One round as a peer makes it: offer, encode, reduce, settle, apply, land."""
        self.round += 1
        snapshots = []
        for shard, replica in zip(self.shards, self.replicas, strict=True):
            snapshot = shard.offer(replica.movement(), tokens_each)
            if snapshot is None:
                raise FloatingPointError(f"round {self.round}: a replica is not finite")
            snapshots.append(snapshot)
        encoded = [shard.encode(snapshot, self.opened) for shard, snapshot in zip(self.shards, snapshots, strict=True)]
        record, parts = Record(round=self.round), {}
        for index, part in enumerate(self.opened.parts):
            contributions = [
                (Share(peer_key=key, weight_tokens=tokens_each), by_part[index])
                for key, by_part in zip(KEYS, encoded, strict=True)
            ]
            work = Reduce(
                ballot=(1, KEYS[0]),
                part=index,
                first_slice=part.first_slice,
                num_slices=part.num_slices,
                contributions=tuple(contributions),
            )
            shares, average = self.shards[part.reducer].reduce(work)
            result = PartResult(first_slice=part.first_slice, num_slices=part.num_slices, shares=shares)
            result.digest = sha256(average)
            parts[result.digest] = average
            record.parts.append(result)
        for key, shard, replica, snapshot in zip(KEYS, self.shards, self.replicas, snapshots, strict=True):
            shard.settle(record, parts, snapshot, key)
            shard.apply(record, parts)
            replica.land(shard.anchor, snapshot.movement)
        if len({shard.state_digest for shard in self.shards}) > 1:
            raise ArithmeticError(f"round {self.round}: replicas hold unequal states")


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
