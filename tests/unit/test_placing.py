"""Which span a peer takes on by what the others tell, and when it goes to another."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from peer.placing import Mover, SpanMoved, settle
from peer.rounds.statuses import StatusRules
from peer.training.hosting import Hosting
from swarm import placement
from swarm.errors import Unreachable
from swarm.placement import Hosted
from swarm.proto.round_pb2 import Status
from swarm.sharding import Span, from_sizes, join

ME = b"m" * 32
SHARDS = from_sizes((2, 2))
FIRST, SECOND, WHOLE = SHARDS[0], SHARDS[1], join(SHARDS)
RULES = StatusRules(run_id=b"", publication_key=b"", founders=(), lifetime_s=0.01)


def hosting(fits: Sequence[Span], chosen: Span | None = None) -> Hosting:
    choices: Any = [SimpleNamespace(plan=SimpleNamespace(span=span)) for span in fits]
    choice = next(c for c in choices if c.plan.span == (chosen or fits[0]))
    device: Any = None
    return Hosting(
        device=device, config=None, shards=SHARDS, work=(1.0, 1.0), fits=tuple(choices), choice=choice, in_flight=(1,)
    )


def told(**rates: float) -> dict[bytes, Status]:
    return {name.encode(): Status(trains=True, service_tokens_per_s=rate) for name, rate in rates.items()}


CASES = [
    ("the whole model where it fits", (WHOLE, FIRST, SECOND), [told(a=9), told()], WHOLE),
    ("the shard that lacks a replica", (FIRST, SECOND), [told(a=9), told()], SECOND),
    ("the slower shard", (FIRST, SECOND), [told(a=9), told(b=3)], SECOND),
    ("nobody was measured: the one with fewer", (FIRST, SECOND), [told(a=0, c=0), told(b=0)], SECOND),
    ("own statuses of a span that was left do not count", (FIRST, SECOND), [told(a=9), {ME: told(a=9)[b"a"]}], SECOND),
]


@pytest.mark.parametrize(("fits", "statuses", "chosen"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_newcomer_takes_the_span_that_helps_most(fits: Any, statuses: Any, chosen: Span) -> None:
    settled, _ = settle(hosting(fits), statuses, ME)
    assert settled.choice.plan.span == chosen


def test_who_leaves_or_only_serves_is_no_host() -> None:
    gone = {b"a": Status(trains=True, leaving=True, service_tokens_per_s=9), b"s": Status(trains=False)}
    assert settle(hosting((FIRST, SECOND)), [gone, told(b=5)], ME)[0].choice.plan.span == FIRST


def mover_at(first: dict[bytes, Status], second: dict[bytes, Status]) -> Mover:
    """One that hosts the first shard, beside these."""
    return Mover(hosting((FIRST, SECOND), FIRST), lambda: [first, second], ME)


def moves(mover: Mover, rate: float) -> set[Hosted]:
    """What it would host over many windows."""
    return {mover.consider(window, rate)[0] for window in range(50)}


HERE, THERE = Hosted(first=0, last=1), Hosted(first=1, last=2)


def test_a_peer_moves_where_a_shard_lost_its_last_replica_also_before_anything_was_measured() -> None:
    for rate in (0.0, 5.0):
        assert THERE in moves(mover_at(told(a=5), {}), rate)


def test_nobody_leaves_the_last_replica_of_a_shard_or_moves_for_little() -> None:
    assert moves(mover_at({}, told(b=1)), 5.0) == {HERE}
    assert moves(mover_at(told(a=5), told(b=10)), 5.0) == {HERE}


def test_in_each_window_one_peer_at_most_may_move() -> None:
    others = told(**{name: 5 for name in "abcdefg"})
    able = [window for window in range(200) if mover_at(others, told()).consider(window, 5.0)[0] == THERE]
    assert 5 < len(able) < 60, "one of eight"


async def answered() -> None:
    pass


async def decided(ask: Callable[[], Awaitable[None]]) -> SpanMoved:
    """What a peer comes to whose neighbours left a shard without a replica."""
    loop = asyncio.get_running_loop()
    return await asyncio.wait_for(mover_at(told(a=5), {}).decide(lambda: 5.0, loop.time, RULES, ask), 20)


def test_a_move_is_decided_in_a_window_of_its_own_and_told_with_its_reason() -> None:
    moved = asyncio.run(decided(answered))
    assert "0 shards lack a replica then" in str(moved) and moved.work_per_s == 5.0


def test_nobody_moves_while_the_coordinator_does_not_answer() -> None:
    """Whoever left then could not join again."""
    asked: list[None] = []

    async def ask() -> None:
        asked.append(None)
        if len(asked) < 3:
            raise Unreachable("the coordinator cannot be reached")

    asyncio.run(decided(ask))
    assert len(asked) == 3


def test_whoever_moves_settles_on_the_span_that_it_moved_for() -> None:
    """By its own measure: with the others' usual one, many a peer would settle elsewhere, or where it was."""
    rng, work, moves = random.Random(0), (1.0,) * 4, 0
    shards = from_sizes((1,) * 4)
    for _ in range(100):
        statuses: list[dict[bytes, Status]] = [{} for _ in shards]
        for number in range(rng.randint(2, 6)):
            first, rate = rng.randrange(3), rng.lognormvariate(3, 1)
            for shard in range(first, first + rng.choice((1, 2))):
                statuses[shard] |= told(**{f"peer{number}": rate})
        fits = [*shards, *(join(shards[first : first + 2]) for first in range(3))]
        before = replace(hosting(fits, rng.choice(fits)), shards=shards, work=work)
        rate = rng.lognormvariate(3, 1)
        mover = Mover(before, lambda told=statuses: told, ME)  # type: ignore[misc]
        for span in {mover.consider(window, rate)[0] for window in range(10)} - {before.span}:
            moves += 1
            settled, _ = settle(before, statuses, ME, rate * len(before.span.shards))
            assert settled.span == span
    assert moves > 20


def test_the_event_loop_goes_on_while_a_move_is_considered(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    consider_move = placement.consider_move

    def noted(*args: Any) -> tuple[Hosted, str]:
        threads.append(threading.current_thread())
        return consider_move(*args)

    monkeypatch.setattr(placement, "consider_move", noted)

    async def there() -> None:
        pass

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(mover_at(told(a=5), {}).decide(lambda: 5.0, loop.time, RULES, there), 20)

    asyncio.run(main())
    assert threads and threading.main_thread() not in threads
