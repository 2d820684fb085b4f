"""Serving `train_microbatch` and `evaluate_microbatch`: a request is limited, admitted, read and answered.

Leaves what a request must look like to `peer.pipeline.messages`, the rest to `peer.pipeline.hop` and `.evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from peer.p2p.transport import Transport
from peer.pipeline.evaluation import Evaluation
from peer.pipeline.hop import Hop
from peer.pipeline.messages import (
    EVALUATE_METHOD,
    TRAIN_METHOD,
    Entering,
    HopRules,
    read_evaluation,
    read_request,
    write_loss,
    write_reply,
)
from peer.pipeline.slot import Run
from swarm.errors import NotAdmitted, NotFound


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
    evaluation: Evaluation | None = None
    """None: no anchors are here"""


class Serving:
    def __init__(self, parts: ServingParts) -> None:
        self._parts = parts

    async def begin(self, transport: Transport) -> None:
        await transport.serve(TRAIN_METHOD, self._train)
        if self._parts.evaluation is not None:
            await transport.serve(EVALUATE_METHOD, self._evaluate)

    async def _train(self, caller: bytes, data: bytes) -> bytes:
        parts = self._parts
        self._check(caller)
        parts.hop.admit()  # before anything is read: to be busy costs nothing
        try:
            entering = await parts.run(lambda: read_request(data, parts.entrances, parts.rules))
        except BaseException:
            parts.hop.give_up()
            raise
        answer = await parts.hop.train(entering)
        reply: bytes = await parts.run(lambda: write_reply(answer, parts.rules))
        return reply

    async def _evaluate(self, caller: bytes, data: bytes) -> bytes:
        parts = self._parts
        self._check(caller)
        if parts.evaluation is None:
            raise NotFound("no anchors are here")

        async def read() -> Entering:
            entering: Entering = await parts.run(lambda: read_evaluation(data, parts.entrances, parts.rules))
            return entering

        return write_loss(await parts.evaluation.answer(caller, read))

    def _check(self, caller: bytes) -> None:
        if not self._parts.is_admitted(caller):
            raise NotAdmitted("only peers of the run may ask for this")
