"""A run of two shards by real processes: rounds of both, a kill, a late joiner, and a checkpoint of the whole model."""

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

TOKENS_PER_ROUND = 4096
SEQUENCE_LENGTH, VALIDATION_SEQUENCES = 64, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    arguments = ("--vocab-size", 512, "--validation-fraction", 0.05, "--token-shard-tokens", 65536)
    done = swarm("data", "prepare", *PACKAGES, "--out", folder / "data", *arguments, env=environment(folder))
    assert done.returncode == 0, done.stderr
    return folder / "data"


def in_both_shards(program: Program, number: int) -> int:
    """Wait until ``program`` was counted in a round after ``number``, of each shard; the later of the two rounds."""

    def counted(shard: int) -> int:
        news = program.wait_news(
            "commit", ROUNDS_S, lambda news: news["shard"] == shard and news["counted"] and news["round"] > number
        )
        return int(news["round"])

    return max(counted(0), counted(1))


def assert_equal_states(run: Swarm) -> dict[tuple[int, int], str]:
    """Whoever applied a round of a shard, in whichever life, said the same state digest; which, by shard and round."""
    told: dict[tuple[int, int], set[str]] = {}
    for commit in itertools.chain.from_iterable(program.commits for program in run.programs):
        told.setdefault((commit["shard"], commit["round"]), set()).add(commit["state digest"])
    assert {key: states for key, states in told.items() if len(states) > 1} == {}
    return {key: next(iter(states)) for key, states in told.items()}


def test_two_shards_live_through_a_kill_and_make_the_model_that_their_peers_measured(
    data: Path, tmp_path: Path
) -> None:
    """Three volunteers, one killed and back, one late; `transformers` computes the loss that was reported."""
    changes = {
        "num_shards": 2,
        "total_tokens": 10**6,
        "rounds": {"tokens_per_round": TOKENS_PER_ROUND},
        "checkpoints": {"every_rounds": 2},
    }
    run = Swarm(tmp_path, write_run_file(tmp_path / "run", data, "sharded", changes), data)
    try:
        run.start_coordinator()
        run.coordinator.wait_news("seed ready", START_S)
        anna, victim = run.join("anna"), run.join("bert")
        in_both_shards(anna, 0)
        in_both_shards(victim, 0)
        victim.kill()
        again, late = run.join("bert"), run.join("late")
        number = max(in_both_shards(again, 0), in_both_shards(late, 0))
        checkpoint = wait_for(lambda: published(run, number), "a checkpoint and its loss", ROUNDS_S)
        told = assert_equal_states(run)
        status = swarm_json("status", run.invite, env=run.env)
        assert [shard["replicas"] for shard in status["shards"]] == [3, 3]
        assert abs(status["shards"][0]["round"] - status["shards"][1]["round"]) <= 2
        ended = [program.leave(signal.SIGTERM, ROUNDS_S) for program in (anna, again, late)]
        assert ended == [0, 0, 0], "what follows needs the seed peer only"
        wanted = f"{run.invite}@{checkpoint['round']}"
        folder = Path(swarm_json("download", wanted, "--out", tmp_path / "got", env=run.env)["folder"])
        verified = swarm_json("verify", folder, "--run", run.invite, env=run.env)
        states = [told[shard, checkpoint["round"]] for shard in (0, 1)]
        assert [shard["state_digest"] for shard in verified["shards"]] == states
        assert abs(loss_of(folder, data, tmp_path / "read") - checkpoint["validation_loss"]) < 1e-3
    finally:
        run.end()


def published(run: Swarm, number: int) -> dict[str, Any] | None:
    """A checkpoint of a round after ``number`` whose loss was reported."""
    listed = swarm_json("checkpoints", run.invite, env=run.env)["checkpoints"]
    found = [entry for entry in listed if entry["round"] > number and entry["validation_loss"] is not None]
    return found[-1] if found else None


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
