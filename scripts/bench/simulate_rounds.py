"""A round's seconds, part by part: encoded, sent, averaged, sent back, applied, over simulated lines and processors.

Decides the order of what happens, which is that of `peer.rounds`: a member encodes its movement, parts go to their
reducers and averages to everybody, in up to four pieces each so that wire and work overlap; then all is applied, and a
majority has it on disk before it counts. Costs are measured ones (docs/benchmarks.md, "Rounds beside hivemind's
averager and gloo"). Leaves whose lines these are to `simulate`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from simulate_hops import Line, deliver, run_jumping

PIECES = 2
# Processor seconds a value, in 1e-9: of each member, and of the reducer for every member's value.
ENCODE_NS, BOOK_NS, APPLY_NS = 2.0, 4.0, 6.0
# Small calls before and after: opening, proposing, accepting, each a way there and back, and a call's own cost.
TURNS, CALL_S = 3, 0.01


# Written and synced, a byte: 50 MiB in 0.155 s, the median of four on the machine of the benchmarks.
SYNC_NS = 3.0
# What a stream may have under way at first; the window doubles with each way there and back.
FIRST_WINDOW_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    up_bps: float | None
    down_bps: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """``cores``: of a processor each, for every member; ``bytes_per_value``: of the wire codec, both ways."""

    num_values: int
    bytes_per_value: float
    delay_s: float
    cores: float = 1.0
    disk_share: float = 1.0
    """how many members write to one disk"""
    reduce_ns: float = 15.0
    wire_ns: float = 20.0
    """of each end, a byte: what four peers took for 25 M values at 100 Mbit/s, beside arithmetic"""

    def wire_ns_of(self, members: int, cpu_s: float) -> float:
        """The same where all together took ``cpu_s``."""
        arithmetic = self.num_values * (members * (ENCODE_NS + BOOK_NS + APPLY_NS) + members * self.reduce_ns / members)
        both_ways = 2 * (members - 1) * self.num_values * self.bytes_per_value
        return max(0.0, (cpu_s * 1e9 - arithmetic) / both_ways / 2)


class _Processor:
    """Does one thing after another."""

    def __init__(self, cores: float) -> None:
        self._cores, self._free_s = cores, 0.0

    async def work(self, nanoseconds: float) -> None:
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(self._free_s, now_s) + nanoseconds * 1e-9 / self._cores
        await asyncio.sleep(self._free_s - now_s)


class _Round:
    def __init__(self, members: Sequence[Member], what: Round) -> None:
        self._what = what
        self._ups, self._downs = [Line(m.up_bps) for m in members], [Line(m.down_bps) for m in members]
        self._processors = [_Processor(what.cores) for _ in members]
        rates = [member.up_bps or 1.0 for member in members]
        # The faster an uplink, the more its reducer averages.
        self._piece_values = [what.num_values * rate / sum(rates) / PIECES for rate in rates]
        self._all = range(len(members))

    async def run(self) -> float:
        """Seconds until all members hold it applied."""
        arrivals = {
            (piece, reducer): [asyncio.get_running_loop().create_future() for _ in self._all]
            for piece in range(PIECES)
            for reducer in self._all
        }
        contributing = [asyncio.ensure_future(self._contribute(member, arrivals)) for member in self._all]
        reducing = [asyncio.ensure_future(self._reduce(key[1], came)) for key, came in arrivals.items()]
        await asyncio.gather(*contributing, *reducing)
        await asyncio.gather(*(self._apply(member) for member in self._all))
        return asyncio.get_running_loop().time() + TURNS * (2 * self._what.delay_s + CALL_S)

    async def _contribute(self, member: int, arrivals: dict[tuple[int, int], list[asyncio.Future[None]]]) -> None:
        """Encode piece by piece, each sent while the next is encoded; everybody begins with another reducer."""
        sending = []
        for piece in range(PIECES):
            for step in self._all:
                reducer = (member + step) % len(self._all)
                await self._processors[member].work(ENCODE_NS * self._piece_values[reducer])
                arrived = arrivals[piece, reducer][member]
                sending.append(asyncio.ensure_future(self._send(member, reducer, self._piece_values[reducer])))
                sending[-1].add_done_callback(lambda done, arrived=arrived: arrived.set_result(None))
        await asyncio.gather(*sending)

    async def _reduce(self, reducer: int, came: list[asyncio.Future[None]]) -> None:
        await asyncio.gather(*came)
        values = self._piece_values[reducer]
        await self._processors[reducer].work(self._what.reduce_ns * values)
        await asyncio.gather(*(self._send(reducer, member, values) for member in self._all))

    async def _send(self, sender: int, receiver: int, values: float) -> None:
        if sender == receiver:
            return
        num_bytes = values * self._what.bytes_per_value
        await self._processors[sender].work(self._what.wire_ns * num_bytes)
        delay_s = self._what.delay_s * (1 + 2 * math.log2(max(1.0, num_bytes / FIRST_WINDOW_BYTES)))
        await deliver(self._ups[sender], self._downs[receiver], num_bytes, delay_s)
        await self._processors[receiver].work(self._what.wire_ns * num_bytes)

    async def _apply(self, member: int) -> None:
        """Averages are on disk before the round counts."""
        await asyncio.sleep(SYNC_NS * 1e-9 * self._what.num_values * self._what.bytes_per_value * self._what.disk_share)
        await self._processors[member].work((BOOK_NS + APPLY_NS) * self._what.num_values)


def round_seconds(members: Sequence[Member], what: Round) -> float:
    """From its opening until all members hold the round applied."""
    return run_jumping(_Round(members, what).run())
