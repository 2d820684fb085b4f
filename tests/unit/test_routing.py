"""Who gets a microbatch, and how long an answer is waited for: tables of cases."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from peer.pipeline.gate import Gate
from peer.pipeline.routing import FIRST_AVOID_S, MAX_AVOID_S, MIN_PATIENCE_S, Routes
from swarm.errors import Busy, ConfigError

A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


def routes_of(**expected_s: float) -> Routes:
    """Replicas A, B, C as far as named, each having answered often in exactly this time."""
    routes, names = Routes(), {"a": A, "b": B, "c": C}
    routes.know(names[name] for name in expected_s)
    for name, elapsed_s in expected_s.items():
        for _ in range(60):
            routes.answered(names[name], elapsed_s)
    return routes


def shares(routes: Routes, now_s: float = 0.0, draws: int = 4000) -> dict[bytes, float]:
    draw = random.Random(0).random
    chosen = Counter(routes.choose(now_s, draw()) for _ in range(draws))
    return {peer: count / draws for peer, count in chosen.items() if peer is not None}


def test_shares_are_in_proportion_to_rates() -> None:
    got = shares(routes_of(a=0.1, b=0.2, c=0.4))
    assert got[A] == pytest.approx(4 / 7, abs=0.03) and got[C] == pytest.approx(1 / 7, abs=0.03)


def test_an_unknown_replica_counts_as_the_quickest() -> None:
    routes = routes_of(a=0.1, b=0.4)
    routes.know([A, B, C])
    got = shares(routes)
    assert got[C] == pytest.approx(got[A], abs=0.03) and got[B] < got[A] / 3


def test_nobody_is_chosen_where_nobody_is() -> None:
    routes = Routes()
    assert routes.choose(0.0, 0.5) is None and routes.next_chance_s() is None


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999999999, 1.0])
def test_every_draw_chooses_somebody(draw: float) -> None:
    assert routes_of(a=0.1, b=0.3).choose(0.0, draw) in (A, B)


def test_one_that_failed_is_avoided_twice_as_long_each_time_and_tried_again() -> None:
    routes = routes_of(a=0.1, b=0.1)
    now_s = 0.0
    for number in range(12):
        routes.failed(A, now_s)
        pause_s = min(MAX_AVOID_S, FIRST_AVOID_S * 2**number)
        assert shares(routes, now_s + pause_s * 0.99, 50).keys() == {B}
        now_s += pause_s * 1.01
        assert shares(routes, now_s, 200).keys() == {A, B}


def test_all_that_one_fails_at_once_is_one_failure() -> None:
    """Who dies with eight microbatches is back in a second, not in minutes."""
    routes = routes_of(a=0.1, b=0.1)
    for _ in range(8):
        routes.failed(A, 0.0)
    assert shares(routes, FIRST_AVOID_S * 1.01, 200).keys() == {A, B}


def test_an_answer_ends_avoidance_and_its_doubling() -> None:
    routes = routes_of(a=0.1, b=0.1)
    for _ in range(5):
        routes.failed(A, 0.0)
    routes.answered(A, 0.1)
    assert shares(routes, 0.0, 200).keys() == {A, B}
    routes.failed(A, 0.0)
    assert shares(routes, FIRST_AVOID_S * 1.01, 200).keys() == {A, B}


def test_one_that_is_busy_is_left_alone_for_half_of_its_time_and_has_not_failed() -> None:
    routes = routes_of(a=0.4, b=0.4)
    routes.busy(A, 0.0)
    assert shares(routes, 0.19, 50).keys() == {B} and shares(routes, 0.21, 200).keys() == {A, B}
    assert routes.next_chance_s() == 0.0
    routes.failed(A, 0.0)
    assert shares(routes, FIRST_AVOID_S * 1.01, 200).keys() == {A, B}


def test_one_that_fails_was_busy_and_fails_again_is_avoided_as_after_its_first_failure() -> None:
    """Else it would be sent requests as fast as it refuses them."""
    routes = routes_of(a=0.1, b=0.1)
    for now_s in (0.0, 1.5, 4.0):
        routes.failed(A, now_s)
    routes.busy(A, 4.1)
    assert shares(routes, 4.5, 200).keys() == {A, B}, "busy: it lives"
    routes.failed(A, 4.5)
    assert shares(routes, 4.5, 200).keys() == {B} and shares(routes, 7.9, 200).keys() == {B}
    assert shares(routes, 8.1, 200).keys() == {A, B}, "it is the same failure still"


def test_one_that_was_late_gets_less_from_then_on() -> None:
    routes = routes_of(a=0.1, b=0.1)
    routes.failed(A, 0.0, waited_s=2.0)
    got = shares(routes, FIRST_AVOID_S * 2)
    assert got[A] < 0.3


# (name, what A takes, who else there is, time left, patience)
PATIENCE = [
    ("the only one", {"a": 1.0}, 50.0, 50.0),
    ("quick, beside another", {"a": 0.01, "b": 0.1}, 50.0, MIN_PATIENCE_S),
    ("slow, beside another", {"a": 5.0, "b": 0.1}, 50.0, 20.0),
    ("little time left", {"a": 5.0, "b": 0.1}, 3.0, 3.0),
]


@pytest.mark.parametrize(("name", "expected", "left_s", "wanted_s"), PATIENCE, ids=[case[0] for case in PATIENCE])
def test_an_answer_is_waited_for_as_long_as_is_usual(
    name: str, expected: dict[str, float], left_s: float, wanted_s: float
) -> None:
    assert routes_of(**expected).patience_s(A, left_s, 0.0) == pytest.approx(wanted_s, rel=0.01)


def test_eight_hops_among_strangers_leave_the_last_one_a_third_of_the_time() -> None:
    left_s = 900.0
    for _ in range(8):
        routes = Routes()
        routes.know([A, B])
        left_s = routes.patience_s(A, left_s, 0.0)
    assert left_s > 300


def test_all_the_time_is_for_one_whose_replacements_are_avoided_for_longer() -> None:
    routes = routes_of(a=1.0, b=1.0)
    for now_s in (0.0, 2.0, 5.0, 10.0):
        routes.failed(B, now_s)
    assert routes.patience_s(A, 50.0, 10.0) == 50.0


def test_those_who_left_are_forgotten() -> None:
    routes = routes_of(a=0.1, b=0.2)
    routes.know([B])
    routes.answered(A, 1.0)
    routes.failed(A, 0.0)
    routes.busy(A, 0.0)
    assert shares(routes, draws=50).keys() == {B} and routes.patience_s(A, 7.0, 0.0) == 7.0


# (name, gathered, in flight, changing, paused, part of the refusal)
GATES = [
    ("empty", 0, 0, False, False, ""),
    ("one place left in flight", 0, 2, False, False, ""),
    ("all places taken", 0, 3, False, False, "3 microbatches are in flight"),
    ("the step's last", 6, 1, False, False, ""),
    ("the step has all it wants under way", 6, 2, False, False, "an inner step is due"),
    ("the step has all it wants", 8, 0, False, False, "an inner step is due"),
    ("weights change", 0, 0, True, False, "an inner step is due"),
    ("paused", 0, 0, False, True, "paused"),
]


@pytest.mark.parametrize(
    ("name", "gathered", "in_flight", "changing", "paused", "reason"), GATES, ids=[case[0] for case in GATES]
)
def test_a_microbatch_is_admitted_where_there_is_room_for_it_and_its_step_wants_it(
    name: str, gathered: int, in_flight: int, changing: bool, paused: bool, reason: str
) -> None:
    gate = Gate(step_microbatches=8, max_in_flight=3, in_flight=in_flight, is_changing=changing, is_paused=paused)
    assert reason in gate.refusal(gathered) and bool(reason) == bool(gate.refusal(gathered))
    if not reason:
        gate.enter(gathered)
        assert gate.in_flight == in_flight + 1
    else:
        with pytest.raises(Busy, match=reason):
            gate.enter(gathered)


@pytest.mark.parametrize(("step", "in_flight"), [(1, 8), (8, 1)])
def test_the_only_place_is_somebody_elses_after_they_were_told_busy_until_they_or_we_took_it(
    step: int, in_flight: int
) -> None:
    gate = Gate(step_microbatches=step, max_in_flight=in_flight)
    for is_own in (False, True):
        gate.enter(0, is_own=True)
        with pytest.raises(Busy):
            gate.enter(0, is_own=True)
        gate.leave()
        assert not gate.yields, "nobody else came"
        gate.enter(0, is_own=True)
        with pytest.raises(Busy):
            gate.enter(0)
        gate.leave()
        assert gate.yields and not gate.refusal(0)
        gate.enter(0, is_own=is_own)
        gate.leave()
        assert not gate.yields


def test_a_place_that_is_not_the_last_is_left_to_nobody_and_a_pause_owes_nothing() -> None:
    gate = Gate(step_microbatches=8, max_in_flight=2, is_changing=True)
    with pytest.raises(Busy):
        gate.enter(0)
    gate.is_changing = False
    assert gate.owes_turn and not gate.yields
    paused = Gate(step_microbatches=8, max_in_flight=1, is_paused=True)
    with pytest.raises(Busy):
        paused.enter(0)
    paused.is_paused = False
    assert not paused.yields


@pytest.mark.parametrize(("step", "in_flight"), [(0, 1), (1, 0)])
def test_a_gate_that_nothing_fits_through_is_refused(step: int, in_flight: int) -> None:
    with pytest.raises(ConfigError):
        Gate(step_microbatches=step, max_in_flight=in_flight)
