"""Calls between peers over libp2p, and the directory in hivemind's DHT.

Decides how a peer is dialled, and attaches hivemind to our own p2pd. Leaves the calls to `peer.p2p.calls`, the
directory to `peer.p2p.dht`, the process of p2pd to `peer.p2p.daemon`, and what is taken from hivemind to
`peer.p2p.hivemind_door`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peer.p2p.calls import Calls, cancel
from peer.p2p.daemon import Daemon, DaemonConfig, make_folder, start_daemon
from peer.p2p.dht import Dht
from peer.p2p.directory import Directory
from peer.p2p.hivemind_door import load, p2pd_binary
from peer.p2p.transport import MAX_CALL_BYTES, Handler
from swarm.errors import (
    ConfigError,
    DeadlineExceeded,
    NetworkError,
    NotFound,
    ProtocolError,
    SwarmError,
    Unreachable,
)
from swarm.files import Kept
from swarm.identity import Identity, peer_id_of, public_key_of

# A connection that takes longer than this is none.
_DIAL_S = 15.0
_MAX_HINTS = 8
_MAX_HINT_CHARS = 256
_SEED_CHECK_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """How this peer takes part. Addresses are multiaddrs; ``initial_peers`` (seed peers) end in ``/p2p/ID``.

    ``clock`` is unix time corrected against the coordinator, for the whole process: hivemind has one clock.
    ``directory_keys`` are all keys that the run's directory has; a record under any other is refused.
    """

    run_id: bytes
    clock: Callable[[], float]
    directory_keys: tuple[str, ...]
    socket_dir: Path | None = None
    identity_path: Path | None = None
    host_maddrs: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    initial_peers: tuple[str, ...] = ()
    relay_service: bool = False
    dht_server: bool = True
    startup_timeout_s: float = 20.0
    keep: Callable[[bytes], Kept] = lambda data: data
    """where large requests wait until they are whole"""
    upload_limit_bps: int | None = None
    """bits per second that this peer's calls may send, together; None: what the line gives"""
    debug: bool = False

    def __post_init__(self) -> None:
        if not self.host_maddrs or self.startup_timeout_s <= 0:
            raise ConfigError("the network needs an address to listen on and time to start")
        if any("/p2p/" not in address for address in self.initial_peers):
            raise ConfigError("a seed peer's address does not end in /p2p/ID", "copy it from the seed peer's log")


async def open_network(config: NetworkConfig, identity: Identity) -> Network:
    """Start p2pd, attach to it and join the directory.

    Raises `PortInUse`, `Unreachable` (no seed peer answers), `DeadlineExceeded`, `ConfigError` or `NetworkError`.
    """
    hivemind = load(config.clock, debug=config.debug)
    folder, key_file = make_folder(config.socket_dir, identity.libp2p_key())
    daemon_config = DaemonConfig(
        binary=p2pd_binary(),
        host_maddrs=config.host_maddrs,
        announce_maddrs=config.announce_maddrs,
        initial_peers=config.initial_peers,
        relay_service=config.relay_service,
        dht_server=config.dht_server,
        debug=config.debug,
    )
    daemon = await start_daemon(daemon_config, folder, config.identity_path or key_file)
    network = Network(config, identity, daemon, hivemind)
    try:
        await daemon.wait_ready(config.startup_timeout_s)
        await asyncio.wait_for(network._join(), config.startup_timeout_s)
    except asyncio.TimeoutError as error:
        await network.close()
        raise DeadlineExceeded(f"the network did not start within {config.startup_timeout_s:.0f} s") from error
    except BaseException:
        await network.close()
        raise
    return network


