"""The coordinator as a server on localhost, and clients of it, for the integration tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from coordinator.server import RunningServer, ServerConfig, serve
from peer.coordinator_client import CoordinatorClient
from swarm.identity import Identity
from swarm.invite import Invite
from tests.coordinator_world import World


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test, for at most a minute."""

    def run(tmp_path: Path) -> None:
        async def whole() -> None:
            await asyncio.wait_for(test(tmp_path), 60)

        asyncio.run(whole())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def invite_to(world: World, port: int, pin: bytes, token: str = "") -> Invite:
    return Invite(run_id=world.run_id, tls_pin=pin, addresses=(f"127.0.0.1:{port}",), token=token)


@asynccontextmanager
async def coordinator(world: World, folder: Path, **changes: Any) -> AsyncIterator[RunningServer]:
    server = await serve(ServerConfig(**{"state_dir": folder, "source": world.source, **changes}))
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def client_of(
    world: World, server: RunningServer, identity: Identity | None = None, token: str = ""
) -> AsyncIterator[CoordinatorClient]:
    client = await CoordinatorClient.connect(invite_to(world, server.port, server.tls_pin, token), identity)
    try:
        yield client
    finally:
        await client.close()
