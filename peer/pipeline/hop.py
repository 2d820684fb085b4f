"""A peer's place in the pipeline: microbatches come in, go through its span and those after it, and back.

Decides that a microbatch holds the compute slot on its way there and on its way back, never while it waits; that time
is kept for the way back; and that inner steps, and whatever else changes the weights, happen only while nothing is in
flight: admission ends, what is in flight comes back or is dropped after ``drain_s``, then the step is made. A peer with
the whole model is a hop without a way onward. Leaves what counts to `peer.pipeline.steps`, who is admitted to
`peer.pipeline.gate`, the next span to `peer.pipeline.onward`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from peer.pipeline.gate import Gate
from peer.pipeline.messages import Answer, Entering
from peer.pipeline.onward import Onward
from peer.pipeline.slot import Slot
from peer.pipeline.steps import Stepped, Steps
from swarm.errors import DeadlineExceeded

T = TypeVar("T")

# Kept for a microbatch's own way back: as many ways back as may be before it, and so much more.
RESERVE_FACTOR = 1.5
MIN_RESERVE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class HopParts:
    steps: Steps
    gate: Gate
    slot: Slot
    onward: Onward | None = None
    """None where the span has the head"""
    drain_s: float = 30.0
    on_step: Callable[[Stepped], None] = lambda stepped: None
    """called where computations run: be quick, and never block"""


@dataclass(slots=True)
class _Command:
    function: Callable[[], Any]
    done: asyncio.Future[Any]

    def carry_out(self) -> Any:
        """Not once the caller gave up: it may have asked again, and what lands twice counts twice."""
        return None if self.done.done() else self.function()


class Hop:
    """`run` must be under way for inner steps to be made."""

    def __init__(self, parts: HopParts) -> None:
        self.parts = parts
        self._changed = asyncio.Event()
        self._commands: list[_Command] = []
        self._is_paused = False

    def admit(self, *, is_own: bool = False) -> None:
        """Make room for one microbatch: `train` or `give_up` must follow. Raises `Busy`."""
        was_owed = self.parts.gate.owes_turn
        self.parts.gate.enter(self.parts.steps.num_gathered, is_own=is_own)
        if was_owed:
            self._changed.set()  # whoever left the place to others need not wait longer

    def give_up(self) -> None:
        """Nothing came of an admission."""
        self.parts.gate.leave()
        self._changed.set()

    async def room(self, yield_s: float = 0.0) -> None:
        """Return once a microbatch would be admitted: for whoever reads the data.

        A last place that others were told busy for is left to them for ``yield_s``: who reads here is always quicker
        than who comes over the network.
        """
        clock, gate, ends_s = asyncio.get_running_loop().time, self.parts.gate, math.inf
        while True:
            if gate.refusal(self.parts.steps.num_gathered):
                await self._change()
            elif not gate.yields or clock() >= ends_s:
                return
            else:
                ends_s = min(ends_s, clock() + yield_s)
                await self._change(ends_s - clock())

    async def train(self, entering: Entering) -> Answer:
        """An admitted microbatch, there and back. Raises what keeps it from being trained on, a `SwarmError`."""
        try:
            return await self._there_and_back(entering)
        finally:
            self.give_up()

    async def between_steps(self, function: Callable[[], T]) -> T:
        """``function``, which may change the weights, in the slot while no microbatch is under way."""
        command = _Command(function, asyncio.get_running_loop().create_future())
        self._commands.append(command)
        self.parts.gate.is_changing = True
        self._changed.set()
        result: T = await command.done
        return result

    def pause(self, *, is_paused: bool = True) -> None:
        """Admit nothing until it is over."""
        self.parts.gate.is_paused = is_paused
        self._changed.set()

    async def run(self) -> None:
        """Make inner steps when they are due, until cancelled. Raises what the replica raises."""
        try:
            while True:
                if not self._wants_turn:
                    await self._change()
                elif await self._drained():
                    await self._turn()
        finally:
            for command in self._commands:
                command.done.cancel()

    @property
    def _wants_turn(self) -> bool:
        gate, gathered = self.parts.gate, self.parts.steps.num_gathered
        return bool(self._commands) or gate.is_due(gathered) or (gate.is_full(gathered) and gathered > 0)

    async def _drained(self) -> bool:
        """Whether the weights may change now; false where a microbatch failed, so that another one is wanted."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + self.parts.drain_s
        while self.parts.gate.in_flight and self._wants_turn and loop.time() < ends_s:
            await self._change(ends_s - loop.time())
        return self._wants_turn

    async def _turn(self) -> None:
        """Make the inner step, carry out commands, open again. What is still in flight comes to nothing."""
        parts = self.parts
        parts.gate.is_changing = True
        await parts.slot.run(self._finish)
        while self._commands:
            await self._carry_out(self._commands.pop(0))
        parts.gate.is_changing = False
        self._changed.set()

    def _finish(self) -> None:
        stepped = self.parts.steps.finish()
        if stepped is not None:
            self.parts.on_step(stepped)

    async def _carry_out(self, command: _Command) -> None:
        try:
            result = await self.parts.slot.run(command.carry_out)
        except asyncio.CancelledError:
            command.done.cancel()
            raise
        except BaseException as error:  # it belongs to whoever asked, whatever it is
            if not command.done.done():
                command.done.set_exception(error)
        else:
            if not command.done.done():
                command.done.set_result(result)

    async def _there_and_back(self, entering: Entering) -> Answer:
        parts, clock = self.parts, asyncio.get_running_loop().time
        ends_s = clock() + entering.time_left_s
        steps = parts.steps
        if parts.onward is None:
            return await parts.slot.run(lambda: self._at_once(entering))
        passed, generation = await parts.slot.run(lambda: (steps.forward(entering), steps.generation))
        reserve_s = MIN_RESERVE_S + RESERVE_FACTOR * parts.slot.way_back_s * parts.gate.in_flight
        left_s = ends_s - clock() - reserve_s
        if left_s <= 0:
            raise DeadlineExceeded("no time is left for the spans after this one")
        came = await parts.onward.ask(entering, passed.result_BLH, left_s)
        return await parts.slot.run(lambda: steps.backward(entering, passed, came, generation), is_way_back=True)

    def _at_once(self, entering: Entering) -> Answer:
        steps = self.parts.steps
        return steps.backward(entering, steps.forward(entering), None, steps.generation)

    async def _change(self, timeout_s: float | None = None) -> None:
        """Return after something changed, at the latest after ``timeout_s``; look again then."""
        self._changed.clear()
        waiting = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait([waiting], timeout=timeout_s)
        finally:
            waiting.cancel()
