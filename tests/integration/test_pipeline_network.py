"""A pipeline of real 8-bit spans over real libp2p: it learns, and goes on when a replica goes away."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from peer.p2p.network import Network
from peer.pipeline.messages import Answer, HopRules
from peer.pipeline.place import Place, PlaceParts
from peer.pipeline.steps import Stepped
from peer.training import model
from peer.training.inner_optimizer import build_optimizer
from peer.training.int8_replica import Int8Replica
from peer.training.trainer import Limits
from swarm.run_spec import Inner
from swarm.sharding import from_sizes
from tests.integration.test_network import open_several
from tests.unit.small_models import LENGTH, VOCAB, small_config

# 1.6 MB a message, so it travels in several frames: 64 sequences of 24 tokens, 256 values each, in fp32.
WIDTH, SEQUENCES = 256, 64
TOKENS = (np.arange(SEQUENCES)[:, None] + np.arange(LENGTH + 1)) % VOCAB
SIZES = (1, 1)


class _Peer:
    """One replica of a span on its own network."""

    def __init__(self, network: Network, shard: int, addresses: dict[bytes, tuple[str, ...]], limit: int) -> None:
        config = small_config("gptj", n_embd=WIDTH, n_inner=32, n_layer=2)
        span = from_sizes(SIZES)[shard]
        built = model.build_span(config, span)
        replica = Int8Replica(built, model.layout_of(built), Inner(), torch.device("cpu"), seed=shard)
        replica.load(model.initial_anchor(config, 3, span))
        self.steps: list[Stepped] = []
        self.answers: list[Answer] = []
        self.place = Place(
            PlaceParts(
                replica=replica,
                transport=network,
                rules=HopRules(
                    sequence_length=LENGTH, max_sequences=SEQUENCES, width=WIDTH, vocab_size=VOCAB, codec="fp32"
                ),
                first_shard=shard,
                next_shard=1 if shard == 0 else None,
                step_microbatches=2,
                max_in_flight=2,
                learning_rate=lambda: 1e-2,
                hosts=lambda shard: addresses,
                is_admitted=lambda key: True,
                limits=Limits(),
                next_batch=(lambda number: TOKENS if number < limit else None) if shard == 0 else None,
                on_step=self.steps.append,
                on_answer=lambda tokens, answer: self.answers.append(answer),
                timeout_s=60.0,
            )
        )


async def _answered(peers: list[_Peer], number: int) -> None:
    while len(peers[0].answers) < number:
        for job in [job for peer in peers for job in peer.place.jobs if job.done()]:
            job.result()
        await asyncio.sleep(0.05)


async def _train(limit: int) -> list[_Peer]:
    """Two replicas of the second span; the network of one ends half-way, in the middle of its calls."""
    networks = await open_several(3)
    addresses = {network.public_key: network.addresses for network in networks[1:]}
    peers = [_Peer(network, min(number, 1), addresses, limit) for number, network in enumerate(networks)]
    try:
        for peer in reversed(peers):
            await peer.place.begin()
        await asyncio.wait_for(_answered(peers, limit // 2), 120)
        await networks[2].close()
        await asyncio.wait_for(_answered(peers, limit), 120)
    finally:
        for peer in peers:
            await peer.place.end()
        for network in reversed(networks):
            await network.close()
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
