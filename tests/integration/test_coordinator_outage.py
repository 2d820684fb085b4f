"""The coordinator away, slow, busy or killed, and what its client makes of it.

Run as a program, this file is a coordinator: ``python FILE FOLDER PORT`` prints its port and pin.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator import server as server_module
from coordinator.server import ServerConfig, serve
from coordinator.service import Service
from coordinator.tls import KEY_FILE
from peer import coordinator_client, coordinator_connection
from peer.coordinator_client import CoordinatorClient
from swarm.errors import DeadlineExceeded, NetworkError, PinError, Unreachable
from tests.coordinator_server import client_of, coordinator, in_loop, invite_to
from tests.coordinator_world import ANNA, SEED, World, address_of, report_payload

ROOT = Path(__file__).parents[2]
EXIT_TIMEOUT_S = 30.0


@in_loop
async def test_a_key_that_changes_under_a_connected_client_is_refused(tmp_path: Path) -> None:
    world = World()
    async with coordinator(world, tmp_path / "one") as server:
        client = await CoordinatorClient.connect(invite_to(world, server.port, server.tls_pin), ANNA)
        await client.get_run()
    async with coordinator(world, tmp_path / "two", port=server.port):
        with pytest.raises(PinError):
            await _persist(client.progress)
    await client.close()


@in_loop
async def test_the_client_goes_on_after_the_coordinator_was_away(tmp_path: Path) -> None:
    """Stopped, calls fail by name; started again on the same port with the same key, they succeed."""
    world = World()
    async with coordinator(world, tmp_path) as server:
        client = await CoordinatorClient.connect(invite_to(world, server.port, server.tls_pin), ANNA)
        await client.admit()
    for _ in range(3):
        with pytest.raises(Unreachable) as caught:
            await client.progress()
        assert "training goes on" in caught.value.advice
    async with coordinator(world, tmp_path, port=server.port):
        assert await client.report(report_payload()) == (1,)
    await client.close()
    with pytest.raises(Unreachable, match="closed"):
        await client.progress()


@in_loop
async def test_a_restart_between_two_calls_is_bridged(tmp_path: Path) -> None:
    world = World()
    async with coordinator(world, tmp_path) as server:
        client = await CoordinatorClient.connect(invite_to(world, server.port, server.tls_pin), ANNA)
        await client.get_run()
    async with coordinator(world, tmp_path, port=server.port):
        reply = await _persist(client.progress)
        assert reply.name == "test-run"
    await client.close()


@in_loop
async def test_a_coordinator_that_nobody_runs_is_unreachable(tmp_path: Path) -> None:
    with _silent_port() as port:
        pass
    with pytest.raises(Unreachable, match="no coordinator answers") as caught:
        await CoordinatorClient.connect(invite_to(World(), port, b"p" * 32))
    assert caught.value.advice


@in_loop
async def test_a_server_that_never_answers_ends_at_the_deadline(tmp_path: Path) -> None:
    with _silent_port() as port, pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator_connection, "CONNECT_TIMEOUT_S", 0.3)
        with pytest.raises(Unreachable, match="no answer within"):
            await CoordinatorClient.connect(invite_to(World(), port, b"p" * 32))


@in_loop
async def test_a_server_without_tls_is_unreachable(tmp_path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as plain:
        port = plain.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable):
            await CoordinatorClient.connect(invite_to(World(), port, b"p" * 32))


@in_loop
async def test_the_next_address_of_the_invite_is_tried(tmp_path: Path) -> None:
    world = World()
    with _silent_port() as dead:
        pass
    async with coordinator(world, tmp_path / "right") as right, coordinator(world, tmp_path / "wrong") as wrong:
        addresses = tuple(f"127.0.0.1:{port}" for port in (dead, wrong.port, right.port))
        client = await CoordinatorClient.connect(replace(invite_to(world, 1, right.tls_pin), addresses=addresses))
        assert (await client.get_run()).spec == world.spec
        await client.close()


@in_loop
async def test_a_call_that_takes_too_long_ends_at_its_deadline(tmp_path: Path) -> None:
    """And the next call works again."""
    world = World()
    async with coordinator(world, tmp_path) as server, client_of(world, server) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coordinator_client, "TRANSFER_TIMEOUT_S", 0.3)
            patch.setattr(Service, "_write", _never)
            with pytest.raises(DeadlineExceeded, match="RecordCommits"):
                await client.record_commits([])
        assert await client.record_commits([]) == 1


@in_loop
async def test_a_coordinator_that_is_busy_says_so_and_recovers(tmp_path: Path) -> None:
    world = World()
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(self: Service, job: Callable[[], Any]) -> Any:
        entered.set()
        await release.wait()
        return job()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "MAX_CONCURRENT_CALLS", 1)
        patch.setattr(Service, "_write", slow)
        async with coordinator(world, tmp_path) as server, client_of(world, server) as client:
            call = asyncio.ensure_future(client.record_commits([]))
            await entered.wait()
            with pytest.raises(NetworkError, match="RESOURCE_EXHAUSTED"):
                await client.progress()
            release.set()
            assert await call == 1
            assert (await client.progress()).name == "test-run"


@in_loop
async def test_a_stop_with_a_call_under_way_takes_at_most_three_seconds(tmp_path: Path) -> None:
    world = World()
    entered = asyncio.Event()

    async def stuck(self: Service, job: Callable[[], Any]) -> Any:
        entered.set()
        await _never(self, job)

    server = await serve(ServerConfig(state_dir=tmp_path, source=world.source))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Service, "_write", stuck)
        async with client_of(world, server, ANNA) as client:
            call = asyncio.ensure_future(client.record_commits([]))
            await entered.wait()
            started = time.monotonic()
            await server.stop()
            assert time.monotonic() - started < 3
            with pytest.raises(Unreachable):
                await call


def test_a_stopped_coordinators_folder_is_free_even_while_a_forked_child_lives(tmp_path: Path) -> None:
    """A child that was forked in between holds copies of our descriptors; a stop lets go all the same."""

    @in_loop
    async def body(folder: Path) -> None:
        server = await serve(ServerConfig(state_dir=folder, source=World().source))
        inherited = os.dup(server._lock)  # the same open file, as a forked child has it
        await server.stop()
        async with coordinator(World(), folder, port=server.port):
            os.close(inherited)

    body(tmp_path)


class Process:
    """A coordinator as a program of its own."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        command = [sys.executable, __file__, str(folder), str(port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._popen.stdout is not None
        port_text, pin_text = self._popen.stdout.readline().split()
        self.port, self.pin = int(port_text), bytes.fromhex(pin_text)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait(EXIT_TIMEOUT_S)
        assert self._popen.stdout is not None
        self._popen.stdout.close()


