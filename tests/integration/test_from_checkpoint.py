"""A run of real processes that starts from a checkpoint on the organizer's disk, and a machine that it does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from peer.rounds.shard import Shard
from peer.training import model
from swarm import data_manifest, presets
from swarm.run_file import to_spec
from tests.integration.processes import assert_refused, environment, swarm
from tests.integration.test_swarm_processes import PACKAGES, START_S, Swarm, write_run_file

pytestmark = pytest.mark.slow

WEIGHTS_SEED = 77  # not the run's: nobody could draw these weights again


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Data, and a checkpoint for its tokenizer as transformers writes it."""
    arguments = ("--vocab-size", 512, "--validation-fraction", 0.05, "--token-shard-tokens", 65536)
    done = swarm("data", "prepare", *PACKAGES, "--out", tmp_path / "data", *arguments, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    built: Any = model.build_model(config_of(tmp_path), WEIGHTS_SEED)
    built.save_pretrained(tmp_path / "checkpoint")
    shutil.copy(tmp_path / "data" / "tokenizer.json", tmp_path / "checkpoint")
    return tmp_path


def config_of(folder: Path) -> Any:
    raw = (folder / "data" / "manifest.json").read_bytes()
    return model.build_config(presets.tiny("any"), data_manifest.parse(raw).vocab_size)


def state_digest_of(folder: Path) -> str:
    """Of round 0, if it is the checkpoint's weights."""
    manifest = data_manifest.parse((folder / "data" / "manifest.json").read_bytes())
    keys = {"organizer_key": bytes(32), "publication_key": b"p" * 32}
    spec = to_spec(presets.tiny("any"), **keys, manifest=manifest, manifest_digest="00" * 32)
    return Shard(spec, 0, model.initial_anchor(config_of(folder), WEIGHTS_SEED)).state_digest.hex()


def test_volunteers_fetch_the_checkpoints_weights_as_round_0_and_train_on(prepared: Path) -> None:
    """Seed peer and volunteer say the checkpoint's state digest before the first commit; a restart needs no --from."""
    rules = write_run_file(prepared / "run", prepared / "data", "based", {"total_tokens": 10**9})
    run = Swarm(prepared, rules, prepared / "data")
    try:
        run.start_coordinator("--from", str(prepared / "checkpoint"))
        expected = state_digest_of(prepared)
        assert run.coordinator.wait_news("seed ready", START_S)["state digest"] == expected
        assert_too_small_a_machine_is_told_at_once(run)
        anna = run.join("anna")
        assert "embedding + head" in anna.wait_news("joining", START_S)["memory"]
        ready = anna.wait_news("ready", START_S)
        assert (ready["round"], ready["state digest"]) == (0, expected)
        run.until_round(1, [anna])
        invite = run.invite
        run.coordinator.leave(15, 30)
        run.start_coordinator()
        assert run.invite == invite
        run.coordinator.wait_news("seed ready", START_S)
        bert = run.join("bert")
        run.more_rounds(1, [anna, bert])
        run.assert_equal_states()
    finally:
        run.end()


def assert_too_small_a_machine_is_told_at_once(run: Swarm) -> None:
    """Exit code 74 as documented, before anything of the state is fetched."""
    done = swarm("join", run.invite, "--home", run.home("small"), "--memory", "1MiB", env=run.env)
    assert_refused(done, 74, "the smallest part of this run does not fit")
    assert not list(run.home("small").glob("runs/*/*"))


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_signed(prepared: Path) -> None:
    changes = {"model": {"config": presets.tiny("x").model.config | {"num_hidden_layers": 3}}}
    rules = write_run_file(prepared / "run", prepared / "data", "based", changes)
    done = swarm("start", rules, "--from", prepared / "checkpoint", env=environment(prepared))
    assert_refused(done, 65, "num_hidden_layers is 2, not 3")
    assert "set in [model.config]: num_hidden_layers = 2" in done.stderr
    assert not (rules.parent / "state" / "genesis.sig").exists()
