"""A transport that outlives its daemon: when p2pd dies, another is started and serves what was served before.

Callers see `NetworkError` meanwhile, as they do when a peer is away; the trainer notices nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Protocol

from peer.p2p.transport import MAX_CALL_BYTES, Handler, Transport
from swarm.errors import SwarmError, Unreachable
from swarm.files import Kept

PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0)

log = logging.getLogger(__name__)


class MortalTransport(Transport, Protocol):
    async def wait_failed(self) -> None: ...
    def learn_seeds(self, addresses: tuple[str, ...]) -> None: ...


class LastingTransport:
    def __init__(
        self,
        first: MortalTransport,
        reopen: Callable[[tuple[str, ...]], Awaitable[MortalTransport]],
        seeds: tuple[str, ...] = (),
    ) -> None:
        """``reopen`` is given the addresses of the seed peers, as they are known then; ``seeds``: as they are now."""
        self._current: MortalTransport | None = first
        self._reopen, self.seeds = reopen, seeds
        self._key = first.public_key
        self._handlers: dict[str, Handler] = {}
        self._before = (0, 0)
        self.restarts = 0

    @property
    def public_key(self) -> bytes:
        return self._key

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._current.addresses if self._current is not None else ()

    async def watch(self) -> None:
        """Reopen whenever the daemon ends, until cancelled."""
        while True:
            if self._current is not None:
                await self._current.wait_failed()
                sent, received = self._current.traffic()
                self._before = (self._before[0] + sent, self._before[1] + received)
                ended, self._current = self._current, None
                await ended.close()
            log.warning("the network daemon ended; starting another")
            await self._replace()

    async def _replace(self) -> None:
        """Try until a new daemon serves what the old one served."""
        failures = 0
        while self._current is None:
            await asyncio.sleep(PAUSES_S[min(failures, len(PAUSES_S) - 1)])
            failures += 1
            self.restarts += 1
            try:
                self._current = await self._reopen_and_serve()
            except (SwarmError, OSError) as error:
                log.warning("the network daemon does not start: %s", error)

    async def _reopen_and_serve(self) -> MortalTransport:
        current = await self._reopen(self.seeds)
        try:
            for method, handler in self._handlers.items():
                await current.serve(method, handler)
        except BaseException:
            await current.close()
            raise
        return current

    async def call(
        self, peer: bytes, method: str, request: Kept, *, timeout_s: float, max_response_bytes: int = MAX_CALL_BYTES
    ) -> bytes:
        return await self._alive().call(
            peer, method, request, timeout_s=timeout_s, max_response_bytes=max_response_bytes
        )

    def stream(
        self, peer: bytes, method: str, request: bytes, *, timeout_s: float, max_response_bytes: int
    ) -> AsyncGenerator[bytes, None]:
        return self._alive().stream(peer, method, request, timeout_s=timeout_s, max_response_bytes=max_response_bytes)

    async def serve(self, method: str, handler: Handler) -> None:
        self._handlers[method] = handler
        await self._alive().serve(method, handler)

    async def connect(self, peer: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None:
        await self._alive().connect(peer, addresses, timeout_s=timeout_s)

    def learn_seeds(self, addresses: tuple[str, ...]) -> None:
        """The run has seed peers at these addresses now."""
        if addresses and addresses != self.seeds:
            self.seeds = addresses
            if self._current is not None:
                self._current.learn_seeds(addresses)

    async def publish(self, key: str, value: bytes, *, lifetime_s: float) -> None:
        await self._alive().publish(key, value, lifetime_s=lifetime_s)

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        return await self._alive().lookup(key)

    def traffic(self) -> tuple[int, int]:
        sent, received = self._current.traffic() if self._current is not None else (0, 0)
        return self._before[0] + sent, self._before[1] + received

    def uplink_bps(self) -> int | None:
        return self._current.uplink_bps() if self._current is not None else None

    async def close(self) -> None:
        if self._current is not None:
            await self._current.close()
            self._current = None

    def _alive(self) -> MortalTransport:
        if self._current is None:
            raise Unreachable("the network daemon is being restarted")
        return self._current
