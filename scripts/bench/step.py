"""Tokens per second of an inner step: the 8-bit replica against plain transformers with torch's AdamW.

    .venv/bin/python scripts/bench/step.py [--quick] [--device cpu|cuda] [--sequences B] [--length L] [--repeats N]

The sides take turns, step by step, so that whatever else the machine does meets both; the ratio is that of the median
times. Where the time goes is measured in further steps of the 8-bit replica, with a clock around each of its parts (on
CUDA the clock waits for the device, so these steps are slower than those that are compared).

Last line: one JSON object; ``tokens_per_s_ratio`` is the 8-bit replica's rate over that of fp32 AdamW.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from bench_models import QUICK, Shape, Side, build_side, machine, random_tokens

from peer.training import int8_matrix, int8_modules, int8_replica, quantized

COMPARED = ("int8 replica", "fp32 AdamW")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, under 60 s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--repeats", type=int)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shape = QUICK if arguments.quick else Shape()
    sequences = arguments.sequences or (4 if arguments.quick else 8 if device.type == "cpu" else 32)
    length = arguments.length or (128 if arguments.quick else 512)
    repeats = arguments.repeats or (3 if arguments.quick else 5 if device.type == "cpu" else 20)
    tokens = random_tokens(shape, sequences, length)
    sides = {name: build_side(name, shape, device) for name in COMPARED}
    for side in sides.values():
        timed(side, tokens, device)
    times: dict[str, list[float]] = {name: [] for name in COMPARED}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(timed(side, tokens, device))
    rates = {name: sequences * length / statistics.median(seconds) for name, seconds in times.items()}
    print(f"{'tokens/s':24} {'median':>10} {'slowest':>10} {'fastest':>10}   at {sequences} x {length} tokens")
    for name, seconds in times.items():
        slow, fast = sequences * length / max(seconds), sequences * length / min(seconds)
        print(f"{name:24} {rates[name]:10.0f} {slow:10.0f} {fast:10.0f}")
    gc.collect()
    shares = where_time_goes(sides["int8 replica"], tokens, device)
    for part, share in shares.items():
        print(f"  {share:6.1%}  {part}")
    print(
        json.dumps(
            {
                "benchmark": "step",
                "quick": arguments.quick,
                "device": machine(device),
                "matrix_values": sides["int8 replica"].num_matrix_values,
                "sequences": sequences,
                "length": length,
                "repeats": repeats,
                "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
                "tokens_per_s_ratio": round(rates["int8 replica"] / rates["fp32 AdamW"], 4),
                "shares_of_a_step": {part: round(share, 4) for part, share in shares.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
