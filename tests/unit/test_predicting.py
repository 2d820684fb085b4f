"""What a peer is told that its machine can do of its span: the figures of `swarm plan`, and where they come from."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peer.predicting import Seen, predict
from peer.training.hosting import Hosting
from peer.training.speed import try_flops
from swarm import pipeline_plan
from swarm.cli import words
from swarm.memory_plan import Working
from swarm.sharding import Span
from tests.unit.test_pipeline_plan import HOME, MIDDLE, WHOLE, WIDE

SEEN = Seen(max_duty=1.0, assumed_uplink_bps=100_000_000)


def hosting_of(span: Span) -> Hosting:
    """A card of 35 TFLOP/s that hosts ``span``, as the only one of the run."""
    choice: Any = SimpleNamespace(plan=SimpleNamespace(span=span))
    return Hosting(
        device=torch.device("cpu"),
        config=SimpleNamespace(hidden_size=WIDE.hidden),
        shards=(span,),
        work=(float(pipeline_plan.flops_per_token(WIDE, span, Working())),),
        fits=(choice,),
        choice=choice,
        in_flight=(1,),
        tried_flops=HOME.flops,
    )


def test_before_anything_was_seen_it_is_what_the_plan_says_of_such_a_card_and_uplink() -> None:
    told = predict(hosting_of(MIDDLE), "int8", SEEN)
    planned = pipeline_plan.span_speed(WIDE, MIDDLE, Working(), HOME)
    assert told["utilisation"] == pytest.approx(planned.utilisation, abs=1e-4)
    assert told["tokens/s"] == pytest.approx(planned.tokens_per_s, abs=0.1)
    assert (told["bound by"], told["uplink is"], told["device is"]) == ("uplink", "assumed", "tried")
    assert words.in_words("can do", told) == (
        "1,524 tokens/s at most, 22% busy, bound by the uplink; device 35 TFLOP/s (tried), uplink 100 Mbit/s (assumed)"
    )


# (name, what was seen, where the uplink's figure comes from, its Mbit/s)
UPLINKS = [
    ("nothing", {}, "assumed", 100),
    ("a limit", {"upload_limit_bps": 8_000_000}, "limited", 8),
    ("what the line carried within the limit", {"upload_limit_bps": 8_000_000, "uplink_bps": 5_000_000}, "measured", 5),
]


@pytest.mark.parametrize(("seen", "source", "mbit"), [case[1:] for case in UPLINKS], ids=[case[0] for case in UPLINKS])
def test_the_uplink_is_the_measured_one_before_the_limit_before_the_usual(
    seen: dict[str, int], source: str, mbit: float
) -> None:
    told = predict(hosting_of(MIDDLE), "int8", replace(SEEN, **seen))
    assert (told["uplink is"], told["uplink mbit/s"]) == (source, mbit)
    assert told["tokens/s"] == pytest.approx(mbit * 1e6 / 8 / (2 * 4100 + 4), abs=0.1)


def test_the_device_counts_by_what_training_showed_and_before_by_the_share_of_time_that_it_may_train() -> None:
    allowed = predict(hosting_of(MIDDLE), "int8", replace(SEEN, max_duty=0.1))
    assert (allowed["device tflops"], allowed["bound by"]) == (3.5, "device")
    trained = predict(hosting_of(MIDDLE), "int8", replace(SEEN, max_duty=0.1, service_tokens_per_s=300.0))
    assert trained["tokens/s"] == 300 and trained["device is"] == "measured" and trained["utilisation"] == 1


def test_a_whole_model_waits_for_no_uplink() -> None:
    told = predict(hosting_of(WHOLE), "int8", replace(SEEN, upload_limit_bps=1))
    assert (told["bound by"], told["utilisation"]) == ("device", 1)


def test_a_device_is_tried_within_the_threads_that_are_allowed_and_torch_keeps_its_own() -> None:
    usual = torch.get_num_threads()
    assert try_flops(torch.device("cpu"), width=64, rows=64, num_threads=1) > 1e6
    assert torch.get_num_threads() == usual
