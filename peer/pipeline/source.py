"""The source: batches of the peers that host the first span, kept in flight until they were trained on.

Decides that a microbatch is asked for again, under the same id, until it was trained on or its loss is not finite; that
no more are read than fit (backpressure to the data); how long a place is left to others who were told *busy*; and says
which span is waited for. Leaves batches to whoever reads them, and the way through the spans to `peer.pipeline.hop`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from peer.pipeline.hop import Hop
from peer.pipeline.messages import SHARD_TIME_S, Answer, Entering
from peer.pipeline.routing import MAX_BUSY_S
from peer.training.microbatches import Tokens
from swarm.errors import Busy, NetworkError, SwarmError

log = logging.getLogger(__name__)

NO_BATCH_S = 0.2
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceParts:
    hop: Hop
    next_batch: Callable[[int], Tokens | None]
    """how many were read before -> tokens [B, L+1]; None: there are none now"""
    new_id: Callable[[], bytes]
    max_in_flight: int
    timeout_s: float = SHARD_TIME_S
    """for one microbatch there and back; after it, it is asked for again"""
    on_answer: Callable[[Tokens, Answer], None] = lambda tokens, answer: None


class Source:
    def __init__(self, parts: SourceParts) -> None:
        self._parts = parts
        self._under_way: set[asyncio.Task[None]] = set()
        self.num_read = 0
        self.num_repeated = 0
        self._took_s = 0.0
        """the last one, there and back"""
        self.waits_for = ""
        """why microbatches do not come back, in words; empty while they do"""

    async def run(self) -> None:
        """Read and train until cancelled. Raises what is no fault of other peers."""
        hop = self._parts.hop
        try:
            while True:
                await hop.room(self._yield_s)
                self._raise_failures()
                if len(self._under_way) >= self._parts.max_in_flight:
                    await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
                    continue
                tokens = self._parts.next_batch(self.num_read)
                if tokens is None:
                    await asyncio.sleep(NO_BATCH_S)
                    continue
                self.num_read += 1
                hop.admit(is_own=True)
                self._under_way.add(asyncio.ensure_future(self._see_through(self._parts.new_id(), tokens)))
        finally:
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _see_through(self, microbatch_id: bytes, tokens: Tokens) -> None:
        """One admitted microbatch, until it was trained on."""
        parts, pause_s, clock = self._parts, FIRST_PAUSE_S, asyncio.get_running_loop().time
        entering = Entering(microbatch_id=microbatch_id, tokens=tokens, time_left_s=parts.timeout_s)
        while True:
            began_s = clock()
            try:
                answer = await parts.hop.train(entering)
            except NetworkError as error:
                self._say(str(error) if not isinstance(error, Busy) else "")
            else:
                self._say("")
                self._took_s = clock() - began_s
                parts.on_answer(tokens, answer)
                return
            self.num_repeated += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
            await self._admit()

    async def _admit(self) -> None:
        while True:
            await self._parts.hop.room(self._yield_s)
            try:
                return self._parts.hop.admit(is_own=True)
            except Busy:  # another one was quicker
                await asyncio.sleep(0)

    @property
    def _yield_s(self) -> float:
        """Until whoever was told busy has asked again; no longer than one of our own takes, lest none comes back."""
        return min(MAX_BUSY_S, self._took_s)

    def _say(self, reason: str) -> None:
        if reason and not self.waits_for:
            log.warning("training waits: %s", reason)
        elif self.waits_for and not reason:
            log.warning("training goes on")
        self.waits_for = reason

    def _raise_failures(self) -> None:
        for task in [task for task in self._under_way if task.done()]:
            self._under_way.discard(task)
            error = task.exception()
            if error is not None:
                raise error if isinstance(error, SwarmError) else SwarmError(f"a microbatch failed: {error!r}")
