"""Witnesses: what a quorum is, and that published weights are those which it signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peer.checkpoints.anchor import anchor_problem
from peer.checkpoints.checkpoint import CheckpointParts, describe_file, write_signed
from peer.checkpoints.verify import open_regular, verify_folder
from swarm import manifest as manifests
from swarm import witness
from swarm.digest import ChunkRoot, chunk_digests, join_subtrees, merkle_root, sha256
from swarm.errors import DataError, SwarmError, VerificationError
from swarm.proto.checkpoint_pb2 import Attestation, Witnesses
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication
from swarm.run_spec import Checkpoints
from tests.checkpoint_samples import (
    ORGANIZER,
    PUBLISHER,
    WITNESSES,
    SignedCheckpoint,
    make_parts,
    publication_of,
    shard_parts_of,
    signed_checkpoint,
    small_checkpoint,
    with_tensors,
)

ANNA, BORIS, CLARA = WITNESSES
STRANGER = ORGANIZER
USUAL = Checkpoints()


@dataclass(frozen=True)
class Case:
    live: int
    needed: int
    rules: Checkpoints = USUAL


QUORA = {
    "one lives": Case(1, 1),
    "two live": Case(2, 2),
    "three live": Case(3, 2),
    "four live": Case(4, 3),
    "sixty-four live": Case(64, 33),
    "a small share of two": Case(2, 2, Checkpoints(witness_share=0.0)),
    "a small share of ten": Case(10, 2, Checkpoints(witness_share=0.0)),
    "more than two thirds of nine": Case(9, 7, Checkpoints(witness_share=2 / 3)),
    "at least five, of three": Case(3, 3, Checkpoints(min_witnesses=5)),
}


@pytest.mark.parametrize("case", QUORA.values(), ids=QUORA.keys())
def test_a_quorum_is_more_than_the_share_and_at_least_the_minimum(case: Case) -> None:
    assert witness.needed(case.live, case.rules) == case.needed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SignedCheckpoint:
    return small_checkpoint(tmp_path_factory.mktemp("made") / "c")


def witnesses_of(made: SignedCheckpoint) -> Witnesses:
    return Witnesses.FromString(made.publication.witnesses.payload)


def attestation(made: SignedCheckpoint, **changes: Any) -> Attestation:
    (said,) = witness.attestations_of(made.manifest)
    return Attestation(**{field.name: value for field, value in said.ListFields()} | changes)


def signed_by(who: Any, made: SignedCheckpoint, run_id: bytes | None = None, **changes: Any) -> Signed:
    return who.sign("attestation", run_id or made.run_id, attestation(made, **changes).SerializeToString())


OTHER_STATE = {
    "anchor_digest": b"a" * 32,
    "momentum_digest": b"m" * 32,
    "state_digest": join_subtrees(b"a" * 32, b"m" * 32),
}
Change = Callable[[Witnesses, SignedCheckpoint], object]


def replace_second(**changes: Any) -> Change:
    return lambda w, made: w.attestations[1].CopyFrom(signed_by(BORIS, made, **changes))


FORGERIES: dict[str, tuple[Change, str]] = {
    "too few": (lambda w, made: w.attestations.pop(), "1 of 3 live replicas are witnesses; 2 needed"),
    "one counted twice": (lambda w, made: w.attestations[1].CopyFrom(w.attestations[0]), "1 of 3"),
    "nobody lives": (lambda w, made: w.ClearField("replicas"), "no replica"),
    "a replica named twice": (lambda w, made: w.replicas.append(w.replicas[0]), "twice"),
    "a replica's key cut short": (lambda w, made: w.replicas.append(b"k"), "wrong length"),
    "a stranger": (lambda w, made: w.attestations[1].CopyFrom(signed_by(STRANGER, made)), "none of the live"),
    "more attestations than replicas": (lambda w, made: w.attestations.extend([w.attestations[0]] * 2), "more"),
    "another state": (replace_second(**OTHER_STATE), "another state"),
    "another log": (replace_second(log_digest=b"l" * 32), "another state"),
    "other parameters": (replace_second(layout_digest=b"l" * 32), "another state"),
    "another round's attestation": (replace_second(round=11), "another round"),
    "another shard's attestation": (replace_second(shard=1), "another round"),
    "another run's attestation": (replace_second(run_id=b"x" * 20), "does not verify"),
    "witnesses of another round": (lambda w, made: setattr(w, "round", 11), "another round"),
    "witnesses of another manifest": (lambda w, made: setattr(w, "manifest_digest", b"d" * 32), "another manifest"),
}


@pytest.mark.parametrize(("change", "message"), FORGERIES.values(), ids=FORGERIES.keys())
def test_what_is_no_quorum_for_this_manifest_is_refused(made: SignedCheckpoint, change: Change, message: str) -> None:
    witnesses = witnesses_of(made)
    change(witnesses, made)
    signed = PUBLISHER.sign("witnesses", made.run_id, witnesses.SerializeToString())
    forged = Publication(manifest=made.publication.manifest, witnesses=signed)
    with pytest.raises(VerificationError, match=message):
        forged.verified(made.run_id, make_parts().spec)


def test_witnesses_that_the_publication_key_did_not_sign_are_refused(made: SignedCheckpoint) -> None:
    payload = made.publication.witnesses.payload
    forged = Publication(manifest=made.publication.manifest, witnesses=STRANGER.sign("witnesses", made.run_id, payload))
    with pytest.raises(VerificationError, match="another key"):
        forged.verified(made.run_id, make_parts().spec)


def test_the_root_over_pieces_is_the_root_over_the_whole() -> None:
    data = bytes(range(256)) * 41
    for cuts in ([], [1], [100, 200, 5000], [1000, 2000, 3000], list(range(0, 10000, 7))):
        root = ChunkRoot(1000)
        for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
            root.update(data[start:stop])
        assert root.root() == merkle_root(chunk_digests(memoryview(data), 1000))
    assert ChunkRoot().root() == merkle_root([])


def publish_again(made: SignedCheckpoint, **changes: Any) -> None:
    """The publication key and all witnesses sign what lies in the folder as the run's, with these changes."""
    files = tuple(describe_file(made.folder / file.name) for file in made.manifest.files)
    manifest = made.manifest.model_copy(update={"files": files, **changes})
    write_signed(made.folder, publication_of(manifest.canonical_bytes(), made.run_id), made.signed_spec)


