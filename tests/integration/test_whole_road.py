"""The whole road of a checkpoint: published by a coordinator, fetched from everybody at once, killed, resumed, mended.

Nothing is a stand-in but the training: the coordinator answers over TLS, the seed peer over libp2p, a web server
over HTTP, and the researcher's commands are processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.checkpoint_files import published_folders
from coordinator.mirroring import write_mirror
from coordinator.server import ServerConfig, serve
from coordinator.service import Outlets
from peer.checkpoints.checkpoint import CheckpointParts, assemble, write_signed
from peer.p2p.chunk_store import CHUNK_METHOD, ChunkStore
from peer.p2p.network import NetworkConfig, open_network
from swarm import data_manifest, witness
from swarm.checkpoint_chunks import FileChunks
from swarm.manifest import CheckpointManifest
from swarm.storage import Storage
from tests.checkpoint_samples import CONFIG, TOKENIZER, make_parts
from tests.coordinator_server import client_of, invite_to
from tests.coordinator_world import ANNA, BORIS, SEED, World
from tests.mirror_servers import WebMirror, web_mirror

ROUND = 1
NUM_VALUES = 8_000_000  # eight chunks
RATE_MBIT = 48
COMMAND_S = 90.0


@dataclass(frozen=True, slots=True)
class Road:
    invite: str
    folder: Path
    manifest: CheckpointManifest
    mirror: WebMirror
    environment: dict[str, str]

    @property
    def out(self) -> Path:
        return self.folder / "got"

    async def start(self, *arguments: object) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "swarm.cli.main", *map(str, arguments), "--json"]
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(*command, env=self.environment, stdout=pipe, stderr=pipe)

    async def run(self, *arguments: object, exit_code: int = 0) -> dict[str, Any]:
        program = await self.start(*arguments)
        out, errors = await asyncio.wait_for(program.communicate(), COMMAND_S)
        assert program.returncode == exit_code, errors.decode()
        found: dict[str, Any] = json.loads(out)
        return found


@asynccontextmanager
async def road(folder: Path) -> AsyncIterator[Road]:
    """A published checkpoint that a coordinator, a seed peer and a web mirror hold."""
    world, home = World(voters=(SEED,)), folder / "home"
    async with AsyncExitStack() as stack:
        mirror = stack.enter_context(web_mirror(folder / "www"))
        outlets = Outlets(checkpoints=home, mirrors=(mirror.url,))
        server = await serve(ServerConfig(state_dir=folder / "state", source=world.source, outlets=outlets))
        stack.push_async_callback(server.stop)
        config = NetworkConfig(run_id=world.run_id, clock=time.time, directory_keys=("status-0",))
        network = await open_network(config, SEED)
        stack.push_async_callback(network.close)
        seed = await stack.enter_async_context(client_of(world, server, SEED))
        await seed.admit(seed_addresses=list(network.addresses))
        await seed.record_commits([world.commit()])
        place = home / f"checkpoint-{ROUND}"
        manifest = assemble(place, parts_of(world))
        (attestation,) = witness.attestations_of(manifest)
        for replica in (SEED, ANNA, BORIS):
            client = await stack.enter_async_context(client_of(world, server, replica))
            if replica is not SEED:
                await client.admit()
            await client.attest(attestation)
        write_signed(place, await seed.publish(manifest.canonical_bytes()), world.source.spec)
        store = ChunkStore(folder / "store", 0)
        store.add_source(FileChunks(place, manifest))
        await network.serve(CHUNK_METHOD, store.handle_chunk)
        (published,) = published_folders(home, world.run_id, world.spec)
        await asyncio.to_thread(write_mirror, Storage(f"file://{folder}/www"), published)
        environment = {**os.environ, "XDG_DATA_HOME": str(folder / "data"), "PYTHONPATH": os.getcwd()}
        invite = invite_to(world, server.port, server.tls_pin).encode()
        yield Road(invite, folder, manifest, mirror, environment)


def parts_of(world: World) -> CheckpointParts:
    """Weights after the round that was recorded."""
    sample = make_parts(ROUND, num_values=NUM_VALUES)
    return replace(
        sample,
        run_id=world.run_id,
        spec=world.spec,
        data=data_manifest.parse(world.data_manifest, world.spec.data.manifest_digest),
        data_json=world.data_manifest,
        total_tokens=world.heads[ROUND].total_tokens,
        states=(replace(sample.states[0], log_digest=world.heads[ROUND].log_digest),),
        config_json=CONFIG,
        tokenizer_json=TOKENIZER,
    )


async def kill_in_the_middle(this: Road) -> int:
    """Kill a download when a quarter is on disk, in whole chunks or pieces of them; how many bytes are."""
    program = await this.start("download", this.invite, "--out", this.out, "--max-rate", RATE_MBIT)
    partial, deadline = this.out / f".partial-{ROUND}", time.monotonic() + COMMAND_S
    while held_bytes(partial) < this.manifest.size_bytes // 4:
        assert program.returncode is None and time.monotonic() < deadline, "the download should be under way"
        await asyncio.sleep(0.02)
    program.send_signal(signal.SIGKILL)
    await program.communicate()
    return held_bytes(partial)


def held_bytes(partial: Path) -> int:
    """What a download wrote so far: chunks in their places (the rest of a file is a hole), and pieces."""
    found = 0
    for path in (partial / "model.safetensors", *partial.glob(".pieces/*")):
        with suppress(FileNotFoundError):  # a piece whose chunk is whole goes
            found += path.stat().st_blocks * 512
    return found


def flip_bit(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_a_download_from_everybody_is_killed_resumed_damaged_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.coordinator_world.TOKENIZER", TOKENIZER)

    async def whole() -> None:
        async with road(tmp_path) as this:
            size_bytes = this.manifest.size_bytes
            held = await kill_in_the_middle(this)
            assert size_bytes // 4 <= held < 0.9 * size_bytes
            got = await this.run("download", this.invite, "--out", this.out)
            assert got["ok"] and {source["kind"] for source in got["sources"]} == {"peers", "mirrors", "coordinator"}
            received = sum(source["received_bytes"] for source in got["sources"])
            assert received <= 0.9 * size_bytes, "what lies on disk is not fetched again"
            folder = Path(got["folder"])
            assert not list(this.out.glob(".partial*"))

            flip_bit(folder / "model.safetensors", 9 << 20)
            broken = await this.run("verify", folder, "--run", this.invite, exit_code=76)
            assert broken["problems"] == ["model.safetensors is damaged in chunk 2 (from byte 8388608)"]
            mended = await this.run("verify", folder, "--run", this.invite, "--repair")
            assert mended["ok"] and mended["chunks_fetched"] == 1
            original = tmp_path / "home" / f"checkpoint-{ROUND}"
            assert all((folder / path.name).read_bytes() == path.read_bytes() for path in original.iterdir())

    asyncio.run(asyncio.wait_for(whole(), 280))
