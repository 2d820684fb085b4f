"""A pipeline in one process: the real hops over a simulated network, under a clock that jumps; replicas as given."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from peer.pipeline.evaluation import Evaluation, EvaluationParts, EvaluationRules
from peer.pipeline.gate import Gate
from peer.pipeline.hop import Hop, HopParts
from peer.pipeline.messages import Answer, HopRules
from peer.pipeline.onward import Onward, OnwardParts
from peer.pipeline.serving import Serving, ServingParts
from peer.pipeline.slot import Slot
from peer.pipeline.source import Source, SourceParts
from peer.pipeline.steps import Stepped, Steps
from peer.training.microbatches import Microbatch, Trained
from peer.training.passes import Later, Passed, StepOutcome
from swarm.identity import Identity
from tests.simulation.memory_transport import MemoryNetwork, MemoryTransport

RULES = HopRules(sequence_length=2, max_sequences=1, width=4, vocab_size=1 << 20, codec="int8")


class FakeReplica:
    """Computes nothing, and notes what must not be: a way back under other weights than the way there."""

    def __init__(self, *, has_embedding: bool, has_head: bool) -> None:
        self.has_embedding, self.has_head = has_embedding, has_head
        self.version = 0
        self.mixed = 0
        self.learned = 0
        self._gathered = 0

    def begin_step(self, learning_rate: float, num_microbatches: int | None = None) -> None:
        self._gathered = 0

    def forward(self, given: Microbatch) -> Passed:
        hidden = torch.full((*given.tokens[:, 1:].shape, RULES.width), float(self.version))
        batch = torch.from_numpy(np.array(given.tokens))
        return Passed(batch_BL=batch, entered=batch, hidden_BLH=hidden, weight=given.weight)

    def backward(self, passed: Passed, gradient_BLH: torch.Tensor | None, *, counts: bool = True) -> Trained:
        self.mixed += float(passed.hidden_BLH[0, 0, 0]) != self.version
        self._gathered += counts
        gradient = None if self.has_embedding else torch.ones_like(passed.hidden_BLH)
        return Trained(loss=2.0 if self.has_head else 0.0, gradient_BLH=gradient)

    def finish_step(self, num_microbatches: int, later: Later = ()) -> StepOutcome:
        if num_microbatches != self._gathered:
            raise AssertionError(f"{num_microbatches} told, {self._gathered} gathered")
        self.version += 1
        self.learned += num_microbatches
        return StepOutcome(grad_norm=1.0, ok=True)

    def drop_step(self) -> None:
        self._gathered = 0


@dataclass(kw_only=True)
class SimulatedPeer:
    shard: int
    transport: MemoryTransport
    hop: Hop
    slot: Slot
    replica: Any
    steps: list[Stepped]
    source: Source | None
    evaluation: Evaluation | None
    jobs: list[asyncio.Task[Any]] = field(default_factory=list)

    @property
    def key(self) -> bytes:
        return self.transport.public_key

    @property
    def counted(self) -> Counter[bytes]:
        """How often each microbatch was learned from."""
        return Counter(name for stepped in self.steps for name in stepped.microbatch_ids)

    def kill(self) -> None:
        self.transport.alive = False
        for job in self.jobs:
            job.cancel()


@dataclass(kw_only=True)
class PeerOptions:
    cost_s: float = 0.1
    """of a computation"""
    step_microbatches: int = 8
    max_in_flight: int = 4
    drain_s: float = 10.0
    timeout_s: float = 60.0
    evaluation: EvaluationRules | None = None


async def _at_once(function: Callable[[], Any]) -> Any:
    return function()


def _evaluation(
    options: PeerOptions, rules: EvaluationRules, replica: Any, slot: Slot, onward: Onward | None
) -> Evaluation:
    parts = EvaluationParts(
        rules=rules, replica=replica, slot=slot, later={}, onward=onward, timeout_s=options.timeout_s
    )
    return Evaluation(parts)


class SimulatedPipeline:
    """``num_shards`` spans of one shard; the peers of the first read microbatches, numbered from 0."""

    def __init__(self, num_shards: int, *, rules: HopRules = RULES, seed: int = 0, **network: Any) -> None:
        self.num_shards, self.rules = num_shards, rules
        self.network = MemoryNetwork(**network)
        self.random = random.Random(seed)
        self.peers: list[SimulatedPeer] = []
        self.answers: list[tuple[int, Answer]] = []
        self.num_read = 0
        self.limit = 0
        """microbatches to read at most"""
        self.batch_of: Callable[[int], Any] = lambda number: np.array([[number, 0, 0]])

    async def add(self, shard: int, options: PeerOptions | None = None, replica: Any = None) -> SimulatedPeer:
        """One more replica of ``shard``, at work."""
        options = options or PeerOptions()
        is_first, is_last = shard == 0, shard + 1 == self.num_shards
        replica = replica or FakeReplica(has_embedding=is_first, has_head=is_last)
        transport = self.network.join(Identity(self.random.randbytes(32)))

        async def compute(function: Callable[[], Any]) -> Any:
            await asyncio.sleep(options.cost_s * (0.9 + 0.2 * self.random.random()))
            return function()

        slot = Slot(compute)
        onward = None if is_last else self._onward(transport, shard + 1, _at_once)
        stepped: list[Stepped] = []
        parts = HopParts(
            steps=Steps(replica, lambda: 1e-2, options.step_microbatches),
            gate=Gate(step_microbatches=options.step_microbatches, max_in_flight=options.max_in_flight),
            slot=slot,
            onward=onward,
            drain_s=options.drain_s,
            on_step=stepped.append,
        )
        hop = Hop(parts)
        evaluation = None
        if options.evaluation is not None:
            ahead = None if is_last else self._onward(transport, shard + 1, _at_once)
            evaluation = _evaluation(options, options.evaluation, replica, slot, ahead)
        source = self._source(hop, options) if is_first else None
        if not is_first:
            serving = ServingParts(
                hop=hop,
                rules=self.rules,
                entrances=(shard,),
                is_admitted=self._is_admitted,
                run=_at_once,
                evaluation=evaluation,
            )
            await Serving(serving).begin(transport)
        peer = SimulatedPeer(
            shard=shard,
            transport=transport,
            hop=hop,
            slot=slot,
            replica=replica,
            steps=stepped,
            source=source,
            evaluation=evaluation,
        )
        self.peers.append(peer)
        peer.jobs.append(asyncio.ensure_future(hop.run()))
        if source is not None:
            peer.jobs.append(asyncio.ensure_future(source.run()))
        return peer

    def _source(self, hop: Hop, options: PeerOptions) -> Source:
        return Source(
            SourceParts(
                hop=hop,
                next_batch=self._next_batch,
                new_id=lambda: self.random.randbytes(16),
                timeout_s=options.timeout_s,
                max_in_flight=options.max_in_flight,
                on_answer=lambda tokens, answer: self.answers.append((int(tokens[0, 0]), answer)),
            )
        )

    def replicas_of(self, shard: int) -> list[SimulatedPeer]:
        return [peer for peer in self.peers if peer.shard == shard]

    async def until(self, number: int, *, at_most_s: float = 3600.0) -> None:
        """Until so many microbatches were answered; raises what ended a peer's work."""
        ends_s = asyncio.get_running_loop().time() + at_most_s
        while len(self.answers) < number:
            if asyncio.get_running_loop().time() > ends_s:
                raise TimeoutError(f"{len(self.answers)} of {number} microbatches were answered")
            for job in (job for peer in self.peers for job in peer.jobs):
                if job.done() and not job.cancelled():
                    job.result()
            await asyncio.sleep(0.05)

    async def finish_steps(self) -> None:
        """Let every living peer make the inner step that it has begun."""
        for peer in self.peers:
            if peer.transport.alive:
                await peer.hop.between_steps(lambda: None)

    def _onward(self, transport: MemoryTransport, shard: int, run: Any) -> Onward:
        return Onward(
            OnwardParts(
                transport=transport,
                rules=self.rules,
                first_shard=shard,
                # As the directory: the dead are listed still.
                hosts=lambda: {peer.key: peer.transport.addresses for peer in self.replicas_of(shard)},
                draw=self.random.random,
                run=run,
            )
        )

    def _is_admitted(self, key: bytes) -> bool:
        return key in {peer.key for peer in self.peers}

    def _next_batch(self, number: int) -> Any:
        if self.num_read >= self.limit:
            return None
        self.num_read += 1
        return self.batch_of(self.num_read - 1)
