"""The way onward: a microbatch's hidden states to a replica of the next span, and its gradient back.

Decides that another replica is asked where one fails, is busy or late, or says that the loss is not finite, as long as
there is time; the caller still holds what it sent. A loss of NaN is believed when a second replica says so, too.
Leaves who is asked and how long to `peer.pipeline.routing`, bytes to `peer.pipeline.messages`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peer.p2p.transport import Transport
from peer.pipeline.hop_codec import HOP_CODECS
from peer.pipeline.messages import (
    Answer,
    Entering,
    HopRules,
    read_loss,
    read_reply,
    with_time,
    write_request,
)
from peer.pipeline.routing import Routes
from peer.pipeline.slot import Run
from swarm.errors import Busy, DataError, DeadlineExceeded, SwarmError, Unreachable
from swarm.identity import peer_id_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# While nobody hosts the next span, the directory is looked at again after so long.
LOOK_AGAIN_S = 0.5
CONNECT_S = 5.0

Hosts = Mapping[bytes, tuple[str, ...]]
"""public key -> addresses, of those whose span begins with the shard that is wanted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnwardParts:
    transport: Transport
    rules: HopRules
    first_shard: int
    """of the next span"""
    hosts: Callable[[], Hosts]
    """whom the directory names now"""
    draw: Callable[[], float]
    """chance, from [0, 1)"""
    run: Run
    """where bytes are made and read"""


class Onward:
    def __init__(self, parts: OnwardParts) -> None:
        self._parts = parts
        self._routes = Routes()
        self._connected: set[bytes] = set()
        self.num_asked = 0
        self.num_retries = 0
        self.waited_s = 0.0
        """for answers, over all microbatches"""

    async def ask(self, entering: Entering, hidden_BLH: torch.Tensor, left_s: float) -> Answer:
        """The gradient of ``hidden_BLH`` (or only the loss), by whichever replica answers first within ``left_s``.

        A loss of NaN where the hidden states cannot travel, or where two replicas say so, or one and no other answered
        in time. Raises `Unreachable` where nobody hosts the next span, and `DeadlineExceeded` where nobody answered in
        time.
        """
        parts, clock = self._parts, asyncio.get_running_loop().time
        ends_s = clock() + left_s
        encode = HOP_CODECS[parts.rules.codec].encode
        try:
            request = await parts.run(lambda: write_request(entering, parts.first_shard, encode(hidden_BLH)))
        except DataError:
            return Answer(loss=math.nan, gradient_BLH=None)
        doubted: dict[bytes, Answer] = {}
        while (left_s := ends_s - clock()) > 0:
            peer = await self._choose(left_s)
            if peer is None:
                continue
            began_s = clock()
            try:
                answer = await self._ask(peer, request, entering, ends_s)
                if not math.isnan(answer.loss) or self._is_believed(peer, doubted):
                    return answer
                doubted[peer] = answer
            except Busy:
                self._routes.busy(peer, clock())
            except SwarmError as error:
                log.info("%s did not answer %s: %s", peer_id_of(peer), entering.method, error)
                self._connected.discard(peer)
                late_s = clock() - began_s if isinstance(error, DeadlineExceeded) else 0.0
                self._routes.failed(peer, clock(), late_s)
            self.num_retries += 1
        if doubted:
            return next(iter(doubted.values()))
        if not parts.hosts():
            raise Unreachable(f"nobody hosts the span that begins with shard {parts.first_shard}")
        raise DeadlineExceeded(f"no replica of the span from shard {parts.first_shard} answered in time")

    def _is_believed(self, peer: bytes, doubted: Mapping[bytes, Answer]) -> bool:
        """Whether a loss of NaN is, from ``peer``: one who says so at once would draw, and lose, all microbatches."""
        if not self._parts.hosts().keys() - {peer}:
            return True
        self._routes.failed(peer, asyncio.get_running_loop().time())
        return bool(doubted.keys() - {peer})

    async def _choose(self, left_s: float) -> bytes | None:
        """A replica to ask now; None after waiting for one, or for the directory."""
        clock = asyncio.get_running_loop().time
        self._routes.know(self._parts.hosts())
        peer = self._routes.choose(clock(), self._parts.draw())
        if peer is None:
            chance_s = self._routes.next_chance_s()
            wait_s = LOOK_AGAIN_S if chance_s is None else max(chance_s - clock(), 0.001)
            await asyncio.sleep(min(wait_s, LOOK_AGAIN_S, left_s))
        return peer

    async def _ask(self, peer: bytes, request: bytes, entering: Entering, ends_s: float) -> Answer:
        parts, num_sequences, clock = self._parts, len(entering.tokens), asyncio.get_running_loop().time
        began_s = clock()
        patience_s = self._routes.patience_s(peer, ends_s - began_s, began_s)
        if peer not in self._connected:
            await parts.transport.connect(peer, parts.hosts().get(peer, ()), timeout_s=min(CONNECT_S, patience_s))
            self._connected.add(peer)
        left_s = max(0.001, began_s + patience_s - clock())
        self.num_asked += 1
        try:
            data = await parts.transport.call(
                peer,
                entering.method,
                with_time(request, left_s),
                timeout_s=left_s,
                max_response_bytes=parts.rules.max_answer_bytes(num_sequences),
            )
        finally:
            self.waited_s += clock() - began_s
        read = read_loss if entering.round is not None else lambda data: read_reply(data, num_sequences, parts.rules)
        answer: Answer = await parts.run(lambda: read(data))
        if not math.isnan(answer.loss):
            self._routes.answered(peer, clock() - began_s)
        return answer
