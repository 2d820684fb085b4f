"""The simulation: lines, hops and rounds take the time that arithmetic says, and a swarm loses what it should."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import simulate_swarm
import simulate_validation
from simulate_hops import Line, Outcome, Route, SharedLine, Station, run_jumping, simulate
from simulate_rounds import Member, Round, round_seconds
from simulate_swarm import Place, day, found
from simulate_volunteers import CARDS, Study

from swarm import pipeline_plan
from swarm.memory_plan import Activations, ModelNumbers, Working
from swarm.placement import Hosted
from swarm.sharding import from_sizes

ROUTE = Route(
    tokens=100, onward_bytes=1e5, back_bytes=1e5, delay_s=0.0, step_microbatches=64, timeout_s=600.0, drain_s=600.0
)


def stations(number: int, up_bps: float | None = None, in_flight: int = 8) -> list[Station]:
    return [
        Station(
            shard=index,
            next_shard=index + 1 if index + 1 < number else None,
            forward_s=0.1 / number,
            backward_s=0.2 / number,
            step_s=0.0,
            up_bps=up_bps,
            down_bps=None,
            in_flight=in_flight,
        )
        for index in range(number)
    ]


def run(*of: Station) -> Outcome:
    return simulate(of, ROUTE, warm_up_s=30.0, measured_s=300.0)


def test_what_is_sent_on_a_line_waits_for_what_was_sent_before() -> None:
    line = Line(8e6)
    assert line.reserve(1e6, 0.0) == 1.0
    assert line.reserve(1e6, 0.5) == 2.0
    assert line.reserve(1e6, 5.0) == 6.0


def test_messages_under_way_share_a_line_evenly_and_who_is_given_up_takes_nothing_more() -> None:
    """At 1 MB/s: 1 MB, 2 MB after half a second, and 9 MB that nobody waits for any longer at once."""
    arrived: dict[str, float] = {}

    async def sends() -> None:
        loop, line = asyncio.get_running_loop(), SharedLine(8e6)

        async def send(name: str, num_bytes: float, after_s: float) -> None:
            await asyncio.sleep(after_s)
            await line.carry(num_bytes)
            arrived[name] = loop.time()

        given_up = asyncio.ensure_future(send("given up", 9e6, 0.0))
        others = [asyncio.ensure_future(send(*what)) for what in (("first", 1e6, 0.0), ("second", 2e6, 0.5))]
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(*others)
        assert line.busy_s == pytest.approx(3.0)

    run_jumping(sends())
    assert arrived == {"first": pytest.approx(1.5), "second": pytest.approx(3.0)}


def test_a_whole_model_computes_all_the_time() -> None:
    came = run(*stations(1))
    assert came.tokens_per_s == pytest.approx(100 / 0.3, rel=0.02)
    assert came.computing_share[0] > 0.99


def test_spans_share_the_work_and_lose_some_to_inner_steps() -> None:
    """Two peers do nearly twice as much, and less where fewer microbatches hide the waits."""
    two, starved = run(*stations(2)), run(*stations(2, in_flight=1))
    assert 1.8 * 100 / 0.3 < two.tokens_per_s < 2 * 100 / 0.3
    assert starved.tokens_per_s < 0.6 * two.tokens_per_s


def test_a_slow_line_bounds_a_pipeline() -> None:
    """A microbatch is 0.1 s of computing in each of three spans; there and back, 0.4 s of the middle one's uplink."""
    came = run(*stations(3, up_bps=4e6))
    assert 0.75 * 100 / 0.4 < came.tokens_per_s <= 1.02 * 100 / 0.4
    assert came.uplink_share[1] > 0.75


def test_a_round_takes_what_its_slowest_resource_does() -> None:
    """Of two members each sends half a contribution and half an average: 1 MB at 8 Mbit/s, and hardly computes."""
    what = Round(num_values=1_000_000, bytes_per_value=1.0, delay_s=0.0, wire_ns=0.0)
    assert 1.0 < round_seconds([Member(up_bps=8e6, down_bps=None)] * 2, what) < 1.15
    slow = dataclasses.replace(what, cores=0.001)
    assert round_seconds([Member(up_bps=None, down_bps=None)] * 2, slow) > 15.0


