"""Verification: no flipped byte, no missing, extra or foreign file gets through."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from peer.checkpoints import evaluations
from peer.checkpoints.checkpoint import describe_file, write_signed
from peer.checkpoints.forms import header_problem
from peer.checkpoints.recording import add_record
from peer.checkpoints.verify import verify_folder
from swarm import manifest as manifests
from swarm import run_spec
from swarm.cli import main
from swarm.errors import DataError, DigestError, SignatureError, SwarmError, VerificationError
from swarm.identity import Identity
from swarm.proto.common_pb2 import Signed
from swarm.run_record import Energy, RunRecord
from tests.checkpoint_samples import (
    ORGANIZER,
    PUBLISHER,
    SignedCheckpoint,
    evaluation,
    make_parts,
    publication_of,
    signed_checkpoint,
    small_checkpoint,
)


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    return small_checkpoint(tmp_path / "c")


def fails(folder: Path, run_id: bytes | None) -> str:
    """Why the folder does not verify; fails the test when it does."""
    with pytest.raises(SwarmError) as caught:
        verify_folder(folder, run_id).require_ok()
    assert isinstance(caught.value, (VerificationError, DataError))
    return str(caught.value)


def exit_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def re_sign(made: SignedCheckpoint, **changes: object) -> None:
    """Let the publication key sign a changed manifest over what lies in the folder."""
    names = [file.name for file in made.manifest.files]
    files = tuple(describe_file(made.folder / name) for name in names)
    manifest = made.manifest.model_copy(update={"files": files, **changes})
    write_signed(made.folder, publication_of(manifest.canonical_bytes(), made.run_id), made.signed_spec)


def test_a_good_folder_verifies_with_and_without_the_run_id(made: SignedCheckpoint) -> None:
    for run_id in (made.run_id, None):
        report = verify_folder(made.folder, run_id)
        assert report.ok
        assert report.provenance.run_id == made.run_id
        assert report.as_json()["organizer_key"] == ORGANIZER.public_key.hex()
        assert report.warnings == ()


def test_the_report_is_plain_json(made: SignedCheckpoint) -> None:
    assert json.loads(json.dumps(verify_folder(made.folder, None).as_json()))["round"] == 10


def test_progress_hears_of_every_byte(made: SignedCheckpoint) -> None:
    counts: list[int] = []
    verify_folder(made.folder, None, counts.append)
    assert sum(counts) == made.manifest.size_bytes


@pytest.mark.parametrize("seed", range(4))
def test_any_flipped_bit_in_any_file_is_noticed(made: SignedCheckpoint, seed: int) -> None:
    rng = random.Random(seed)
    for path in sorted(made.folder.iterdir()):
        good = path.read_bytes()
        for position in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(15))}:
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            for run_id in (made.run_id, None):
                fails(made.folder, run_id)
        path.write_bytes(good)
    assert verify_folder(made.folder, made.run_id).ok


def test_any_flipped_bit_in_a_record_or_in_what_was_measured_is_noticed(
    made: SignedCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: an evaluation lies beside the checkpoint, and keeps nobody from using that."""
    energy = Energy(devices=(), kwh=0, co2_kg=0, unknown_tokens=0, method="none")
    raw = RunRecord(round=10, num_peers=1, energy=energy).canonical_bytes()
    manifest = add_record(made.folder, make_parts(num_values=1000), made.manifest, raw)
    changed = replace(made, publication=publication_of(manifest.canonical_bytes(), made.run_id))
    write_signed(made.folder, changed.publication, made.signed_spec)
    evaluations.record(made.folder, evaluation(changed, 0.5), Identity(b"a" * 32))
    rng = random.Random(0)
    paths = [made.folder / "run-record.json", *sorted((made.folder / "evaluations").iterdir())]
    assert len(paths) == 3 and exit_of("verify", made.folder) == 0
    for path in paths:
        good = path.read_bytes()
        for position in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(10))}:
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            assert exit_of("verify", made.folder) == 76
            assert path.stem in capsys.readouterr().err
            assert verify_folder(made.folder, made.run_id).ok == (path.parent != made.folder)
        path.write_bytes(good)
    assert exit_of("verify", made.folder) == 0


