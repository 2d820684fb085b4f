"""Placement: what peers train together, which span helps most, and when it is worth to move."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from swarm import placement
from swarm.errors import ConfigError
from swarm.placement import Host, Hosted, choose, consider_move, hosts_of, merged, mover, throughput, wait_share

ME = b"m" * 32


def key(number: int) -> bytes:
    return bytes([number]) * 32


def span(first: int, last: int) -> Hosted:
    return Hosted(first=first, last=last)


def hosts(*given: tuple[int, int, float]) -> list[Host]:
    """(first, last, work/s) of each."""
    return [
        Host(key=key(number), span=span(first, last), work_per_s=rate)
        for number, (first, last, rate) in enumerate(given)
    ]


RATES = [
    ("nobody", [], [1, 1], 0),
    ("one whole-model peer", [(0, 2, 10)], [1, 1], 5),
    ("two of them", [(0, 2, 10), (0, 2, 6)], [1, 1], 8),
    ("one a shard: the slower bounds", [(0, 1, 10), (1, 2, 4)], [1, 1], 4),
    ("a heavy shard", [(0, 1, 10), (1, 2, 10)], [1, 5], 2),
    ("a shard without a replica", [(0, 1, 10), (2, 3, 10)], [1, 1, 1], 0),
    ("a whole-model peer helps where it is scarce", [(0, 1, 10), (1, 2, 4), (0, 2, 6)], [1, 1], 10),
    ("one peer at both ends, another in between", [(0, 3, 1), (1, 2, 10)], [1, 1, 1], 0.5),
    ("overlapping spans", [(0, 2, 4), (1, 3, 4), (2, 4, 4)], [1, 1, 1, 1], 3),
]


@pytest.mark.parametrize(("given", "work", "expected"), [c[1:] for c in RATES], ids=[c[0] for c in RATES])
def test_what_peers_train_together(given: list[tuple[int, int, float]], work: list[float], expected: float) -> None:
    assert throughput(hosts(*given), work) == pytest.approx(expected, abs=1e-6)


def test_no_set_of_shards_is_asked_for_more_than_its_hosts_have() -> None:
    """The bound of every set of shards (Hall's) is reached by the tightest, on random swarms."""
    rng = random.Random(1)
    for _ in range(60):
        work = [rng.uniform(0.5, 2) for _ in range(4)]
        ends = [sorted(rng.sample(range(5), 2)) for _ in range(rng.randint(1, 5))]
        given = hosts(*((first, last, rng.uniform(0.1, 5)) for first, last in ends))
        sets = [s for size in range(1, 5) for s in itertools.combinations(range(4), size)]
        tightest = min(
            sum(h.work_per_s for h in given if any(shard in h.span.shards for shard in chosen))
            / sum(work[shard] for shard in chosen)
            for chosen in sets
        )
        assert throughput(given, work) == pytest.approx(tightest, abs=1e-6)


def test_hosts_of_one_span_count_as_one_so_that_many_peers_cost_no_more_than_few() -> None:
    """And nothing that peers decide is another with them merged."""
    rng = random.Random(2)
    given = hosts(*((first, first + 1, rng.uniform(1, 5)) for first in (0, 1, 2, 1, 1, 0)), (0, 2, 3.0), (1, 3, 1.0))
    one_each = merged(given)
    assert len({host.span for host in given}) == len({host.span for host in one_each}) == len(one_each) == 5
    for span_ in {host.span for host in given}:
        of_span = [host.work_per_s for host in given if host.span == span_]
        assert [h.work_per_s for h in one_each if h.span == span_] == [pytest.approx(sum(of_span))]
    assert throughput(given, [1, 1, 1]) == pytest.approx(throughput(one_each, [1, 1, 1]))
    assert choose(ME, 5, FITS, given, [1, 1, 1]).span == choose(ME, 5, FITS, one_each, [1, 1, 1]).span


FITS = [span(0, 1), span(1, 2), span(2, 3)]
CHOICES = [
    ("the whole model where it fits", [*FITS, span(0, 3)], [(0, 3, 9)], span(0, 3), "whole model fits"),
    ("the slowest shard", FITS, [(0, 1, 9), (1, 2, 3), (2, 3, 9)], span(1, 2), "tokens/s with it"),
    ("the one without a replica", FITS, [(0, 1, 9), (1, 2, 9)], span(2, 3), "5 tokens/s with it, 0 without"),
    ("two lack one: what is left counts", [*FITS, span(1, 3)], [], span(1, 3), "1 shards still lack"),
    ("the larger span where both help alike", [span(1, 2), span(1, 3)], [(0, 3, 9)], span(1, 3), "tokens/s"),
]


@pytest.mark.parametrize(("fits", "given", "chosen", "why"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES])
def test_a_peer_takes_the_span_that_helps_most(
    fits: list[Hosted], given: list[tuple[int, int, float]], chosen: Hosted, why: str
) -> None:
    place = choose(ME, 5, fits, hosts(*given), [1, 1, 1])
    assert place.span == chosen and why in place.reason


def test_newcomers_to_an_empty_run_cover_all_of_it() -> None:
    """One after the other, each seeing those before."""
    there: list[Host] = []
    for number in range(6):
        place = choose(key(number), 5, FITS, there, [1, 1, 1])
        there.append(Host(key=key(number), span=place.span, work_per_s=5))
    assert sorted(host.span.first for host in there) == [0, 0, 1, 1, 2, 2]
    assert throughput(there, [1, 1, 1]) == pytest.approx(10)


MOVES = [
    ("the whole model stays", (0, 3, 5), [(1, 2, 1)], span(0, 3), "whole model is here"),
    ("where it is best already", (1, 2, 5), [(0, 1, 5), (2, 3, 5)], span(1, 2), "no other span"),
    ("to a shard that died out", (0, 1, 5), [(0, 1, 5), (1, 2, 5)], span(2, 3), "0 shards lack a replica then"),
    ("not for a little", (0, 1, 5), [(0, 1, 10), (1, 2, 11), (2, 3, 9.5)], span(0, 1), "not worth"),
    ("for much", (0, 1, 5), [(0, 1, 10), (1, 2, 11), (2, 3, 6)], span(2, 3), "10 tokens/s instead of 6"),
    ("not before its speed is known", (0, 1, 0), [(0, 1, 5), (1, 2, 0), (2, 3, 5)], span(0, 1), "yet to be seen"),
    ("never as the last replica", (0, 1, 5), [(1, 2, 5)], span(0, 1), "lose its only replica"),
]


@pytest.mark.parametrize(("mine", "given", "then", "why"), [c[1:] for c in MOVES], ids=[c[0] for c in MOVES])
def test_a_peer_moves_only_where_the_run_gains_much(
    mine: tuple[int, int, float], given: list[tuple[int, int, float]], then: Hosted, why: str
) -> None:
    first, last, rate = mine
    me = Host(key=ME, span=span(first, last), work_per_s=rate)
    moved, reason = consider_move(me, FITS, hosts(*given), [1, 1, 1])
    assert moved == then and why in reason


def test_movers_come_to_rest() -> None:
    """Ten peers that all began in one shard move one a round, spread out, and then nobody moves any more."""
    there = {host.key: host for host in hosts(*[(0, 1, 5.0)] * 10)}
    moves = []
    for number in range(1, 200):
        chosen = mover(number, list(there.values()), 3)
        assert chosen is not None
        me = there[chosen]
        others = [host for host in there.values() if host.key != chosen]
        then, _ = consider_move(me, FITS, others, [1, 1, 1])
        if then != me.span:
            moves.append(number)
            there[chosen] = Host(key=chosen, span=then, work_per_s=5)
    assert throughput(list(there.values()), [1, 1, 1]) == pytest.approx(15)
    assert 6 <= len(moves) <= 8 and max(moves) < 60


def test_each_round_has_one_mover_and_waits_differ() -> None:
    given = hosts((0, 1, 1), (1, 2, 1), (0, 3, 1))
    movers = {mover(number, given, 3) for number in range(50)}
    assert movers == {key(0), key(1)}, "who holds the whole model does not move"
    assert mover(1, hosts((0, 3, 1)), 3) is None
    waits = [wait_share(7, key(number)) for number in range(100)]
    assert 0 <= min(waits) < 0.1 and 0.9 < max(waits) < 1


def test_hosts_follow_from_the_statuses_of_each_shard() -> None:
    """Rates are of whole spans; shards that are not neighbours do not make one."""
    found = hosts_of(
        [{key(1): 7.0}, {key(1): 7.0, key(2): 3.0}, {key(2): 3.0, key(3): -1.0}, {key(1): 7.0}], [1, 2, 1, 1]
    )
    assert [(h.key, h.span, h.work_per_s) for h in found] == [
        (key(1), span(0, 2), 21.0),
        (key(2), span(1, 3), 9.0),
        (key(3), span(2, 3), 0.0),
    ]


def test_an_empty_span_is_refused() -> None:
    with pytest.raises(ConfigError, match="are no span"):
        span(2, 2)


BOUNDING = [
    ("the slowest", (1, 2, 1), (50.0, 40.0, 60.0), {1}, ""),
    (
        "those without a replica, however slow the others",
        (1, 0, 1, 0),
        (50.0, 0.0, 1.0, 0.0),
        {1, 3},
        "shard 1 and of 1",
    ),
    ("none where all can do the same, as whole models do", (3, 3), (70.0, 70.0), set(), ""),
    ("none before each was measured", (1, 1), (70.0, 0.0), set(), ""),
    ("none where there is one shard", (2,), (70.0,), set(), ""),
    ("its only shard, where that has no replica", (0,), (0.0,), {0}, "a replica of shard 0"),
]


@pytest.mark.parametrize(
    ("replicas", "could", "bounding", "lacks"), [case[1:] for case in BOUNDING], ids=[case[0] for case in BOUNDING]
)
def test_what_bounds_a_run_and_what_it_lacks(replicas: Any, could: Any, bounding: set[int], lacks: str) -> None:
    assert placement.bottlenecks(replicas, could) == bounding
    said = placement.lack(replicas)
    assert lacks in said and bool(said) == bool(lacks)
