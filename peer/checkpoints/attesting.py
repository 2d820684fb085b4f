"""Signatures of a peer that hosts a part of the model: of each shard's state that it holds, at the rounds of the spec.

Decides that they are told until the coordinator takes them, or newer ones wait. Whoever hosts the whole model signs
what it made a checkpoint of instead, see `peer.checkpoints.publishing`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from peer.rounds.shard import Shard
from peer.training.layout import Layout
from swarm.digest import DIGEST_BYTES
from swarm.errors import NetworkError, NotAdmitted, SwarmError
from swarm.log import LogHead
from swarm.manifest import Anchor, Parameter
from swarm.proto.checkpoint_pb2 import Attestation

RETRY_S = 1.0
MAX_WAITING = 64

log = logging.getLogger(__name__)


class Coordinator(Protocol):
    async def attest(self, attestation: Attestation) -> None: ...


class Attester:
    def __init__(self, coordinator: Coordinator, layout: Layout) -> None:
        """``layout``: the whole model's."""
        parameters = tuple(Parameter(name=entry.name, shape=entry.shape) for entry in layout.entries)
        no_digest = "00" * DIGEST_BYTES
        self._layout_digest = Anchor(digest=no_digest, momentum_digest=no_digest, parameters=parameters).layout_digest
        self._coordinator = coordinator
        self._untold: dict[tuple[int, int], Attestation] = {}

    def sign(self, head: LogHead, shard: Shard) -> None:
        """The state of ``shard``, which stands at ``head``; signed again, it is told again."""
        self._untold[shard.index, head.round] = Attestation(
            shard=shard.index,
            round=head.round,
            log_digest=head.log_digest,
            state_digest=shard.state_digest,
            anchor_digest=shard.anchor_digest,
            momentum_digest=shard.momentum_digest,
            layout_digest=self._layout_digest,
        )
        while len(self._untold) > MAX_WAITING:
            self._untold.pop(next(iter(self._untold)))

    async def run(self) -> None:
        """Tell what is signed, until cancelled."""
        while True:
            for name, attestation in list(self._untold.items()):
                try:
                    await self._coordinator.attest(attestation)
                except (NetworkError, NotAdmitted) as error:  # it is away, or lacks the commit so far
                    log.info("shard %d, round %d: not attested yet: %s", *name, error)
                    continue
                except SwarmError as error:
                    log.warning("shard %d, round %d: not attested: %s", *name, error)
                self._untold.pop(name, None)
            await asyncio.sleep(RETRY_S)
