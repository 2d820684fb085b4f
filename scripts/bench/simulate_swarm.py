"""A day of a swarm: volunteers come, fetch their state, train, and leave; what they train together, and what bounds it.

Decides the order of losses, from what all machines could compute to what is committed: cards that fit nothing, time
spent fetching, replicas beyond a round's members, homes' lines, uneven shards, waits within the pipeline, rounds that
cannot follow each other faster. Placement, speeds and memory are the program's own functions; rounds are
`simulate_rounds`, the pipeline's waits `simulate_hops`, over a sample of the swarm. Who leaves is replaced at once by
somebody with such a card and another home, who takes the same place once the state is there.
"""

from __future__ import annotations

import functools
import heapq
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from simulate_hops import Route, Station, simulate
from simulate_rounds import Member, Round, round_seconds
from simulate_volunteers import HOMES, HOP_CODEC, SESSION_S, SUSTAINED, Card, Home, Study, draw_card, draw_home

from peer.pipeline.messages import time_for
from peer.spanning import MAX_DRAIN_S
from swarm import pipeline_plan
from swarm.placement import Host, Hosted, choose, throughput

MAX_MEMBERS = 64
# Bytes a value: a state is the anchor in fp32 and momentum in 8 bits; the wire codec is int4.
STATE_BYTES, WIRE_BYTES = 5.016, 4.25 / 8
# Of the uplinks, what serving states to newcomers may take.
SERVING_SHARE = 0.5
# Slower homes send a thinner rung of the ladder: equal time.
LEAST_UPLINK_BPS = 20e6
DELAY_S = 0.03
# More than a run has by default: fewer drains (`pipeline.step_microbatches`).
STEP_MICROBATCHES = 64
SETTLE_S, DAY_S, SAMPLE_S = 8 * 3600.0, 24 * 3600.0, 1800.0
CANDIDATES = 2

