"""What `swarm start` prepares and runs: keys, signed rules, genesis, the coordinator, and a seed peer beside it.

The run's folder holds everything: ``run.toml`` and ``state/`` (signed spec and genesis, publication and TLS keys, the
database, the seed peer's home). Started again, the same run goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from coordinator.mirroring import Mirrored, PublishedRun, keep_mirrors
from coordinator.run import RunSource
from coordinator.server import RunningServer, ServerConfig, serve
from coordinator.service import Outlets
from swarm import data_manifest, governance, keyfiles, run_file, run_spec
from swarm.cli import governing
from swarm.data_manifest import MANIFEST_NAME, TOKENIZER_NAME, DataManifest
from swarm.digest import sha256
from swarm.errors import ConfigError, DataError, DigestError, ResourceError, SignatureError
from swarm.files import write_durably
from swarm.identity import Identity, verify
from swarm.invite import Invite
from swarm.log import GENESIS_CONTEXT, genesis_head, parse_genesis
from swarm.proto.common_pb2 import Genesis, ShardGenesis, Signed
from swarm.run_file import MirrorTargets
from swarm.run_spec import RunSpec

if TYPE_CHECKING:
    from peer.rounds.codec import Float32

SEED_RESTART_PAUSE_S = 2.0
SEED_STARTS = 2  # before giving up: one that was killed frees its port a moment after its key
SEED_STOP_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """Where `swarm start` listens. ``public_host``: the name in the invite where it is not ``host``."""

    host: str = "127.0.0.1"
    port: int = 0
    seed_port: int = 0
    public_host: str | None = None
    token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    spec: RunSpec
    source: RunSource
    data_folder: Path
    state: Path
    mirrors: MirrorTargets

    @property
    def seed_home(self) -> Path:
        return self.state / "seed"

    @property
    def checkpoints(self) -> Path:
        """Where the seed peer beside the coordinator keeps the checkpoints that it assembles."""
        return self.seed_home / "runs" / self.spec.run_id.hex()


def prepare_run(path: Path, base: Path | None = None) -> PreparedRun:
    """Sign the rules in ``path`` (run.toml) and make the genesis; or find what an earlier start made of them.

    ``base``: a checkpoint on this machine whose weights the run starts from. An earlier start is remembered.
    """
    if not path.is_file():
        raise ConfigError(f"there is no run file {path}", "write one with: swarm init NAME")
    rules = run_file.parse(path.read_text(encoding="utf-8"), str(path))
    data_folder = (path.parent / rules.data.path).resolve()
    raw_manifest, tokenizer = _read_data(data_folder)
    manifest = data_manifest.parse(raw_manifest)
    state = path.parent / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    organizer = keyfiles.load_or_create(keyfiles.data_home() / "organizer.key")
    publication = keyfiles.load_or_create(state / "publication.key")
    spec = run_file.to_spec(
        rules,
        organizer_key=organizer.public_key,
        publication_key=publication.public_key,
        manifest=manifest,
        manifest_digest=sha256(raw_manifest).hex(),
    )
    spec, anchor = _with_base(spec, manifest, state, base)
    signed_spec = organizer.sign(run_spec.CONTEXT, spec.run_id, spec.canonical_bytes())
    _refuse_another_run(state, spec)
    genesis = _genesis(state, spec, organizer, lambda: _first_anchors(spec, manifest, anchor))
    write_durably(state / "spec.sig", signed_spec.SerializeToString())
    offline = governing.begin(state, spec, organizer)
    source = RunSource(
        spec=signed_spec,
        genesis=genesis,
        data_manifest=raw_manifest,
        tokenizer=tokenizer,
        publication=publication,
        offline=offline,
        publisher=governing.publisher(state, governance.describe(offline.roots[-1]).publication_key),
    )
    return PreparedRun(spec=spec, source=source, data_folder=data_folder, state=state, mirrors=rules.mirrors)


def started_spec(state: Path) -> RunSpec:
    """The rules of the run that an earlier start signed; `ConfigError` where there was none."""
    path = state / "spec.sig"
    if not path.exists():
        raise ConfigError(f"{state} holds no run yet", "start it first: swarm start RUN.toml")
    signed = _read_signed(path, run_spec.CONTEXT)
    return run_spec.parse_signed(signed, run_spec.run_id_of(signed.signer, signed.payload))


def _read_data(folder: Path) -> tuple[bytes, bytes]:
    try:
        return (folder / MANIFEST_NAME).read_bytes(), (folder / TOKENIZER_NAME).read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no prepared data",
            "make it with: swarm data prepare SOURCE... --out DIR, and set data.path",
        ) from error


def _with_base(spec: RunSpec, manifest: DataManifest, state: Path, base: Path | None) -> tuple[RunSpec, Float32 | None]:
    """The spec with the checkpoint that it starts from, and that one's weights where they were read."""
    earlier = state / "spec.sig"
    if base is not None:
        from peer.training.base import read_base

        found, anchor = read_base(base, spec, manifest)
        return spec.model_copy(update={"base": found}), anchor
    if not earlier.exists():
        return spec, None
    return spec.model_copy(update={"base": started_spec(state).base}), None


