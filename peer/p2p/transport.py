"""The one way in which peers talk: a call with bytes in and bytes out, and signed hints in a directory.

Two implementations meet this interface and one contract test class: `peer.p2p.network` (libp2p through hivemind) and
`tests/simulation/memory_transport.py` (a simulated network under a fake clock). The caller is authenticated: a
handler is told the public key of who calls, proven by the transport's handshake.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Protocol

from swarm.files import Kept

# A request larger than this, or a response larger than the caller allows, ends the call with `ProtocolError`.
MAX_CALL_BYTES = 256 << 20
FRAME_BYTES = 1 << 20

Handler = Callable[[bytes, bytes], Awaitable[bytes]]
"""(caller's public key, request) -> response. A `SwarmError` reaches the caller as the same class and message."""


class Transport(Protocol):
    @property
    def public_key(self) -> bytes:
        """This peer's Ed25519 public key, 32 bytes."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs (with peer id) at which this peer can be reached."""
        ...

    async def call(
        self, peer: bytes, method: str, request: Kept, *, timeout_s: float, max_response_bytes: int = MAX_CALL_BYTES
    ) -> bytes:
        """Call ``method`` on ``peer``; a ``request`` that lies on disk is read as it leaves.

        Raises `Unreachable`, `DeadlineExceeded`, `ProtocolError`, or the `SwarmError` that the handler raised.
        """
        ...

    def stream(
        self, peer: bytes, method: str, request: bytes, *, timeout_s: float, max_response_bytes: int
    ) -> AsyncGenerator[bytes, None]:
        """`call` with a response that is handed over as it comes; its sender waits for who is slow to take it.

        ``timeout_s``: for how long the peer sends. Whoever takes the parts decides how long to wait for each.
        """
        ...

    async def serve(self, method: str, handler: Handler) -> None:
        """Answer calls of ``method`` with ``handler``."""
        ...

    async def connect(self, peer: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None:
        """Make sure of a connection to ``peer``; addresses are hints. Raises `Unreachable`."""
        ...

    async def publish(self, key: str, value: bytes, *, lifetime_s: float) -> None:
        """Put a signed value under (``key``, own public key) into the directory. Raises `NetworkError`."""
        ...

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        """Values under ``key`` by the public key that signed them. Hints: never more than that."""
        ...

    def traffic(self) -> tuple[int, int]:
        """(bytes sent, bytes received) as payload of calls since the start."""
        ...

    def uplink_bps(self) -> int | None:
        """Bits per second that large requests lately left with; None: not known yet."""
        ...

    async def close(self) -> None: ...
