"""GB of fp32 per second of CPU that the wire codecs encode and decode, and what they lose.

    .venv/bin/python scripts/bench/codec.py [--quick] [--values N] [--repeats N]

A rate is bytes of fp32 over the CPU seconds of all threads together: GB/s of one core, also where other work shares the
machine. The codecs and the rival (bitsandbytes' block-wise 8 bits, hivemind's best codec on a CPU) take turns; medians
count. The error is the relative L2 error on independent values of each distribution.

Last line: one JSON object; ``encode_gb_per_s`` and ``decode_gb_per_s`` by codec.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from report import print_result

from peer.rounds.codec import CODECS

RIVAL = "bitsandbytes"
RIVAL_BLOCK_VALUES = 4096


def distributions(num_values: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = {
        "Gaussian": rng.standard_normal(num_values),
        "Laplace": rng.laplace(size=num_values),
        "Student t, 3": rng.standard_t(3, size=num_values),
    }
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def works(values: np.ndarray) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed, by codec and direction."""
    timed: dict[tuple[str, str], Callable[[], object]] = {}
    for name, codec in CODECS.items():
        data = codec.encode(values)
        timed[name, "encode"] = lambda codec=codec: codec.encode(values)
        timed[name, "decode"] = lambda codec=codec, data=data: codec.decode(data, len(values))
        timed[name, "check"] = lambda codec=codec, data=data: codec.check(data, len(values))
    tensor = torch.from_numpy(values)
    quantised, state = quantize_blockwise(tensor, blocksize=RIVAL_BLOCK_VALUES)
    timed[RIVAL, "encode"] = lambda: quantize_blockwise(tensor, blocksize=RIVAL_BLOCK_VALUES)
    timed[RIVAL, "decode"] = lambda: dequantize_blockwise(quantised, state)
    return timed


def measure(values: np.ndarray, repeats: int) -> dict[tuple[str, str], float]:
    """GB of fp32 per CPU second."""
    timed = works(values)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):
        for key, work in timed.items():
            start = time.process_time()
            work()
            if repeat:  # the first is a warm-up
                seconds[key].append(time.process_time() - start)
    return {key: values.nbytes / statistics.median(spent) / 1e9 for key, spent in seconds.items()}


def relative_error(name: str, values: np.ndarray) -> float:
    if name == RIVAL:
        decoded = dequantize_blockwise(*quantize_blockwise(torch.from_numpy(values), blocksize=RIVAL_BLOCK_VALUES))
        return float(np.linalg.norm(decoded.numpy() - values) / np.linalg.norm(values))
    codec = CODECS[name]
    return float(np.linalg.norm(codec.decode(codec.encode(values), len(values)) - values) / np.linalg.norm(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer values and repeats, under 60 s")
    parser.add_argument("--values", type=int)
    parser.add_argument("--repeats", type=int)
    arguments = parser.parse_args()
    num_values = arguments.values or (1 << 20 if arguments.quick else 1 << 24)
    repeats = arguments.repeats or (3 if arguments.quick else 9)
    torch.set_num_threads(1)
    samples = distributions(num_values)
    rates = measure(samples["Gaussian"], repeats)
    names = [*CODECS, RIVAL]
    bits = {name: 8 * codec.encoded_size(num_values) / num_values for name, codec in CODECS.items()}
    bits[RIVAL] = 8 + 32 / RIVAL_BLOCK_VALUES
    errors = {name: {of: round(relative_error(name, x), 5) for of, x in samples.items()} for name in names}
    print(f"{'codec':14} {'bits':>7} {'encode':>8} {'decode':>8} {'check':>8} GB/s   error on {', '.join(samples)}")
    for name in names:
        cells = " ".join(f"{rates.get((name, way), 0):8.2f}" for way in ("encode", "decode", "check"))
        print(f"{name:14} {bits[name]:7.3f} {cells}        {'  '.join(f'{e:.4f}' for e in errors[name].values())}")
    figures = {
        f"{way}_gb_per_s": {name: round(rate, 2) for (name, timed), rate in rates.items() if timed == way}
        for way in ("encode", "decode", "check")
    }
    print_result(
        "codec",
        {
            **figures,
            "topk_encode_values_per_s": round(rates["topk", "encode"] * 1e9 / 4),
            "bits_per_value": {name: round(value, 4) for name, value in bits.items()},
            "relative_error": errors,
        },
        quick=arguments.quick,
        settings={"values": num_values, "repeats": repeats, "numpy": np.__version__},
    )


if __name__ == "__main__":
    main()
