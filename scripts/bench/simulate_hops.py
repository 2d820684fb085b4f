"""Microbatches over simulated machines: the program's own hops, gates and routes, under a clock that jumps.

The event loop is the queue of events: when nothing is ready, time moves on to the next timer. So nothing of the
pipeline is copied: `Hop`, `Serving`, `Onward` and `Source` run as they are, over replicas that only take time and over
lines that only take time. Decides what a line and a station are; leaves whose figures they get to `simulate`.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from peer.p2p.transport import MAX_CALL_BYTES, Handler
from peer.pipeline.gate import Gate
from peer.pipeline.hop import Hop, HopParts
from peer.pipeline.messages import Answer, HopRules
from peer.pipeline.onward import Onward, OnwardParts
from peer.pipeline.serving import Serving, ServingParts
from peer.pipeline.slot import Slot
from peer.pipeline.source import Source, SourceParts
from peer.pipeline.steps import Steps
from peer.training.microbatches import Microbatch, Trained
from peer.training.passes import Later, Passed, StepOutcome
from swarm.errors import DeadlineExceeded
from swarm.identity import Identity

T = TypeVar("T")

# What is really encoded: one number. What a microbatch weighs on a line is said by its `Route`.
RULES = HopRules(sequence_length=1, max_sequences=1, width=1, vocab_size=1 << 31, codec="fp32")


class _JumpingSelector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("nothing is ready, and no timer is set")
        if not ready and timeout:
            self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class Line:
    """One way of a link: what is sent first arrives first. ``bps`` None: nobody waits."""

    def __init__(self, bps: float | None) -> None:
        self._bps, self._free_s = bps, 0.0
        self.busy_s = 0.0

    def reserve(self, num_bytes: float, after_s: float) -> float:
        """When the last of ``num_bytes``, given at ``after_s``, is through."""
        lasts_s = num_bytes * 8 / self._bps if self._bps else 0.0
        self._free_s = max(self._free_s, after_s) + lasts_s
        self.busy_s += lasts_s
        return self._free_s


async def deliver(up: Line, down: Line, num_bytes: float, delay_s: float) -> None:
    """Until bytes given to ``up`` now have come through ``down``, which takes them in as they come."""
    clock = asyncio.get_running_loop().time
    now_s = clock()
    arrives_s = max(up.reserve(num_bytes, now_s), down.reserve(num_bytes, now_s)) + delay_s
    await asyncio.sleep(arrives_s - clock())


class SharedLine:
    """One way of a link, shared by all that is under way on it, as libp2p does. ``bps`` None: nobody waits."""

    def __init__(self, bps: float | None) -> None:
        self._bps, self.busy_s = bps, 0.0
        # Each message has had as many bytes of the line since it came as all others under way.
        self._had, self._since_s = 0.0, 0.0
        self._under_way: list[tuple[float, asyncio.Future[None]]] = []
        self._next: asyncio.TimerHandle | None = None

    async def carry(self, num_bytes: float) -> None:
        """Until the last of ``num_bytes`` is through."""
        if self._bps is None:
            return
        self._advance()
        entry = (self._had + num_bytes, asyncio.get_running_loop().create_future())
        self._under_way.append(entry)
        self._plan()
        try:
            await entry[1]
        finally:
            if entry in self._under_way:
                self._advance()
                self._under_way.remove(entry)
                self._plan()

    def _advance(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._under_way and self._bps:
            self._had += (now_s - self._since_s) * self._bps / 8 / len(self._under_way)
            self.busy_s += now_s - self._since_s
        self._since_s = now_s

    def _plan(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._under_way and self._bps:
            left = min(until for until, _ in self._under_way) - self._had
            lasts_s = max(0.0, left) * len(self._under_way) * 8 / self._bps
            self._next = asyncio.get_running_loop().call_later(lasts_s, self._arrive)

    def _arrive(self) -> None:
        self._advance()
        through = min(until for until, _ in self._under_way)
        for entry in [entry for entry in self._under_way if entry[0] <= through]:
            self._under_way.remove(entry)
            if not entry[1].done():
                entry[1].set_result(None)
        self._plan()


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A peer: its span begins with ``shard`` and ends before ``next_shard``; times are of one microbatch."""

    shard: int
    next_shard: int | None
    forward_s: float
    backward_s: float
    step_s: float
    """an inner step, besides"""
    up_bps: float | None
    down_bps: float | None
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What all microbatches have in common."""

    tokens: int
    onward_bytes: float
    back_bytes: float
    delay_s: float
    step_microbatches: int
    timeout_s: float
    drain_s: float


class _Replica:
    """Takes time, and learns nothing. ``spent_s``: of the computation that was just asked for."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self.spent_s = 0.0

    def begin_step(self, learning_rate: float, num_microbatches: int | None = None) -> None:
        return None

    def forward(self, given: Microbatch) -> Passed:
        self.spent_s += self._station.forward_s
        batch = torch.from_numpy(np.array(given.tokens))
        return Passed(batch_BL=batch, entered=batch, hidden_BLH=torch.ones((1, 1, 1)), weight=given.weight)

    def backward(self, passed: Passed, gradient_BLH: torch.Tensor | None, *, counts: bool = True) -> Trained:
        self.spent_s += self._station.backward_s
        return Trained(loss=1.0, gradient_BLH=None if self._station.shard == 0 else torch.ones((1, 1, 1)))

    def finish_step(self, num_microbatches: int, later: Later = ()) -> StepOutcome:
        self.spent_s += self._station.step_s
        return StepOutcome(grad_norm=1.0, ok=True)

    def drop_step(self) -> None:
        return None