def test_a_killed_coordinator_lost_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    """SIGKILL right after the answer, three times: commits, reports, addresses and checkpoints are all there."""
    world = World()
    port = 0
    for life in range(1, 4):
        process = Process(tmp_path, port)
        port = process.port
        try:
            asyncio.run(asyncio.wait_for(_one_life(world, process, life), 60))
        finally:
            process.kill()
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600


async def _one_life(world: World, process: Process, life: int) -> None:
    client = await CoordinatorClient.connect(invite_to(world, process.port, process.pin), SEED)
    before = await client.progress()
    assert (before.round, before.total_tokens) == (5 * (life - 1), 300 * 5 * (life - 1))
    if life > 1:
        assert [info.round for info in await client.checkpoints()] == [5 * number for number in range(life - 1, 0, -1)]
        assert {peer.peer_key: peer.round for peer in before.peers}[SEED.public_key] == life - 1
        assert (await client.get_run()).seed_addresses == (address_of(SEED, life - 1),)
    await client.admit(seed_addresses=[address_of(SEED, life)])
    acknowledged: list[Callable[[], Awaitable[object]]] = [
        lambda: client.report(report_payload(round=life)),
        lambda: client.publish(world.manifest(5 * life)),
    ]
    assert await client.record_commits(world.commits(5)) == 5 * life + 1
    witness = await CoordinatorClient.connect(invite_to(world, process.port, process.pin), ANNA)
    await witness.admit()
    for replica in (client, witness):
        await replica.attest(world.attestation(5 * life))
    await witness.close()
    for call in acknowledged if life % 2 else acknowledged[::-1]:  # another call is the last before each kill
        await call()
    process.kill()
    with pytest.raises(Unreachable):
        await client.progress()
    await client.close()


async def _persist(call: Callable[[], Awaitable[Any]], attempts: int = 3) -> Any:
    """Call until it is no longer `Unreachable`; an outage may cost a bounded number of calls."""
    for _ in range(attempts):
        try:
            return await call()
        except Unreachable:
            continue
    raise Unreachable(f"still away after {attempts} calls")


async def _never(self: Service, job: Callable[[], Any]) -> Any:
    await asyncio.Event().wait()


@contextmanager
def _silent_port() -> Iterator[int]:
    """A port on which, inside the block, connections are taken but never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        yield listener.getsockname()[1]


async def _main(folder: Path, port: int) -> None:
    server = await serve(ServerConfig(state_dir=folder, source=World().source, port=port))
    sys.stdout.write(f"{server.port} {server.tls_pin.hex()}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2])))
