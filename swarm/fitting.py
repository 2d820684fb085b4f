"""Fitting: which spans go into how much memory.

Pure. Decides what a peer takes on before it allocates anything, and what an organizer is told about cards; what a span
takes is `swarm.memory_plan`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from swarm.errors import ConfigError, ResourceError
from swarm.memory_plan import FP32_BYTES, MemoryPlan, ModelNumbers, Working, activation_bytes, plan
from swarm.run_spec import Inner
from swarm.sharding import Span, spans

GIB = 1 << 30
# Devices whose memory is the host's.
SHARED_MEMORY = ("cpu", "mps")
# What the device's driver and libraries take for themselves before the first tensor.
RUNTIME_BYTES = {"cpu": 0, "cuda": 640 << 20, "mps": 0}
# More hide no wait that these do not.
MAX_IN_FLIGHT = 32
# Left free: allocators round up and leave gaps, and kernels want scratch.
SPARE_SHARE = 0.07

CARDS = (
    ("GTX 1650", 4),
    ("RTX 2060", 6),
    ("RTX 3070", 8),
    ("RTX 3080", 10),
    ("RTX 3060", 12),
    ("RTX 4080", 16),
    ("RTX 4090", 24),
    ("RTX 5090", 32),
    ("RTX A6000", 48),
    ("A100, H100", 80),
)
"""(name, GiB) of cards that people have"""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory that a peer may use, in bytes. CPU and MPS share one memory with the host: give all of it as both."""

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    plan: MemoryPlan
    working: Working
    batch: int
    """sequences that go through at once"""
    reason: str
    pieces: int = 1
    """in which a microbatch goes through, one after the other"""


def fits(planned: MemoryPlan, room: Room, device: str) -> bool:
    """Whether ``planned`` goes into ``room`` with the driver's share and some to spare."""
    needed = planned.device_bytes + RUNTIME_BYTES[device]
    if device in SHARED_MEMORY:
        return needed + planned.host_bytes <= room.device_bytes * (1 - SPARE_SHARE)
    return needed <= room.device_bytes * (1 - SPARE_SHARE) and planned.host_bytes <= room.host_bytes * (1 - SPARE_SHARE)


def choose(
    numbers_of: Callable[[int], ModelNumbers], shards: Sequence[Span], working: Working, batch: int, room: Room
) -> Choice:
    """The span with the most layers that fits; see `choices`."""
    return choices(numbers_of, shards, working, batch, room)[0]


def choices(
    numbers_of: Callable[[int], ModelNumbers], shards: Sequence[Span], working: Working, batch: int, room: Room
) -> tuple[Choice, ...]:
    """Every span that fits, the most layers first, with ``batch`` sequences at once, or half of them, or a quarter.

    ``numbers_of`` gives the model's figures for a number of sequences. A whole batch comes before a larger span:
    smaller microbatches are slower, and their gradients wait. Raises `ResourceError` where even one sequence through
    the smallest shard does not fit.
    """
    candidates = sorted(spans(shards), key=lambda span: -span.size)
    size = batch
    while True:
        numbers = numbers_of(size)
        split = replace(working, microbatches=-(-batch // size) * working.microbatches)
        plans = [plan(numbers, span, split) for span in candidates]
        fitting = [planned for planned in plans if fits(planned, room, working.device)]
        if fitting:
            halved = f", {size} of {batch} sequences at once" if size < batch else ""
            return tuple(
                Choice(
                    plan=planned,
                    working=split,
                    batch=size,
                    pieces=-(-batch // size),
                    reason=f"{planned.span}: {_amounts(planned, room, working.device)}{halved}",
                )
                for planned in fitting
            )
        if size == 1:
            raise _nothing_fits(min(plans, key=lambda planned: planned.device_bytes), room, working.device)
        size //= 2


def in_flight(choice: Choice, numbers: ModelNumbers, room: Room) -> int:
    """How many microbatches may be under way in a span at once; at least one.

    Each has its activations, but where it goes through in pieces: these keep none. ``numbers`` are those of
    ``choice.batch`` sequences. Several gather gradients in one inner step.
    """
    span, device = choice.plan.span, choice.working.device
    several = plan(numbers, span, replace(choice.working, microbatches=max(2, choice.working.microbatches)))
    needed = several.device_bytes + RUNTIME_BYTES[device]
    needed += several.host_bytes if device in SHARED_MEMORY else 0
    kept = activation_bytes(numbers, span, checkpointing=choice.working.checkpointing) if choice.pieces == 1 else 0
    # What came in and what went on, with its gradient.
    each = kept + 3 * FP32_BYTES * numbers.activations.tokens * choice.pieces * numbers.hidden
    spare = int(room.device_bytes * (1 - SPARE_SHARE)) - needed
    return max(1, min(MAX_IN_FLIGHT, 1 + spare // each))


def working(inner: Inner, device: str) -> Working:
    """How a replica works on a ``device`` of this type under these rules."""
    return Working(
        weights=inner.weights,
        moments="8bit" if inner.optimizer == "adamw8bit" and device != "mps" else "32bit",
        checkpointing=inner.checkpoint_activations,
        device=device,
    )


def _amounts(planned: MemoryPlan, room: Room, device: str) -> str:
    """What a plan takes of what there is."""
    taken = planned.device_bytes + RUNTIME_BYTES[device]
    if device in SHARED_MEMORY:
        return f"{gib(taken + planned.host_bytes)} of {gib(room.device_bytes)}"
    host = f"{gib(planned.host_bytes)} of {gib(room.host_bytes)} on the host"
    return f"{gib(taken)} of {gib(room.device_bytes)} on the device, {host}"


def _nothing_fits(smallest: MemoryPlan, room: Room, device: str) -> ResourceError:
    return ResourceError(
        f"the smallest part of this run does not fit, one sequence at once ({smallest.span}):"
        f" it wants {_amounts(smallest, room, device)} and {SPARE_SHARE:.0%} to spare",
        "close other programs, raise --memory, choose another --device, or ask the organizer for more shards"
        " or checkpoint_activations",
    )


def parse_bytes(text: str) -> int:
    """``8GiB``, ``8 GB``, ``512MiB`` or a number of bytes. Raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,3})?)\s*([A-Za-z]{0,3})\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ConfigError(f"{text[:40]!r} is no amount of memory", "write for example 8GiB, 7.5GB or 512MiB")
    return int(float(match[1]) * unit)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