def _first_anchors(spec: RunSpec, manifest: DataManifest, whole: Float32 | None) -> list[Float32]:
    """The anchor of each shard; ``whole``: of a checkpoint that the run starts from."""
    from peer.training import model
    from peer.training.cut import cut

    config = model.build_config(spec, manifest.vocab_size)
    if whole is None:
        whole = model.initial_anchor(config, spec.seed)
    return [whole[shard.values] for shard in cut(config, spec.num_shards)]


def _refuse_another_run(state: Path, spec: RunSpec) -> None:
    path = state / "spec.sig"
    if path.exists():
        earlier = _read_signed(path, run_spec.CONTEXT)
        if earlier.payload != spec.canonical_bytes():
            raise ConfigError(
                "run.toml or its data changed since this run was started; signed rules cannot change",
                f"change it back, or start another run: move {state} away",
            )


def _read_signed(path: Path, context: str, run_id: bytes | None = None) -> Signed:
    """What an earlier start signed; ``run_id`` None: of the run that the payload, a run spec, makes."""
    try:
        signed = Signed.FromString(path.read_bytes())
        verify(signed, context, run_id or run_spec.run_id_of(signed.signer, signed.payload))
    except (DecodeError, SignatureError) as error:
        raise DigestError(f"{path} is damaged", "bring it back from a copy of the run's folder") from error
    return signed


def _genesis(state: Path, spec: RunSpec, organizer: Identity, first_anchors: Callable[[], list[Float32]]) -> Signed:
    """The signed genesis; the first time, the states of all shards are built and written to the seed peer's disk."""
    path = state / "genesis.sig"
    if path.exists():
        signed = _read_signed(path, GENESIS_CONTEXT, spec.run_id)
        parse_genesis(signed, spec.run_id, organizer.public_key, spec.num_shards)
        return signed
    from peer.home import Home
    from peer.joining import DEFAULT_DISK_BYTES
    from peer.p2p.chunk_store import ChunkStore
    from peer.rounds.ledger import Ledger, LedgerOptions
    from peer.rounds.shard import Shard

    home = Home(state / "seed")
    seed = keyfiles.load_or_create(home.key_path)
    shards = [Shard(spec, number, anchor) for number, anchor in enumerate(first_anchors())]
    genesis = Genesis(
        run_id=spec.run_id,
        voters=[seed.public_key],
        shards=[ShardGenesis(state_digest=shard.state_digest, num_values=shard.num_values) for shard in shards],
        created_unix_s=int(time.time()),
    )
    folder = home.run_folder(spec.run_id)
    chunks = ChunkStore(folder / "chunks", DEFAULT_DISK_BYTES)
    for shard in shards:
        head = genesis_head(genesis, shard.index)
        ledger = Ledger(folder / f"shard-{shard.index}", head, chunks, LedgerOptions(archive=True))
        ledger.save_state(0, shard)
    signed = organizer.sign(GENESIS_CONTEXT, spec.run_id, genesis.SerializeToString())
    write_durably(path, signed.SerializeToString())
    return signed


