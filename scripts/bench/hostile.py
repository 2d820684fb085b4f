"""What hostile peers cost: validation loss of a small swarm under attack, by the run's rule and by the plain mean.

    .venv/bin/python scripts/bench/hostile.py [--quick] [--results FOLDER] [--seeds 0 1 2]

Ten peers train a byte-level LLaMA of 0.14 M parameters in one process; rounds are made of the real offer, encode,
check, reduce, settle and apply, every part at its own reducer, which is honest. A share of the peers is hostile
(`hostile_attacks`), from the first round or after a third of them, and claims as many tokens as an honest peer trained.
Beside it, at 30 %: peers on all rungs in turn, without momentum; and hostile peers that claim the most that is
admitted. ``gap_percent`` compares with ten honest peers under the plain mean: it holds what the rule costs and what the
missing peers cost. A full run takes about 25 minutes of one core; every finished cell is a file in FOLDER and is not
made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_attacks import ATTACKS, Known
from report import print_result

from peer.rounds.codec import CODECS, Float32
from peer.rounds.paxos import to_message
from peer.rounds.planning import num_slices, part_values, split_parts
from peer.rounds.round_actions import Reduce
from peer.rounds.shard import ReplicaSnapshot, Settling, Shard
from peer.training.fp32_replica import Replica
from peer.training.layout import Layout
from peer.training.model import build_config, build_model, layout_of
from swarm import schedule
from swarm.digest import sha256
from swarm.errors import ProtocolError
from swarm.proto.round_pb2 import Member, OpenRound, PartResult, Record, Share
from swarm.run_spec import Data, Inner, Model, Outer, Robust, Rounds, RunSpec

PEERS = 10
SHARES_PERCENT = (30, 10, 40)
RULES = ("none", "clip_and_drop")
STARTS = ("at once", "after warm-up")
RUNGS = {"uniform": ("int8",), "mixed": ("int8", "int4", "int2", "topk")}
CLAIMS = ("as honest", "the most")
KEYS = [bytes([index]) * 32 for index in range(PEERS)]
BALLOT = (1, KEYS[0])
VOCAB = 256
VALIDATION_BYTES = 400_000
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    hidden: int = 64
    layers: int = 2
    length: int = 32
    sequences: int = 4
    rounds: int = 20
    steps_per_round: int = 5
    learning_rate: float = 6e-3
    validation_sequences: int = 1024

    @property
    def tokens_each(self) -> int:
        """Tokens of one peer in one round."""
        return self.steps_per_round * self.sequences * self.length


QUICK = Setting(hidden=32, layers=1, rounds=4, steps_per_round=2, validation_sequences=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One training run. No attack: all peers are honest."""

    rule: str
    seed: int
    attack: str = ""
    share_percent: int = 0
    start: str = STARTS[0]
    rungs: str = "uniform"
    claims: str = CLAIMS[0]

    @property
    def name(self) -> str:
        return "-".join(str(part).replace(" ", "_") for part in dataclasses.astuple(self) if part != "")

    @property
    def num_hostile(self) -> int:
        return PEERS * self.share_percent // 100

    def codec(self, index: int) -> str:
        """The rung of a peer."""
        return RUNGS[self.rungs][index % len(RUNGS[self.rungs])]


def spec_of(setting: Setting, rule: str, rungs: str = "uniform") -> RunSpec:
    nothing = "0" * 64
    config = {
        "hidden_size": setting.hidden,
        "intermediate_size": 3 * setting.hidden,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": 4,
        "max_position_embeddings": setting.length,
        "initializer_range": 0.05,
    }
    tokens_per_round = PEERS * setting.tokens_each
    return RunSpec(
        name="hostile",
        total_tokens=setting.rounds * tokens_per_round,
        organizer_key=nothing,
        publication_key="1" * 64,
        model=Model(family="llama", config=config),
        data=Data(manifest_digest=nothing, tokenizer_digest=nothing, sequence_length=setting.length),
        inner=Inner(optimizer="adamw", weights="fp32", learning_rate=setting.learning_rate, beta2=0.95),
        outer=Outer(learning_rate=0.8, momentum=0.8 if rungs == "uniform" else 0.0, momentum_warmup_rounds=8),
        rounds=Rounds(tokens_per_round=tokens_per_round, contribution_codecs=RUNGS[rungs]),
        robust=Robust(rule=rule),
    )


