"""The coordinator and its client over real gRPC, TLS and SQLite: honest and hostile, on one machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.checkpoint_files import CheckpointFiles
from coordinator.server import ServerConfig, serve
from coordinator.service import Outlets
from peer import coordinator_client, coordinator_connection
from peer.checkpoints import trusted
from peer.coordinator_client import CoordinatorClient
from swarm.digest import sha256
from swarm.errors import (
    AlreadyRunning,
    ConfigError,
    DigestError,
    NetworkError,
    NotAdmitted,
    NotFound,
    PinError,
    PortInUse,
    ProtocolError,
    SignatureError,
    SpecError,
    SwarmError,
    VerificationError,
)
from swarm.proto.common_pb2 import Signed
from tests.checkpoint_samples import make_parts, small_checkpoint
from tests.coordinator_server import client_of, coordinator, in_loop, invite_to
from tests.coordinator_world import ANNA, ORGANIZER, SEED, STRANGER, TOKEN, World, address_of, report_payload

WITH_TOKEN = {"mode": "token", "token_sha256": sha256(TOKEN.encode()).hex()}


@in_loop
async def test_a_run_from_the_first_call_to_a_published_checkpoint(tmp_path: Path) -> None:
    world = World(admission=WITH_TOKEN)
    async with coordinator(world, tmp_path) as server, client_of(world, server, SEED) as seed:
        await seed.admit(seed_addresses=[address_of(SEED)])
        async with client_of(world, server, STRANGER, TOKEN) as volunteer:
            run = await volunteer.get_run()
            assert run.spec == world.spec
            assert run.seed_addresses == (address_of(SEED),)
            assert (run.manifest_bytes, run.tokenizer_bytes) == (world.source.data_manifest, world.source.tokenizer)
            assert abs(run.clock_offset_s) < 1
            await volunteer.admit()
            assert await volunteer.report(report_payload(round=0)) == (1,)
        assert await seed.record_commits(world.commits(70)) == 71
        assert await seed.record_commits([]) == 71
        await seed.attest(world.attestation(70))
        with pytest.raises(NotFound, match="1 of 3 live replicas"):
            await seed.publish(world.manifest(70))
        async with client_of(world, server, ANNA, TOKEN) as witness:
            await witness.admit()
            await witness.attest(world.attestation(70))
        signed = await seed.publish(world.manifest(70))
        measured = world.evaluation_by(STRANGER, 70)
        with pytest.raises(NotAdmitted):
            await seed.tell_evaluation(measured)
        async with client_of(world, server, None, TOKEN) as researcher:
            await researcher.tell_evaluation(measured)
            assert await researcher.evaluations(70) == [measured]
            assert [info.num_evaluations for info in await researcher.checkpoints()] == [1]
        async with client_of(world, server) as researcher:
            assert [info.round for info in await researcher.checkpoints()] == [70]
            assert await researcher.checkpoint() == await researcher.checkpoint(70) == signed
            source = trusted.files_source(await researcher.metadata())
            known = trusted.refresh(tmp_path / "trusted", world.run_id, world.spec, source)
            assert known.newest_round == 70
            assert known.check(signed).round == 70
            progress = await researcher.progress()
            assert (progress.round, len(progress.rounds), progress.target_tokens) == (70, 70, 100_000)
            with pytest.raises(NotFound, match="round 9"):
                await researcher.checkpoint(9)


@in_loop
async def test_errors_of_the_coordinator_reach_the_caller_as_themselves(tmp_path: Path) -> None:
    world = World(admission=WITH_TOKEN, voters=(SEED,))
    commit = world.commit()
    cases: list[tuple[str, type[SwarmError], Callable[[CoordinatorClient], Awaitable[object]]]] = [
        ("wrong token", NotAdmitted, lambda client: client.admit("guess")),
        ("not admitted", NotAdmitted, lambda client: client.report(report_payload())),
        ("too few votes", VerificationError, lambda client: client.record_commits([world.commit(signers=[])])),
        ("no seed peer", SignatureError, lambda client: client.publish(world.manifest(1))),
        ("too large", ProtocolError, lambda client: client.publish(b"x" * (17 << 20))),
        ("too long", ProtocolError, lambda client: client.admit(TOKEN * 10_000)),
    ]
    async with coordinator(world, tmp_path) as server, client_of(world, server, ANNA) as client:
        await client.record_commits([commit])
        for name, expected, call in cases:
            with pytest.raises(expected) as caught:
                await call(client)
            assert caught.type is expected, name
        with pytest.raises(ConfigError) as refused:
            await client.admit("guess")
        assert "token" in str(refused.value) and "organizer" in refused.value.advice


@in_loop
async def test_another_key_than_the_invites_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    world = World()
    async with coordinator(world, tmp_path) as server:
        with pytest.raises(PinError, match="another key"):
            await CoordinatorClient.connect(invite_to(world, server.port, b"p" * 32), ANNA)


@in_loop
async def test_a_message_larger_than_the_server_takes_is_refused_by_the_server_too(tmp_path: Path) -> None:
    world = World()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator_client, "MAX_REQUEST_BYTES", 1 << 30)
        options = [option for option in coordinator_connection._OPTIONS if "send" not in option[0]]
        patch.setattr(coordinator_connection, "_OPTIONS", (*options, ("grpc.max_send_message_length", -1)))
        async with coordinator(world, tmp_path) as server, client_of(world, server, SEED) as client:
            with pytest.raises(NetworkError, match="RESOURCE_EXHAUSTED"):
                await client.publish(b"x" * (17 << 20))
            assert (await client.progress()).name == "test-run"


def _flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def _spec_of_another_key(world: World) -> Signed:
    return STRANGER.sign("run-spec", world.run_id, world.spec.canonical_bytes())


HOSTILE_RUNS: dict[str, tuple[type[SwarmError], Callable[[World], dict[str, Any]]]] = {
    "spec with a flipped byte": (
        SpecError,
        lambda world: {
            "spec": Signed(
                signer=ORGANIZER.public_key,
                payload=_flip(world.source.spec.payload),
                signature=world.source.spec.signature,
            )
        },
    ),
    "spec signed by another key": (SpecError, lambda world: {"spec": _spec_of_another_key(world)}),
    "spec with another's signature": (
        SignatureError,
        lambda world: {
            "spec": Signed(
                signer=ORGANIZER.public_key,
                payload=world.source.spec.payload,
                signature=_spec_of_another_key(world).signature,
            )
        },
    ),
    "genesis signed by another key": (
        SignatureError,
        lambda world: {"genesis": STRANGER.sign("genesis", world.run_id, world.source.genesis.payload)},
    ),
    "data manifest with a flipped byte": (
        DigestError,
        lambda world: {"data_manifest": _flip(world.source.data_manifest)},
    ),
    "tokenizer with a flipped byte": (DigestError, lambda world: {"tokenizer": _flip(world.source.tokenizer)}),
}


@pytest.mark.parametrize("case", HOSTILE_RUNS)
def test_a_run_that_was_changed_is_refused_by_the_client_and_by_the_coordinator(tmp_path: Path, case: str) -> None:
    expected, change = HOSTILE_RUNS[case]
    world = World()
    hostile = replace(world.source, **change(world))

    async def body() -> None:
        async with coordinator(world, tmp_path) as server, client_of(world, server, ANNA) as client:
            server._service._run = replace(server._service._run, source=hostile)
            with pytest.raises(expected):
                await client.get_run()
        with pytest.raises((VerificationError, ConfigError)):
            await serve(ServerConfig(state_dir=tmp_path, source=hostile))

    asyncio.run(asyncio.wait_for(body(), 60))


@in_loop
async def test_a_taken_port_is_named_and_the_first_server_goes_on(tmp_path: Path) -> None:
    world = World()
    async with coordinator(world, tmp_path / "one") as server, client_of(world, server) as client:
        with pytest.raises(PortInUse, match=f"127.0.0.1:{server.port}"):
            await serve(ServerConfig(state_dir=tmp_path / "two", source=world.source, port=server.port))
        assert (await client.progress()).name == "test-run"


@in_loop
async def test_a_host_that_is_not_this_machines_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no address of this machine"):
        await serve(ServerConfig(state_dir=tmp_path, source=World().source, host="192.0.2.1"))


@in_loop
async def test_a_folder_serves_one_coordinator_at_a_time(tmp_path: Path) -> None:
    world = World()
    async with coordinator(world, tmp_path):
        with pytest.raises(AlreadyRunning):
            await serve(ServerConfig(state_dir=tmp_path, source=world.source))


@in_loop
async def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    async with coordinator(World(), tmp_path):
        pass
    with pytest.raises(ConfigError, match="another run"):
        await serve(ServerConfig(state_dir=tmp_path, source=World(admission=WITH_TOKEN).source))
    async with coordinator(World(), tmp_path):
        pass


@in_loop
async def test_a_volunteers_wrong_clock_is_corrected(tmp_path: Path) -> None:
    """A clock an hour off would be refused; the client measures the difference and signs with the right time."""
    world = World()
    async with coordinator(world, tmp_path) as server:
        invite = invite_to(world, server.port, server.tls_pin)
        client = CoordinatorClient(invite, ANNA, clock=lambda: time.time() - 3600)
        assert abs((await client.get_run()).clock_offset_s - 3600) < 1
        await client.admit()
        await client.report(report_payload())
        await client.close()


@in_loop
async def test_chunks_and_mirrors_come_over_the_same_connection(tmp_path: Path) -> None:
    world = World()
    made = small_checkpoint(tmp_path / "home" / "checkpoint-10")
    files = CheckpointFiles(tmp_path / "home", made.run_id, make_parts().spec)
    digest = sha256((made.folder / "model.safetensors").read_bytes())
    outlets = Outlets(checkpoints=tmp_path / "home", mirrors=("https://host/runs",))
    async with coordinator(world, tmp_path / "state", outlets=outlets) as server:
        server._service._files = files  # the sample's run is another than the world's
        async with client_of(world, server) as client:
            assert await client.mirrors() == ("https://host/runs",)
            whole = b"".join([await client.chunk(digest, 0, 100), await client.chunk(digest, 100, 1 << 20)])
            assert sha256(whole) == digest
            with pytest.raises(NotFound):
                await client.chunk(b"u" * 32, 0, 1)
            with pytest.raises(ProtocolError):
                await client.chunk(digest, 0, 2 << 20)
