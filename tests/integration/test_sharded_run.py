"""A run of two shards: volunteers with one each beside one with the whole, a kill, a move, a published checkpoint."""

from __future__ import annotations

import asyncio
import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.training.data import ReaderOptions, TokenReader
from swarm import data_manifest
from swarm.data_manifest import MANIFEST_NAME
from tests.integration.processes import Program, environment, swarm, swarm_json, wait_for
from tests.integration.test_swarm_processes import PACKAGES, ROUNDS_S, START_S, Swarm, write_run_file

pytestmark = pytest.mark.slow

# One shard of the tiny model fits, the whole does not.
MEMORY = ("--memory", "8MB")
SEQUENCE_LENGTH, VALIDATION_SEQUENCES = 64, 64
CHANGES = {
    "num_shards": 2,
    "total_tokens": 10**6,
    "rounds": {"tokens_per_round": 8192},
    "checkpoints": {"every_rounds": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    arguments = ("--vocab-size", 512, "--validation-fraction", 0.05, "--token-shard-tokens", 65536)
    done = swarm("data", "prepare", *PACKAGES, "--out", folder / "data", *arguments, env=environment(folder))
    assert done.returncode == 0, done.stderr
    return folder / "data"


def hosts(program: Program) -> list[int]:
    """The shards that it hosts, once it takes part."""
    shards: list[int] = program.wait_news("ready", START_S)["hosts"]
    return shards


def join(run: Swarm, name: str) -> Program:
    """One after the other, as each chooses by what the others host."""
    program = run.join(name, *MEMORY)
    hosts(program)
    return program


def place(program: Program) -> list[int]:
    """The shards that it hosts now, after whatever moves."""
    shards: list[int] = program.of_kind("ready")[-1]["hosts"]
    return shards


def counted(program: Program, after: int = 0, shard: int | None = None) -> int:
    """Wait until ``program`` was counted in a round later than ``after``, of ``shard`` or any; which."""

    def found(news: dict[str, Any]) -> bool:
        return news["counted"] and news["round"] > after and shard in (None, news["shard"])

    return int(program.wait_news("commit", ROUNDS_S, found)["round"])


def assert_equal_states(run: Swarm) -> dict[tuple[int, int], str]:
    """Whoever applied a round of a shard said the same state digest; which, by shard and round."""
    told: dict[tuple[int, int], set[str]] = {}
    for news in itertools.chain.from_iterable(program.news for program in run.programs):
        if news["event"] in ("commit", "seed commit"):
            told.setdefault((news["shard"], news["round"]), set()).add(news["state digest"])
    assert {key: states for key, states in told.items() if len(states) > 1} == {}
    return {key: next(iter(states)) for key, states in told.items()}


@pytest.mark.timeout(600)
def test_spans_and_a_whole_model_train_while_one_is_killed_another_moves_there_and_it_comes_back(
    data: Path, tmp_path: Path
) -> None:
    """Both shards go on, replicas stay equal, the loss falls; `transformers` computes the one that was reported.

    Where the only span of a shard is killed, one of the two that hold the other shard takes its place. Where the whole
    model has left, the loss is measured over the spans.
    """
    run = Swarm(tmp_path, write_run_file(tmp_path / "run", data, "split", CHANGES), data)
    try:
        run.start_coordinator()
        run.coordinator.wait_news("seed ready", START_S)
        whole = run.join("anna")
        spans = {name: join(run, name) for name in ("bert", "cora", "dora")}
        assert hosts(whole) == [0, 1]
        assert sorted(hosts(spans[name])[0] for name in ("bert", "cora")) == [0, 1], "the second takes the other"
        number = max(counted(program) for program in (whole, *spans.values()))
        places = {name: place(program) for name, program in spans.items()}
        victim = next(name for name in spans if list(places.values()).count(places[name]) == 1)
        lost = places[victim]
        spans[victim].kill()
        survivors = [program for name, program in spans.items() if name != victim]
        number = max(counted(program, number + 1) for program in (whole, *survivors))
        moved = wait_for(lambda: next((p for p in survivors if place(p) == lost), None), "a move", ROUNDS_S)
        there = moved.of_kind("ready")[-1]["round"]
        assert moved.of_kind("moving")
        counted(moved, there, lost[0])
        number = max(counted(whole, there, shard) for shard in (0, 1))
        again = run.join(victim, *MEMORY)
        number = max(number, counted(again))
        checkpoint = wait_for(lambda: published(run, number), "a checkpoint and its loss", ROUNDS_S)
        told = assert_equal_states(run)
        status = swarm_json("status", run.invite, env=run.env)
        assert abs(status["shards"][0]["round"] - status["shards"][1]["round"]) <= 2
        assert whole.leave(signal.SIGTERM, ROUNDS_S) == 0
        number = max(counted(program, number + 1) for program in (*survivors, again))
        over_spans = wait_for(lambda: published(run, number + 1), "a checkpoint and its loss over spans", ROUNDS_S)
        ended = [program.leave(signal.SIGTERM, ROUNDS_S) for program in (*survivors, again)]
        assert ended == [0, 0, 0], "what follows needs the seed peer only"
        assert checkpoint["validation_loss"] < 0.95 * status["initial validation loss"]
        folder = downloaded(run, checkpoint)
        verified = swarm_json("verify", folder, "--run", run.invite, env=run.env)
        states = [told[shard, checkpoint["round"]] for shard in (0, 1)]
        assert [shard["state_digest"] for shard in verified["shards"]] == states
        assert loss_of(folder, data, tmp_path / "read") == pytest.approx(checkpoint["validation_loss"], abs=1e-3)
        exact = loss_of(downloaded(run, over_spans), data, tmp_path / "read")
        assert exact == pytest.approx(over_spans["validation_loss"], abs=0.02), "hidden states travel in 8 bits"
    finally:
        run.end()


def published(run: Swarm, number: int) -> dict[str, Any] | None:
    """A checkpoint of a round after ``number`` whose loss was reported."""
    listed = swarm_json("checkpoints", run.invite, env=run.env)["checkpoints"]
    found = [entry for entry in listed if entry["round"] > number and entry["validation_loss"] is not None]
    return found[-1] if found else None


def downloaded(run: Swarm, checkpoint: dict[str, Any]) -> Path:
    number = checkpoint["round"]
    out = run.folder / f"got-{number}"
    return Path(swarm_json("download", f"{run.invite}@{number}", "--out", out, env=run.env)["folder"])


def loss_of(checkpoint: Path, data: Path, cache: Path) -> float:
    """Of `transformers`, on the held-out sequences of the run."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    total, count = 0.0, 0
    for batch in asyncio.run(held_out(data, cache)):
        tokens = torch.from_numpy(batch)
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1]).logits
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        )
        count += tokens[:, 1:].numel()
    return total / count


async def held_out(data: Path, cache: Path) -> list[Any]:
    manifest = data_manifest.parse((data / MANIFEST_NAME).read_bytes())
    files = {bytes.fromhex(shard.digest): shard.file for shard in (*manifest.train, *manifest.validation)}

    async def fetch(key: bytes, size: int) -> bytes:
        return (data / files[key]).read_bytes()

    options = ReaderOptions(sequence_length=SEQUENCE_LENGTH, cache=cache, max_cache_bytes=1 << 28)
    reader = TokenReader(manifest, options, fetch)
    await reader.ensure_validation(VALIDATION_SEQUENCES)
    return list(reader.validation_batches(VALIDATION_SEQUENCES, 8))