def weights_problem(made: SignedCheckpoint) -> str:
    (problem,) = verify_folder(made.folder, made.run_id).problems
    return problem


@pytest.mark.parametrize("file_bytes", [6000, 10**9], ids=["several files", "one file"])
def test_the_anchor_is_recomputed_from_the_weights_wherever_they_lie(tmp_path: Path, file_bytes: int) -> None:
    parts = make_parts(num_values=600_000)
    assert parts.tensors["b.weight"].nbytes > 2 << 20  # several chunks of the state
    object.__setattr__(parts, "max_file_bytes", file_bytes)
    made = signed_checkpoint(tmp_path / "c", parts)
    assert len([file for file in made.manifest.files if file.name.endswith(".safetensors")]) == 1 + (file_bytes < 10**9)
    report = verify_folder(made.folder, made.run_id)
    assert report.ok and report.as_json()["anchor_digest"] == made.manifest.anchor.digest
    flat = np.concatenate([tensor.reshape(-1) for tensor in parts.tensors.values()])
    assert made.manifest.anchor.digest == merkle_root(chunk_digests(flat.data.cast("B"))).hex()


def sharded_parts(*sizes: int) -> CheckpointParts:
    """The sample's values as shards of these sizes, which do not end where parameters do."""
    parts = make_parts(num_values=1000)
    flat = np.concatenate([tensor.reshape(-1) for tensor in parts.tensors.values()])
    shards = [shard_parts_of({"": values}) for values in np.split(flat, np.cumsum(sizes)[:-1])]
    return replace(parts, states=tuple(shards))


