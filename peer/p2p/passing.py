"""Bytes passed between two streams, both ways.

Decides when that ends: with either stream, or when neither says anything for too long. Leaves who may have bytes passed
to `peer.p2p.relay` and `peer.p2p.punching`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

_PIECE_BYTES = 1 << 18

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def pass_both_ways(one: Stream, other: Stream, silence_s: float, count: Callable[[int], None]) -> None:
    """Return when an end closes, or neither said anything for ``silence_s``. The caller closes both."""
    now = asyncio.get_running_loop().time
    heard_at = now()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard_at
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE_BYTES):
                heard_at = now()
                count(len(data))
                writer.write(data)
                await writer.drain()

    ways = {asyncio.create_task(pass_on(one[0], other[1])), asyncio.create_task(pass_on(other[0], one[1]))}
    ended = set[asyncio.Task[None]]()
    try:
        while not ended and (left_s := heard_at + silence_s - now()) > 0:
            ended, _ = await asyncio.wait(ways, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
