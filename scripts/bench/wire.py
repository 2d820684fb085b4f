"""What the wire costs in quality, and what it saves: bytes a peer uploads, and validation loss after equal tokens.

    .venv/bin/python scripts/bench/wire.py --results FOLDER [--seeds 0] [--headline-seeds 0 1 2]
    .venv/bin/python scripts/bench/wire.py --quick

Four replicas and one synchronous model begin with the same weights and read the same bytes (see `quality_arms`). All
replicas are fp32 with fp32 moments, averages are plain (outer learning rate 1, no momentum), and the rounds of a row
are the same, so within a row the wire alone differs: what it loses is owed by members and by reducers, as in a run.
Rounds grow from one inner step, linearly until the last; H is their mean.

Bytes uploaded are those of the encoded vectors, without the frames of calls: a peer sends its contribution to the
reducers of the other parts, and its own average to the other members. So per parameter and inner step, with n peers,

    this wire      (n - 1) / n x (contribution + average) / H       bytes of one value; exact sizes, part by part
    fp32           2 (n - 1) / n x 4                                 a ring all-reduce of fp32 gradients every step

``reduction_over_fp32`` is the second over the first. ``gap_to_fp32_wire_percent`` compares the last loss with that of
the same rounds averaged in fp32, ``gap_to_sync_percent`` with synchronous training at equal tokens: mean over seeds.
The headline settings have more seeds, the rest of the grid one. Results are kept in FOLDER as by `quality`. Last line:
one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from quality_arms import Arm, num_parameters, round_lengths
from quality_results import Result, load, make, mean_and_error, percent_above
from quality_setting import QUICK, REPLICAS, SMALL, VOCAB, Setting, spec_of
from report import print_result

from peer.rounds.codec import CODECS
from peer.rounds.planning import num_slices, part_values, split_parts
from swarm.proto.round_pb2 import Member

Job = tuple[str, Arm, Setting, int]
"""row, arm, setting, seed"""
SYNC = Arm(name="sync", is_synchronous=True)
FP32 = Arm(name="fp32")
# Contributions and averages in the same codec. A run spec has no sparse averages: this says what they would be worth.
WIRES = {codec: Arm(name=codec, has_wire=True, codecs=(codec, codec)) for codec in CODECS}
FULL = dataclasses.replace(
    SMALL,
    **{"hidden": 96, "intermediate": 256, "layers": 2, "heads": 3, "sequences": 1},
    **{"total_tokens": 655_360, "warmup_tokens": 165_000, "validation_sequences": 512},
)
SHORT = dataclasses.replace(QUICK, sequences=1, total_tokens=32_768)
GRID_H = (8, 19, 36, 200)
QUICK_H = (8, 16)
# int4 at the shortest rounds that reach 250 times less than fp32, and topk at those that reach 2,500.
HEADLINES = {"dense": (36, "int4"), "sparse": (19, "topk")}


def setting_of(base: Setting, inner_steps: int) -> Setting:
    """Rounds that grow from one step to the end of the run, ``inner_steps`` in the mean."""
    step = base.tokens_per_step
    return dataclasses.replace(
        base,
        **{"outer_momentum": 0.0, "outer_learning_rate": 1.0, "first_tokens_per_round": step},
        **{"tokens_per_round": (2 * inner_steps - 1) * step, "growth_rounds": base.num_steps // inner_steps},
    )


def bytes_per_round(arm: Arm, num_values: int) -> float:
    """What a peer uploads in one round, in the mean over the peers."""
    if arm.codecs is None:
        return 2 * (REPLICAS - 1) / REPLICAS * 4 * num_values
    members = [Member(peer_key=bytes([index]) * 32, contributes=True) for index in range(REPLICAS)]
    total = 0
    for part in split_parts(members, {}, num_slices(num_values)):
        values = part_values(part.first_slice, part.num_slices, num_values)
        sizes = [CODECS[codec].encoded_size(values.stop - values.start) for codec in arm.codecs]
        total += (REPLICAS - 1) * sum(sizes)  # by the other members to the reducer, by the reducer to them
    return total / REPLICAS


def traffic(arm: Arm, setting: Setting) -> tuple[float, float]:
    """(bytes uploaded per parameter and inner step, how many times less than fp32 data parallel)."""
    num_values = num_parameters(setting)
    spec = spec_of(setting, in_8_bits=False, is_synchronous=False)
    rounds = len(round_lengths(spec, setting))
    sent = bytes_per_round(arm, num_values) * rounds / setting.num_steps / num_values
    synchronous = bytes_per_round(FP32, num_values) / num_values
    return sent, synchronous / sent


def plan(base: Setting, lengths: Sequence[int], seeds: list[int], headline_seeds: list[int]) -> Iterator[Job]:
    """All that is trained, of each seed the headlines first."""
    for seed in dict.fromkeys([*seeds, *headline_seeds]):
        yield "sync", SYNC, base, seed
        wanted = [
            (length, codec) for length, codec in HEADLINES.values() if seed in headline_seeds and length in lengths
        ]
        if seed in seeds:
            wanted += [(length, codec) for length in lengths for codec in WIRES]
        for length, codec in wanted:
            yield f"h{length}", FP32, setting_of(base, length), seed
            yield f"h{length}", WIRES[codec], setting_of(base, length), seed


def figures_of(folder: Path, base: Setting, length: int, arm: Arm) -> dict[str, Any]:
    """What one wire sends and loses in the rounds of one row, over the seeds that ``folder`` holds."""
    sent, reduction = traffic(arm, setting_of(base, length))
    figures: dict[str, Any] = {
        "bytes_per_parameter_and_inner_step": round(sent, 6),
        "reduction_over_fp32": round(reduction, 1),
    }
    row, synchronous = load(folder, f"h{length}"), load(folder, "sync")
    mine = {seed: arms[arm.name] for seed, arms in row.items() if arm.name in arms}
    rivals: dict[str, dict[int, Result]] = {
        "gap_to_fp32_wire_percent": {seed: arms[FP32.name] for seed, arms in row.items() if FP32.name in arms},
        "gap_to_sync_percent": {seed: arms[SYNC.name] for seed, arms in synchronous.items()},
    }
    for key, rival in rivals.items():
        values = [percent_above(mine[seed], rival[seed]) for seed in mine if seed in rival]
        mean, error = mean_and_error(values)
        figures[key] = None if mean is None else round(mean, 3)
        figures[f"{key}_standard_error"] = None if error is None else round(error, 3)
    figures["loss"] = {seed: result["loss"] for seed, result in mine.items()}
    return figures


def tell(folder: Path, base: Setting, lengths: Sequence[int]) -> dict[str, Any]:
    """Print the table; the headlines' figures under their names, and those of every row and wire."""
    print(f"{'H':>4} {'wire':5} {'reduction':>10} {'to fp32 wire':>18} {'to sync':>18}   loss by seed")
    settings: dict[str, dict[str, Any]] = {}
    for length in lengths:
        for arm in (FP32, *WIRES.values()):
            figures = figures_of(folder, base, length, arm)
            if not figures["loss"]:
                continue
            settings.setdefault(f"h{length}", {})[arm.name] = figures
            gaps = [_percent(figures, key) for key in ("gap_to_fp32_wire_percent", "gap_to_sync_percent")]
            reduction = figures["reduction_over_fp32"]
            losses = " ".join(f"{loss:.4f}" for loss in figures["loss"].values())
            print(f"{length:4} {arm.name:5} {reduction:10,.0f} {gaps[0]:>18} {gaps[1]:>18}   {losses}")
    headlines = {name: settings.get(f"h{h}", {}).get(codec) for name, (h, codec) in HEADLINES.items()}
    synchronous = {seed: arms[SYNC.name]["loss"] for seed, arms in load(folder, "sync").items()}
    print("synchronous: " + " ".join(f"{loss:.4f}" for loss in synchronous.values()))
    return {"headlines": headlines, "rows": settings, "sync_loss": synchronous}


def _percent(figures: dict[str, Any], key: str) -> str:
    mean, error = figures[key], figures[f"{key}_standard_error"]
    return "" if mean is None else f"{mean:.2f}" + ("" if error is None else f" +- {error:.2f}") + " %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one seed, under 60 s")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where finished arms are kept")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="seeds of the whole grid")
    parser.add_argument("--headline-seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    if not options.quick and options.results is None:
        parser.error("name a folder with --results")
    torch.set_num_threads(1)
    base, lengths, headline_seeds = (SHORT, QUICK_H, [0]) if options.quick else (FULL, GRID_H, options.headline_seeds)
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.results or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for row, arm, setting, seed in plan(base, lengths, options.seeds, headline_seeds):
            make(folder, row, arm, setting, seed)
        figures = tell(folder, base, lengths)
    everywhere = {
        "replicas": REPLICAS,
        "vocabulary": VOCAB,
        "parameters": num_parameters(base),
        "replica_weights": "fp32",
    }
    print_result("wire", figures, quick=options.quick, settings={**everywhere, **dataclasses.asdict(base)})


if __name__ == "__main__":
    main()
