"""How busy a span's peers will be, what bounds them, and how many microbatches their memory holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peer.pipeline.hop_codec import HOP_CODECS
from peer.training import model
from swarm import fitting, memory_plan, pipeline_plan, sharding
from swarm.errors import ConfigError
from swarm.memory_plan import Activations, ModelNumbers, Working
from swarm.pipeline_plan import Machine, hop_bytes, span_speed
from tests.unit.small_models import LENGTH, NUM_LAYERS, small_config
from tests.unit.test_plan_command import app

# A LLaMA of width 4096 and 32 layers, in figures alone.
LAYER = ((4096, 4096),) * 4 + ((11008, 4096),) * 3
WIDE = ModelNumbers(
    vocab=32_000,
    hidden=4096,
    layers=(LAYER,) * 32,
    embedding=((32_000, 4096),),
    head=((32_000, 4096), (4096,)),
    is_tied=False,
    buffer_bytes=0,
    activations=Activations(
        batch=1, sequence=2048, compute_bytes=2, embedding=0, layers=(1 << 20,) * 32, head=0, scratch=0
    ),
)
FIRST, *_, MIDDLE, LAST = sharding.from_sizes((4,) * 8)
WHOLE = sharding.whole(32)
HOME = Machine(flops=35e12, uplink_bps=100e6, downlink_bps=1e9)


def test_a_home_uplink_keeps_a_span_of_four_wide_layers_a_fifth_busy() -> None:
    """The figure that placement is argued with: 100 Mbit/s, 8-bit hidden states, 35 TFLOP/s."""
    speed = span_speed(WIDE, MIDDLE, Working(), HOME)
    assert speed.bound_by == "uplink"
    assert speed.tokens_per_s == pytest.approx(100e6 / 8 / (2 * 4100 + 4))
    assert speed.utilisation == pytest.approx(0.21, abs=0.02)


# (name, span, machine, what bounds it)
BOUNDS = [
    ("whole", WHOLE, replace(HOME, uplink_bps=1), "compute"),
    ("a slow card", MIDDLE, replace(HOME, flops=1e12), "compute"),
    ("a slow uplink", MIDDLE, HOME, "uplink"),
    ("a slow downlink", MIDDLE, replace(HOME, downlink_bps=1e6), "downlink"),
]


@pytest.mark.parametrize(("name", "span", "machine", "bound"), BOUNDS, ids=[case[0] for case in BOUNDS])
def test_the_slowest_part_is_named(name: str, span: sharding.Span, machine: Machine, bound: str) -> None:
    assert span_speed(WIDE, span, Working(), machine).bound_by == bound


def test_ends_send_half_of_what_is_sent_between_them() -> None:
    rates = [span_speed(WIDE, span, Working(), HOME).by_uplink for span in (FIRST, MIDDLE, LAST)]
    assert rates[0] / rates[1] == pytest.approx(2, rel=1e-3) and rates[2] / rates[1] == pytest.approx(2, rel=1e-3)


def test_a_whole_model_is_always_busy_and_needs_no_link() -> None:
    speed = span_speed(WIDE, WHOLE, Working(), HOME)
    assert speed.utilisation == 1.0 and math.isinf(speed.by_uplink) and math.isinf(speed.by_downlink)


def test_work_is_six_operations_a_matrix_value_and_token_and_a_third_more_where_activations_are_computed_twice() -> (
    None
):
    once = pipeline_plan.flops_per_token(WIDE, MIDDLE, Working())
    values = sum(math.prod(shape) for shape in LAYER) * 4
    assert once == pytest.approx(6 * (values + 4 * 4096 * 2048))
    assert pipeline_plan.flops_per_token(WIDE, MIDDLE, Working(checkpointing=True)) == pytest.approx(once * 4 / 3)


def test_work_of_shards_adds_up_to_that_of_the_whole() -> None:
    shards = sharding.from_sizes((4,) * 8)
    parts = [pipeline_plan.flops_per_token(WIDE, span, Working()) for span in shards]
    assert sum(parts) == pipeline_plan.flops_per_token(WIDE, WHOLE, Working())


def test_planned_work_is_what_torch_counts() -> None:
    """Forward alone, for a family with plain matrices; attention is counted by torch without the causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small_config("llama")
    numbers = model.measure(config, batch=1, sequence=LENGTH, in_bf16=False)
    built = model.build_model(config, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(input_ids=torch.zeros((1, LENGTH), dtype=torch.long), use_cache=False)
    planned = pipeline_plan.flops_per_token(numbers, sharding.whole(NUM_LAYERS), Working()) * LENGTH / 3
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.2)


