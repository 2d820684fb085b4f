"""Which span a peer takes on, by what fits here and what the others tell; and when it moves to another.

Decides how statuses become the hosts that `swarm.placement` reckons with, and what a newcomer counts for before anybody
has measured it: as much as the others do on average. Leaves the choice to `swarm.placement`, and what fits to
`peer.training.hosting`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from peer.rounds.statuses import StatusRules
from peer.training.hosting import Hosting
from swarm import placement
from swarm.errors import NetworkError, SwarmError
from swarm.placement import Host, Hosted
from swarm.proto.round_pb2 import Status

log = logging.getLogger(__name__)

# A window in which one peer may move, in lifetimes of statuses.
WINDOW_LIFETIMES = 2.0
# Where nobody has told how fast it is: only that it is above nothing matters.
ANY_RATE = 1.0


def others_of(hosting: Hosting, statuses: Sequence[Mapping[bytes, Status]], me: bytes) -> tuple[Host, ...]:
    """Who else hosts what, by the ``statuses`` of each shard. Who has yet to make a step counts like the others."""
    rates = [
        {peer: s.service_tokens_per_s for peer, s in of_shard.items() if s.trains and not s.leaving and peer != me}
        for of_shard in statuses
    ]
    hosts = placement.hosts_of(rates, hosting.work)
    usual = _usual_work(hosts)
    return tuple(host if host.work_per_s > 0 else replace(host, work_per_s=usual) for host in hosts)


def settle(
    hosting: Hosting, statuses: Sequence[Mapping[bytes, Status]], me: bytes, work_per_s: float = 0.0
) -> tuple[Hosting, str]:
    """What to host, and why. ``work_per_s``: of this peer, as measured before it moved (`SpanMoved`); 0: it was not."""
    others = others_of(hosting, statuses, me)
    fits = {hosting.hosted(choice): choice for choice in hosting.fits}
    place = placement.choose(me, work_per_s or _usual_work(others), list(fits), others, hosting.work)
    return replace(hosting, choice=fits[place.span]), place.reason


class SpanMoved(SwarmError):
    """Another span is hosted from now on: leave this one, and join again.

    ``work_per_s``: with which that was decided. Whoever joins again by another measure might settle elsewhere.
    """

    def __init__(self, reason: str, work_per_s: float) -> None:
        super().__init__(reason)
        self.work_per_s = work_per_s


class Mover:
    """Looks whether another span helps the run more: one peer at a time, each in a window of its own."""

    def __init__(self, hosting: Hosting, statuses: Callable[[], Sequence[Mapping[bytes, Status]]], me: bytes) -> None:
        """``statuses``: of everybody else, shard by shard, as they are now."""
        self._hosting, self._statuses, self._me = hosting, statuses, me

    async def decide(
        self,
        service_tokens_per_s: Callable[[], float],
        clock: Callable[[], float],
        rules: StatusRules,
        ask_coordinator: Callable[[], Awaitable[object]],
    ) -> SpanMoved:
        """Return once a move is worth it, and possible: without the coordinator nobody who left can join again.

        ``clock``: unix time, the same for everybody. ``ask_coordinator``: anything.
        """
        window_s = WINDOW_LIFETIMES * rules.lifetime_s  # whoever moved before is seen where it went
        window = int(clock() // window_s)
        while True:
            await asyncio.sleep((window + 1) * window_s - clock())
            window = int(clock() // window_s)
            if (await self._look(window, service_tokens_per_s()))[0] == self._hosting.span:
                continue
            await asyncio.sleep(placement.wait_share(window, self._me) * window_s / 4)
            rate = service_tokens_per_s()
            span, reason = await self._look(window, rate)
            if span == self._hosting.span:
                continue
            try:
                await ask_coordinator()
            except NetworkError as error:
                log.info("no move now, as the coordinator does not answer: %s", error)
            else:
                return SpanMoved(reason, rate * _work_of(self._hosting, self._hosting.span))

    def consider(self, window: int, service_tokens_per_s: float) -> tuple[Hosted, str]:
        """The span to host from now on, and why; another than ours only in the window whose mover we are."""
        return self._consider(window, service_tokens_per_s, self._statuses())

    async def _look(self, window: int, service_tokens_per_s: float) -> tuple[Hosted, str]:
        """As `consider`, in a thread: of many shards and peers it takes seconds, and rounds must not wait for it."""
        statuses = [dict(of_shard) for of_shard in self._statuses()]
        return await asyncio.to_thread(self._consider, window, service_tokens_per_s, statuses)

    def _consider(
        self, window: int, service_tokens_per_s: float, statuses: Sequence[Mapping[bytes, Status]]
    ) -> tuple[Hosted, str]:
        hosting, span = self._hosting, self._hosting.span
        mine = Host(key=self._me, span=span, work_per_s=service_tokens_per_s * _work_of(hosting, span))
        others = others_of(hosting, statuses, self._me)
        if mine.work_per_s <= 0 and not _is_stuck(others, mine, len(hosting.work)):
            return span, "how fast this peer is has yet to be seen"
        mine = mine if mine.work_per_s > 0 else replace(mine, work_per_s=_usual_work(others))
        if placement.mover(window, [*others, mine], len(hosting.work)) != self._me:
            return span, "another peer may move now"
        return placement.consider_move(mine, [hosting.hosted(choice) for choice in hosting.fits], others, hosting.work)


def _is_stuck(others: Sequence[Host], mine: Host, num_shards: int) -> bool:
    """Some shard has no replica, so that nobody will ever be seen training."""
    return any(not any(shard in host.span.shards for host in [*others, mine]) for shard in range(num_shards))


def _work_of(hosting: Hosting, span: Hosted) -> float:
    return sum(hosting.work[shard] for shard in span.shards)


def _usual_work(hosts: Sequence[Host]) -> float:
    measured = [host.work_per_s for host in hosts if host.work_per_s > 0]
    return sum(measured) / len(measured) if measured else ANY_RATE
