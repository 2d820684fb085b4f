"""Serving `train_microbatch`: a request is limited, admitted, read, trained on and answered.

Leaves what a request must look like to `peer.pipeline.messages`, and the rest to `peer.pipeline.hop`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from peer.p2p.transport import Transport
from peer.pipeline.hop import Hop
from peer.pipeline.messages import TRAIN_METHOD, HopRules, read_request, write_reply
from peer.pipeline.slot import Run
from swarm.errors import NotAdmitted


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingParts:
    hop: Hop
    rules: HopRules
    entrances: Collection[int]
    """shards at whose first layer a microbatch may enter: those of the span"""
    is_admitted: Callable[[bytes], bool]
    """whether the run knows the peer with this public key"""
    run: Run
    """where bytes are made and read"""


class Serving:
    def __init__(self, parts: ServingParts) -> None:
        self._parts = parts

    async def begin(self, transport: Transport) -> None:
        await transport.serve(TRAIN_METHOD, self._answer)

    async def _answer(self, caller: bytes, data: bytes) -> bytes:
        parts = self._parts
        if not parts.is_admitted(caller):
            raise NotAdmitted("only peers of the run may ask for this")
        parts.hop.admit()  # before anything is read: to be busy costs nothing
        try:
            entering = await parts.run(lambda: read_request(data, parts.entrances, parts.rules))
        except BaseException:
            parts.hop.give_up()
            raise
        answer = await parts.hop.train(entering)
        reply: bytes = await parts.run(lambda: write_reply(answer, parts.rules))
        return reply
