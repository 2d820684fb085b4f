"""The compute slot: one computation at a time, and of those who wait the ways back first.

A way back frees the activations that its way there left, and somebody upstream waits for it. Decides the order and how
long computations take; leaves where they run (a thread, or nowhere under a simulated clock) to whoever makes the slot.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
Run = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Carries out a function somewhere, and gives its result or raises its error."""

# Of the estimate before, at each measurement.
KEPT = 0.8


class Slot:
    def __init__(self, run: Run) -> None:
        self._run = run
        self._is_taken = False
        self._waiting: tuple[deque[asyncio.Future[None]], deque[asyncio.Future[None]]] = (deque(), deque())
        self.way_back_s = 0.0
        """how long a way back takes, lately"""
        self.computed_s = 0.0
        """all computations of training since the start"""

    async def run(self, function: Callable[[], T], *, is_way_back: bool = False, trains: bool = True) -> T:
        """``function`` once nobody is before it. Once begun it is carried out, also where the caller is cancelled."""
        await self._enter(self._waiting[0 if is_way_back else 1])
        clock = asyncio.get_running_loop().time
        began_s = clock()
        computing = asyncio.ensure_future(self._run(function))
        try:
            result: T = await _to_the_end(computing)
            return result
        finally:
            elapsed_s = clock() - began_s
            if trains:
                self.computed_s += elapsed_s
            if is_way_back:
                self.way_back_s = KEPT * self.way_back_s + (1 - KEPT) * elapsed_s if self.way_back_s else elapsed_s
            self._leave()

    async def _enter(self, line: deque[asyncio.Future[None]]) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # it was our turn: the next one's now
            raise

    def _leave(self) -> None:
        for line in self._waiting:
            while line:
                turn = line.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._is_taken = False


async def _to_the_end(computing: asyncio.Future[Any]) -> Any:
    """The result; whoever is cancelled meanwhile still waits, as nobody else may compute."""
    try:
        return await asyncio.shield(computing)
    except asyncio.CancelledError:
        await asyncio.wait([computing])
        if not computing.cancelled():
            computing.exception()
        raise
