"""Calls between peers over libp2p, and the directory in hivemind's DHT.

Decides when a peer is dialled, and attaches hivemind to our own p2pd. Leaves the calls to `peer.p2p.calls`, the
directory to `peer.p2p.dht`, where we are reached to `peer.p2p.reachability`, the process of p2pd to `peer.p2p.daemon`,
what it is told to `peer.p2p.daemon_control`, and what is taken from hivemind to `peer.p2p.hivemind_door`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peer.p2p.calls import Calls, cancel
from peer.p2p.daemon import Daemon, DaemonConfig, make_folder, start_daemon
from peer.p2p.daemon_control import DaemonControl
from peer.p2p.dht import Dht
from peer.p2p.directory import Directory
from peer.p2p.hivemind_door import load, p2pd_binary
from peer.p2p.punching import OPEN_METHOD, PUNCH_METHOD, PUNCH_S, Introducer, Puncher
from peer.p2p.reachability import DIAL_BACK_METHOD, Reach, ask_within, dial_back, is_relayed, relays_of, seeds_of
from peer.p2p.relay import HOP, RESERVE_METHOD, Relay
from peer.p2p.transport import MAX_CALL_BYTES, Handler
from swarm.errors import (
    ConfigError,
    DeadlineExceeded,
    NetworkError,
    ProtocolError,
    SwarmError,
    Unreachable,
)
from swarm.files import Kept
from swarm.identity import Identity, peer_id_of, public_key_of

logger = logging.getLogger(__name__)

# A connection that takes longer than this is none.
_DIAL_S = 15.0
_MAX_HINTS = 8
_SEED_CHECK_S = 15.0
_MEET_S = 8.0
# Peers of which the way through a relay is kept in mind.
_MAX_REMEMBERED = 4096


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
    relay_for: Callable[[bytes, bytes], None] | None = None
    """makes this peer a relay; raises for a caller whose proof (its admission) is none"""
    proof: Callable[[], bytes] | None = None
    """what relays want to see; None: this peer asks none. It can be dialled where it announces, or tells none at all"""
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
        self._listens_at: tuple[str, ...] = ()
        self._reach = Reach(f"/p2p/{identity.peer_id}")
        self._seeds = seeds_of(config.initial_peers)
        self._hints: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()
        self._control = DaemonControl(hivemind, daemon.socket_path)
        self._puncher = Puncher(
            self._public_key,
            lambda: self._reach.outward_end(self._listens_at),
            lambda peer: peer in self._seeds,
            self._ask_seed,
            lambda peer, address: self._control.connect(peer, (address,), PUNCH_S),
        )
        self._closed = False
        self._p2p: Any = None
        self._upkeep: set[asyncio.Task[Any]] = set()

    @property
    def public_key(self) -> bytes:
        return self._public_key

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._reach.addresses(self._listens_at)

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

    async def stream(
        self, peer: bytes, method: str, request: bytes, *, timeout_s: float, max_response_bytes: int
    ) -> AsyncGenerator[bytes, None]:
        """See `peer.p2p.transport.Transport.stream`; not of this peer itself."""
        opened = await self._open_stream(peer, method, timeout_s)
        parts = self._calls.stream(peer, method, request, timeout_s, max_response_bytes, opened)
        async with contextlib.aclosing(parts):
            async for part in parts:
                yield part

    async def serve(self, method: str, handler: Handler) -> None:
        """See `peer.p2p.transport.Transport.serve`. A handler is cancelled once its caller's patience has ended."""
        is_new = method not in self._calls.handlers
        self._calls.handlers[method] = handler
        if is_new:

            async def on_stream(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await self._calls.on_stream(method, str(info.peer_id), reader, writer)

            await self._add_handler(self._protocol(method), on_stream)

    async def connect(self, peer: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None:
        """See `peer.p2p.transport.Transport.connect`. Raises `Unreachable` also when the time is over."""
        if peer == self._public_key:
            return
        addresses = addresses[:_MAX_HINTS]
        if is_relayed(addresses):
            self._remember(peer, addresses)
            began = asyncio.get_running_loop().time()
            if timeout_s >= 2 * PUNCH_S:
                await self._punch(peer, addresses)
            timeout_s -= asyncio.get_running_loop().time() - began
        await self._control.connect(peer, addresses, timeout_s)

    def learn_seeds(self, addresses: tuple[str, ...]) -> None:
        """The run has these seed peers now."""
        self._seeds = seeds_of(addresses)

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
        await self._puncher.close()
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
        met = await self._meet_seeds()
        if self._config.relay_for is not None:
            await self._serve_relay(self._config.relay_for)
        if self._config.proof is not None and not self._config.announce_maddrs:
            await self.serve(OPEN_METHOD, self._puncher.on_open)
            await self._reach.look(self._listens_at, self._seeds, self._ask_seed)
            if not self._reach.is_dialable and self._reach.outward_end(self._listens_at) is None:
                logger.warning(
                    "this peer listens to its own machine alone, so relays carry what it sends to others "
                    "behind routers; with --listen 0.0.0.0:0 it connects to them directly where their routers let it"
                )
        # Nobody is sent to a node of the directory that cannot be asked.
        serves = self._config.dht_server and self._reach.is_dialable
        await self._dht.join(hivemind, self._p2p, self._config.initial_peers if met else (), serves)
        self._upkeep.add(asyncio.create_task(self._keep_in_touch()))
        if (proof := self._config.proof) is not None:
            # Relays are asked to carry us; where we can be dialled, this shows them that we may dial others.
            await self._reach.reserve(self._seeds, proof(), self._ask_seed)
            # A task of its own: greeting many silent seed peers takes longer than a reservation lasts.
            reserving = self._reach.keep_reserved(lambda: self._seeds, proof, self._ask_seed)
            self._upkeep.add(asyncio.create_task(reserving))

    async def _meet_seeds(self) -> bool:
        """Connect to all that can be reached; whether any can.

        Raises `Unreachable` where there are some and none can, unless we are a seed peer: the first one to come back.
        """
        meetings = [self.connect(seed, addresses, timeout_s=_MEET_S) for seed, addresses in self._seeds.items()]
        failures = [error for error in await asyncio.gather(*meetings, return_exceptions=True) if error is not None]
        if failures and len(failures) == len(meetings) and self._config.relay_for is None:
            text = f"no seed peer could be reached: {failures[0]}"
            raise Unreachable(text, "check the network, then try again") from failures[0]
        return len(failures) < len(meetings)

    async def _keep_in_touch(self) -> None:
        """Find the seed peers again after they restarted, and learn our own addresses when they change."""
        while True:
            await asyncio.sleep(_SEED_CHECK_S)
            with contextlib.suppress(SwarmError, OSError, asyncio.IncompleteReadError):
                await self._read_addresses()
            for seed, addresses in self._seeds.items():
                with contextlib.suppress(SwarmError, self._hivemind.ValidationError):
                    await self._greet_seed(seed, addresses)

    async def _greet_seed(self, seed: bytes, addresses: tuple[str, ...]) -> None:
        if seed != self._public_key and not self._dht.knows_node(self._peer_id(seed)):
            await self.connect(seed, addresses, timeout_s=_DIAL_S)
            await self._dht.greet(self._peer_id(seed))

    async def _ask_briefly(self, peer: bytes, method: str, request: bytes) -> bytes:
        return await self.call(peer, method, request, timeout_s=PUNCH_S, max_response_bytes=1 << 10)

    async def _ask_seed(self, seed: bytes, method: str, request: bytes) -> bytes:
        async def ask() -> bytes:
            # It may have left the run's list meanwhile.
            await self.connect(seed, self._seeds.get(seed, ()), timeout_s=_DIAL_S)
            return await self.call(seed, method, request, timeout_s=_DIAL_S, max_response_bytes=1 << 10)

        return await ask_within(ask())

    async def _punch(self, peer: bytes, addresses: tuple[str, ...]) -> None:
        """A direct connection before a relayed one is made, where neither of us can be dialled and routers let us."""
        proof = self._config.proof
        if proof is None or self._reach.is_dialable or not self._puncher.is_worth_it(peer):
            return
        # p2pd dials nobody twice.
        if not await self._control.is_connected(peer):
            await self._puncher.punch(peer, relays_of(addresses), proof())

    async def _dial_back(self, caller: bytes, request: bytes) -> bytes:
        return await dial_back(request, await self._control.seen_at(caller))

    async def _serve_relay(self, check: Callable[[bytes, bytes], None]) -> None:
        relay = Relay(self._control.open_stream, check, self._control.seen_at)

        async def on_hop(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await relay.on_hop(public_key_of(str(info.peer_id)), reader, writer)

        await self._add_handler(HOP, on_hop)
        await self.serve(RESERVE_METHOD, relay.on_reserve)
        # Nobody else may: whom a volunteer's router lets in is seen at the volunteer's own address.
        await self.serve(DIAL_BACK_METHOD, self._dial_back)
        introducer = Introducer(check, relay.is_kept, self._control.seen_at, self._ask_briefly)
        await self.serve(PUNCH_METHOD, introducer.on_punch)

    async def _read_addresses(self) -> None:
        own = f"/p2p/{self._identity.peer_id}"
        self._listens_at = tuple(address + own for address in await self._control.own_addresses())

    async def _add_handler(self, protocol: str, on_stream: Callable[..., Awaitable[None]]) -> None:
        try:
            await asyncio.wait_for(self._p2p.add_binary_stream_handler(protocol, on_stream), _DIAL_S)
        except (asyncio.TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            raise Unreachable("our own p2pd does not answer") from error

    # Calls out

    async def _call(self, peer: bytes, method: str, request: Kept, timeout_s: float, limit: int) -> bytes:
        stream = await self._open_stream(peer, method, timeout_s)
        return await self._calls.exchange(peer, method, request, timeout_s, limit, stream)

    async def _open_stream(
        self, peer: bytes, method: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        dial_s = min(timeout_s, _DIAL_S)
        if peer in self._hints:
            # libp2p forgets the way through a relay, and knows nothing of another; does nothing while connected.
            await self.connect(peer, self._hints[peer], timeout_s=dial_s)
        return await self._control.open_stream(peer, self._protocol(method), dial_s)

    def _remember(self, peer: bytes, addresses: tuple[str, ...]) -> None:
        self._hints[peer] = addresses
        self._hints.move_to_end(peer)
        if len(self._hints) > _MAX_REMEMBERED:
            self._hints.popitem(last=False)

    def _protocol(self, method: str) -> str:
        return f"/swarm/{self._config.run_id.hex()}/{method}"

    def _peer_id(self, public_key: bytes) -> Any:
        return self._hivemind.PeerID.from_base58(peer_id_of(public_key))

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
