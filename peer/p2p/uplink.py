"""How fast this peer's uplink is, and how fast it may be used.

Pure: sizes and times are arguments. Decides when a frame may leave where the person set a limit, and what rate the
large requests of the last times show. Leaves sending, and whose turn it is, to `peer.p2p.call_stream`.

A rate is that of a *burst*: large requests on their way at the same time. Whenever one of them has arrived, all that
arrived since the burst began took at most the time since then; the best such rate is the burst's. So a receiver that is
slow, or never answers, hides nothing. The uplink is the best of the last bursts. A receiver that answers early makes it
seem faster by what lies in the buffers of its connection: a hint for sharing work out, not a proof.
"""

from __future__ import annotations

from collections import deque

# Below, the way there and back counts for more than the bytes do.
LARGE_BYTES = 1 << 18
BURST_BYTES = 1 << 20
LAST_BURSTS = 8
# A frame up to this size goes at once: a round waits for it, and it hardly weighs.
SMALL_FRAME_BYTES = 1 << 14
# Of the line, where there is a limit: others wait so long for their turn.
LONGEST_FRAME_S = 0.25


class Pacer:
    """When frames may leave so that no more than ``limit_bps`` bits per second do; None: at once."""

    def __init__(self, limit_bps: int | None) -> None:
        self.limit_bps = limit_bps
        self._free_at = 0.0

    def wait_s(self, now: float) -> float:
        """Seconds until the line is free."""
        return max(0.0, self._free_at - now)

    def leave(self, size_bytes: int, now: float) -> None:
        """A frame of this size leaves; a pause before it is not saved up."""
        if self.limit_bps is not None:
            self._free_at = max(now, self._free_at) + 8 * size_bytes / self.limit_bps

    def frame_bytes(self, most: int) -> int:
        """How large a frame may be: at most ``most``."""
        if self.limit_bps is None:
            return most
        return min(most, max(SMALL_FRAME_BYTES, int(self.limit_bps * LONGEST_FRAME_S / 8)))


class UplinkMeter:
    """Told when requests begin and end, it knows what the uplink carries."""

    def __init__(self) -> None:
        self._rates_bps: deque[float] = deque(maxlen=LAST_BURSTS)
        self._num_on_way = 0
        self._began_at = 0.0
        self._arrived_bytes = 0
        self._best_bps = 0.0

    @property
    def bps(self) -> int | None:
        """Bits per second; None: nothing large has been sent yet."""
        return int(max([*self._rates_bps, self._best_bps])) or None

    def began(self, size_bytes: int, now: float) -> None:
        if size_bytes < LARGE_BYTES:
            return
        if not self._num_on_way:
            self._began_at, self._arrived_bytes, self._best_bps = now, 0, 0.0
        self._num_on_way += 1

    def ended(self, size_bytes: int, now: float, *, arrived: bool) -> None:
        """``arrived``: all of it was sent, and the peer answered."""
        if size_bytes < LARGE_BYTES:
            return
        self._num_on_way -= 1
        if arrived:
            self._arrived_bytes += size_bytes
            if self._arrived_bytes >= BURST_BYTES and now > self._began_at:
                self._best_bps = max(self._best_bps, 8 * self._arrived_bytes / (now - self._began_at))
        if not self._num_on_way and self._best_bps:
            self._rates_bps.append(self._best_bps)
            self._best_bps = 0.0
