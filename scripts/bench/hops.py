"""What thinner hops cost: bytes a token, and validation loss after equal tokens, for each way to cross a hop.

    .venv/bin/python scripts/bench/hops.py [--quick] [--seeds 0 1]

A byte-level LLaMA, one layer a span, trains in one process on the sources of Python's standard library; between any two
spans hidden states and gradients are encoded and decoded as peers would. Weights, batches and schedule are the same for
every way. Spans are fp32 replicas with AdamW, each clipped by its own norm, so within the table the wire alone differs,
but for `subspace`, which also changes the model (`hops_wires`).

``bytes_per_token``: of one hop, hidden states there and gradient back. ``loss_gap_percent``: of the last validation
loss above that of the fp32 wire, mean over seeds. Last line: one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from hops_wires import CodecWire, SubspaceWire
from quality_setting import QUICK, SMALL, VOCAB, Setting, Text, read_text, spec_of
from report import print_result

from peer.training import model
from peer.training.fp32_replica import Replica
from peer.training.microbatches import Microbatch
from swarm import schedule
from swarm.sharding import from_sizes, whole

CPU = torch.device("cpu")
FULL = dataclasses.replace(
    SMALL,
    **{"hidden": 128, "intermediate": 344, "layers": 4, "heads": 4, "sequences": 8, "total_tokens": 262_144},
    **{"warmup_tokens": 16_384, "validation_sequences": 256},
)
SHORT = dataclasses.replace(
    QUICK,
    **{"layers": 3, "sequences": 4, "length": 64, "total_tokens": 12_288, "warmup_tokens": 1_024},
    **{"validation_sequences": 32},
)
BASELINE = "fp32"


def wires(setting: Setting) -> list[CodecWire]:
    ranks = [setting.hidden // 4, setting.hidden // 8]
    return [*(CodecWire(codec) for codec in (BASELINE, "bf16", "int8", "int4")), *map(SubspaceWire, ranks)]


class Chain:
    """One span a layer, hand in hand over a wire."""

    def __init__(self, setting: Setting, seed: int, wire: CodecWire) -> None:
        self.spec = spec_of(setting, in_8_bits=False, is_synchronous=False)
        self.config, self.wire = model.build_config(self.spec.model_copy(update={"num_shards": 2}), VOCAB), wire
        self.replicas = []
        for span in from_sizes([1] * setting.layers):
            built = model.build_span(self.config, span)
            replica = Replica(built, model.layout_of(built), self.spec.inner, CPU)
            replica.load(model.initial_anchor(self.config, seed, span))
            self.replicas.append(replica)
        wire.begin(self.replicas)

    def step(self, tokens: np.ndarray, learning_rate: float) -> float:
        """One inner step of every span; the loss in nats per byte."""
        weight, hidden, halves = 1 / tokens[:, 1:].size, None, []
        for number, replica in enumerate(self.replicas):
            replica.begin_step(learning_rate)
            halves.append(replica.forward(Microbatch(tokens=tokens, weight=weight, hidden_BLH=hidden)))
            if number + 1 < len(self.replicas):
                hidden = self.wire.onward(halves[-1].result_BLH, tokens)
        gradient, loss = None, 0.0
        for replica, half in zip(reversed(self.replicas), reversed(halves), strict=True):
            trained = replica.backward(half, gradient)
            loss += trained.loss * weight
            if trained.gradient_BLH is not None:
                gradient = self.wire.back(trained.gradient_BLH)
            replica.finish_step(1)
        self.wire.after_step(self.replicas)
        return loss

    def evaluate(self, setting: Setting, text: Text) -> float:
        built = model.build_span(self.config, whole(setting.layers))
        judge = Replica(built, model.layout_of(built), self.spec.inner, CPU)
        weights = np.concatenate([replica.read() for replica in self.replicas])
        return judge.evaluate(weights, text.validation_batches(setting, setting.validation_sequences))


def train(wire: CodecWire, setting: Setting, seed: int) -> dict[str, float]:
    text, chain = read_text(), Chain(setting, seed, wire)
    tokens_per_step = setting.sequences * setting.length
    num_steps = setting.total_tokens // tokens_per_step
    for number in range(num_steps):
        rate = schedule.learning_rate(chain.spec.inner, number * tokens_per_step, setting.total_tokens)
        chain.step(text.batch(setting, seed, 0, number), rate)
    hops = setting.layers - 1
    return {
        "bytes_per_token": wire.sent_bytes / (num_steps * tokens_per_step * hops),
        "loss": chain.evaluate(setting, text),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one seed, under 60 s")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting, seeds = (SHORT, [0]) if options.quick else (FULL, options.seeds)
    results: dict[str, dict[str, Any]] = {}
    print(f"{'wire':12} {'bytes a token':>14} {'above fp32':>11}   loss by seed")
    for name in [wire.name for wire in wires(setting)]:
        came = []
        for seed in seeds:
            wire = next(wire for wire in wires(setting) if wire.name == name)
            came.append(train(wire, setting, seed))
        losses = [round(result["loss"], 5) for result in came]
        baseline = results[BASELINE]["loss"] if name != BASELINE else losses
        gaps = [100 * (mine - theirs) / theirs for mine, theirs in zip(losses, baseline, strict=True)]
        results[name] = {
            "bytes_per_token": round(came[0]["bytes_per_token"], 2),
            "loss_gap_percent": round(statistics.mean(gaps), 3),
            "gap_by_seed_percent": [round(gap, 3) for gap in gaps],
            "loss": losses,
        }
        row = results[name]
        shown = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name:12} {row['bytes_per_token']:14.1f} {row['loss_gap_percent']:9.2f} %   {shown}", flush=True)
    print_result("hops", {"schemes": results}, quick=options.quick, settings={**dataclasses.asdict(setting)})


if __name__ == "__main__":
    main()
