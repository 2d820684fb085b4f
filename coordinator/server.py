"""Wiring of the coordinator: state folder, database, TLS key and gRPC server, started once and stopped within 3 s.

Decides limits of the transport; leaves every answer to `coordinator.service`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from coordinator import tls
from coordinator.run import Run, RunSource, open_run
from coordinator.service import MAX_REQUEST_BYTES, Outlets, Service, handlers
from coordinator.store import Store
from coordinator.tls import TlsKey
from swarm.errors import AlreadyRunning, ConfigError, PortInUse, ResourceError
from swarm.manifest import SPEC_FILE

DATABASE_FILE = "coordinator.sqlite"
MAX_CONCURRENT_CALLS = 32
STOP_GRACE_S = 2.0
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # otherwise a second server would share the port in silence
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 60_000),  # a peer whose network is gone does not hold its connection for ever
    ("grpc.keepalive_timeout_ms", 20_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a coordinator is started with.

    ``port`` 0 takes a free one. ``clock`` tells Unix time in seconds. ``database_url``: any SQLAlchemy URL, by
    default SQLite in ``state_dir``.
    """

    state_dir: Path
    source: RunSource
    host: str = "127.0.0.1"
    port: int = 0
    clock: Callable[[], float] = time.time
    database_url: str | None = None
    outlets: Outlets | None = None


class RunningServer:
    """A coordinator that answers. ``tls_pin``: what the invite pins, 32 bytes."""

    def __init__(self, server: grpc.aio.Server, service: Service, lock: int, port: int, tls_pin: bytes) -> None:
        self._server = server
        self._service = service
        self._lock = lock
        self.port = port
        self.tls_pin = tls_pin

    async def mirrored_files(self) -> dict[str, bytes]:
        """What a mirror holds beside checkpoints: the signed run spec, and the metadata as it is now."""
        spec = self._service.signed_spec.SerializeToString(deterministic=True)
        return {SPEC_FILE: spec, **await self._service.metadata_files()}

    async def stop(self) -> None:
        """Refuse new calls, give those under way `STOP_GRACE_S`, close the database."""
        await self._server.stop(STOP_GRACE_S)
        await asyncio.to_thread(self._service.close)
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing alone would leave it to children that were forked since
        os.close(self._lock)


async def serve(config: ServerConfig) -> RunningServer:
    """Start answering.

    Raises `ConfigError` (parts that do not belong together, a folder of another run), `AlreadyRunning`, `PortInUse`,
    `VerificationError` and `DataError` for parts that are not what they claim, and `ResourceError`.
    """
    run = open_run(config.source)
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = _lock(config.state_dir)
    try:
        key = tls.load_or_create(config.state_dir)
        service = await asyncio.to_thread(_open_service, config, run)
        try:
            server, port = await _listen(config, service, key)
        except BaseException:
            service.close()
            raise
    except BaseException:
        os.close(lock)
        raise
    return RunningServer(server, service, lock, port, key.pin)


def _open_service(config: ServerConfig, run: Run) -> Service:
    store = Store(config.database_url or f"sqlite:///{config.state_dir.absolute() / DATABASE_FILE}")
    try:
        source = config.source
        store.bind_run(run.run_id, source.spec.SerializeToString(), source.genesis.SerializeToString())
        return Service(run, store, config.clock, config.outlets, config.state_dir)
    except BaseException:
        store.close()
        raise


async def _listen(config: ServerConfig, service: Service, key: TlsKey) -> tuple[grpc.aio.Server, int]:
    _check_address(config.host, config.port)
    server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS)
    server.add_generic_rpc_handlers((handlers(service),))
    credentials = grpc.ssl_server_credentials([(key.private_key_pem, key.certificate_pem)])
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        port = server.add_secure_port(f"{host}:{config.port}", credentials)
    except RuntimeError as error:  # taken since we looked
        raise _port_in_use(config.host, config.port) from error
    await server.start()
    return server, port


def _check_address(host: str, port: int) -> None:
    """Bind once ourselves, because gRPC does not say why it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror as error:
        raise ConfigError(f"{host!r} is no address of this machine", "give another host to listen on") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _port_in_use(host, port) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"{host!r} is no address of this machine", "give another host to listen on") from error
        raise ResourceError(f"cannot listen on {host}:{port}: {error.strerror}", "choose a port above 1023") from error


def _port_in_use(host: str, port: int) -> PortInUse:
    return PortInUse(f"{host}:{port} is taken by another program", "stop that program or choose another port")


def _lock(state_dir: Path) -> int:
    """Hold the folder for this process; the kernel lets go when the process ends, however it ends."""
    descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise AlreadyRunning(
            f"another coordinator uses {state_dir}", "stop it first, or give another state folder"
        ) from error
    return descriptor
