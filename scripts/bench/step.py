"""Tokens per second of an inner step: the 8-bit replica against plain transformers with torch's AdamW.

    .venv/bin/python scripts/bench/step.py [--quick] [--device cpu|cuda] [--threads N] [--repeats N]

The rival computes in fp32 with the same attention and as many threads, clips its gradient and steps by torch's fused
AdamW, the fastest that torch has. On CUDA both compute in bf16, where the device can.

Steps of both sides follow one another in pairs, so that whatever else the machine does meets both; which is first
changes from pair to pair. A ratio is the median over the pairs of the rival's time over ours, its spread the quartiles.
An 8-bit update costs several times a 32-bit one whatever the number of tokens, so the ratio grows with the tokens of a
step: the curve is measured over 1 to 16 sequences of 512 tokens, and ``tokens_per_s_ratio`` is that of 8 sequences
(4,096 tokens), half of the largest.

Where the time goes is measured in further steps of the 8-bit replica, with a clock around each of its parts (on CUDA
the clock waits for the device, so these steps are slower than those that are compared).

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from bench_models import MIDDLE, QUICK, Side, build_side, random_tokens
from report import print_result

from peer.training import dither, int8_matrix, int8_modules, int8_replica, quantized

OURS, RIVAL = "int8 replica", "fp32 AdamW"
# Sequences per step: the curve. The figure of merit is that of the last but one.
CURVE = (1, 2, 4, 8, 16)
LENGTH = 512
QUICK_CURVE = (1, 4, 8)
QUICK_LENGTH = 128


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(side: Side, tokens: np.ndarray, device: torch.device) -> float:
    """Seconds of one step."""
    synchronise(device)
    start = time.perf_counter()
    side.step(tokens)
    synchronise(device)
    return time.perf_counter() - start


def where_time_goes(side: Side, tokens: np.ndarray, device: torch.device) -> dict[str, float]:
    """Share of a step in each part; a part within another counts for itself only."""
    spent: dict[str, float] = defaultdict(float)
    inside: list[float] = []

    def clocked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            synchronise(device)
            start = time.perf_counter()
            inside.append(0.0)
            try:
                return function(*arguments, **keywords)
            finally:
                synchronise(device)
                took = time.perf_counter() - start
                spent[part] += took - inside.pop()
                if inside:
                    inside[-1] += took

        return wrapper

    watched = [
        (int8_matrix.Moments, "update_", "AdamW in 8 bits (bitsandbytes)"),
        (quantized, "quantise_", "write back (stochastic rounding)"),
        (dither.Dither, "noise", "noise for rounding"),
        (quantized, "dequantise", "dequantise"),
        (int8_matrix, "_norm", "norms for clipping"),
        (int8_replica, "cross_entropy", "head and loss"),
        (int8_modules, "_give_product", "gradients of weights"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in watched]
    try:
        for owner, name, part in watched:
            setattr(owner, name, clocked(getattr(owner, name), part))
        total = timed(side, tokens, device)
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
    spent["layers: forward, gradients of activations"] = total - sum(spent.values())
    return {part: seconds / total for part, seconds in sorted(spent.items(), key=lambda item: -item[1])}


def compare(sides: dict[str, Side], tokens: np.ndarray, device: torch.device, repeats: int) -> dict[str, Any]:
    """Rates of both and their ratio, over ``repeats`` pairs of steps."""
    for side in sides.values():
        timed(side, tokens, device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in sorted(sides, reverse=turn % 2 == 1):
            times[name].append(timed(sides[name], tokens, device))
    ratios = [rival / ours for ours, rival in zip(times[OURS], times[RIVAL], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    rates = {name: tokens[:, 1:].size / statistics.median(seconds) for name, seconds in times.items()}
    return {
        "tokens": tokens[:, 1:].size,
        "ratio": round(statistics.median(ratios), 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "int8_tokens_per_s": round(rates[OURS], 1),
        "fp32_tokens_per_s": round(rates[RIVAL], 1),
    }


def measure_curve(
    sides: dict[str, Side], batches: Sequence[np.ndarray], device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    print(f"{'tokens per step':>15} {'int8 tokens/s':>14} {'fp32 tokens/s':>14} {'ratio':>7} {'quartiles':>15}")
    rows = []
    for tokens in batches:
        row = compare(sides, tokens, device, repeats)
        rates = f"{row['int8_tokens_per_s']:14.0f} {row['fp32_tokens_per_s']:14.0f}"
        low, high = row["quartiles"]
        print(f"{row['tokens']:15} {rates} {row['ratio']:7.3f} {f'{low:.3f} to {high:.3f}':>15}", flush=True)
        rows.append(row)
        gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, under 60 s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, help="pairs of steps at each batch size")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    shape, length = (QUICK, QUICK_LENGTH) if arguments.quick else (MIDDLE, LENGTH)
    repeats = arguments.repeats or (3 if arguments.quick else 5 if device.type == "cpu" else 20)
    batches = [random_tokens(shape, size, length) for size in (QUICK_CURVE if arguments.quick else CURVE)]
    sides = {name: build_side(name, shape, device) for name in (OURS, RIVAL)}
    curve = measure_curve(sides, batches, device, repeats)
    chosen = -2
    shares = where_time_goes(sides[OURS], batches[chosen], device)
    print(f"an 8-bit step of {curve[chosen]['tokens']} tokens:")
    for part, share in shares.items():
        print(f"  {share:6.1%}  {part}")
    print_result(
        "step",
        {
            "tokens_per_s_ratio": curve[chosen]["ratio"],
            "tokens_per_step": curve[chosen]["tokens"],
            "curve": curve,
            "shares_of_a_step": {part: round(share, 4) for part, share in shares.items()},
        },
        quick=arguments.quick,
        settings={
            "shape": asdict(shape),
            "matrix_values": sides[OURS].num_matrix_values,
            "sequence_length": length,
            "pairs": repeats,
        },
        device=device,
    )


if __name__ == "__main__":
    main()
