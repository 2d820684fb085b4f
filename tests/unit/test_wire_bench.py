"""The wire benchmark counts the bytes that rounds send, and compares what shares its rounds and its seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import quality_results
import wire
from quality_arms import REPLICAS, Swarm, round_lengths, spec_for
from quality_setting import QUICK, Text, spec_of

from peer.rounds.shard import Shard

TINY = QUICK.changed(["sequences=1", "total_tokens=4096", "validation_sequences=16"])
RANDOM = np.random.default_rng(0)
TEXT = Text(training=RANDOM.integers(0, 256, 20_000), validation=RANDOM.integers(0, 256, 20_000), num_files=2)


@pytest.mark.parametrize("codec", list(wire.WIRES))
def test_the_bytes_of_a_round_are_those_that_members_and_reducers_encode(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every contribution but the reducer's own, and every average once per other member, over the number of peers."""
    arm, setting = wire.WIRES[codec], wire.setting_of(TINY, 2)
    swarm = Swarm(spec_for(arm, setting), seed=0)
    for index, replica in enumerate(swarm.replicas):
        replica.step(TEXT.batch(setting, 0, index, 0), 1e-2)
    contributions, averages, reduce = [], [], Shard.reduce

    def watched(shard, work):  # type: ignore[no-untyped-def]
        shares, average = reduce(shard, work)
        contributions.extend(len(encoded) for _, _, encoded in work.contributions)
        averages.append(len(average))
        return shares, average

    monkeypatch.setattr(Shard, "reduce", watched)
    swarm.commit(tokens_each=128)
    others = (REPLICAS - 1) / REPLICAS
    assert len(contributions) == REPLICAS * len(averages)
    sent = others * sum(contributions) + (REPLICAS - 1) * sum(averages)
    assert wire.bytes_per_round(arm, swarm.shards[0].num_values) == sent / REPLICAS


def test_a_wire_differs_from_its_fp32_twin_in_nothing_else() -> None:
    """Same replicas, plain averages, and no contribution is clipped or dropped."""
    setting = wire.setting_of(wire.FULL, 36)
    twin, mine = spec_for(wire.FP32, setting), spec_for(wire.WIRES["topk"], setting)
    assert (mine.rounds.wire_codec, mine.rounds.ladder, mine.robust.rule) == ("topk", ("topk",), "none")
    assert (mine.inner, mine.outer, mine.total_tokens) == (twin.inner, twin.outer, twin.total_tokens)
    assert mine.rounds.model_copy(update={"wire_codec": "int4", "contribution_codecs": None}) == twin.rounds


def test_fp32_in_rounds_of_one_step_saves_nothing_and_longer_rounds_save_their_length() -> None:
    """The measure of all reductions is a ring all-reduce of fp32 every step."""
    assert wire.traffic(wire.FP32, wire.setting_of(TINY, 1))[1] == 1
    setting = wire.setting_of(wire.FULL, 8)
    rounds = len(round_lengths(spec_of(setting, in_8_bits=False, is_synchronous=False), setting))
    assert wire.traffic(wire.FP32, setting)[1] == pytest.approx(setting.num_steps / rounds)


def test_the_headlines_send_as_little_as_the_goals_ask() -> None:
    """250 times less than fp32 for the dense wire, 2,500 times less for the sparse one."""
    for name, goal in (("dense", 250), ("sparse", 2500)):
        length, codec = wire.HEADLINES[name]
        assert wire.traffic(wire.WIRES[codec], wire.setting_of(wire.FULL, length))[1] >= goal


def test_rounds_grow_from_one_step_and_are_as_long_as_asked_in_the_mean() -> None:
    """Short rounds come first; the last one takes what is left."""
    setting = wire.setting_of(wire.FULL, 36)
    lengths = round_lengths(spec_of(setting, in_8_bits=False, is_synchronous=False), setting)
    assert lengths[0] == 1 and lengths[:-1] == sorted(lengths[:-1])
    assert sum(lengths) == setting.num_steps
    assert setting.num_steps / len(lengths) == pytest.approx(36, rel=0.05)


def test_a_gap_compares_arms_of_one_seed_and_the_same_rounds(tmp_path: Path) -> None:
    """Other seeds and rows are left out; a seed without its rival makes no gap."""
    losses = {"h8-0-int4": 2.02, "h8-1-int4": 2.06, "h8-2-int4": 9.0, "h8-0-fp32": 2.0, "h8-1-fp32": 2.0}
    losses |= {"h80-2-fp32": 1.0, "sync-0-sync": 1.0}
    for name, loss in losses.items():
        _, seed, arm = name.split("-")
        (tmp_path / f"{name}.json").write_text(json.dumps({"seed": int(seed), "arm": arm, "loss": loss}))
    figures = wire.figures_of(tmp_path, TINY, 8, wire.WIRES["int4"])
    assert figures["gap_to_fp32_wire_percent"] == pytest.approx(2)
    assert figures["gap_to_fp32_wire_percent_standard_error"] == pytest.approx(1)
    assert figures["gap_to_sync_percent"] == pytest.approx(102)


def test_a_quick_run_ends_with_the_figures_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every wire is trained beside its fp32 twin and the synchronous model, and has all three keys."""
    monkeypatch.setattr(quality_results, "read_text", lambda: TEXT)
    monkeypatch.setattr(wire, "SHORT", TINY)
    monkeypatch.setattr(wire, "QUICK_H", (4,))
    monkeypatch.setattr(sys, "argv", ["wire.py", "--quick"])
    wire.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["quick"] and set(said["rows"]["h4"]) == {"fp32", *wire.WIRES}
    for figures in said["rows"]["h4"].values():
        assert figures["reduction_over_fp32"] > 1
        assert None not in (figures["gap_to_fp32_wire_percent"], figures["gap_to_sync_percent"])
