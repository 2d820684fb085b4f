"""What our own p2pd is asked over its socket: connections, streams, addresses.

Decides the form of a request and which error an answer is. Every request has a socket of its own: a stream stays on
it. Leaves when to dial to `peer.p2p.network`, and p2pd's process to `peer.p2p.daemon`.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peer.p2p.reachability import CIRCUIT
from swarm.errors import NetworkError, NotFound, Unreachable
from swarm.identity import peer_id_bytes, peer_id_of, public_key_of

_MAX_ADDRESS_CHARS = 256
# Codes of /p2p and /p2p-circuit in a multiaddr's bytes (multiformats, table of protocols).
_P2P_CODE, _CIRCUIT_CODE = b"\xa5\x03", b"\xa2\x02"
# Whatever is longer goes over a relay, and names it.
_PEER_ID_BYTES = 38


class DaemonControl:
    """``hivemind``: what `peer.p2p.hivemind_door` loads."""

    def __init__(self, hivemind: SimpleNamespace, socket_path: Path) -> None:
        self._hivemind, self._pb, self._socket_path = hivemind, hivemind.p2pd_pb2, socket_path

    async def connect(self, peer: bytes, addresses: tuple[str, ...], timeout_s: float) -> None:
        """Make sure of a connection. Raises `Unreachable` also when the time is over."""
        raw = [way for address in addresses if (way := self._way(address)) is not None]
        asked = self._pb.ConnectRequest(peer=peer_id_bytes(peer), addrs=raw, timeout=math.ceil(timeout_s))
        request = self._pb.Request(type=self._pb.Request.CONNECT, connect=asked)
        try:
            _, _, writer = await asyncio.wait_for(self._ask(request), timeout_s)
        except asyncio.TimeoutError as error:
            raise Unreachable(f"{peer_id_of(peer)}: no connection within {timeout_s:.1f} s") from error
        writer.close()

    async def open_stream(
        self, peer: bytes, protocol: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream of ``protocol``. Raises `Unreachable`, and `NotFound` where the peer does not speak it."""
        asked = self._pb.StreamOpenRequest(peer=peer_id_bytes(peer), proto=[protocol], timeout=math.ceil(timeout_s))
        request = self._pb.Request(type=self._pb.Request.STREAM_OPEN, streamOpen=asked)
        try:
            _, reader, writer = await asyncio.wait_for(self._ask(request), timeout_s)
        except asyncio.TimeoutError as error:
            name = protocol.rpartition("/")[2]
            raise Unreachable(f"{name}: no connection to {peer_id_of(peer)} within {timeout_s:.1f} s") from error
        return reader, writer

    async def own_addresses(self) -> list[str]:
        """Where p2pd listens, without the peer id."""
        response, _, writer = await self._ask(self._pb.Request(type=self._pb.Request.IDENTIFY))
        writer.close()
        return [str(self._hivemind.Multiaddr(raw)) for raw in response.identify.addrs]

    async def is_connected(self, peer: bytes) -> bool:
        """Directly or through a relay."""
        return bool(await self._far_ends(peer))

    async def seen_at(self, peer: bytes) -> list[str]:
        """The far ends of our direct connections with ``peer``."""
        ends = await self._far_ends(peer)
        return [str(self._hivemind.Multiaddr(raw)) for raw in ends if len(raw) < _PEER_ID_BYTES]

    async def _far_ends(self, peer: bytes) -> list[bytes]:
        response, _, writer = await self._ask(self._pb.Request(type=self._pb.Request.LIST_PEERS))
        writer.close()
        return [raw for found in response.peers if found.id == peer_id_bytes(peer) for raw in found.addrs]

    def _way(self, address: str) -> bytes | None:
        """A multiaddr without the peer id at its end, in bytes; None where it cannot be one."""
        way = address[:_MAX_ADDRESS_CHARS].rpartition("/p2p/")[0] or address
        try:
            if not way.endswith(CIRCUIT):
                return bytes(self._hivemind.Multiaddr(way).to_bytes())
            # hivemind writes a peer id within an address as a CID, which libp2p does not read.
            to_relay, _, relay = way.removesuffix(CIRCUIT).rpartition("/p2p/")
            relay_id = peer_id_bytes(public_key_of(relay))
            raw = bytes(self._hivemind.Multiaddr(to_relay).to_bytes())
            return raw + _P2P_CODE + bytes([len(relay_id)]) + relay_id + _CIRCUIT_CODE
        except Exception:  # the parser raises whatever its codecs do; a bad address is none
            return None

    async def _ask(self, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """One request on a socket of its own, which is closed unless the answer is good."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket_path)
        except OSError as error:
            raise Unreachable("our own p2pd does not run") from error
        try:
            await self._hivemind.write_pbmsg(writer, request)
            response = self._pb.Response()
            await self._hivemind.read_pbmsg_safe(reader, response)
            if response.type == self._pb.Response.ERROR:
                raise _daemon_error(response.error.msg)
        except (OSError, asyncio.IncompleteReadError) as error:
            writer.close()
            raise Unreachable("our own p2pd has stopped") from error
        except BaseException:
            writer.close()
            raise
        return response, reader, writer


def _daemon_error(message: str) -> NetworkError:
    text = message[:300]
    if "protocols not supported" in text or "protocol not supported" in text:
        return NotFound(f"the peer does not serve this: {text}")
    return Unreachable(f"no connection: {text}")