@pytest.mark.parametrize("cut", [0, 1, 100], ids=lambda cut: f"{cut} bytes left")
def test_a_truncated_file_is_noticed_in_every_file(made: SignedCheckpoint, cut: int) -> None:
    for path in sorted(made.folder.iterdir()):
        good = path.read_bytes()
        if len(good) > cut:
            path.write_bytes(good[:cut])
            assert path.name in fails(made.folder, made.run_id)
            path.write_bytes(good)


def test_a_longer_file_is_noticed_in_every_file(made: SignedCheckpoint) -> None:
    for path in sorted(made.folder.iterdir()):
        good = path.read_bytes()
        path.write_bytes(good + b"\x2a\x01x")  # also an unknown protobuf field behind a signature
        fails(made.folder, made.run_id)
        path.write_bytes(good)


def test_a_missing_file_is_noticed_in_every_file(made: SignedCheckpoint) -> None:
    for path in sorted(made.folder.iterdir()):
        good = path.read_bytes()
        path.unlink()
        assert path.name in fails(made.folder, made.run_id)
        path.write_bytes(good)


def test_a_flipped_byte_is_reported_with_file_and_chunk(tmp_path: Path) -> None:
    made = signed_checkpoint(tmp_path / "c", make_parts())
    with open(made.folder / "model.safetensors", "r+b") as file:
        file.seek((4 << 20) + 5)
        file.write(b"\x00\x00\x00\x00")
    problems = verify_folder(made.folder, made.run_id).problems
    assert problems == ("model.safetensors is damaged in chunk 1 (from byte 4194304)",)


EXTRAS = {
    "weights": ("extra.safetensors", True),
    "pickle": ("pytorch_model.bin", True),
    "config": ("adapter_config.json", True),
    "code": ("modeling_evil.py", True),
    "capitals": ("EXTRA.JSON", True),
    "notes": ("notes.md", False),
    "dot file": (".gitattributes", False),
}


@pytest.mark.parametrize(("name", "is_error"), EXTRAS.values(), ids=EXTRAS.keys())
def test_an_unlisted_file_is_an_error_where_a_loader_might_read_it(
    made: SignedCheckpoint, name: str, is_error: bool
) -> None:
    (made.folder / name).write_bytes(b"{}")
    report = verify_folder(made.folder, made.run_id)
    assert report.ok is not is_error
    assert any(name in line for line in (report.problems if is_error else report.warnings))


