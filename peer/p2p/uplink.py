"""How fast this peer's uplink is, and how fast it may be used.

Pure: sizes and times are arguments. Decides when a frame may leave where the person set a limit, and what rate the
large requests of the last times show. Leaves sending to `peer.p2p.call_stream`.

A rate is that of a *burst*: from when a large request begins until none is on its way, the bytes that arrived over the
seconds that it took. A slow receiver can make a burst slower than the uplink, nothing makes it faster: so the uplink is
the best of the last bursts.
"""

from __future__ import annotations

from collections import deque

# Below, the way there and back counts for more than the bytes do.
LARGE_BYTES = 1 << 18
BURST_BYTES = 1 << 20
LAST_BURSTS = 8
# A frame up to this size goes at once: a round waits for it, and it hardly weighs.
SMALL_FRAME_BYTES = 1 << 14


class Pacer:
    """When frames may leave so that no more than ``limit_bps`` bits per second do; None: at once."""

    def __init__(self, limit_bps: int | None) -> None:
        self.limit_bps = limit_bps
        self._free_at = 0.0

    def wait_s(self, size_bytes: int, now: float) -> float:
        """Seconds until a frame of this size may leave; its time on the line is taken, in the order of asking."""
        if self.limit_bps is None:
            return 0.0
        starts_at = max(now, self._free_at)
        self._free_at = starts_at + 8 * size_bytes / self.limit_bps
        return 0.0 if size_bytes <= SMALL_FRAME_BYTES else starts_at - now


class UplinkMeter:
    """Told when requests begin and end, it knows what the uplink carries."""

    def __init__(self) -> None:
        self._rates_bps: deque[float] = deque(maxlen=LAST_BURSTS)
        self._num_on_way = 0
        self._began_at = 0.0
        self._arrived_bytes = 0

    @property
    def bps(self) -> int | None:
        """Bits per second; None: nothing large has been sent yet."""
        return int(max(self._rates_bps)) if self._rates_bps else None

    def began(self, size_bytes: int, now: float) -> None:
        if size_bytes < LARGE_BYTES:
            return
        if not self._num_on_way:
            self._began_at, self._arrived_bytes = now, 0
        self._num_on_way += 1

    def ended(self, size_bytes: int, now: float, *, arrived: bool) -> None:
        """``arrived``: the peer answered, so it has all of it."""
        if size_bytes < LARGE_BYTES:
            return
        self._num_on_way -= 1
        self._arrived_bytes += size_bytes if arrived else 0
        if not self._num_on_way and self._arrived_bytes >= BURST_BYTES and now > self._began_at:
            self._rates_bps.append(8 * self._arrived_bytes / (now - self._began_at))
