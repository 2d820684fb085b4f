"""Device memory of an inner step: 8-bit replica, AdamW in fp32, and bf16 weights with bitsandbytes' AdamW8bit.

    .venv/bin/python scripts/bench/memory.py [--quick] [--device cpu|cuda]

Two models, measured one after another: embedding and head untied, and tied. The goals are for the worse of both.

Persistent: every tensor that is kept between two steps (weights, moments, scales), by its storage. On CUDA also what
the allocator counts.
Peak: the most that torch's allocator holds during one step with one microbatch, above what it held before it, plus the
persistent bytes. On the CPU from the allocator's own events (profile_memory: every allocation and release of a tensor,
those inside of kernels too), on CUDA from max_memory_allocated. What is not a tensor (a matrix library's packing
buffers, the program itself) is in neither.
Without activations: the step is made on a single token, whose activations and logits are counted, and take next to
nothing. The last column is a full batch, activations and logits included.

Figures are bytes per value of the matrices. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from bench_models import QUICK, SIDES, Shape, Side, build_side, bytes_of, random_tokens
from report import print_result

FEW_TOKENS = 1


def peak_rise(side: Side, tokens: np.ndarray, device: torch.device) -> int:
    """Most bytes that one step holds above what was held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.step(tokens)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        side.step(tokens)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def measure(name: str, shape: Shape, device: torch.device, batch: tuple[int, int]) -> dict[str, float]:
    held_before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    side = build_side(name, shape, device)
    few, many = random_tokens(shape, 1, FEW_TOKENS), random_tokens(shape, *batch)
    for _ in range(2):  # moments exist from the first step on
        side.step(few)
    gc.collect()
    count = side.num_matrix_values
    persistent = bytes_of(side.kept())
    result = {
        "persistent": persistent / count,
        "peak": (persistent + peak_rise(side, few, device)) / count,
        "peak_full_batch": (persistent + peak_rise(side, many, device)) / count,
    }
    if device.type == "cuda":
        result["allocator_persistent"] = (torch.cuda.memory_allocated() - held_before) / count
    return {"matrix_values": count, **{key: round(value, 4) for key, value in result.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, under 60 s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shape = QUICK if arguments.quick else Shape()
    batch = (2, 128) if arguments.quick else (4, 256)
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'bytes per matrix value':32} {'persistent':>10} {'peak':>8} {f'peak {batch[0]}x{batch[1]} tokens':>22}")
    for model, tied in (("untied", False), ("tied", True)):
        results[model] = {}
        for name in SIDES:
            row = results[model][name] = measure(name, replace(shape, tied=tied), device, batch)
            line = f"{row['persistent']:10.3f} {row['peak']:8.3f} {row['peak_full_batch']:22.3f}"
            print(f"{f'{model}: {name}':32} {line}", flush=True)
            gc.collect()
    dimensions = {name: size for name, size in asdict(shape).items() if name != "tied"}
    ours = [rows["int8 replica"] for rows in results.values()]
    print_result(
        "memory",
        {
            "persistent_bytes_per_parameter": max(row["persistent"] for row in ours),
            "peak_bytes_per_parameter": max(row["peak"] for row in ours),
            "models": results,
        },
        quick=arguments.quick,
        settings={"shape": dimensions, "tokens_at_the_peak": FEW_TOKENS, "full_batch": batch},
        device=device,
    )


if __name__ == "__main__":
    main()
