"""Signatures of who holds a part of the model: they say what whole replicas say, and are told until they are taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from peer.checkpoints import attesting
from peer.checkpoints.attesting import Attester
from peer.rounds.shard import Shard
from peer.training.layout import Layout
from swarm.digest import chunk_digests, join_subtrees, merkle_root
from swarm.errors import NotFound, ProtocolError, SwarmError
from swarm.log import LogHead
from swarm.manifest import Anchor, Parameter
from swarm.proto.checkpoint_pb2 import Attestation
from tests.unit.small_models import small_spec

LAYOUT = Layout.of([("a", (2, 3)), ("b", (4,))])
SHARD = Shard(small_spec("llama"), 1, np.arange(4, dtype=np.float32))
HEAD = LogHead(run_id=b"r" * 20, shard=1, round=4, log_digest=b"l" * 32, voters=(), total_tokens=9)


class Coordinator:
    """Answers attestations by these errors, one after the other, then takes them."""

    def __init__(self, *errors: SwarmError) -> None:
        self.errors = list(errors)
        self.asked = 0
        self.taken: list[Attestation] = []

    async def attest(self, attestation: Attestation) -> None:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append(attestation)


def told(coordinator: Coordinator, heads: list[LogHead], until: Callable[[], bool]) -> None:
    async def main() -> None:
        attester = Attester(coordinator, LAYOUT)
        for head in heads:
            attester.sign(head, SHARD)
        job = asyncio.ensure_future(attester.run())
        for _ in range(500):
            if until():
                break
            await asyncio.sleep(0.01)
        job.cancel()
        assert until() and not job.done()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attesting, "RETRY_S", 0.01)


def test_what_is_signed_is_the_shards_state_in_the_layout_of_the_whole() -> None:
    coordinator = Coordinator()
    told(coordinator, [HEAD], lambda: bool(coordinator.taken))
    (said,) = coordinator.taken
    anchor, momentum = (merkle_root(chunk_digests(part)) for part in SHARD.state_bytes())
    assert (said.shard, said.round, said.log_digest) == (1, 4, b"l" * 32)
    assert (said.anchor_digest, said.momentum_digest) == (anchor, momentum)
    assert said.state_digest == SHARD.state_digest == join_subtrees(anchor, momentum)
    parameters = (Parameter(name="a", shape=(2, 3)), Parameter(name="b", shape=(4,)))
    whole = Anchor(digest="00" * 32, momentum_digest="00" * 32, parameters=parameters)
    assert said.layout_digest == whole.layout_digest


def test_a_coordinator_that_lacks_the_commit_is_told_again_and_one_that_refuses_is_not() -> None:
    coordinator = Coordinator(NotFound("not recorded yet"), ProtocolError("no checkpoint"))
    heads = [HEAD, replace(HEAD, round=6)]
    told(coordinator, heads, lambda: coordinator.asked >= 3)
    assert [said.round for said in coordinator.taken] == [4]
