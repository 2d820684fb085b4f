"""Answers on their way to peers that may read slowly, or never: how many bytes, and which of them in memory.

Decides that an answer stays in memory as long as few do (the chunks that an honest download asks for at once), lies on
disk beyond that, and is given up for "busy" beyond what one peer, or all together, may have waiting. Leaves what an
answer says to its handler, and the sending to `peer.p2p.call_stream`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from peer.p2p.transport import MAX_CALL_BYTES
from swarm.errors import NetworkError
from swarm.files import Kept

# What is no larger waits in memory and is never refused: a vote must not suffer from what others leave unread.
SMALL_ANSWER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLimits:
    """Bytes of answers that are not sent yet. A peer's only answer may be as large as any call."""

    in_memory: int = 256 << 20
    in_memory_per_peer: int = 32 << 20  # a download asks one peer for six chunks of 4 MiB at once
    held: int = 8 * MAX_CALL_BYTES
    held_per_peer: int = 4 * MAX_CALL_BYTES  # a fetch asks one holder for four blobs at once


class Answers:
    """What waits to be sent, by the peer that asked for it. ``keep`` puts bytes on disk, from any thread."""

    def __init__(self, keep: Callable[[bytes], Kept], limits: AnswerLimits | None = None) -> None:
        self._keep = keep
        self._limits = limits or AnswerLimits()
        self.held: Counter[bytes] = Counter()
        self.in_memory: Counter[bytes] = Counter()

    @asynccontextmanager
    async def holding(self, peer: bytes, coming: Awaitable[bytes]) -> AsyncIterator[Kept]:
        """The answer, once it came, where it may wait; it is counted until the context ends.

        Raises `NetworkError` where too much waits already, and what ``coming`` raises.
        """
        answer: Kept = await coming
        size = len(answer)
        if size <= SMALL_ANSWER_BYTES:
            yield answer
            return
        if self._is_too_much(peer, size):
            raise NetworkError("busy: too many answers wait to be read", "ask another holder, or read sooner")
        counts = [self.held]
        if self._fits_in_memory(peer, size):
            counts.append(self.in_memory)
        for count in counts:
            count[peer] += size
        try:
            if self.in_memory not in counts:
                answer = await asyncio.to_thread(self._keep, answer[:])
            yield answer
        finally:
            for count in counts:
                count[peer] -= size
                if not count[peer]:
                    del count[peer]

    def _is_too_much(self, peer: bytes, size: int) -> bool:
        too_much_for_it = self.held[peer] > 0 and self.held[peer] + size > self._limits.held_per_peer
        return too_much_for_it or self.held.total() + size > self._limits.held

    def _fits_in_memory(self, peer: bytes, size: int) -> bool:
        fits_its_share = self.in_memory[peer] + size <= self._limits.in_memory_per_peer
        return fits_its_share and self.in_memory.total() + size <= self._limits.in_memory