class _Wire:
    """A peer's end of all its calls: `peer.p2p.transport.Transport`, of which hops use three methods."""

    def __init__(self, world: World, key: bytes, station: Station) -> None:
        self._world, self.key = world, key
        self.up, self.down = SharedLine(station.up_bps), SharedLine(station.down_bps)
        self.handler: Handler | None = None

    async def serve(self, method: str, handler: Handler) -> None:
        self.handler = handler

    async def connect(self, peer: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None:
        return None

    async def call(
        self, peer: bytes, method: str, request: Any, *, timeout_s: float, max_response_bytes: int = MAX_CALL_BYTES
    ) -> bytes:
        try:
            return await asyncio.wait_for(self._there_and_back(self._world.wires[peer], request[:]), timeout_s)
        except asyncio.TimeoutError as error:
            raise DeadlineExceeded("no answer in time") from error

    async def _there_and_back(self, other: _Wire, request: bytes) -> bytes:
        route = self._world.route
        await self._send(other, route.onward_bytes)
        if other.handler is None:
            raise AssertionError("every later span serves")
        response = await other.handler(self.key, request)
        await other._send(self, route.back_bytes)
        return response

    async def _send(self, other: _Wire, num_bytes: float) -> None:
        await asyncio.gather(self.up.carry(num_bytes), other.down.carry(num_bytes))
        await asyncio.sleep(self._world.route.delay_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of a window of simulated time; shares are of each station, in the order given."""

    tokens_per_s: float
    computing_share: tuple[float, ...]
    uplink_share: tuple[float, ...]
    repeated: int


class World:
    """Stations of one run under one route."""

    def __init__(self, stations: Sequence[Station], route: Route, seed: int = 0) -> None:
        self.route, self._stations = route, stations
        self._random = random.Random(seed)
        self.wires: dict[bytes, _Wire] = {}
        self._slots: list[Slot] = []
        self._sources: list[Source] = []
        self._answered = 0
        self._jobs: list[asyncio.Task[None]] = []

    async def run(self, warm_up_s: float, measured_s: float) -> Outcome:
        loop = asyncio.get_running_loop()
        hosts: dict[int, dict[bytes, tuple[str, ...]]] = {}
        for number, station in enumerate(self._stations):
            identity = Identity(number.to_bytes(32, "big"))
            self.wires[identity.public_key] = _Wire(self, identity.public_key, station)
            hosts.setdefault(station.shard, {})[identity.public_key] = ()
        for station, wire in zip(self._stations, list(self.wires.values()), strict=True):
            await self._add(station, wire, hosts)
        await asyncio.sleep(warm_up_s)
        began_s, answered = loop.time(), self._answered
        computed = [slot.computed_s for slot in self._slots]
        sent = [wire.up.busy_s for wire in self.wires.values()]
        await asyncio.sleep(measured_s)
        for job in self._jobs:
            if job.done():
                job.result()
        elapsed_s = loop.time() - began_s
        return Outcome(
            tokens_per_s=(self._answered - answered) * self.route.tokens / elapsed_s,
            computing_share=tuple(
                (s.computed_s - before) / elapsed_s for s, before in zip(self._slots, computed, strict=True)
            ),
            uplink_share=tuple(
                (w.up.busy_s - before) / elapsed_s for w, before in zip(self.wires.values(), sent, strict=True)
            ),
            repeated=sum(source.num_repeated for source in self._sources),
        )

    async def _add(self, station: Station, wire: _Wire, hosts: Mapping[int, Mapping[bytes, tuple[str, ...]]]) -> None:
        replica = _Replica(station)

        async def compute(function: Callable[[], Any]) -> Any:
            replica.spent_s = 0.0
            result = function()
            await asyncio.sleep(replica.spent_s * self._random.uniform(0.95, 1.05))
            return result

        slot = Slot(compute)
        self._slots.append(slot)
        steps = Steps(replica, lambda: 1e-3, self.route.step_microbatches)
        gate = Gate(step_microbatches=self.route.step_microbatches, max_in_flight=station.in_flight)
        onward = None if station.next_shard is None else self._onward(wire, station.next_shard, hosts)
        hop = Hop(HopParts(steps=steps, gate=gate, slot=slot, onward=onward, drain_s=self.route.drain_s))
        self._jobs.append(asyncio.ensure_future(hop.run()))
        if station.shard > 0:
            serving = ServingParts(
                hop=hop, rules=RULES, entrances=(station.shard,), is_admitted=lambda key: True, run=_at_once
            )
            await Serving(serving).begin(wire)  # type: ignore[arg-type]
            return
        source = SourceParts(
            hop=hop,
            next_batch=lambda number: np.array([[number, 0]]),
            new_id=lambda: self._random.randbytes(16),
            max_in_flight=1 if station.next_shard is None else station.in_flight,
            timeout_s=self.route.timeout_s,
            on_answer=self._count,
        )
        self._sources.append(Source(source))
        self._jobs.append(asyncio.ensure_future(self._sources[-1].run()))

    def _onward(self, wire: _Wire, shard: int, hosts: Mapping[int, Mapping[bytes, tuple[str, ...]]]) -> Onward:
        parts = OnwardParts(
            transport=wire,  # type: ignore[arg-type]
            rules=RULES,
            first_shard=shard,
            hosts=lambda: hosts.get(shard, {}),
            draw=self._random.random,
            run=_at_once,
        )
        onward = Onward(parts)
        # As in a run that goes on: for replicas that it does not know a peer waits for half of the time that is left,
        # hop after hop, so that deep pipelines on slow lines would not begin within the window.
        onward._routes.know(hosts.get(shard, {}))
        for peer in hosts.get(shard, {}):
            onward._routes.answered(peer, self._usual_s(shard))
        return onward

    def _usual_s(self, shard: int) -> float:
        """From a request for ``shard`` to its answer, if every later span were waited for as long as it computes."""
        route, later = self.route, {s.shard: s for s in self._stations if s.shard >= shard}
        lines = sum(8 * (route.onward_bytes + route.back_bytes) / s.up_bps for s in later.values() if s.up_bps)
        computing = sum(s.forward_s + s.backward_s for s in later.values())
        return lines + 2 * computing + 2 * len(later) * route.delay_s

    def _count(self, tokens: Any, answer: Answer) -> None:
        self._answered += 1


def simulate(
    stations: Sequence[Station], route: Route, *, warm_up_s: float, measured_s: float, seed: int = 0
) -> Outcome:
    return run_jumping(World(stations, route, seed).run(warm_up_s, measured_s))


def run_jumping(main: Coroutine[Any, Any, T]) -> T:
    """``main`` under simulated time, to its end; what it left under way is cancelled."""
    loop = JumpingLoop()
    try:
        result = loop.run_until_complete(main)
        loop.run_until_complete(_cancel(asyncio.all_tasks(loop)))
        return result
    finally:
        loop.close()


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _at_once(function: Callable[[], Any]) -> Any:
    return function()