LOSSES = ("memory", "churn", "members of a round", "hop wire", "uneven shards", "waits in the pipeline", "round wire")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What volunteers with such a card do; ``hosted`` None: nothing fits."""

    card: Card
    hosted: Hosted | None
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """``kept``: after each of `LOSSES`, tokens/s that are left; the first is before all of them."""

    tokens_per_s: float
    utilisation: float
    bound_by: str
    kept: tuple[float, ...]
    state_minutes: float
    round_s: float
    samples_without_training: float

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_s * 86_400


@dataclass(slots=True)
class _Volunteer:
    place: Place
    home: Home
    ready: bool
    session: int = 0


def found(study: Study, number: int, seed: int) -> list[Place]:
    """Where ``number`` volunteers settle, one after another, each by `swarm.placement.choose`."""
    rng, work = random.Random(f"{seed} found"), study.work
    hosted: dict[Hosted, float] = defaultdict(float)
    places = []
    for index in range(number):
        card, home = draw_card(rng), draw_home(rng)
        fits = study.fits(card)
        if not fits:
            places.append(Place(card=card, hosted=None, in_flight=0))
            continue
        # One shard each: none but those with the least speed so far can be the best.
        fits = sorted(fits, key=lambda span: (hosted[span], span.first))[:CANDIDATES]
        others = [Host(key=bytes([h.first, h.last]), span=h, work_per_s=w) for h, w in hosted.items() if w]
        speeds = {span: speed(study, span, card, home.up_bps, home.down_bps)[0] for span in fits}
        mine = choose(index.to_bytes(4, "big"), speeds[fits[0]], fits, others, work).span
        hosted[mine] += speeds[mine]
        places.append(Place(card=card, hosted=mine, in_flight=study.takes[card.name][1]))
    return places


@functools.cache
def _speed(study_key: tuple[str, int], span: Hosted, flops: float, up_bps: float, down_bps: float) -> tuple[float, str]:
    study = _STUDIES[study_key]
    machine = pipeline_plan.Machine(flops=flops, uplink_bps=max(1.0, up_bps), downlink_bps=down_bps)
    told = pipeline_plan.span_speed(study.numbers, study.span(span), study.working, machine, HOP_CODEC)
    return told.tokens_per_s * sum(study.work[span.first : span.last]), told.bound_by


_STUDIES: dict[tuple[str, int], Study] = {}


def speed(study: Study, span: Hosted, card: Card, up_bps: float, down_bps: float) -> tuple[float, str]:
    """(tokens/s of a whole model's work, what bounds them)."""
    key = (study.name, len(study.shards))
    _STUDIES[key] = study
    return _speed(key, span, card.peak_flops * SUSTAINED, up_bps, down_bps)


def efficiency(study: Study, places: list[Place], seed: int, seconds: float) -> float:
    """What waits leave of a pipeline's throughput: the sample's tokens/s over what placement promises it."""
    if len(study.shards) == 1 or all(p.hosted is None or len(p.hosted.shards) == len(study.shards) for p in places):
        return 1.0
    rng = random.Random(f"{seed} efficiency")
    stations, hosts = [], []
    for number, place in enumerate(places):
        if place.hosted is None:
            continue
        home, hosted = draw_home(rng), place.hosted
        flops = pipeline_plan.flops_per_token(study.numbers, study.span(hosted), study.working)
        compute_s = study.tokens_per_microbatch * flops / (place.card.peak_flops * SUSTAINED)
        last = hosted.last == len(study.shards)
        station = Station(
            shard=hosted.first,
            next_shard=None if last else hosted.last,
            # There once, back twice, and there again as activations are not kept.
            forward_s=compute_s / 4,
            backward_s=compute_s * 3 / 4,
            step_s=compute_s / 4,
            up_bps=home.up_bps,
            down_bps=home.down_bps,
            in_flight=place.in_flight,
        )
        stations.append(station)
        rate, _ = speed(study, hosted, place.card, home.up_bps, home.down_bps)
        hosts.append(Host(key=number.to_bytes(4, "big"), span=hosted, work_per_s=rate))
    promised = throughput(hosts, study.work)
    if not promised:
        return 0.0
    num_bytes = pipeline_plan.hop_bytes(study.numbers.hidden, HOP_CODEC) * study.tokens_per_microbatch
    route = Route(
        tokens=study.tokens_per_microbatch,
        onward_bytes=num_bytes + pipeline_plan.TOKEN_ID_BYTES * study.tokens_per_microbatch,
        back_bytes=num_bytes,
        delay_s=DELAY_S,
        step_microbatches=STEP_MICROBATCHES,
        timeout_s=time_for(len(study.shards)),
        drain_s=MAX_DRAIN_S,
    )
    came = simulate(stations, route, warm_up_s=seconds, measured_s=seconds, seed=seed)
    return min(1.0, came.tokens_per_s / promised)


def day(study: Study, places: list[Place], number: int, waits: float, seed: int) -> Day:
    """A day of ``number`` volunteers, spread over ``places`` alike; ``waits``: the pipeline's `efficiency`."""
    swarm = _Swarm(study, [places[index % len(places)] for index in range(number)], seed)
    first = swarm.kept_of(waits, 0.0)
    # Rounds take some of every uplink: how much follows from how fast they come.
    shard_values = max(study.numbers.num_values(shard) for shard in study.shards)
    round_bps = 16 * WIRE_BYTES * shard_values * max(1e-9, first[-1]) / study.tokens_per_round
    samples = []
    for at_s in swarm.samples():
        if at_s >= SETTLE_S:
            samples.append(swarm.kept_of(waits, round_bps))
    kept = tuple(sum(column) / len(samples) for column in zip(*samples, strict=True))
    losses = {name: kept[i + 1] / kept[i] if kept[i] else 1.0 for i, name in enumerate(LOSSES)}
    worst = min(losses, key=lambda name: losses[name])
    return Day(
        tokens_per_s=kept[-1],
        utilisation=kept[-1] / kept[0],
        bound_by=worst if losses[worst] < 0.95 else "compute",
        kept=kept,
        state_minutes=swarm.state_s / 60,
        round_s=swarm.round_s,
        samples_without_training=sum(not sample[-1] for sample in samples) / len(samples),
    )


class _Swarm:
    def __init__(self, study: Study, places: list[Place], seed: int) -> None:
        self.study, self._rng = study, random.Random(f"{seed} day")
        self._volunteers = [_Volunteer(place, draw_home(self._rng), ready=place.hosted is not None) for place in places]
        self._events: list[tuple[float, int, int, str]] = []
        self._capable = sum(place.card.peak_flops * SUSTAINED / study.flops for place in places)
        useful = [place for place in places if place.hosted is not None]
        self._fitting = sum(place.card.peak_flops * SUSTAINED / study.flops for place in useful)
        values = [study.numbers.num_values(study.span(place.hosted)) for place in useful if place.hosted is not None]
        self._state_bytes = STATE_BYTES * sum(values) / max(1, len(values))
        shares = sum(home.subscribers_millions for home in HOMES)
        mean_up_bps = sum(home.up_bps * home.subscribers_millions for home in HOMES) / shares
        demand_bps, supply_bps = self._state_bytes * 8 / SESSION_S, SERVING_SHARE * mean_up_bps
        self._served = min(1.0, supply_bps / demand_bps) if demand_bps else 1.0
        # Of every uplink, the share that serves newcomers.
        self._serving_share = min(demand_bps, supply_bps) / mean_up_bps
        median_down_bps = sorted(home.down_bps for home in HOMES)[len(HOMES) // 2]
        self.state_s = self._state_bytes * 8 / median_down_bps
        self.round_s = self._round_seconds(len(useful))
        for index in range(len(places)):
            self._push(self._rng.expovariate(1 / SESSION_S), index, "leave")

    def samples(self) -> Iterator[float]:
        """Times, every `SAMPLE_S`; the swarm is as it is then."""
        at_s = 0.0
        while at_s < SETTLE_S + DAY_S:
            while self._events and self._events[0][0] <= at_s:
                self._happen()
            yield at_s
            at_s += SAMPLE_S

    def kept_of(self, waits: float, round_bps: float) -> tuple[float, ...]:
        """Tokens/s after each loss, now."""
        study = self.study
        ready = [v for v in self._volunteers if v.ready and v.place.hosted is not None]
        computing = sum(v.place.card.peak_flops * SUSTAINED / study.flops for v in ready)
        members = self._members(ready)
        member_flops = sum(v.place.card.peak_flops * SUSTAINED / study.flops for v in members)
        hosted: dict[Hosted, float] = defaultdict(float)
        for v in members:
            span = v.place.hosted
            up_bps = v.home.up_bps * (1 - self._serving_share) - round_bps
            if span is not None:
                hosted[span] += speed(study, span, v.place.card, up_bps, v.home.down_bps)[0]
        hosts = [Host(key=bytes([s.first, s.last]), span=s, work_per_s=w) for s, w in hosted.items()]
        together = throughput(hosts, study.work) if hosts else 0.0
        flowing = together * waits
        committed = min(flowing, study.tokens_per_round / self.round_s)
        return (
            self._capable,
            self._fitting,
            computing,
            member_flops,
            sum(hosted.values()),
            together,
            flowing,
            committed,
        )

    def _members(self, ready: list[_Volunteer]) -> list[_Volunteer]:
        """Of each shard's replicas those with the fastest uplinks, as a leader chooses members."""
        counts = [0] * len(self.study.shards)
        members = []
        for v in sorted(ready, key=lambda v: -v.home.up_bps):
            shards = v.place.hosted.shards if v.place.hosted is not None else range(0)
            if all(counts[shard] < MAX_MEMBERS for shard in shards):
                members.append(v)
                for shard in shards:
                    counts[shard] += 1
        return members

    def _round_seconds(self, useful: int) -> float:
        study = self.study
        per_shard = max(1, min(MAX_MEMBERS, useful if len(study.shards) == 1 else useful // len(study.shards)))
        rng = random.Random("round")
        homes = [draw_home(rng) for _ in range(per_shard)]
        members = [Member(up_bps=max(h.up_bps, LEAST_UPLINK_BPS), down_bps=h.down_bps) for h in homes]
        values = max(study.numbers.num_values(shard) for shard in study.shards)
        what = Round(num_values=values, bytes_per_value=WIRE_BYTES, delay_s=DELAY_S)
        return round_seconds(members, what) if per_shard > 1 else 1.0

    def _happen(self) -> None:
        at_s, index, session, what = heapq.heappop(self._events)
        volunteer = self._volunteers[index]
        if session != volunteer.session:
            return
        if what == "ready":
            volunteer.ready = True
            return
        volunteer.session += 1
        volunteer.home, volunteer.ready = draw_home(self._rng), False
        self._push(at_s + self._rng.expovariate(1 / SESSION_S), index, "leave")
        if volunteer.place.hosted is not None and self._rng.random() < self._served:
            self._push(at_s + self._state_bytes * 8 / volunteer.home.down_bps, index, "ready")

    def _push(self, at_s: float, index: int, what: str) -> None:
        heapq.heappush(self._events, (at_s, index, self._volunteers[index].session, what))