def small_study(**takes: tuple[int, int]) -> Study:
    layer = ((64, 64),)
    activations = Activations(
        batch=1, sequence=128, compute_bytes=2, embedding=0, layers=(1000,) * 4, head=1000, scratch=0
    )
    numbers = ModelNumbers(
        vocab=256,
        hidden=64,
        layers=(layer,) * 4,
        embedding=((256, 64),),
        head=((256, 64),),
        is_tied=False,
        buffer_bytes=0,
        activations=activations,
    )
    return Study(
        name="small",
        numbers=numbers,
        shards=from_sizes([2, 2]),
        working=Working(),
        tokens_per_round=10**15,
        takes=takes,
    )


@pytest.fixture(autouse=True)
def _fresh() -> None:
    simulate_swarm._speed.cache_clear()


def test_volunteers_settle_evenly_where_they_fit() -> None:
    """One shard each by the program's placement; a card that nothing fits sits out."""
    study = small_study(**{"RTX 3060": (1, 4), "RTX 4060": (1, 4)})
    places = found(study, 60, seed=0)
    hosted = [place.hosted for place in places]
    assert {place.card.name for place in places if place.hosted} == {"RTX 3060", "RTX 4060"}
    counts = [hosted.count(Hosted(first=shard, last=shard + 1)) for shard in (0, 1)]
    assert min(counts) > 0.3 * sum(counts) and None in hosted


def test_no_more_replicas_count_than_a_round_has_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swarm ten times as large commits no more once every shard has its members, and that is called the bound."""
    monkeypatch.setattr(simulate_swarm, "MAX_MEMBERS", 8)
    study = small_study(**{card.name: (1, 4) for card in CARDS})
    places = [Place(card=CARDS[0], hosted=Hosted(first=shard, last=shard + 1), in_flight=4) for shard in (0, 1)]
    swarm = simulate_swarm._Swarm(study, [places[index % 2] for index in range(100)], 0)
    members = swarm._members([volunteer for volunteer in swarm._volunteers if volunteer.ready])
    assert len(members) == 2 * 8
    assert day(study, places, 100, 1.0, 0).bound_by in ("members of a round", "hop wire")


def test_losses_only_take_away_and_who_leaves_is_replaced() -> None:
    study = small_study(**{card.name: (1, 4) for card in CARDS})
    places = [Place(card=CARDS[0], hosted=Hosted(first=shard, last=shard + 1), in_flight=4) for shard in (0, 1)]
    came = day(study, places, 20, 0.5, 0)
    assert all(after <= before * (1 + 1e-9) for before, after in zip(came.kept, came.kept[1:], strict=False))
    assert came.tokens_per_s > 0 and came.samples_without_training == 0
    assert came.kept[6] == pytest.approx(0.5 * came.kept[5])


def test_a_run_without_any_card_that_fits_trains_nothing() -> None:
    places = [Place(card=CARDS[0], hosted=None, in_flight=0)]
    came = day(small_study(), places, 10, 1.0, 0)
    assert came.tokens_per_s == 0 and came.bound_by == "memory"


def test_rounds_are_set_beside_what_was_measured() -> None:
    """Every cell that is large enough to say something, within 20 %."""
    compared = simulate_validation.rounds(Path(__file__).parents[2] / "docs" / "benchmarks")
    assert len(compared) >= 10
    assert all(abs(one.error_percent) < 20 for one in compared)


def test_a_pipeline_that_was_measured_is_predicted_from_the_whole_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without such a file nothing is claimed."""
    assert simulate_validation.pipelines(tmp_path) == []
    cells = {
        "ours, 1 peer(s), loopback": {"tokens_per_s": 500.0},
        "ours, 2 peer(s), loopback": {"tokens_per_s": 900.0},
        "hivemind, 3 peer(s), loopback": {"tokens_per_s": 100.0},
    }
    settings = {"hidden": 64, "layers": 2, "heads": 2, "length": 64}
    (tmp_path / "pipeline.json").write_text(json.dumps({"cells": cells, "settings": settings}))
    [compared] = simulate_validation.pipelines(tmp_path)
    assert compared.name == "ours, 2 peer(s), loopback" and compared.measured == 900.0
    assert 700 < compared.simulated < 1000
    assert pipeline_plan.hop_bytes(64, "int8") == 68
