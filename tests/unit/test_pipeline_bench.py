"""The benchmarks of hops and pipelines: what crosses a hop is counted, a subspace loses nothing but its int8."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import hops
import pipeline
import pipeline_loss
from hops_wires import CodecWire, SubspaceWire
from quality_setting import VOCAB, Text

from peer.pipeline.hop_codec import HOP_CODECS

SETTING = dataclasses.replace(hops.SHORT, total_tokens=1024)
BATCHES = [np.random.default_rng(seed).integers(0, VOCAB, (4, 65)) for seed in range(3)]


def test_the_bytes_of_a_hop_are_those_of_the_codec() -> None:
    """There and back, over two hops, for every token."""
    wire = CodecWire("int4")
    hops.Chain(SETTING, 0, wire).step(BATCHES[0], 1e-3)
    assert wire.sent_bytes == 2 * 2 * 4 * 64 * HOP_CODECS["int4"].encoded_size(1, SETTING.hidden)


def test_a_subspace_holds_all_that_crosses_a_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its int8, a chain over it computes what the same weights compute over a perfect wire."""
    wire = SubspaceWire(8)
    monkeypatch.setattr(wire, "_cross", lambda values, noise=None: values)
    chain = hops.Chain(SETTING, 0, wire)
    seen: list[float] = []
    onward = wire.onward

    def watch(hidden_BLH: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        arrived = onward(hidden_BLH, tokens)
        seen.append(((arrived - hidden_BLH).abs().max() / hidden_BLH.abs().max()).item())
        return arrived

    monkeypatch.setattr(wire, "onward", watch)
    losses = [chain.step(tokens, 1e-2) for tokens in BATCHES]
    assert len(seen) == 6 and max(seen) < 1e-5
    assert losses[-1] != losses[0]


def test_efficiency_is_per_peer_and_nothing_is_made_up() -> None:
    rows = {
        pipeline.WHOLE.name: {"tokens_per_s": 100.0},
        pipeline.Cell(side="ours", peers=2, link=pipeline.FAST).name: {"tokens_per_s": 180.0},
        pipeline.Cell(side="ours", peers=2, link=pipeline.HOME).name: {"tokens_per_s": 120.0},
        pipeline.Cell(side="hivemind", peers=3, link=pipeline.HOME).name: {"tokens_per_s": 40.0},
        pipeline.Cell(side="ours", peers=2, link=pipeline.NARROW).name: {"tokens_per_s": 50.0},
        pipeline.Cell(side="ours", peers=2, link=pipeline.NARROW, codec="int4").name: {"tokens_per_s": 80.0},
        pipeline.Cell(side="hivemind", peers=3, link=pipeline.NARROW).name: {"tokens_per_s": 20.0},
    }
    keys = pipeline.keys_of(rows)
    assert keys["efficiency_2_shards"] == 0.9 and keys["efficiency_2_shards_home"] == 0.6
    assert keys["speedup_over_hivemind_moe_home"] == 3.0
    assert keys["speedup_over_hivemind_moe"] == 2.5 and keys["speedup_over_hivemind_moe_int4"] == 4.0
    assert keys["efficiency_4_shards"] is None


def test_cells_of_an_earlier_result_keep_their_commit(tmp_path: Path) -> None:
    """One that was itself measured again says so; the others are of the result's commit."""
    earlier = {
        "commit": "old",
        "loss_gap_percent": 0.5,
        "cells": {"a": {"tokens_per_s": 1.0}, "b": {"tokens_per_s": 2.0, "commit": "newer"}},
    }
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    cells, losses = pipeline.kept_from(tmp_path / "earlier.json")
    assert (cells["a"]["commit"], cells["b"]["commit"]) == ("old", "newer")
    assert losses == {"loss_commit": "old", "loss_gap_percent": 0.5}


def loss_arm(num_shards: int, monkeypatch: pytest.MonkeyPatch, tokens: int = 2048) -> pipeline_loss.Arm:
    letters = np.random.default_rng(0).integers(0, VOCAB, 20_000)
    text = Text(training=letters, validation=letters, num_files=1)
    monkeypatch.setattr(pipeline_loss, "read_text", lambda: text)
    setting = dataclasses.replace(
        pipeline_loss.SHORT, total_tokens=tokens, first_tokens_per_round=512, tokens_per_round=512
    )
    return pipeline_loss.Arm(setting, 0, num_shards)


def test_both_arms_of_the_loss_train_all_tokens_from_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard commits every token, and only the pipeline has hops."""
    arms = [loss_arm(number, monkeypatch) for number in (1, 2)]
    first = [np.concatenate([group.anchor for group in arm.groups]) for arm in arms]
    np.testing.assert_array_equal(first[0], first[1])
    assert all(0 < arm.train() < 7 for arm in arms)
    assert arms[0].wire.sent_bytes == 0 < arms[1].wire.sent_bytes
    # What is left in inner steps that were begun is in no round.
    assert all(2048 - 2 * 128 <= done <= 2048 for arm in arms for done in arm.committed)


def test_rounds_of_the_second_shard_open_half_a_round_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """So no two shards exchange at once."""
    arm = loss_arm(2, monkeypatch)
    assert [arm._opens_at(shard) for shard in (0, 1)] == [512, 768]
