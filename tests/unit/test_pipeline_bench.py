"""The benchmarks of hops and pipelines: what crosses a hop is counted, a subspace loses nothing but its int8."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import hops
import pipeline
from hops_wires import CodecWire, SubspaceWire
from quality_setting import VOCAB

SETTING = dataclasses.replace(hops.SHORT, total_tokens=1024)
BATCHES = [np.random.default_rng(seed).integers(0, VOCAB, (4, 65)) for seed in range(3)]


def test_the_bytes_of_a_hop_are_those_of_the_codec() -> None:
    """There and back, over two hops, for every token."""
    wire = CodecWire("int4")
    hops.Chain(SETTING, 0, wire).step(BATCHES[0], 1e-3)
    assert wire.sent_bytes == 2 * 2 * 4 * 64 * (4 + SETTING.hidden // 2)


def test_a_subspace_holds_all_that_crosses_a_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its int8, a chain over it computes what the same weights compute over a perfect wire."""
    wire = SubspaceWire(8)
    monkeypatch.setattr(wire, "_cross", lambda values: values)
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
    }
    keys = pipeline.keys_of(rows)
    assert keys["efficiency_2_shards"] == 0.9 and keys["efficiency_2_shards_home"] == 0.6
    assert keys["speedup_over_hivemind_moe"] == 3.0
    assert keys["efficiency_4_shards"] is None
