"""Calls on streams that are already open: how many at once, for how long, and what becomes of a failure.

Decides which incoming calls are admitted (by number, per peer and by memory), that no handler outlives its caller's
patience, and that a peer learns our named errors and nothing else. Leaves opening streams to `peer.p2p.network`, the
bytes of a call to `peer.p2p.call_stream`, and answers that wait to be sent to `peer.p2p.answers`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

from peer.p2p import call_stream
from peer.p2p.answers import Answers
from peer.p2p.call_stream import Traffic
from peer.p2p.transport import Handler
from peer.p2p.uplink import Pacer
from swarm.errors import NetworkError, NotFound, ProtocolError, SwarmError, Unreachable
from swarm.files import Kept
from swarm.identity import peer_id_of, public_key_of

logger = logging.getLogger(__name__)

# Handlers at work; calls that are open at all (arriving, waiting or at work); the same for one peer.
MAX_RUNNING_CALLS = 64
MAX_OPEN_CALLS = 512
MAX_OPEN_CALLS_PER_PEER = 192
# Requests that are held at once; what they take of memory is `keep`'s affair.
MAX_HELD_BYTES = 1 << 30
MAX_CALL_S = 900.0
_FIRST_BYTES_S = 10.0
_CANCEL_S = 1.0


class Calls:
    """The calls of one peer, in both directions."""

    def __init__(self, keep: Callable[[bytes], Kept], upload_limit_bps: int | None = None) -> None:
        self._keep = keep
        self.handlers: dict[str, Handler] = {}
        self.traffic = Traffic(MAX_HELD_BYTES, pacer=Pacer(upload_limit_bps))
        self.answers = Answers(keep)
        self._running = asyncio.Semaphore(MAX_RUNNING_CALLS)
        self._open: Counter[bytes] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def exchange(
        self,
        peer: bytes,
        method: str,
        request: Kept,
        timeout_s: float,
        max_response_bytes: int,
        stream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> bytes:
        """Send ``request`` and read the response on an open stream, which is closed in any case.

        Raises `Unreachable` where the peer goes away, `ProtocolError`, or the peer's `SwarmError`.
        """
        reader, writer = stream
        clock, uplink, arrived = asyncio.get_running_loop().time, self.traffic.uplink, False
        uplink.began(len(request), clock())
        # Sent beside the reading: a peer that refuses early answers before it has read everything.
        sending = asyncio.create_task(call_stream.send_request(writer, request, timeout_s, self.traffic))
        try:
            response = await call_stream.receive_response(reader, max_response_bytes, self.traffic)
            arrived = sending.done() and not sending.cancelled() and sending.exception() is None
            return response
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Unreachable(f"{method}: {peer_id_of(peer)} closed the connection") from error
        finally:
            uplink.ended(len(request), clock(), arrived=arrived)
            writer.close()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def stream(
        self,
        peer: bytes,
        method: str,
        request: bytes,
        timeout_s: float,
        max_response_bytes: int,
        stream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> AsyncGenerator[bytes, None]:
        """`exchange` of a small ``request``, whose response is handed over as it comes."""
        reader, writer = stream
        try:
            await call_stream.send_request(writer, request, timeout_s, self.traffic)
            async with aclosing(call_stream.response_parts(reader, max_response_bytes, self.traffic)) as parts:
                async for part in parts:
                    yield part
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Unreachable(f"{method}: {peer_id_of(peer)} closed the connection") from error
        finally:
            writer.close()

    async def call_self(self, method: str, own_key: bytes, request: Kept, max_response_bytes: int) -> bytes:
        """The same call without a network: libp2p does not dial itself."""
        if method not in self.handlers:
            raise NotFound(f"{method} is not served here")
        response = await self._handle(method, own_key, request[:])
        if len(response) > max_response_bytes:
            raise ProtocolError(f"a message larger than the {max_response_bytes} bytes that were allowed")
        return response

    async def on_stream(
        self, method: str, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve one incoming call by the peer whose key the handshake has proven. Never raises: nobody would look."""
        task = asyncio.current_task()
        if task is None or self._closed:
            writer.close()
            return
        self._tasks.add(task)
        try:
            await self._admit(method, public_key_of(peer_id), reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, SwarmError) as error:
            logger.debug("a call of %s by %s ended early: %r", method, peer_id, error)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def close(self) -> None:
        """Cancel the incoming calls."""
        self._closed = True
        await cancel(self._tasks)

    async def _admit(
        self, method: str, caller: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if sum(self._open.values()) >= MAX_OPEN_CALLS or self._open[caller] >= MAX_OPEN_CALLS_PER_PEER:
            busy = NetworkError("busy: too many calls at once")
            await asyncio.wait_for(call_stream.send_error(writer, busy, self.traffic), _FIRST_BYTES_S)
            return
        self._open[caller] += 1
        try:
            timeout_s = await asyncio.wait_for(call_stream.receive_timeout_s(reader), _FIRST_BYTES_S)
            await asyncio.wait_for(self._serve(method, caller, reader, writer), min(timeout_s, MAX_CALL_S))
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]

    async def _serve(
        self, method: str, caller: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        pieces: list[Kept] = []
        async with AsyncExitStack() as until_sent:
            try:
                await call_stream.receive_request(reader, self.traffic, self._keep, pieces)
                async with self._running:
                    coming = self._handle(method, caller, b"".join(piece[:] for piece in pieces))
                    response = await until_sent.enter_async_context(self.answers.holding(caller, coming))
            except SwarmError as error:
                await call_stream.send_error(writer, error, self.traffic)
                return
            finally:
                self.traffic.release(sum(map(len, pieces)))
            await call_stream.send_response(writer, response, self.traffic)

    async def _handle(self, method: str, caller: bytes, request: bytes) -> bytes:
        try:
            return await self.handlers[method](caller, request)
        except SwarmError:
            raise
        except Exception as error:
            # The edge of the network: a peer learns nothing about our insides, and no call may end the service.
            logger.exception("the handler of %s failed", method)
            raise NetworkError("internal error") from error


async def cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel ``tasks`` (but not the caller's own) and give them a moment to end."""
    waiting = [task for task in tasks if task is not asyncio.current_task()]
    for task in waiting:
        task.cancel()
    if waiting:
        done, _ = await asyncio.wait(waiting, timeout=_CANCEL_S)
        for task in done:
            if not task.cancelled():
                # Looked at, or asyncio would complain on the terminal.
                task.exception()
