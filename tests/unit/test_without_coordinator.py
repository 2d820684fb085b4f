"""A coordinator that is away: what the commands of a researcher still tell, and mend, from a mirror alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from coordinator.checkpoint_files import PublishedFolder
from coordinator.mirroring import write_mirror
from peer.checkpoints.checkpoint import assemble, write_signed
from peer.checkpoints.recording import add_record
from peer.coordinator_client import CoordinatorClient
from swarm import evaluation as evaluations
from swarm import run_spec
from swarm.cli import download, leaderboard, researcher
from swarm.digest import sha256
from swarm.errors import DigestError, PinError, RefusedCheckpoint, SwarmError, Unreachable, VerificationError
from swarm.identity import Identity
from swarm.invite import Invite
from swarm.manifest import SPEC_FILE
from swarm.run_record import Energy, RunRecord
from swarm.storage import Storage
from tests.checkpoint_samples import (
    ORGANIZER,
    SignedCheckpoint,
    evaluation,
    invite_to,
    make_parts,
    publication_of,
    small_checkpoint,
)
from tests.metadata_samples import mirror_metadata

ANNA, BORIS = Identity(b"a" * 32), Identity(b"b" * 32)

app = typer.Typer()
for command in (researcher.checkpoints, leaderboard.leaderboard, download.download, download.verify):
    app.command()(command)


class Mirror:
    """Rounds 10 and 20 of a run; the record of round 20 carries what Anna measured of round 10."""

    def __init__(self, folder: Path) -> None:
        self.www, self.home = folder / "www", folder / "home"
        first = self.publish(10)
        told = evaluation(first, 0.25).canonical_bytes()
        by_boris = evaluation(first, 0.75).model_copy(update={"manifest_digest": "b" * 64}).canonical_bytes()
        texts = [
            evaluations.encode(who.sign("evaluation", first.run_id, payload))
            for who, payload in ((ANNA, told), (BORIS, by_boris))
        ]
        self.made = {10: first, 20: self.publish(20, validation_loss=3.5, evaluations=tuple(texts))}
        self.run_id = first.run_id
        mirror_metadata(self.www, make_parts().spec, self.made)

    def publish(self, number: int, **about: Any) -> SignedCheckpoint:
        parts = make_parts(number, num_values=1000)
        folder = self.home / f"checkpoint-{number}"
        manifest = assemble(folder, parts)
        if about:
            energy = Energy(devices=(), kwh=0, co2_kg=0, unknown_tokens=0, method="none")
            record = RunRecord(round=number, num_peers=2, energy=energy, **about)
            manifest = add_record(folder, parts, manifest, record.canonical_bytes())
        signed_spec = ORGANIZER.sign(run_spec.CONTEXT, parts.run_id, parts.spec.canonical_bytes())
        publication = publication_of(manifest.canonical_bytes(), parts.run_id)
        write_signed(folder, publication, signed_spec)
        write_mirror(Storage(f"file://{self.www}"), PublishedFolder(path=folder, manifest=manifest))
        return SignedCheckpoint(folder, manifest, parts.run_id, signed_spec, publication)

    @property
    def url(self) -> str:
        return f"file://{self.www}"

    @property
    def invite(self) -> str:
        return invite_to(self.run_id)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    away(monkeypatch, Unreachable("no coordinator answers"))
    return Mirror(tmp_path)


def away(monkeypatch: pytest.MonkeyPatch, error: SwarmError) -> None:
    async def connect(_invite: Invite) -> CoordinatorClient:
        raise error

    monkeypatch.setattr(CoordinatorClient, "connect", connect)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exception is None, result.exception
    assert result.stderr.count("no coordinator answers; asking mirrors") <= 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_checkpoints_are_listed_by_a_mirrors_metadata_and_manifests(mirror: Mirror) -> None:
    listing = run_json("checkpoints", mirror.invite, "--mirror", mirror.url)
    newest, first = listing["checkpoints"]
    assert (newest["round"], newest["validation_loss"], newest["num_evaluations"]) == (20, 3.5, 0)
    assert (first["round"], first["validation_loss"], first["num_evaluations"]) == (10, None, 1)
    manifest = mirror.made[10].manifest
    assert (first["size_bytes"], first["total_tokens"]) == (manifest.size_bytes, 500)
    assert first["manifest_digest"] == sha256(manifest.canonical_bytes()).hex()
    assert first["published_unix_ms"] is None
    result = run("checkpoints", mirror.invite, "--mirror", mirror.url)
    assert "2 checkpoints" in result.stdout and "asking mirrors what is published" in result.stderr


def test_a_checkpoint_that_the_mirror_lacks_is_listed_by_its_digest(mirror: Mirror) -> None:
    (mirror.www / "checkpoint-10" / "swarm-manifest.json").unlink()
    first = run_json("checkpoints", mirror.invite, "--mirror", mirror.url)["checkpoints"][1]
    assert (first["round"], first["size_bytes"], first["total_tokens"]) == (10, None, None)
    assert run("checkpoints", mirror.invite, "--mirror", mirror.url).exception is None


def test_the_leaderboard_has_losses_of_records_and_evaluations_that_later_records_carry(mirror: Mirror) -> None:
    first, newest = run_json("leaderboard", mirror.invite, "--mirror", mirror.url)["checkpoints"]
    assert (first["round"], first["scores"]) == (10, {"tiny acc (5-shot)": 0.25})
    assert first["measured_by"] == [ANNA.peer_id], "what is of another manifest is left out"
    assert (newest["round"], newest["scores"]) == (20, {"validation loss": 3.5})
    told = run("leaderboard", mirror.invite, "--mirror", mirror.url).stderr
    assert "only evaluations that later checkpoints" in told


def test_a_folder_is_verified_and_repaired_by_invite_from_a_mirror(mirror: Mirror, tmp_path: Path) -> None:
    folder = Path(run_json("download", mirror.invite, "--out", tmp_path / "got", "--mirror", mirror.url)["folder"])
    assert run_json("verify", folder, "--run", mirror.invite)["ok"]
    raw = bytearray((folder / "config.json").read_bytes())
    raw[3] ^= 1
    (folder / "config.json").write_bytes(raw)
    (folder / "swarm-manifest.sig").unlink()
    repairing = ("verify", folder, "--repair", "--run", f"{mirror.invite}@20")
    assert isinstance(run(*repairing).exception, Unreachable), "no mirror is known"
    assert run_json(*repairing, "--mirror", mirror.url)["ok"]
    (folder / "config.json").write_bytes(raw)
    assert run_json("verify", folder, "--repair", "--run", mirror.invite, "--mirror", mirror.url)["ok"]


def spoil_manifest(www: Path) -> None:
    path = www / "checkpoint-10" / "swarm-manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"round": 10', b'"round": 11'))


def spoil_record(www: Path) -> None:
    path = www / "checkpoint-20" / "run-record.json"
    path.write_bytes(path.read_bytes().replace(b"3.5", b"1.5"))


def another_run(www: Path) -> None:
    other = small_checkpoint(www.parent / "other", name="other")
    (www / "metadata" / SPEC_FILE).write_bytes(other.signed_spec.SerializeToString())


LIES: dict[str, tuple[Callable[[Path], None], type[SwarmError]]] = {
    "another manifest": (spoil_manifest, VerificationError),
    "another record": (spoil_record, DigestError),
    "another run": (another_run, RefusedCheckpoint),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["checkpoints", "leaderboard"])
def test_a_mirror_that_lies_is_refused_and_the_next_one_asked(
    mirror: Mirror, tmp_path: Path, name: str, lie: str
) -> None:
    honest = Mirror(tmp_path / "honest")
    LIES[lie][0](mirror.www)
    assert isinstance(run(name, mirror.invite, "--mirror", mirror.url).exception, LIES[lie][1])
    found = run_json(name, mirror.invite, "--mirror", mirror.url, "--mirror", honest.url)
    assert len(found["checkpoints"]) == 2


@pytest.mark.parametrize("name", ["checkpoints", "leaderboard"])
def test_without_a_mirror_or_with_another_key_in_its_place_the_coordinators_error_stands(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert isinstance(run(name, mirror.invite).exception, Unreachable)
    away(monkeypatch, PinError("another key answers"))
    assert isinstance(run(name, mirror.invite, "--mirror", mirror.url).exception, PinError)
