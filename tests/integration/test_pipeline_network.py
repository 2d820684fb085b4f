"""A pipeline of real 8-bit spans over real libp2p: it learns, and goes on when a replica goes away."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from peer.p2p.network import Network
from peer.pipeline.gate import Gate
from peer.pipeline.hop import Hop, HopParts
from peer.pipeline.messages import Answer, HopRules
from peer.pipeline.onward import Onward, OnwardParts
from peer.pipeline.serving import Serving, ServingParts
from peer.pipeline.slot import Slot
from peer.pipeline.source import Source, SourceParts
from peer.pipeline.steps import Stepped, Steps
from peer.training import model
from peer.training.inner_optimizer import build_optimizer
from peer.training.int8_replica import Int8Replica
from swarm.run_spec import Inner
from swarm.sharding import from_sizes
from tests.integration.test_network import open_several
from tests.unit.small_models import LENGTH, VOCAB, small_config

# 1.6 MB a message, so it travels in several frames: 64 sequences of 24 tokens, 256 values each, in fp32.
WIDTH, SEQUENCES = 256, 64
TOKENS = (np.arange(SEQUENCES)[:, None] + np.arange(LENGTH + 1)) % VOCAB
SIZES = (1, 1)


class _Peer:
    """One replica of a span on its own network, computing in a thread of its own."""

    def __init__(self, network: Network, shard: int, hosts: Any) -> None:
        config = small_config("gptj", n_embd=WIDTH, n_inner=32, n_layer=2)
        rules = HopRules(sequence_length=LENGTH, max_sequences=SEQUENCES, width=WIDTH, vocab_size=VOCAB, codec="fp32")
        span = from_sizes(SIZES)[shard]
        built = model.build_span(config, span)
        self.replica = Int8Replica(built, model.layout_of(built), Inner(), torch.device("cpu"), seed=shard)
        self.replica.load(model.initial_anchor(config, 3, span))
        self.pool = ThreadPoolExecutor(1)
        self.steps: list[Stepped] = []
        self.network, self.answers, self.shard = network, list[Answer](), shard
        onward = None
        if shard == 0:
            onward = Onward(
                OnwardParts(
                    transport=network,
                    rules=rules,
                    first_shard=1,
                    hosts=hosts,
                    draw=random.Random(0).random,
                    run=asyncio.to_thread,
                )
            )
        loop = asyncio.get_running_loop()
        self.hop = Hop(
            HopParts(
                steps=Steps(self.replica, lambda: 1e-2, 2),
                gate=Gate(step_microbatches=2, max_in_flight=2),
                slot=Slot(lambda function: loop.run_in_executor(self.pool, function)),
                onward=onward,
                on_step=self.steps.append,
            )
        )
        self.serving = ServingParts(
            hop=self.hop, rules=rules, first_shard=shard, is_admitted=lambda key: True, run=asyncio.to_thread
        )

    async def begin(self, limit: int) -> list[asyncio.Task[None]]:
        jobs = [asyncio.ensure_future(self.hop.run())]
        if self.shard:
            await Serving(self.serving).begin(self.network)
        else:
            parts = SourceParts(
                hop=self.hop,
                next_batch=lambda number: TOKENS if number < limit else None,
                new_id=lambda: random.randbytes(16),
                timeout_s=60.0,
                on_answer=lambda tokens, answer: self.answers.append(answer),
            )
            jobs.append(asyncio.ensure_future(Source(parts).run()))
        return jobs


async def _answered(peers: list[_Peer], jobs: list[asyncio.Task[None]], number: int) -> None:
    while len(peers[0].answers) < number:
        for job in jobs:
            if job.done():
                job.result()
        await asyncio.sleep(0.05)


async def _train(limit: int) -> list[_Peer]:
    """Two replicas of the second span; the network of one ends half-way, in the middle of its calls."""
    networks = await open_several(3)
    addresses = {network.public_key: network.addresses for network in networks[1:]}
    peers = [_Peer(networks[0], 0, lambda: addresses), *(_Peer(network, 1, None) for network in networks[1:])]
    jobs: list[asyncio.Task[None]] = []
    try:
        for peer in reversed(peers):
            jobs += await peer.begin(limit)
        await asyncio.wait_for(_answered(peers, jobs, limit // 2), 120)
        await networks[2].close()
        await asyncio.wait_for(_answered(peers, jobs, limit), 120)
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        for network in reversed(networks):
            await network.close()
        for peer in peers:
            peer.pool.shutdown()
    return peers


@pytest.mark.slow
def test_spans_on_libp2p_learn_and_outlive_a_replica() -> None:
    # A process has one replica, and imports bitsandbytes in one thread; here are three.
    build_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], Inner(), torch.device("cpu"))
    limit, threads = 20, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, *others = asyncio.run(_train(limit))
    finally:
        torch.set_num_threads(threads)
    ids = [name for stepped in first.steps for name in stepped.microbatch_ids]
    assert len(ids) == len(set(ids)) == limit
    losses = [answer.loss for answer in first.answers]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert all(peer.steps for peer in others)
