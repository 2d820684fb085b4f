"""`swarm diff` and `swarm lineage`: what is measured, what is told, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from peer.checkpoints.compare import compare, layer_of
from peer.checkpoints.facts import manifest_digest, read_evaluations, read_facts
from peer.checkpoints.verify import verify_folder
from swarm import evaluation
from swarm.cli import compare as commands
from swarm.errors import DataError, DigestError, SwarmError
from swarm.evaluation import Evaluation, Result
from swarm.families import family_of
from swarm.identity import Identity
from swarm.run_spec import Base
from tests.checkpoint_samples import SignedCheckpoint, make_parts, signed_checkpoint, with_tensors

app = typer.Typer()
for command in (commands.diff, commands.lineage):
    app.command()(command)


def tensors(shift: float = 0.0) -> dict[str, np.ndarray]:
    return {
        "lm_head.weight": np.ones((4, 2), np.float32),
        "model.embed_tokens.weight": np.ones((4, 2), np.float32),
        "model.layers.10.up.weight": np.full(9, 2.0 + shift, np.float32),
        "model.layers.2.up.weight": np.full(4, 3.0, np.float32),
        "model.layers.2.norm.weight": np.zeros(3, np.float32),
        "model.norm.weight": np.zeros(2, np.float32),
    }


def checkpoint(folder: Path, round_number: int, shift: float = 0.0, name: str = "sample") -> SignedCheckpoint:
    parts = with_tensors(make_parts(round_number, name, num_values=2), tensors(shift))
    return signed_checkpoint(folder, replace(parts, total_tokens=100 * round_number))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return checkpoint(tmp_path / "a", 1).folder, checkpoint(tmp_path / "b", 3, shift=1.0).folder


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--json"], catch_exceptions=False)
    return json.loads(done.stdout)


def test_a_layers_norm_is_over_all_its_parameters_and_layers_come_as_the_model_runs(pair: tuple[Path, Path]) -> None:
    found = compare(read_facts(pair[0], None), read_facts(pair[1], None)).layers
    assert [change.layer for change in found] == ["embed_tokens", "layer 2", "layer 10", "norm", "lm_head"]
    moved = found[2]
    assert (moved.norm_a, moved.norm_b, moved.moved, moved.relative, moved.num_values) == (6.0, 9.0, 3.0, 0.5, 9)
    assert (found[1].norm_a, found[1].moved, found[1].num_values) == (6.0, 0.0, 7)


def test_diff_tells_rounds_tokens_and_data(pair: tuple[Path, Path]) -> None:
    found = run("diff", *pair)
    assert (found["rounds"], found["tokens"], found["same_data"], found["same_run"]) == (2, 200, True, True)
    assert found["a"]["round"] == 1
    assert found["layers"][3]["relative"] is None  # a norm of zeros


def test_diff_names_the_rules_of_two_runs_that_differ(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "c", 3, name="other").folder
    found = run("diff", pair[0], other)
    assert (found["same_run"], found["rules_changed"]) == (False, ["name"])


@pytest.mark.parametrize("is_its_base", [True, False])
def test_diff_tells_a_run_that_started_from_the_other_checkpoint(
    pair: tuple[Path, Path], tmp_path: Path, is_its_base: bool
) -> None:
    anchor = read_facts(pair[0], None).provenance.manifest.anchor.digest if is_its_base else "a" * 64
    parts = with_tensors(make_parts(2, "tuned", num_values=2), tensors(0.5))
    base = Base(name="a", anchor_digest=anchor, vocab_size=256)
    spec = parts.spec.model_copy(update={"base": base})
    tuned = signed_checkpoint(tmp_path / "tuned", replace(parts, spec=spec, run_id=spec.run_id)).folder
    assert run("diff", pair[0], tuned)["starts_from_a"] is is_its_base
    assert run("diff", tuned, pair[0])["starts_from_a"] is False
    told = CliRunner().invoke(app, ["diff", str(pair[0]), str(tuned)]).stdout
    assert ("B's run started from A: 2 rounds, 500 tokens ago" in told) is is_its_base


def test_models_of_other_shapes_are_not_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    parts = with_tensors(make_parts(5, num_values=2), {"model.norm.weight": np.ones(3, np.float32)})
    other = signed_checkpoint(tmp_path / "c", parts).folder
    with pytest.raises(DataError, match="not of one shape"):
        compare(read_facts(pair[0], None), read_facts(other, None))


@pytest.mark.parametrize(
    ("family", "name", "layer"),
    [
        ("gpt_neo", "transformer.h.3.attn.attention.k_proj.weight", "layer 3"),
        ("gpt_neo", "transformer.wpe.weight", "wpe"),
        ("gpt_neox", "embed_out.weight", "embed_out"),
        ("bloom", "transformer.word_embeddings_layernorm.bias", "word_embeddings_layernorm"),
    ],
)
def test_layers_are_found_in_every_familys_names(family: str, name: str, layer: str) -> None:
    assert layer_of(name, family_of(family)) == layer


def test_lineage_tells_who_signed_and_the_data(pair: tuple[Path, Path]) -> None:
    found = run("lineage", pair[0])
    report = verify_folder(pair[0], None).as_json()
    assert found["signed_by"]["organizer_key"] == report["organizer_key"]
    assert found["signed_by"]["manifest_digest"] == report["manifest_digest"]
    assert [source["licence"] for source in found["data"]["sources"]] == ["CC0"]
    assert found["genesis"] == {"seed": 0, "base": None}


def test_both_commands_print_tables(pair: tuple[Path, Path]) -> None:
    for arguments in (("diff", *pair), ("lineage", pair[0])):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0 and "round" in done.stdout


def test_diff_refuses_a_damaged_checkpoint(pair: tuple[Path, Path]) -> None:
    weights = pair[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DigestError):
        run("diff", *pair)


@pytest.mark.parametrize("name", ["data-manifest.json", "swarm-manifest.json", "swarm-run-spec.sig"])
def test_lineage_refuses_a_changed_file_that_it_reads(pair: tuple[Path, Path], name: str) -> None:
    path = pair[0] / name
    raw = bytearray(path.read_bytes())
    raw[40] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SwarmError):
        read_facts(pair[0], None)


def test_evaluations_count_once_their_signature_and_their_checkpoint_are_right(pair: tuple[Path, Path]) -> None:
    facts = read_facts(pair[0], None)
    folder = pair[0] / evaluation.FOLDER
    folder.mkdir()
    made = Evaluation(
        run_id=facts.provenance.run_id.hex(),
        round=1,
        manifest_digest=manifest_digest(facts.provenance),
        asked=("tiny",),
        results=(Result(task="tiny", metric="acc", value=0.5, num_samples=4),),
        versions={"lm_eval": "0.4.13"},
        seed=0,
        batch_size=1,
        device="cpu",
    )
    signer = Identity.generate()

    def write(name: str, item: Evaluation, flip: bool = False) -> None:
        raw = signer.sign(evaluation.CONTEXT, facts.provenance.run_id, item.canonical_bytes()).SerializeToString()
        (folder / f"{name}.sig").write_bytes(raw.replace(b"0.5", b"0.9") if flip else raw)

    write("a-good", made)
    write("b-forged", made, flip=True)
    write("c-of-another", made.model_copy(update={"manifest_digest": "b" * 64}))
    (folder / "d-nonsense.sig").write_bytes(b"\xff\xff")
    found, ignored = read_evaluations(pair[0], facts.provenance)
    assert [(item.evaluation, item.signer) for item in found] == [(made, signer.public_key)]
    assert [line.partition(":")[0] for line in ignored] == ["b-forged.sig", "c-of-another.sig", "d-nonsense.sig"]
    assert verify_folder(pair[0], None).warnings == ()
