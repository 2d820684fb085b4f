"""A simulated network: the transport's interface over dictionaries, with latency, deaths, stalls and partitions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

from peer.p2p.transport import MAX_CALL_BYTES, Handler
from swarm.errors import DeadlineExceeded, NetworkError, NotFound, ProtocolError, SwarmError, Unreachable
from swarm.files import Kept
from swarm.identity import Identity, peer_id_of

Filter = Callable[[bytes, bytes, str, bytes], None]
"""(from, to, method, request): may raise `NetworkError`, or act (kill a peer) before the message is delivered"""


@dataclass
class MemoryNetwork:
    """All peers of one simulation. ``latency_s`` is one way; ``bandwidth_bps`` is each sender's uplink."""

    latency_s: float = 0.02
    bandwidth_bps: float = 1e9
    peers: dict[bytes, MemoryTransport] = field(default_factory=dict)
    directory: dict[str, dict[bytes, tuple[float, bytes]]] = field(default_factory=dict)
    blocked: set[tuple[bytes, bytes]] = field(default_factory=set)
    stalled: set[bytes] = field(default_factory=set)
    before_delivery: list[Filter] = field(default_factory=list)

    def join(self, identity: Identity) -> MemoryTransport:
        transport = MemoryTransport(self, identity)
        self.peers[identity.public_key] = transport
        return transport


class MemoryTransport:
    def __init__(self, network: MemoryNetwork, identity: Identity) -> None:
        self._network = network
        self._key = identity.public_key
        self._handlers: dict[str, Handler] = {}
        self._sent = self._received = 0
        self.alive = True

    @property
    def public_key(self) -> bytes:
        return self._key

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"/memory/p2p/{peer_id_of(self._key)}",)

    async def call(
        self, peer: bytes, method: str, request: Kept, *, timeout_s: float, max_response_bytes: int = MAX_CALL_BYTES
    ) -> bytes:
        if len(request) > MAX_CALL_BYTES:
            raise ProtocolError("the request is too large")
        try:
            response = await asyncio.wait_for(self._deliver(peer, method, request[:]), timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise DeadlineExceeded(f"no answer within {timeout_s} s") from error
        if len(response) > max_response_bytes:
            raise ProtocolError("the response is too large")
        self._received += len(response)
        return response

    async def stream(
        self, peer: bytes, method: str, request: bytes, *, timeout_s: float, max_response_bytes: int
    ) -> AsyncGenerator[bytes, None]:
        yield await self.call(peer, method, request, timeout_s=timeout_s, max_response_bytes=max_response_bytes)

    async def _deliver(self, peer: bytes, method: str, request: bytes) -> bytes:
        network = self._network
        await self._travel(peer, len(request))
        for check in list(network.before_delivery):
            check(self._key, peer, method, request)
        target = network.peers.get(peer)
        if target is None or not target.alive or not self.alive:
            raise Unreachable("nobody is there")
        if peer in network.stalled:
            await asyncio.sleep(3600)
        handler = target._handlers.get(method)
        if handler is None:
            raise NotFound(f"no method {method}")
        self._sent += len(request)
        target._received += len(request)
        try:
            response = await handler(self._key, request)
        except SwarmError:
            raise
        except Exception as error:
            raise NetworkError("internal error") from error
        await target._travel(self._key, len(response))
        if not target.alive:
            raise Unreachable("the peer died before it answered")
        target._sent += len(response)
        return response

    async def _travel(self, to: bytes, num_bytes: int) -> None:
        if (self._key, to) in self._network.blocked:
            await asyncio.sleep(3600)
        await asyncio.sleep(self._network.latency_s + num_bytes * 8 / self._network.bandwidth_bps)

    async def serve(self, method: str, handler: Handler) -> None:
        self._handlers[method] = handler

    async def connect(self, peer: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None:
        target = self._network.peers.get(peer)
        if target is None or not target.alive:
            raise Unreachable("nobody is there")

    async def publish(self, key: str, value: bytes, *, lifetime_s: float) -> None:
        now = asyncio.get_running_loop().time()
        self._network.directory.setdefault(key, {})[self._key] = (now + lifetime_s, value)

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        now = asyncio.get_running_loop().time()
        records = self._network.directory.get(key, {})
        heard = {peer for peer in records if (peer, self._key) not in self._network.blocked}
        return {peer: value for peer, (expires, value) in records.items() if expires > now and peer in heard}

    def traffic(self) -> tuple[int, int]:
        return self._sent, self._received

    def uplink_bps(self) -> int | None:
        return None

    async def close(self) -> None:
        self.alive = False
