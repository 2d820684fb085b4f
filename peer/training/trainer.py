"""The trainer: inner steps in one background thread, with commands carried out between two of them.

Decides when a step is made (not while paused, waiting for data, or over the share of time that the person allows) and
how the event loop talks to the thread that owns the replica. Leaves what a step is to `peer.training.fp32_replica`,
which tokens it reads and at which learning rate to the runtime's `Hooks`, and what to do about bad steps to the
runtime.

Tokens of a step are B * L.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from peer.training.between_steps import COMMAND_TIMEOUT_S, BetweenSteps, Replica
from swarm.errors import ConfigError, DeadlineExceeded, ResourceError, SwarmError

if TYPE_CHECKING:
    from peer.training.microbatches import Tokens

T = TypeVar("T")

MAX_COMMANDS = 32
# A sleeping thread looks again after this long, whatever it waits for: nothing depends on a wake-up arriving.
IDLE_S = 0.2


def _nothing(_: Any) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the runtime supplies. All four are called in the trainer's thread: be quick, and never block."""

    next_batch: Callable[[int], Tokens | None]
    """Attempted steps since the start -> tokens [B, L+1], or None while there are none: asked again soon."""
    learning_rate: Callable[[], float]
    on_failed: Callable[[SwarmError], None] = _nothing
    on_bad: Callable[[int], None] = _nothing
    """Told the number of consecutive bad steps, each time it reaches a multiple of ``Limits.max_bad_steps``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    num_threads: int | None = None  # CPU threads of torch; None: as many as torch chooses
    max_duty: float = 1.0  # largest share of time spent in steps, above 0 and at most 1
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.max_duty <= 1:
            raise ConfigError(f"the share of time for training must be above 0 and at most 1, not {self.max_duty}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"training needs at least one thread, not {self.num_threads}")
        if self.max_bad_steps < 1:
            raise ConfigError(f"max_bad_steps must be at least 1, not {self.max_bad_steps}")


@dataclass(slots=True)
class _Command:
    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class Trainer(BetweenSteps):
    def __init__(
        self, replica: Replica, hooks: Hooks, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``clock`` gives seconds; it times steps, never waits."""
        super().__init__(replica)
        self._hooks, self._limits, self._clock = hooks, limits, clock
        self._changed = threading.Condition()  # guards the four below
        self._commands: deque[_Command] = deque()
        self._paused = False
        self._stopping = False
        self._failure: SwarmError | None = None
        self._attempts = 0
        self._last_end_s = 0.0
        self._rest_until_s = -math.inf
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="trainer")

    @property
    def failure(self) -> SwarmError | None:
        """Why training ended by itself, or None."""
        return self._failure

    def start(self) -> None:
        """Begin to train, in a thread of its own. Once per trainer."""
        self._thread.start()

    def pause(self) -> None:
        """Begin no further step; commands are still carried out, and a step in progress is finished."""
        self._set(paused=True)

    def resume(self) -> None:
        self._set(paused=False)

    def wake(self) -> None:
        """There may be a batch now: ask for it at once."""
        with self._changed:
            self._changed.notify_all()

    async def call(self, function: Callable[[], T], timeout_s: float = COMMAND_TIMEOUT_S) -> T:
        """See `BetweenSteps`; in the trainer's thread. Raises `ResourceError` when too many commands wait, too."""
        command = _Command(function)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._stopping or not self._thread.is_alive():
                raise SwarmError("the trainer does not run")
            if len(self._commands) >= MAX_COMMANDS:
                raise ResourceError(f"{MAX_COMMANDS} commands wait for the trainer: it is too slow or stuck")
            self._commands.append(command)
            self._changed.notify_all()
        try:
            result: T = await asyncio.wait_for(asyncio.wrap_future(command.future), timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as error:
            if command.future.done() and not command.future.cancelled():
                raise  # the function's own TimeoutError
            raise DeadlineExceeded(f"the trainer did not answer within {timeout_s:.0f} s") from error
        return result

    async def stop(self, timeout_s: float) -> None:
        """End the thread after the step in progress; waiting commands are refused.

        Raises `DeadlineExceeded` if a step takes longer than ``timeout_s``; the thread still ends after it.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is None:
            return
        done, _ = await asyncio.wait([asyncio.wrap_future(self._ended)], timeout=timeout_s)
        if not done:
            raise DeadlineExceeded(f"an inner step is still running after {timeout_s:.0f} s")

    def _set(self, *, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    def _run(self) -> None:
        """The thread. Whatever a step or hook raises ends it, is kept, and reaches everyone who waits."""
        try:
            self._prepare_thread()
            # The interpreter waits for this thread when it exits, so it must end when the main thread is gone.
            while not self._stopping and threading.main_thread().is_alive():
                self._turn()
        except SwarmError as error:
            self._fail(error)
        except Exception as error:  # the thread's edge: an error of any kind must not vanish with it
            failure = SwarmError(f"training ended by {type(error).__name__}: {error}", "run again with --debug")
            failure.__cause__ = error
            self._fail(failure)
        finally:
            self._refuse_commands()
            self._ended.set_result(None)

    def _prepare_thread(self) -> None:
        self._last_end_s = self._clock()
        if self._limits.num_threads is not None:
            import torch

            torch.set_num_threads(self._limits.num_threads)

    def _turn(self) -> None:
        """One command, else one step, else a short sleep."""
        with self._changed:
            command = self._commands.popleft() if self._commands else None
            paused = self._paused
        if command is not None:
            _carry_out(command)
            return
        rest_s = self._rest_until_s - self._clock()
        if rest_s > 0:
            self._sleep(min(rest_s, IDLE_S))
            return
        batch = None if paused else self._hooks.next_batch(self._attempts)
        if batch is None:
            self._sleep(IDLE_S)
            return
        self._step(batch)

    def _step(self, batch: Tokens) -> None:
        start_s = self._clock()
        result = self._replica.step(batch, self._hooks.learning_rate())
        end_s = self._clock()
        self._attempts += 1
        num_tokens = batch.shape[0] * (batch.shape[1] - 1)
        bad = self._count(result, num_tokens, end_s - self._last_end_s)
        self._last_end_s = end_s
        self._rest_until_s = end_s + (end_s - start_s) * (1 / self._limits.max_duty - 1)
        if bad and bad % self._limits.max_bad_steps == 0:
            self._hooks.on_bad(bad)

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            if not self._commands and not self._stopping:
                self._changed.wait(seconds)

    def _fail(self, failure: SwarmError) -> None:
        with self._changed:
            self._failure = failure
        # A hook that fails must not keep the thread from ending in order.
        with contextlib.suppress(Exception):
            self._hooks.on_failed(failure)

    def _refuse_commands(self) -> None:
        with self._changed:
            self._stopping = True
            waiting = list(self._commands)
            self._commands.clear()
        for command in waiting:
            if command.future.set_running_or_notify_cancel():
                command.future.set_exception(self._failure or SwarmError("the trainer was stopped"))


def _carry_out(command: _Command) -> None:
    if not command.future.set_running_or_notify_cancel():
        return
    try:
        result = command.function()
    except BaseException as error:  # it belongs to whoever asked, whatever it is
        command.future.set_exception(error)
    else:
        command.future.set_result(result)
