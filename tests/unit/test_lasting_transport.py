"""A transport whose daemon dies is replaced, and serves what was served before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

import pytest

from peer.p2p.lasting_transport import LastingTransport
from peer.p2p.transport import Handler
from swarm.errors import NetworkError, Unreachable
from tests.simulation.virtual_time import run


class Daemon:
    def __init__(self) -> None:
        self.dead = asyncio.Event()
        self.handlers: dict[str, Handler] = {}
        self.closed = False
        self.seeds: tuple[str, ...] = ()

    public_key = b"k" * 32
    addresses = ("/memory",)

    async def wait_failed(self) -> None:
        await self.dead.wait()

    async def call(
        self, peer: bytes, method: str, request: bytes, *, timeout_s: float, max_response_bytes: int = 0
    ) -> bytes:
        return await self.handlers[method](peer, request)

    async def stream(
        self, peer: bytes, method: str, request: bytes, *, timeout_s: float, max_response_bytes: int
    ) -> AsyncGenerator[bytes, None]:
        yield await self.handlers[method](peer, request)

    async def serve(self, method: str, handler: Handler) -> None:
        self.handlers[method] = handler

    async def connect(self, peer: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None: ...
    async def publish(self, key: str, value: bytes, *, lifetime_s: float) -> None: ...

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        return {}

    def learn_seeds(self, addresses: tuple[str, ...]) -> None:
        self.seeds = addresses

    def traffic(self) -> tuple[int, int]:
        return 10, 20

    def uplink_bps(self) -> int | None:
        return None

    async def close(self) -> None:
        self.closed = True


async def echo(caller: bytes, request: bytes) -> bytes:
    return request


def test_after_the_daemon_died_calls_work_again_and_traffic_adds_up() -> None:
    async def main() -> None:
        first, second = Daemon(), Daemon()
        failures = [NetworkError("the port is still taken")]

        async def reopen(seeds: tuple[str, ...]) -> Daemon:
            if failures:
                raise failures.pop()
            second.seeds = seeds
            return second

        transport = LastingTransport(first, reopen, ("/old",))
        await transport.serve("echo", echo)
        transport.learn_seeds(("/new",))
        transport.learn_seeds(())
        watching = asyncio.ensure_future(transport.watch())
        assert await transport.call(b"p", "echo", b"1", timeout_s=1) == b"1"
        first.dead.set()
        await asyncio.sleep(0.1)
        assert first.closed
        with pytest.raises(Unreachable, match="restarted"):
            await transport.call(b"p", "echo", b"2", timeout_s=1)
        await asyncio.sleep(10)
        assert await transport.call(b"p", "echo", b"3", timeout_s=1) == b"3"
        assert first.seeds == second.seeds == ("/new",)
        assert transport.traffic() == (20, 40) and transport.restarts == 2
        watching.cancel()
        await transport.close()
        assert second.closed

    run(main())