@pytest.mark.parametrize("width", [1, 7, 16, 4096])
@pytest.mark.parametrize("codec", HOP_CODECS)
def test_planned_bytes_are_those_of_the_codec(codec: str, width: int) -> None:
    assert hop_bytes(width, codec) == HOP_CODECS[codec].encoded_size(1, width)


def test_an_unknown_codec_and_a_machine_without_speed_are_refused() -> None:
    with pytest.raises(ConfigError, match="no hop codec 'int3'"):
        hop_bytes(4096, "int3")
    with pytest.raises(ConfigError, match="above 0"):
        Machine(flops=1e12, uplink_bps=0, downlink_bps=1)


def choice_of(device: str) -> fitting.Choice:
    working = Working(device=device)
    planned = memory_plan.plan(WIDE, MIDDLE, working)
    return fitting.Choice(plan=planned, working=working, batch=1, reason="")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_is_in_flight_fits_the_memory_and_one_more_would_not(device: str) -> None:
    choice = choice_of(device)
    several = memory_plan.plan(WIDE, MIDDLE, replace(choice.working, microbatches=2))
    base = several.device_bytes + fitting.RUNTIME_BYTES[device] + (several.host_bytes if device == "cpu" else 0)
    each = memory_plan.activation_bytes(WIDE, MIDDLE, checkpointing=False) + 3 * 4 * 2048 * 4096
    for extra in (0, 1, 5):
        size = int((base + extra * each) / (1 - fitting.SPARE_SHARE)) + 1000
        room = fitting.Room(device_bytes=size, host_bytes=1 << 50)
        assert fitting.in_flight(choice, WIDE, room) == 1 + extra


def test_in_pieces_microbatches_keep_what_comes_in_and_goes_on_of_all_their_sequences_and_nothing_else() -> None:
    choice = replace(choice_of("cuda"), pieces=3)
    several = memory_plan.plan(WIDE, MIDDLE, replace(choice.working, microbatches=2))
    base, each = several.device_bytes + fitting.RUNTIME_BYTES["cuda"], 3 * 3 * 4 * 2048 * 4096
    for extra in (0, 1, 5):
        size = int((base + extra * each) / (1 - fitting.SPARE_SHARE)) + 1000
        assert fitting.in_flight(choice, WIDE, fitting.Room(device_bytes=size, host_bytes=1 << 50)) == 1 + extra


def test_at_least_one_microbatch_is_in_flight_and_never_more_than_help() -> None:
    choice = choice_of("cuda")
    sizes = [fitting.in_flight(choice, WIDE, fitting.Room(device_bytes=size, host_bytes=1)) for size in (1, 1 << 50)]
    assert sizes == [1, fitting.MAX_IN_FLIGHT]


def test_the_plan_says_how_busy_each_spans_peers_would_be(tmp_path: Path) -> None:
    from swarm import presets, run_file

    path = tmp_path / "run.toml"
    path.write_text(run_file.render(presets.preset("demo", "planned")), encoding="utf-8")
    arguments = [str(path), "--json", "--shards", "2", "--tflops", "1", "--uplink", "1"]
    spans = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)["spans"]
    assert [span["bound by"] for span in spans] == ["uplink", "uplink", "compute"]
    assert spans[2]["utilisation"] == 1.0 and all(0 < span["utilisation"] < 1 for span in spans[:2])
    assert "busy" in CliRunner().invoke(app, [str(path)], catch_exceptions=False).stdout
