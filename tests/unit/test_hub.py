"""`swarm push` against a local stand-in of the Hub, and `swarm sign` against the tool that it signs for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peer.checkpoints import hub, model_signature
from peer.checkpoints.evaluations import record
from peer.checkpoints.verify import verify_folder
from swarm.digest import sha256
from swarm.errors import ConfigError, DataError, NetworkError, VerificationError
from swarm.identity import Identity
from swarm.manifest import MANIFEST_FILE, SIGNATURE_FILE, SPEC_FILE, WITNESSES_FILE
from tests.checkpoint_samples import SignedCheckpoint, evaluation, small_checkpoint
from tests.hub_server import TOKEN, Hub, hub_server

REPOSITORY = "volunteers/sample"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with hub_server() as server:
        yield server


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    return small_checkpoint(tmp_path / "c")


def test_every_file_of_a_checkpoint_is_uploaded_as_it_is_and_nothing_else(
    fake: Hub, made: SignedCheckpoint, tmp_path: Path
) -> None:
    measured, _ = record(made.folder, evaluation(made, 0.25), Identity.generate())
    altered, _ = record(made.folder, evaluation(made, 0.5), Identity.generate())
    altered.write_text("{}")
    model_signature.sign(made.folder, model_signature.load_or_create_key(tmp_path / "key.pem"))
    private = (".hidden", "notes/private.md", ".ssh/keys.json", "evaluations/a.json", "evaluations/old/b.json")
    for name in (*private, "evaluations/forged.sig"):
        (made.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made.folder / name).write_text("{}")
    pushed = hub.describe_folder(made.folder, made.run_id)
    hub.push(made.folder, pushed, hub.PushOptions(repository=REPOSITORY, endpoint=fake.url))
    assert fake.messages == [f"Add {pushed.summary}"] and "round 10" in pushed.summary
    signed = {MANIFEST_FILE, SIGNATURE_FILE, SPEC_FILE, WITNESSES_FILE, "model.sig"}
    measurement = {f"evaluations/{measured.stem}{ending}" for ending in (".json", ".sig")}
    assert set(fake.files(REPOSITORY)) == {file.name for file in made.manifest.files} | signed | measurement
    for name, content in fake.files(REPOSITORY).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert fake.card == (made.folder / "README.md").read_text()
    assert verify_folder(tmp_path / "copy", made.run_id).ok


def test_a_damaged_checkpoint_is_not_pushed(made: SignedCheckpoint) -> None:
    weights = made.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(VerificationError):
        hub.describe_folder(made.folder, None)


ORIGIN = {"run_name": "r", "round": 3, "dtype": "bf16", "manifest_digest": "a" * 64}


def test_a_derived_set_is_checked_against_its_own_list(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    origin = {**ORIGIN, "files": {"w.safetensors": sha256(b"weights").hex()}}
    (tmp_path / "origin.json").write_text(json.dumps(origin))
    (tmp_path / "notes.md").write_text("private")
    pushed = hub.describe_folder(tmp_path, None)
    assert "bf16" in pushed.summary and set(pushed.names) == {"w.safetensors", "origin.json"}
    (tmp_path / "w.safetensors").write_bytes(b"weighed")
    with pytest.raises(VerificationError):
        hub.describe_folder(tmp_path, None)


@pytest.mark.parametrize("name", ["../w", "*", "[a-z]*", ".env.json", "a/b", "a\\", ""])
def test_a_derived_set_cannot_list_what_is_no_plain_file_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "origin.json").write_text(json.dumps({**ORIGIN, "files": {name: "a" * 64}}))
    with pytest.raises(DataError, match="no plain file"):
        hub.describe_folder(tmp_path, None)


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither"):
        hub.describe_folder(tmp_path, None)


@pytest.mark.parametrize(("status", "error"), [(401, ConfigError), (403, ConfigError), (500, NetworkError)])
def test_refusals_are_named(fake: Hub, made: SignedCheckpoint, status: int, error: type[Exception]) -> None:
    fake.refuse = status
    with pytest.raises(error):
        hub.push(
            made.folder,
            hub.Pushed(summary="x", names=("config.json",)),
            hub.PushOptions(repository=REPOSITORY, endpoint=fake.url),
        )


@pytest.mark.parametrize("text", ["org/name", "hf://name", "hf://a/b/c", "hf://../x", "https://x/y", "hf://a/b?c"])
def test_what_is_no_repository_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        hub.parse_target(text)


def model_signing(folder: Path, public: Path) -> subprocess.CompletedProcess[str]:
    command = ["verify", "key", str(folder), "--signature", str(folder / "model.sig"), "--public_key", str(public)]
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *command], capture_output=True, text=True, timeout=120
    )


def test_model_signing_verifies_what_is_signed_and_refuses_a_flipped_byte(
    made: SignedCheckpoint, tmp_path: Path
) -> None:
    key = model_signature.load_or_create_key(tmp_path / "keys" / "key.pem")
    (tmp_path / "key.pub").write_bytes(model_signature.public_pem(key))
    model_signature.sign(made.folder, key)
    (made.folder / "evaluations").mkdir()
    (made.folder / "evaluations" / "later.json").write_text("{}")
    good = model_signing(made.folder, tmp_path / "key.pub")
    assert good.returncode == 0, good.stdout + good.stderr
    damaged = Path(shutil.copytree(made.folder, tmp_path / "d"))
    raw = bytearray((damaged / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(raw)
    bad = model_signing(damaged, tmp_path / "key.pub")
    assert bad.returncode != 0 and "model.safetensors" in bad.stdout + bad.stderr


def test_a_signed_checkpoint_still_verifies_with_us(made: SignedCheckpoint, tmp_path: Path) -> None:
    model_signature.sign(made.folder, model_signature.load_or_create_key(tmp_path / "key.pem"))
    report = verify_folder(made.folder, made.run_id)
    assert (report.ok, report.warnings) == (True, ())


def test_a_signing_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "key.pem"
    first = model_signature.public_pem(model_signature.load_or_create_key(path))
    assert model_signature.public_pem(model_signature.load_or_create_key(path)) == first
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        model_signature.load_or_create_key(path)
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(ConfigError, match="no key that can be used"):
        model_signature.load_or_create_key(path)


def test_links_are_not_signed(made: SignedCheckpoint) -> None:
    (made.folder / "link.txt").symlink_to(made.folder / "config.json")
    with pytest.raises(DataError, match=r"link\.txt"):
        model_signature.statement(made.folder)