def link_elsewhere(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("replace", [link_elsewhere, pipe, folder])
@pytest.mark.parametrize("name", ["config.json", manifests.MANIFEST_FILE, manifests.SPEC_FILE])
def test_a_file_that_is_no_regular_file_is_refused(
    made: SignedCheckpoint, name: str, replace: Callable[[Path], None]
) -> None:
    replace(made.folder / name)
    assert name in fails(made.folder, made.run_id)


def test_an_unlisted_link_is_refused(made: SignedCheckpoint) -> None:
    (made.folder / "link").symlink_to("/etc/hostname")
    assert "link is not part" in fails(made.folder, made.run_id)


def test_another_run_id_is_refused(made: SignedCheckpoint) -> None:
    assert "not the one" in fails(made.folder, b"x" * 20)


def test_a_spec_that_the_organizer_did_not_sign_is_refused(made: SignedCheckpoint) -> None:
    payload = made.signed_spec.payload
    forged = PUBLISHER.sign(run_spec.CONTEXT, made.run_id, payload)
    for spec in (forged, Signed(signer=made.signed_spec.signer, payload=payload, signature=forged.signature)):
        write_signed(made.folder, made.publication, spec)
        fails(made.folder, made.run_id)
        fails(made.folder, None)


def test_a_manifest_signed_by_another_key_is_refused(made: SignedCheckpoint) -> None:
    payload = made.manifest.canonical_bytes()
    write_signed(made.folder, publication_of(payload, made.run_id, publisher=ORGANIZER), made.signed_spec)
    assert "another key" in fails(made.folder, made.run_id)


def test_files_of_two_rounds_cannot_be_mixed(made: SignedCheckpoint, tmp_path: Path) -> None:
    other = small_checkpoint(tmp_path / "other", round_number=11)
    shutil.copy(other.folder / "model.safetensors", made.folder / "model.safetensors")
    assert "model.safetensors" in fails(made.folder, made.run_id)
    shutil.copy(other.folder / manifests.MANIFEST_FILE, made.folder / manifests.MANIFEST_FILE)
    with pytest.raises(SignatureError):
        verify_folder(made.folder, made.run_id)


CONTRADICTIONS = {
    "another data manifest": {"data_manifest_digest": "0" * 64},
    "another name": {"run_name": "other"},
}


@pytest.mark.parametrize("changes", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_signed_manifest_that_contradicts_the_spec_is_refused(
    made: SignedCheckpoint, changes: dict[str, object]
) -> None:
    re_sign(made, **changes)
    fails(made.folder, made.run_id)


SIGNED_NONSENSE = {
    "tokenizer of another run": ("tokenizer.json", b'{"added_tokens": []}', "not the tokenizer"),
    "config with code": ("config.json", b'{"auto_map": {"AutoModelForCausalLM": "x.Y"}}', "auto_map"),
    "config that is a list": ("config.json", b"[]", "no table"),
    "config that is no JSON": ("config.json", b"{", "not JSON"),
    "deep config": ("config.json", b"[" * 100_000, "not JSON"),
    "index that leaves the folder": ("config.json", b'{"weight_map": {"w": "../../x.safetensors"}}', "outside"),
    "empty weights": ("model.safetensors", b"", "header"),
    "weights with a huge header": ("model.safetensors", b"\xff" * 8 + b"{}", "header is longer"),
    "weights that are a pickle": ("model.safetensors", b"\x80\x04\x95" + b"x" * 100, "header is longer"),
}


@pytest.mark.parametrize(("name", "data", "reason"), SIGNED_NONSENSE.values(), ids=SIGNED_NONSENSE.keys())
def test_nonsense_is_refused_although_the_publication_key_signed_it(
    made: SignedCheckpoint, name: str, data: bytes, reason: str
) -> None:
    (made.folder / name).write_bytes(data)
    re_sign(made)
    assert reason in fails(made.folder, made.run_id)


def test_a_folder_that_is_no_checkpoint_is_a_data_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="is no checkpoint"):
            verify_folder(path, None)


def test_a_huge_signature_file_is_refused_before_it_is_parsed(made: SignedCheckpoint) -> None:
    with open(made.folder / manifests.SPEC_FILE, "r+b") as file:
        file.truncate(10 << 20)
    assert "larger than" in fails(made.folder, made.run_id)


def test_the_first_of_many_problems_is_told_with_their_number(made: SignedCheckpoint) -> None:
    (made.folder / "config.json").unlink()
    (made.folder / "tokenizer.json").unlink()
    with pytest.raises(DigestError, match=r"config.json is missing \(and 1 more\)"):
        verify_folder(made.folder, None).require_ok()


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[object, bool]] = {
    "one tensor": ({"a": tensor()}, True),
    "metadata": ({"__metadata__": {"format": "pt"}, "a": tensor()}, True),
    "two tensors": ({"a": tensor("U8", [3], [0, 3]), "b": tensor("U8", [5], [3, 8])}, True),
    "empty tensor": ({"a": tensor(), "b": tensor("F32", [0], [8, 8])}, True),
    "a list": ([], False),
    "hole": ({"a": tensor("U8", [3], [0, 3]), "b": tensor("U8", [4], [4, 8])}, False),
    "overlap": ({"a": tensor(), "b": tensor()}, False),
    "too short": ({"a": tensor("F32", [1], [0, 4])}, False),
    "beyond the file": ({"a": tensor("F32", [3], [0, 12])}, False),
    "shape and size differ": ({"a": tensor("F32", [3], [0, 8])}, False),
    "unknown type": ({"a": tensor("PICKLE")}, False),
    "negative": ({"a": tensor("F32", [-2], [8, 0])}, False),
    "no numbers": ({"a": tensor("F32", ["2"], [0, 8])}, False),
    "booleans": ({"a": tensor("U64", [True], [False, 8])}, False),
    "three offsets": ({"a": tensor("F32", [2], [0, 8, 8])}, False),
    "many dimensions": ({"a": tensor("F32", [1] * 100, [0, 4])}, False),
    "no table": ({"a": 3}, False),
}


@pytest.mark.parametrize(("header", "is_sound"), HEADERS.values(), ids=HEADERS.keys())
def test_safetensors_headers_must_describe_the_file_exactly(header: object, is_sound: bool) -> None:
    assert (header_problem(json.dumps(header).encode(), 8) is None) is is_sound
