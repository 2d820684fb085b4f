"""The researcher's commands: what they accept, what they print, and that errors keep their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from swarm.cli import download, researcher
from swarm.cli.download import parse_invite_at_round, parse_run
from swarm.cli.generate import generate
from swarm.errors import ConfigError, DataError, DigestError, InviteError, SwarmError, VerificationError
from swarm.invite import Invite
from tests.checkpoint_samples import SignedCheckpoint, small_checkpoint

INVITE = Invite(run_id=b"r" * 20, tls_pin=b"t" * 32, addresses=("localhost:1",))
TEXT = INVITE.encode()

app = typer.Typer()
for command in (researcher.checkpoints, download.download, download.verify, generate):
    app.command()(command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    return small_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(("text", "round_number"), [(TEXT, 0), (f"{TEXT}@1", 1), (f" {TEXT}@0000120\n", 120)])
def test_a_round_may_follow_an_invite(text: str, round_number: int) -> None:
    assert parse_invite_at_round(text) == (INVITE, round_number)


BAD_ROUNDS = {
    "empty": f"{TEXT}@",
    "zero": f"{TEXT}@0",
    "negative": f"{TEXT}@-1",
    "a word": f"{TEXT}@newest",
    "two": f"{TEXT}@1@2",
    "huge": f"{TEXT}@{10**30}",
    "other digits": f"{TEXT}@١",
}


@pytest.mark.parametrize("text", BAD_ROUNDS.values(), ids=BAD_ROUNDS.keys())
def test_what_is_no_round_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="is no round"):
        parse_invite_at_round(text)


def test_a_damaged_invite_is_an_invite_error() -> None:
    for text in (TEXT[:-1], f"{TEXT[:-1]}@5", "nonsense"):
        with pytest.raises(InviteError):
            parse_invite_at_round(text)
        with pytest.raises(InviteError):
            parse_run(text)


def test_a_run_is_named_by_its_id_or_its_invite() -> None:
    assert parse_run(None) is None
    assert parse_run("72" * 20) == parse_run(TEXT) == b"r" * 20


def test_verify_prints_the_run_and_asks_to_compare_it(made: SignedCheckpoint) -> None:
    result = run("verify", made.folder)
    assert result.exit_code == 0
    assert made.run_id.hex() in result.stdout
    assert "every byte and signature is right" in result.stdout
    assert "Compare the run id" in result.stdout
    assert "Compare the run id" not in run("verify", made.folder, "--run", made.run_id.hex()).stdout


def test_verify_prints_json_also_where_something_is_wrong(made: SignedCheckpoint) -> None:
    assert json.loads(run("verify", made.folder, "--json").stdout)["ok"] is True
    (made.folder / "config.json").write_text("{}")
    result = run("verify", made.folder, "--json")
    assert isinstance(result.exception, DigestError)
    assert "config.json has 2 bytes" in json.loads(result.stdout)["problems"][0]


def test_verify_warns_about_unlisted_files_on_stderr(made: SignedCheckpoint) -> None:
    (made.folder / "notes.md").write_text("mine")
    result = run("verify", made.folder, "--json")
    assert "warning: notes.md is not part of the checkpoint" in result.stderr
    assert json.loads(result.stdout)["warnings"] == ["notes.md is not part of the checkpoint"]


BAD_VERIFICATIONS: dict[str, tuple[list[str], type[SwarmError]]] = {
    "another run": (["--run", "00" * 20], VerificationError),
    "another run's invite": (["--run", TEXT], VerificationError),
    "no run at all": (["--run", "xyz"], InviteError),
}


@pytest.mark.parametrize(("options", "error"), BAD_VERIFICATIONS.values(), ids=BAD_VERIFICATIONS.keys())
def test_verify_refuses_another_run(made: SignedCheckpoint, options: list[str], error: type[SwarmError]) -> None:
    assert isinstance(run("verify", made.folder, *options).exception, error)


def test_a_folder_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    assert isinstance(run("verify", tmp_path / "absent").exception, DataError)
    assert isinstance(run("generate", tmp_path / "absent", "text").exception, DataError)


def test_generate_checks_its_options_before_anything_is_read(tmp_path: Path) -> None:
    assert isinstance(run("generate", tmp_path / "absent", "text", "--top-p", "2").exception, ConfigError)


class Coordinator:
    """What `swarm checkpoints` asks a coordinator for."""

    async def get_run(self) -> Any:
        return type("Run", (), {"spec": type("Spec", (), {"name": "sample"})})

    async def checkpoints(self) -> list[Any]:
        from swarm.proto.coordinator_pb2 import CheckpointInfo

        nan = float("nan")
        infos = [(20, 2.5, b"\xab" * 32), (10, nan, b"\xcd" * 32)]
        return [
            CheckpointInfo(
                round=number,
                size_bytes=5_000_000,
                validation_loss=loss,
                manifest_digest=digest,
                published_unix_ms=1_700_000_000_000,
            )
            for number, loss, digest in infos
        ]

    async def close(self) -> None:
        pass


def test_checkpoints_lists_rounds_newest_first_as_table_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    from peer.coordinator_client import CoordinatorClient

    async def connect(invite: Invite) -> Coordinator:
        return Coordinator()

    monkeypatch.setattr(CoordinatorClient, "connect", connect)
    table = run("checkpoints", TEXT).stdout
    assert "sample: 2 checkpoints" in table
    assert "2023-11-14 22:13:20" in table and "5.0 MB" in table and "abababababababab" in table
    listing = json.loads(run("checkpoints", TEXT, "--json").stdout)
    assert [entry["round"] for entry in listing["checkpoints"]] == [20, 10]
    assert [entry["validation_loss"] for entry in listing["checkpoints"]] == [2.5, None]


def test_a_model_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch, made: SignedCheckpoint) -> None:
    from peer.checkpoints import generate as generation

    monkeypatch.setattr(generation, "generate", lambda *arguments: iter(["a\n", "\x1b[2J\x07", "é"]))
    assert run("generate", made.folder, "text").stdout == "a\n\x1b[2J\x07é\n"
    monkeypatch.setattr(researcher.output, "is_terminal", lambda stream=None: stream is None)
    assert run("generate", made.folder, "text").stdout == "a\n�[2J�é\n"