async def start_coordinator(prepared: PreparedRun, options: StartOptions) -> tuple[RunningServer, Invite]:
    """Serve the run; the invite that leads to it is also written to ``state/invite.txt``."""
    remembered = prepared.state / "port"
    port = options.port or _remembered_port(remembered)
    outlets = Outlets(checkpoints=prepared.checkpoints, mirrors=prepared.mirrors.told)
    config = ServerConfig(
        state_dir=prepared.state, source=prepared.source, host=options.host, port=port, outlets=outlets
    )
    server = await serve(config)
    write_durably(remembered, str(server.port).encode())  # the invite must lead here also after a restart
    host = options.public_host or options.host
    invite = Invite(
        run_id=prepared.spec.run_id,
        tls_pin=server.tls_pin,
        addresses=(f"{host}:{server.port}",),
        token=options.token,
    )
    write_durably(prepared.state / "invite.txt", invite.encode().encode() + b"\n")
    return server, invite


async def keep_seed_peer(
    prepared: PreparedRun, invite: Invite, options: StartOptions, on_news: Callable[[dict[str, Any]], None]
) -> None:
    """Run a seed peer as a process of its own, and start it again when it ends, until cancelled.

    Raises `ResourceError` or `ConfigError` where it never gets ready for a reason that only a person can mend.
    """
    command = [sys.executable, "-m", "swarm.cli.main", "seed", invite.encode(), "--json"]
    command += ["--home", str(prepared.seed_home), "--data", str(prepared.data_folder), "--parent", str(os.getpid())]
    seed_port = _lasting_seed_port(prepared.state, options)
    command += ["--listen", f"{options.host}:{seed_port}"]
    if options.public_host:
        command += ["--announce", f"{options.public_host}:{seed_port}"]
    was_ready, starts = False, 0
    while True:
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            was_ready = await _read_news(process, on_news) or was_ready
            code = await process.wait()
        finally:
            await _end(process)
        starts += 1
        if not was_ready and starts >= SEED_STARTS and code in (ResourceError.exit_code, ConfigError.exit_code):
            kind = ResourceError if code == ResourceError.exit_code else ConfigError
            raise kind("the seed peer does not start", "its own error is told above: correct that, then start again")
        log.warning("the seed peer ended with exit code %d; starting it again", code)
        await asyncio.sleep(SEED_RESTART_PAUSE_S)


async def write_mirrors(
    prepared: PreparedRun, server: RunningServer, say: Callable[[str, dict[str, Any]], None]
) -> None:
    """Write what is published to the run file's targets, until cancelled. Raises `ConfigError` where one is none."""

    def tell(what: Mirrored) -> None:
        values = {"round": what.round, "mirror": what.url}
        say("mirrored" if not what.error else "not mirrored", values | ({"error": what.error} if what.error else {}))

    published = PublishedRun(folder=prepared.checkpoints, run_id=prepared.spec.run_id, spec=prepared.spec)
    await keep_mirrors(published, prepared.mirrors.write, tell, server.mirrored_files)


def _remembered_port(path: Path) -> int:
    """The port of an earlier start; 0 where there was none, or its file is of no use."""
    text = path.read_text(errors="replace").strip() if path.exists() else ""
    return int(text) if text.isascii() and text.isdigit() and int(text) < 65536 else 0


def _lasting_seed_port(state: Path, options: StartOptions) -> int:
    """The same port at every start: volunteers find a seed peer again only where it was."""
    remembered = state / "seed-port"
    port = options.seed_port or _remembered_port(remembered)
    if not port:
        with socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET) as probe:
            probe.bind((options.host, 0))
            port = int(probe.getsockname()[1])
    write_durably(remembered, str(port).encode())
    return port


async def _read_news(process: asyncio.subprocess.Process, on_news: Callable[[dict[str, Any]], None]) -> bool:
    """Pass on what the seed peer says until it ends; whether it was ready."""
    was_ready = False
    if process.stdout is None:
        return was_ready
    async for line in process.stdout:
        try:
            news = json.loads(line)
            was_ready = was_ready or news.get("event") == "ready"
            on_news(news)
        except ValueError:
            log.info("seed peer: %s", line.decode(errors="replace").rstrip())
    return was_ready


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), SEED_STOP_S)
    except (TimeoutError, asyncio.TimeoutError):
        process.kill()
        await process.wait()