def test_the_anchor_of_each_shard_is_recomputed_from_the_weights(tmp_path: Path) -> None:
    made = signed_checkpoint(tmp_path / "c", sharded_parts(300, 707))
    report = verify_folder(made.folder, made.run_id)
    assert report.problems == ("the manifest names 2 shards, the run spec 1",)  # and nothing else is wrong
    assert report.as_json()["shards"] == [state.model_dump() for state in made.manifest.shards]
    assert anchor_problem(made.folder, made.manifest, open_regular) is None
    first, second = made.manifest.shards
    assert [attestation.shard for attestation in witness.attestations_of(made.manifest)] == [0, 1]
    moved = (first.model_copy(update={"num_values": 301}), second.model_copy(update={"num_values": 706}))
    cut_elsewhere = made.manifest.model_copy(update={"shards": moved})
    assert "anchor digest" in str(anchor_problem(made.folder, cut_elsewhere, open_regular))


@pytest.mark.parametrize("sizes", [(300, 708), (300, 700)])
def test_shards_that_are_not_the_weights_make_no_checkpoint(tmp_path: Path, sizes: tuple[int, int]) -> None:
    parts = sharded_parts(300, 707)
    states = tuple(replace(state, num_values=size) for state, size in zip(parts.states, sizes, strict=True))
    with pytest.raises(DataError, match="values than the shards"):
        signed_checkpoint(tmp_path / "c", replace(parts, states=states))


def test_a_publication_key_alone_cannot_pass_off_other_weights(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    path = made.folder / "model.safetensors"
    weights = load_file(path)
    weights["b.weight"][3, 1] += 1
    save_file(weights, path, metadata={"format": "pt"})
    publish_again(made)
    assert "do not have the anchor digest" in weights_problem(made)


def test_weights_under_each_others_names_are_refused(tmp_path: Path) -> None:
    """The bytes in their order are those of the witnessed anchor; only their names are swapped."""
    parts = make_parts(num_values=1000)
    one, two = np.full(7, 1, np.float32), np.full(7, 2, np.float32)
    made = signed_checkpoint(tmp_path / "c", with_tensors(parts, {"one": one, "two": two}))
    save_file({"one": two, "two": one}, made.folder / "model.safetensors", metadata={"format": "pt"})
    files = tuple(describe_file(made.folder / file.name) for file in made.manifest.files)
    anchor = made.manifest.anchor.model_copy(update={"parameters": made.manifest.anchor.parameters[::-1]})
    manifest = made.manifest.model_copy(update={"files": files, "anchor": anchor})
    honest = Witnesses.FromString(made.publication.witnesses.payload)
    honest.manifest_digest = sha256(manifest.canonical_bytes())
    forged = Publication(
        manifest=PUBLISHER.sign("checkpoint", made.run_id, manifest.canonical_bytes()),
        witnesses=PUBLISHER.sign("witnesses", made.run_id, honest.SerializeToString()),
    )
    write_signed(made.folder, forged, made.signed_spec)
    with pytest.raises(SwarmError, match="another state"):
        verify_folder(made.folder, made.run_id)


def test_weights_in_another_type_are_not_the_anchor(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    path = made.folder / "model.safetensors"
    weights = {name: tensor.astype(np.float16) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    publish_again(made)
    assert "not a parameter of the anchor in fp32" in weights_problem(made)


def test_a_parameter_more_or_less_is_noticed(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    path = made.folder / "model.safetensors"
    weights = load_file(path)
    for changed in ({**weights, "c": np.ones(2, np.float32)}, {"b.weight": weights["b.weight"]}):
        save_file(changed, path, metadata={"format": "pt"})
        publish_again(made)
        assert "parameter" in weights_problem(made)


def test_the_report_names_the_witnesses(made: SignedCheckpoint) -> None:
    report = json.loads(json.dumps(verify_folder(made.folder, made.run_id).as_json()))
    assert report["witnesses"] == [ANNA.peer_id, BORIS.peer_id]
    assert report["live_replicas"] == 3


def test_a_checkpoint_without_its_witnesses_is_refused(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    (made.folder / manifests.WITNESSES_FILE).unlink()
    with pytest.raises(SwarmError, match=manifests.WITNESSES_FILE):
        verify_folder(made.folder, made.run_id)