class Swarm:
    """Ten peers, of which the last few turn hostile; only honest ones train."""

    def __init__(self, spec: RunSpec, setting: Setting, cell: Cell) -> None:
        self.spec, self.setting, self.cell = spec, setting, cell
        self.random = np.random.default_rng([cell.seed, 1])
        self.replicas = [Replica(*_model(spec, cell.seed), spec.inner, CPU) for _ in KEYS]
        anchor = self.replicas[0].read()
        self.shards = [Shard(spec, 0, anchor.copy()) for _ in KEYS]
        self.everything = slice(0, len(anchor))
        members = [Member(peer_key=key, contributes=True) for key in KEYS]
        self.opened = OpenRound(members=members, parts=split_parts(members, {}, num_slices(len(anchor))))
        self.honest_clipped: list[float] = []
        self.num_honest_dropped = self.num_hostile_dropped = 0

    def train(self, text: np.ndarray) -> Float32 | None:
        """The anchor after the last round; None where the swarm diverged."""
        attack_from = 1 if self.cell.start == STARTS[0] else self.setting.rounds // 3 + 1
        for number in range(1, self.setting.rounds + 1):
            hostile = self.cell.num_hostile if number >= attack_from else 0
            rate = schedule.learning_rate(
                self.spec.inner, (number - 1) * self.spec.rounds.tokens_per_round, self.spec.total_tokens
            )
            for index in range(PEERS - hostile):
                for step in range(self.setting.steps_per_round):
                    seed = [self.cell.seed, index, number, step]
                    self.replicas[index].step(batch(text, self.setting, seed), rate)
            if not self.commit(number, hostile):
                return None
        return self.shards[0].anchor

    def commit(self, number: int, num_hostile: int) -> bool:
        """One round as peers make it; False where an honest replica is no longer finite."""
        honest = range(PEERS - num_hostile)
        snapshots = [
            self.shards[i].offer(self.replicas[i].movement(), self.setting.tokens_each, self.cell.codec(i))
            for i in honest
        ]
        sound = [snapshot for snapshot in snapshots if snapshot is not None]
        if len(sound) < len(snapshots):
            return False
        by_peer = [self._encode(self.shards[i], sound[i]) for i in honest]
        known = np.stack([self.shards[i].owed(self.everything) - sound[i].movement[:] for i in honest])
        for index in range(num_hostile):
            codec = self.cell.codec(len(honest) + index)
            by_peer.append(self._craft(Known(honest_HN=known, index=index, random=self.random), codec))
        record, parts = Record(round=number, opened_by=to_message(BALLOT)), {}
        for place, part in enumerate(self.opened.parts):
            contributions = tuple(self._admitted(place, by_peer, num_hostile))
            work = Reduce(BALLOT, place, part.first_slice, part.num_slices, contributions)
            average, encoded = self.shards[0].reduce(work)
            result = PartResult(first_slice=part.first_slice, num_slices=part.num_slices)
            if average.shares:
                result.digest = sha256(encoded)
                result.shares.extend(average.shares)
                result.rejections.extend(average.rejections)
                parts[result.digest] = encoded
            self._count(result, num_hostile)
            record.parts.append(result)
        self._land(record, parts, sound)
        return True

    def _encode(self, shard: Shard, snapshot: ReplicaSnapshot) -> list[bytes]:
        return [shard.encode(snapshot, part) for part in self.opened.parts]

    def _craft(self, known: Known, codec: str) -> list[bytes]:
        shard, vector = self.shards[0], ATTACKS[self.cell.attack](known)
        if vector is None:
            values = [part_values(p.first_slice, p.num_slices, shard.num_values) for p in self.opened.parts]
            return [b"\xff" * CODECS[codec].encoded_size(v.stop - v.start) for v in values]
        movement = shard.owed(self.everything) - vector
        return self._encode(shard, ReplicaSnapshot(movement=movement, tokens=1, codec=codec))

    def _admitted(self, place: int, by_peer: list[list[bytes]], num_hostile: int) -> Iterator[tuple[Share, str, bytes]]:
        """What a reducer keeps on arrival, with the weights that are claimed."""
        part = self.opened.parts[place]
        for index, encoded in enumerate(by_peer):
            is_greedy = index >= PEERS - num_hostile and self.cell.claims == CLAIMS[1]
            tokens = 4 * self.spec.rounds.tokens_per_round if is_greedy else self.setting.tokens_each
            codec = self.cell.codec(index)
            try:
                self.shards[0].check_contribution(part.first_slice, part.num_slices, codec, encoded[place])
            except ProtocolError:
                continue
            yield Share(peer_key=KEYS[index], weight_tokens=tokens), codec, encoded[place]

    def _count(self, result: PartResult, num_hostile: int) -> None:
        honest = KEYS[: PEERS - num_hostile]
        self.honest_clipped += [share.clipped_to or 1.0 for share in result.shares if share.peer_key in honest]
        dropped_honest = sum(rejection.peer_key in honest for rejection in result.rejections)
        self.num_honest_dropped += dropped_honest
        self.num_hostile_dropped += len(result.rejections) - dropped_honest

    def _land(self, record: Record, parts: dict[bytes, bytes], sound: list[ReplicaSnapshot]) -> None:
        for index, shard in enumerate(self.shards):
            settling = Settling(sound[index], KEYS[index]) if index < len(sound) else None
            shard.apply(record, parts, settling)
            if index < len(sound):
                self.replicas[index].land(shard.anchor, sound[index].movement)