class Network:
    """`peer.p2p.transport.Transport` over libp2p. Made by `open_network`."""

    def __init__(self, config: NetworkConfig, identity: Identity, daemon: Daemon, hivemind: SimpleNamespace) -> None:
        self._config = config
        self._identity = identity
        self._public_key = identity.public_key
        self._daemon = daemon
        self._hivemind = hivemind
        self._calls = Calls(config.keep, config.upload_limit_bps)
        self._dht = Dht(Directory(config.run_id, config.directory_keys), identity, config.clock)
        self._addresses: tuple[str, ...] = ()
        self._closed = False
        self._p2p: Any = None
        self._upkeep: set[asyncio.Task[Any]] = set()

    @property
    def public_key(self) -> bytes:
        return self._public_key

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    @property
    def alive(self) -> bool:
        """Whether p2pd runs. Once it does not, close this network and open another."""
        return not self._closed and not self._daemon.failed.is_set()

    async def wait_failed(self) -> None:
        """Return when p2pd has ended without being asked to."""
        await self._daemon.failed.wait()

    def traffic(self) -> tuple[int, int]:
        return self._calls.traffic.sent_bytes, self._calls.traffic.received_bytes

    def uplink_bps(self) -> int | None:
        measured, limit = self._calls.traffic.uplink.bps, self._config.upload_limit_bps
        return measured if measured is None or limit is None else min(measured, limit)

    async def call(
        self, peer: bytes, method: str, request: Kept, *, timeout_s: float, max_response_bytes: int = MAX_CALL_BYTES
    ) -> bytes:
        """See `peer.p2p.transport.Transport.call`. A `NotFound` says that the peer does not serve ``method``."""
        if len(request) > MAX_CALL_BYTES:
            raise ProtocolError(f"a request of {len(request)} bytes exceeds {MAX_CALL_BYTES}")
        limit = min(max_response_bytes, MAX_CALL_BYTES)
        try:
            if peer == self._public_key:
                return await asyncio.wait_for(self._calls.call_self(method, peer, request, limit), timeout_s)
            return await asyncio.wait_for(self._call(peer, method, request, timeout_s, limit), timeout_s)
        except asyncio.TimeoutError as error:
            raise DeadlineExceeded(f"{method}: no answer within {timeout_s:.1f} s") from error

    async def serve(self, method: str, handler: Handler) -> None:
        """See `peer.p2p.transport.Transport.serve`. A handler is cancelled once its caller's patience has ended."""
        is_new = method not in self._calls.handlers
        self._calls.handlers[method] = handler
        if is_new:

            async def on_stream(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await self._calls.on_stream(method, str(info.peer_id), reader, writer)

            adding = self._p2p.add_binary_stream_handler(self._protocol(method), on_stream)
            try:
                await asyncio.wait_for(adding, _DIAL_S)
            except (asyncio.TimeoutError, OSError, asyncio.IncompleteReadError) as error:
                raise Unreachable("our own p2pd does not answer") from error

    async def connect(self, peer: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None:
        """See `peer.p2p.transport.Transport.connect`. Raises `Unreachable` also when the time is over."""
        if peer == self._public_key:
            return
        hints = [hint for address in addresses[:_MAX_HINTS] if (hint := self._hint(address)) is not None]
        ask = self._hivemind.p2pd_pb2
        request = ask.Request(
            type=ask.Request.CONNECT,
            connect=ask.ConnectRequest(peer=self._peer_id(peer).to_bytes(), addrs=hints, timeout=math.ceil(timeout_s)),
        )
        try:
            _, _, writer = await asyncio.wait_for(self._ask_daemon(request), timeout_s)
        except asyncio.TimeoutError as error:
            raise Unreachable(f"{peer_id_of(peer)}: no connection within {timeout_s:.1f} s") from error
        writer.close()

    async def publish(self, key: str, value: bytes, *, lifetime_s: float) -> None:
        """See `peer.p2p.transport.Transport.publish` and `peer.p2p.dht.Dht.publish`; ``lifetime_s`` is at most 600."""
        await self._dht.publish(key, value, lifetime_s)

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        """See `peer.p2p.transport.Transport.lookup`. Raises `NetworkError` where the directory does not answer."""
        return await self._dht.lookup(key)

    async def close(self) -> None:
        """End everything within about 3 s. Never raises, and may be called twice."""
        if self._closed:
            return
        self._closed = True
        await cancel(self._upkeep)
        await self._calls.close()
        try:
            if self._p2p is not None:
                await self._detach()
        finally:
            await self._daemon.close()

    # Joining

    async def _join(self) -> None:
        """Attach to p2pd, then take part in the directory."""
        hivemind = self._hivemind
        # hivemind puts its own socket beside this prefix; in our folder it is removed with everything else.
        hivemind.P2P._UNIX_SOCKET_PREFIX = f"/unix{self._daemon.folder}/"
        self._p2p = await hivemind.P2P.replicate(hivemind.Multiaddr(f"/unix{self._daemon.socket_path}"))
        if str(self._p2p.peer_id) != self._identity.peer_id:
            raise NetworkError("p2pd runs under another identity than ours")
        await self._read_addresses()
        await self._dht.join(hivemind, self._p2p, self._config.initial_peers, self._config.dht_server)
        self._upkeep.add(asyncio.create_task(self._keep_in_touch()))

    async def _keep_in_touch(self) -> None:
        """Find the seed peers again after they restarted, and learn our own addresses when they change."""
        while True:
            await asyncio.sleep(_SEED_CHECK_S)
            with contextlib.suppress(SwarmError, OSError, asyncio.IncompleteReadError):
                await self._read_addresses()
            for address in self._config.initial_peers:
                with contextlib.suppress(SwarmError, self._hivemind.ValidationError):
                    await self._greet_seed(address)

    async def _greet_seed(self, address: str) -> None:
        seed = public_key_of(address.rpartition("/p2p/")[2])
        if seed != self._public_key and not self._dht.knows_node(self._peer_id(seed)):
            await self.connect(seed, (address,), timeout_s=_DIAL_S)
            await self._dht.greet(self._peer_id(seed))

    async def _read_addresses(self) -> None:
        ask = self._hivemind.p2pd_pb2
        response, _, writer = await self._ask_daemon(ask.Request(type=ask.Request.IDENTIFY))
        writer.close()
        own = f"/p2p/{self._identity.peer_id}"
        self._addresses = tuple(str(self._hivemind.Multiaddr(raw)) + own for raw in response.identify.addrs)

    # Calls out

    async def _call(self, peer: bytes, method: str, request: Kept, timeout_s: float, limit: int) -> bytes:
        stream = await self._open_stream(peer, method, timeout_s)
        return await self._calls.exchange(peer, method, request, timeout_s, limit, stream)

    async def _open_stream(
        self, peer: bytes, method: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        dial_s = min(timeout_s, _DIAL_S)
        ask = self._hivemind.p2pd_pb2
        opening = ask.StreamOpenRequest(
            peer=self._peer_id(peer).to_bytes(), proto=[self._protocol(method)], timeout=math.ceil(dial_s)
        )
        try:
            _, reader, writer = await asyncio.wait_for(
                self._ask_daemon(ask.Request(type=ask.Request.STREAM_OPEN, streamOpen=opening)), dial_s
            )
        except asyncio.TimeoutError as error:
            raise Unreachable(f"{method}: no connection to {peer_id_of(peer)} within {dial_s:.1f} s") from error
        return reader, writer

    async def _ask_daemon(self, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """One request to p2pd on a socket of its own, which is closed unless the answer is good."""
        hivemind = self._hivemind
        try:
            reader, writer = await asyncio.open_unix_connection(self._daemon.socket_path)
        except OSError as error:
            raise Unreachable("our own p2pd does not run") from error
        try:
            await hivemind.write_pbmsg(writer, request)
            response = hivemind.p2pd_pb2.Response()
            await hivemind.read_pbmsg_safe(reader, response)
            if response.type == hivemind.p2pd_pb2.Response.ERROR:
                raise _daemon_error(response.error.msg)
        except (OSError, asyncio.IncompleteReadError) as error:
            writer.close()
            raise Unreachable("our own p2pd has stopped") from error
        except BaseException:
            writer.close()
            raise
        return response, reader, writer

    def _protocol(self, method: str) -> str:
        return f"/swarm/{self._config.run_id.hex()}/{method}"

    def _peer_id(self, public_key: bytes) -> Any:
        return self._hivemind.PeerID.from_base58(peer_id_of(public_key))

    def _hint(self, address: str) -> bytes | None:
        """A multiaddr without its peer id, in bytes; None where it cannot be one."""
        way = address[:_MAX_HINT_CHARS].rpartition("/p2p/")[0] or address
        try:
            if not way.endswith("/p2p-circuit"):
                return bytes(self._hivemind.Multiaddr(way).to_bytes())
            # hivemind writes a peer id within an address as a CID, which libp2p does not read.
            to_relay, _, relay = way.removesuffix("/p2p-circuit").rpartition("/p2p/")
            raw = bytes(self._hivemind.Multiaddr(to_relay).to_bytes())
            relay_id = self._hivemind.PeerID.from_base58(relay).to_bytes()
            return raw + b"\xa5\x03" + bytes([len(relay_id)]) + bytes(relay_id) + b"\xa2\x02"
        except Exception:  # the parser raises whatever its codecs do; a bad hint is no hint
            return None

    async def _detach(self) -> None:
        """Leave hivemind's objects without open sockets or waiting tasks; it offers no way to do so."""
        if self._dht.node is not None:
            self._dht.node.is_alive = False
        control = self._p2p._client.control
        await self._p2p.shutdown()
        for pending in list(control._pending_calls.values()):
            if not pending.done():
                pending.set_exception(self._hivemind.P2PDaemonError("closed"))
        tasks = [self._p2p._listen_task, control._read_task, control._write_task, *control._handler_tasks.values()]
        await cancel({task for task in tasks if task is not None})


def _daemon_error(message: str) -> NetworkError:
    text = message[:300]
    if "protocols not supported" in text or "protocol not supported" in text:
        return NotFound(f"the peer does not serve this: {text}")
    return Unreachable(f"no connection: {text}")
