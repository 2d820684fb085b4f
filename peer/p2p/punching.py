"""A direct connection between two peers that nobody can dial: the way through both their routers.

A seed peer that relays tells each of the two where it sees the other. The one that is asked sends first, from the port
that it listens at: that opens its router for the other's address, and is dropped by the other's router. Then the one
that asks dials, and both meet (RFC 9293, 3.5: simultaneous open). Two p2pd that dial each other would both begin the
handshake, so what the asked one opened is passed to its p2pd here, as if dialled. Else the relay stays.

Decides who is asked, which addresses are tried, and how many at once. Leaves relayed connections to `peer.p2p.relay`,
and when to connect at all to `peer.p2p.network`. Why libp2p's own hole punching does not do it: docs/decisions/0019.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from peer.p2p.passing import Stream, pass_both_ways
from swarm.errors import NetworkError, NotAdmitted, ProtocolError, ResourceError, SwarmError
from swarm.identity import peer_id_of

# Asked of a relay; asked by a relay.
PUNCH_METHOD, OPEN_METHOD = "punch", "open"
PUNCH_S = 2.5
"""what an attempt may take before the relay is dialled"""
_OPEN_S = 4.0
_KEY_BYTES = 32
_MAX_PROOF_BYTES = 4096
_LEAST_PORT = 1024
# What is given out of IPv6 (RFC 4291), and of that what is for protocols (Teredo among them) and for 6to4.
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_V6 = (ipaddress.IPv6Network("2001::/23"), ipaddress.IPv6Network("2002::/16"))
MAX_OPENING, MAX_PASSED = 16, 64
MAX_PUNCHES_PER_PEER = 8
# A pair whose routers do not let it is not tried again for as long.
TRY_AGAIN_S = 600.0
_MAX_REMEMBERED = 4096
# libp2p says something every 30 s.
SILENCE_S = 120.0

logger = logging.getLogger(__name__)

Ask = Callable[[bytes, str, bytes], Awaitable[bytes]]
"""(a peer's public key, method, request) -> its answer"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a router lets a peer's port appear. `parse` takes public addresses only: nobody is sent into a home."""

    family: str
    host: str
    port: int

    @staticmethod
    def parse(address: str) -> Endpoint | None:
        """A TCP multiaddr's; None where it is another, or no public one."""
        parts = address.split("/")
        if len(parts) != 5 or parts[0] or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
            return None
        try:
            host, port = ipaddress.ip_address(parts[2]), int(parts[4])
        except ValueError:
            return None
        is_right = f"ip{host.version}" == parts[1] and _is_public(host)
        return Endpoint(parts[1], str(host), port) if is_right and _LEAST_PORT <= port < 65536 else None

    @staticmethod
    def first_of(addresses: Sequence[str]) -> Endpoint | None:
        return next((end for address in addresses if (end := Endpoint.parse(address)) is not None), None)

    def __str__(self) -> str:
        return f"/{self.family}/{self.host}/tcp/{self.port}"


class Introducer:
    """The seed peer's part. ``check`` raises for who is not admitted; ``is_kept``: whom we relay to."""

    def __init__(
        self,
        check: Callable[[bytes, bytes], None],
        is_kept: Callable[[bytes], bool],
        seen_at: Callable[[bytes], Awaitable[list[str]]],
        ask: Ask,
    ) -> None:
        self._check, self._is_kept, self._seen_at, self._ask = check, is_kept, seen_at, ask
        self._under_way = dict[bytes, int]()

    async def on_punch(self, caller: bytes, request: bytes) -> bytes:
        """Where the asked-for peer is dialled now, once it opened its router for the caller.

        Raises what ``check`` does, and `NetworkError` where there is no way.
        """
        target, proof = request[:_KEY_BYTES], request[_KEY_BYTES:]
        if len(target) != _KEY_BYTES or target == caller or len(proof) > _MAX_PROOF_BYTES:
            raise ProtocolError("a request to be introduced names another peer, and shows an admission")
        self._check(caller, proof)
        if not self._is_kept(target):
            raise NetworkError(f"{peer_id_of(target)} did not ask this relay")
        if self._under_way.get(caller, 0) >= MAX_PUNCHES_PER_PEER:
            raise ResourceError("too many introductions at once", "they are tried again later")
        self._under_way[caller] = self._under_way.get(caller, 0) + 1
        try:
            ends = [Endpoint.first_of(await self._seen_at(peer)) for peer in (caller, target)]
            if ends[0] is None or ends[1] is None:
                raise NetworkError("one of the two is not seen at a public address")
            await asyncio.wait_for(self._ask(target, OPEN_METHOD, caller + str(ends[0]).encode()), PUNCH_S)
        except asyncio.TimeoutError as error:
            raise NetworkError("the other peer does not answer") from error
        finally:
            self._under_way[caller] -= 1
            if not self._under_way[caller]:
                del self._under_way[caller]
        return str(ends[1]).encode()


class Puncher:
    """A volunteer's part, on both sides of a pair.

    ``dial(peer, address)`` dials from the port that this peer listens at. ``own_end``: that port, with an address of
    this machine; None where it listens to nobody outside, and then nothing is tried. ``is_relay`` tells seed peers.
    """

    def __init__(
        self,
        own_key: bytes,
        own_end: Callable[[], tuple[str, int] | None],
        is_relay: Callable[[bytes], bool],
        ask: Ask,
        dial: Callable[[bytes, str], Awaitable[None]],
    ) -> None:
        self._own_key, self._own_end, self._is_relay = own_key, own_end, is_relay
        self._ask, self._dial = ask, dial
        self._tries = dict[bytes, asyncio.Task[None]]()
        self._failed_at = dict[bytes, float]()
        self._opened = set[asyncio.Task[None]]()
        self._passing = 0
        self.passed_bytes = 0

    def is_worth_it(self, peer: bytes) -> bool:
        failed_at = self._failed_at.get(peer)
        return self._own_end() is not None and (failed_at is None or _now() > failed_at + TRY_AGAIN_S)

    async def punch(self, peer: bytes, relays: Sequence[bytes], proof: bytes) -> None:
        """Try once to be connected directly, within `PUNCH_S`. Never raises; calls that meet share one attempt."""
        if peer not in self._tries:
            relay = next((relay for relay in relays if self._is_relay(relay)), None)
            if relay is None:
                return
            task = asyncio.create_task(self._try(peer, relay, proof))
            self._tries[peer] = task
            task.add_done_callback(lambda _: self._tries.pop(peer, None))
        await asyncio.wait({self._tries[peer]})

    async def on_open(self, caller: bytes, request: bytes) -> bytes:
        """A relay asks us to let a peer in. Raises `NotAdmitted`, `ProtocolError` or `NetworkError`."""
        if not self._is_relay(caller):
            raise NotAdmitted("only seed peers introduce peers")
        peer = request[:_KEY_BYTES]
        end = Endpoint.parse(request[_KEY_BYTES:][:64].decode(errors="replace"))
        if len(peer) != _KEY_BYTES or end is None:
            raise ProtocolError("an introduction names a peer and a public address")
        if (own_end := self._own_end()) is None:
            raise NetworkError("this peer listens to nobody outside")
        if peer in self._tries and self._own_key < peer:
            raise NetworkError("this peer is about to dial")
        if len(self._opened) >= MAX_OPENING + self._passing or self._passing >= MAX_PASSED:
            raise ResourceError("busy: too many introductions", "they are tried again later")
        task = asyncio.create_task(self._let_in(end, own_end))
        self._opened.add(task)
        task.add_done_callback(self._opened.discard)
        return b""

    async def close(self) -> None:
        tasks = {*self._tries.values(), *self._opened}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _try(self, peer: bytes, relay: bytes, proof: bytes) -> None:
        try:
            await asyncio.wait_for(self._meet(peer, relay, proof), PUNCH_S)
            self._failed_at.pop(peer, None)
            logger.info("connected directly with %s, through both routers", peer_id_of(peer))
        except (SwarmError, asyncio.TimeoutError) as error:
            logger.info("no direct connection with %s: %s", peer_id_of(peer), str(error) or "no answer in time")
            if len(self._failed_at) >= _MAX_REMEMBERED:
                self._failed_at.clear()
            self._failed_at[peer] = _now()

    async def _meet(self, peer: bytes, relay: bytes, proof: bytes) -> None:
        answer = await self._ask(relay, PUNCH_METHOD, peer + proof)
        end = Endpoint.parse(answer[:64].decode(errors="replace"))
        if end is None:
            raise ProtocolError("a relay tells no public address")
        await self._dial(peer, str(end))

    async def _let_in(self, end: Endpoint, own_end: tuple[str, int]) -> None:
        """Open the router towards ``end``, and pass who comes to our own p2pd."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            far = await asyncio.wait_for(_connect_from(own_end[1], end), _OPEN_S)
            self._passing += 1
            try:
                await self._pass_to_p2pd(far, own_end)
            finally:
                self._passing -= 1
                far[1].close()

    async def _pass_to_p2pd(self, far: Stream, own_end: tuple[str, int]) -> None:
        near = await asyncio.open_connection(*own_end)

        def count(size: int) -> None:
            self.passed_bytes += size

        try:
            await pass_both_ways(near, far, SILENCE_S, count)
        finally:
            near[1].close()


def _is_public(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """False of an IPv6 address that may stand for an IPv4 one, too: gateways translate it, into homes as well."""
    is_special = host not in _UNICAST_V6 or any(host in network for network in _SPECIAL_V6)
    return host.is_global and not host.is_multicast and not (host.version == 6 and is_special)


async def _connect_from(port: int, end: Endpoint) -> Stream:
    """A connection from ``port``, at which p2pd listens too (it lets others of this user share it)."""
    family, anywhere = (socket.AF_INET, "0.0.0.0") if end.family == "ip4" else (socket.AF_INET6, "::")
    ours = socket.socket(family, socket.SOCK_STREAM)
    try:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        ours.bind((anywhere, port))
        await asyncio.get_running_loop().sock_connect(ours, (end.host, end.port))
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return await asyncio.open_connection(sock=ours)
    except BaseException:
        ours.close()
        raise


def _now() -> float:
    return asyncio.get_running_loop().time()