def _model(spec: RunSpec, seed: int) -> tuple[torch.nn.Module, Layout]:
    model = build_model(build_config(spec, VOCAB), seed)
    return model, layout_of(model)


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """(training, validation): sources of the standard library, as bytes."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = np.frombuffer(b"\n".join(path.read_bytes() for path in paths), np.uint8).astype(np.int64)
    return text[:-VALIDATION_BYTES], text[-VALIDATION_BYTES:]


def batch(text: np.ndarray, setting: Setting, seed: list[int]) -> np.ndarray:
    starts = np.random.default_rng(seed).integers(0, len(text) - setting.length - 1, setting.sequences)
    rows: np.ndarray = text[starts[:, None] + np.arange(setting.length + 1)]
    return rows


def run_cell(cell: Cell, setting: Setting, text: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    started = time.process_time()
    spec = spec_of(setting, cell.rule, cell.rungs)
    swarm = Swarm(spec, setting, cell)
    anchor = swarm.train(text[0])
    starts = np.linspace(0, len(text[1]) - setting.length - 2, setting.validation_sequences).astype(np.int64)
    rows = text[1][starts[:, None] + np.arange(setting.length + 1)]
    loss = math.inf if anchor is None else swarm.replicas[0].evaluate(anchor, np.array_split(rows, 8))
    judged = max(1, len(swarm.honest_clipped) + swarm.num_honest_dropped)
    return {
        **dataclasses.asdict(cell),
        "setting": dataclasses.asdict(setting),
        "loss": loss if math.isfinite(loss) else None,
        "honest_dropped_percent": 100 * swarm.num_honest_dropped / judged,
        "honest_clipped_to": statistics.mean(swarm.honest_clipped) if swarm.honest_clipped else None,
        "hostile_dropped": swarm.num_hostile_dropped,
        "cpu_seconds": time.process_time() - started,
    }


def cells(seeds: list[int], attacks: list[str]) -> Iterator[Cell]:
    """Honest swarms, then 30 % in every way (beside it the plain mean for the first seed), then the other shares."""
    for seed, rungs, rule in itertools.product(seeds, RUNGS, RULES):
        yield Cell(rule=rule, seed=seed, rungs=rungs)
    usual = SHARES_PERCENT[0]
    for seed, attack in itertools.product(seeds, attacks):
        here = Cell(rule="clip_and_drop", seed=seed, attack=attack, share_percent=usual)
        for start, rungs in itertools.product(STARTS, RUNGS):
            yield dataclasses.replace(here, start=start, rungs=rungs)
        yield dataclasses.replace(here, claims=CLAIMS[1])
        if seed == seeds[0]:
            yield dataclasses.replace(here, rule="none")
    for share, seed, attack, start in itertools.product(SHARES_PERCENT[1:], seeds, attacks, STARTS):
        yield Cell(rule="clip_and_drop", seed=seed, attack=attack, share_percent=share, start=start)


def figures_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Gaps in percent, means over seeds; None where a run diverged. ``gap_percent``: the worst start and rungs."""
    clean = {(r["seed"], r["rungs"]): r["loss"] for r in results if r["rule"] == "none" and not r["attack"]}
    gaps: dict[tuple[str, ...], list[float]] = {}
    for r in results:
        gap = math.inf if r["loss"] is None else 100 * (r["loss"] / clean[r["seed"], r["rungs"]] - 1)
        key = (r["rule"], r["attack"], str(r["share_percent"]), r["start"], r["rungs"], r["claims"])
        gaps.setdefault(key, []).append(gap)
    gap_percent: dict[str, dict[str, float]] = {}
    greedy: dict[str, float | None] = {}
    plain_mean: dict[str, float | None] = {}
    print(
        f"{'rule':14} {'attack':20} {'hostile %':9} {'start':14} {'rungs':8} {'claims':10} {'gap %':>10}   every seed"
    )
    for key, values in gaps.items():
        rule, attack, share, start, rungs, claims = key
        mean, listed = statistics.mean(values), " ".join(f"{value:.2f}" for value in values)
        print(f"{rule:14} {attack:20} {share:9} {start:14} {rungs:8} {claims:10} {mean:10.2f}   {listed}")
        if attack and rule == "none":
            plain_mean[attack] = _finite(mean)
        elif attack and claims == CLAIMS[1]:
            greedy[attack] = _finite(mean)
        elif attack:
            worst = gap_percent.setdefault(attack, {})
            worst[share] = max(mean, worst.get(share, -math.inf))
    dropped = [r["honest_dropped_percent"] for r in results if r["rule"] != "none"]
    honest = {rungs: gaps["clip_and_drop", "", "0", STARTS[0], rungs, CLAIMS[0]] for rungs in RUNGS}
    return {
        "gap_percent": {attack: {s: _finite(gap) for s, gap in worst.items()} for attack, worst in gap_percent.items()},
        "claiming_the_most_gap_percent": greedy,
        "honest_gap_percent": {rungs: _finite(statistics.mean(values)) for rungs, values in honest.items()},
        "plain_mean_gap_percent": plain_mean,
        "clean_loss": {f"{rungs}, seed {seed}": round(loss, 4) for (seed, rungs), loss in clean.items()},
        "honest_parts_dropped_percent": {"mean": _finite(statistics.mean(dropped)), "worst": _finite(max(dropped))},
        "gaps_by_seed": {", ".join(key): [_finite(value) for value in values] for key, values in gaps.items()},
    }


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two attacks, under 60 s")
    parser.add_argument("--results", type=Path, help="folder of finished cells: they are not made again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = QUICK if arguments.quick else Setting()
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    attacks = ["flip x10", "a little is enough"] if arguments.quick else list(ATTACKS)
    text = read_text()
    results = [finished(cell, setting, text, arguments.results) for cell in cells(seeds, attacks)]
    settings = dataclasses.asdict(setting) | {
        "peers": PEERS,
        "seeds": seeds,
        "parameters": _model(spec_of(setting, "none"), 0)[1].num_values,
        "cpu_seconds": round(sum(result["cpu_seconds"] for result in results)),
    }
    print_result("hostile", figures_of(results), quick=arguments.quick, settings=settings)


def finished(cell: Cell, setting: Setting, text: tuple[np.ndarray, np.ndarray], folder: Path | None) -> dict[str, Any]:
    """The result of ``cell``, from ``folder`` where it is there."""
    path = None if folder is None else folder / f"{cell.name}.json"
    if path is not None and path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["setting"] == dataclasses.asdict(setting):
            return kept
    result = run_cell(cell, setting, text)
    print(f"{cell.name}: loss {result['loss']}", file=sys.stderr, flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
