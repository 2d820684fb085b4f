"""Where others reach this peer: at its own addresses, or through relays.

Decides by what seed peers find when they dial back: a peer that nobody can dial asks seed peers to relay for it, and
tells the addresses of that. Leaves calls and connections to `peer.p2p.network`, the relay itself to `peer.p2p.relay`.
An answer is a hint: a seed peer that lies makes a peer harder to reach, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from peer.p2p.relay import RESERVE_METHOD
from swarm.errors import DataError, NetworkError, ProtocolError, SwarmError
from swarm.identity import public_key_of

DIAL_BACK_METHOD = "dial-back"
MAX_RELAYS = 3
# With the time that silent seed peers take to be given up, less than a reservation lasts.
RENEW_S = 15.0
ADDRESSES_PER_RELAY = 2
CIRCUIT = "/p2p-circuit"
_DIAL_BACK_S = 3.0
_ANSWER_S = 8.0

logger = logging.getLogger(__name__)

Seeds = Mapping[bytes, Sequence[str]]
"""Addresses of seed peers by public key."""
Ask = Callable[[bytes, str, bytes], Awaitable[bytes]]
"""(a seed peer's public key, method, request) -> its answer"""


class Reach:
    """``own_end``: what this peer's addresses end in, ``/p2p/ID``."""

    def __init__(self, own_end: str) -> None:
        self._own_end = own_end
        self._outside: tuple[str, ...] = ()
        self._relays: dict[bytes, tuple[str, ...]] = {}
        self.is_dialable = True

    def addresses(self, own: Sequence[str]) -> tuple[str, ...]:
        """What others are told, given the addresses at which this peer listens: the likeliest first."""
        if self.is_dialable:
            return tuple(dict.fromkeys((*self._outside, *own)))
        # Those nearby may still reach it; nobody else's loopback is ours.
        relayed = (address for addresses in self._relays.values() for address in addresses)
        return (*relayed, *_outward(own))

    def outward_end(self, own: Sequence[str]) -> tuple[str, int] | None:
        """A host and port of this machine at which other machines reach it, or would if routers let them."""
        ways = _outward(own)
        return next(((way.split("/")[2], port) for way in ways if (port := _tcp_port(way))), None)

    async def look(self, own: Sequence[str], seeds: Seeds, ask: Ask) -> None:
        """Have seed peers dial back. Where none of them answers at all, nothing is concluded."""
        port = next((port for address in own if (port := _tcp_port(address))), 0)
        asked = (ask(seed, DIAL_BACK_METHOD, port.to_bytes(2, "big")) for seed in list(seeds)[:MAX_RELAYS])
        answers = [
            answer[:64].decode(errors="replace")
            for answer in await asyncio.gather(*asked, return_exceptions=True)
            if isinstance(answer, bytes)
        ]
        self._outside = tuple(answer + self._own_end for answer in answers if port and _tcp_port(answer) == port)
        self.is_dialable = bool(self._outside) or not answers
        logger.info("seed peers reach us at %s", self._outside or "no address: relays will")

    async def reserve(self, seeds: Seeds, proof: bytes, ask: Ask) -> None:
        """Be reachable through up to `MAX_RELAYS` of the seed peers; those that relay already come first."""
        relays = list[bytes]()
        for those in ([s for s in self._relays if s in seeds], [s for s in seeds if s not in self._relays]):
            relays += await _first_to_agree(those, MAX_RELAYS - len(relays), lambda s: ask(s, RESERVE_METHOD, proof))
        self._relays = {
            seed: tuple(
                way + CIRCUIT + self._own_end
                for way in (_outward(seeds[seed]) or tuple(seeds[seed]))[:ADDRESSES_PER_RELAY]
            )
            for seed in relays
        }

    async def keep_reserved(self, seeds: Callable[[], Seeds], proof: Callable[[], bytes], ask: Ask) -> None:
        """`reserve` again and again, until cancelled."""
        while True:
            await asyncio.sleep(RENEW_S)
            await self.reserve(seeds(), proof(), ask)


async def _first_to_agree(seeds: Sequence[bytes], count: int, ask: Callable[[bytes], Awaitable[bytes]]) -> list[bytes]:
    """Up to ``count`` of them, asked side by side: those that are silent, however many, cost the time of one."""

    async def agrees(seed: bytes) -> bool:
        with contextlib.suppress(SwarmError):
            await ask(seed)
            return True
        return False

    agreed = list[bytes]()
    asked = {asyncio.create_task(agrees(seed)): seed for seed in seeds} if count > 0 else {}
    pending = set(asked)
    try:
        while pending and len(agreed) < count:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            agreed += [seed for task, seed in asked.items() if task in done and task.result()]
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return agreed[:count]


def seeds_of(addresses: Iterable[str]) -> dict[bytes, tuple[str, ...]]:
    """Multiaddrs that end in ``/p2p/ID``, by that peer's public key. Raises `DataError` for another ending."""
    found = dict[bytes, tuple[str, ...]]()
    for address in addresses:
        key = public_key_of(address.rpartition("/p2p/")[2])
        found[key] = (*found.get(key, ()), address)
    return found


def is_relayed(addresses: Iterable[str]) -> bool:
    """Whether a peer that tells these addresses is one that nobody can dial."""
    return any(CIRCUIT + "/" in address for address in addresses)


def relays_of(addresses: Iterable[str]) -> tuple[bytes, ...]:
    """The public keys of the relays that are on these ways."""
    relays = dict[bytes, None]()
    for address in addresses:
        before, circuit, _ = address.partition(CIRCUIT + "/")
        with contextlib.suppress(DataError):
            relays.update({public_key_of(before.rpartition("/p2p/")[2]): None} if circuit else {})
    return tuple(relays)


async def dial_back(request: bytes, seen_at: Sequence[str]) -> bytes:
    """The multiaddr under which the asked-for port answers us, at an address from which the caller called; or nothing.

    No other machine is dialled, so nobody can have us knock elsewhere, as long as callers are seen at addresses of
    their own: not so where connections are passed on to us. Raises `ProtocolError`.
    """
    port = int.from_bytes(request, "big")
    if len(request) != 2:
        raise ProtocolError("a request to dial back names a port")
    for seen in seen_at:
        _, family, host, *_ = (*seen.split("/"), "", "", "")
        if family in ("ip4", "ip6") and port and await _answers(host, port):
            return f"/{family}/{host}/tcp/{port}".encode()
    return b""


async def _answers(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _DIAL_BACK_S)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True


async def ask_within(answer: Awaitable[bytes]) -> bytes:
    """An answer that does not hold up the start. Raises `NetworkError`."""
    try:
        return await asyncio.wait_for(answer, _ANSWER_S)
    except asyncio.TimeoutError as error:
        raise NetworkError("no answer in time") from error


def _tcp_port(address: str) -> int:
    parts = address.split("/")
    port = parts[4] if len(parts) > 4 and parts[3] == "tcp" else ""
    return int(port) if port.isascii() and port.isdigit() and int(port) < 65536 else 0


def _outward(addresses: Iterable[str]) -> tuple[str, ...]:
    """Those that mean the same machine elsewhere too."""
    return tuple(address for address in addresses if not _is_loopback(address))


def _is_loopback(address: str) -> bool:
    parts = address.split("/")
    try:
        return ipaddress.ip_address(parts[2]).is_loopback
    except (ValueError, IndexError):
        return False
