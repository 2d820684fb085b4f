"""`swarm audit` by invite: what a run published is audited without a folder, by what seed peers serve."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from coordinator.checkpoint_files import CheckpointFiles
from peer.checkpoints.verify import read_provenance
from peer.coordinator_client import CoordinatorClient, RunInfo
from swarm.cli import audit, reaching
from swarm.errors import ConfigError, NotFound, VerificationError
from swarm.invite import Invite
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication
from tests.checkpoint_samples import ORGANIZER, PUBLISHER
from tests.metadata_samples import Repository
from tests.unit.test_audit import CHECKPOINTS, VOTER, Run
from tests.unit.test_collecting import DONOR, Donor

app = typer.Typer()
app.command()(audit.audit)


class SeedPeer(Donor):
    """Answers under the key that the genesis names."""

    async def call(self, peer: bytes, method: str, request: bytes, **limits: Any) -> bytes:
        return await super().call(DONOR if peer == VOTER.public_key else b"", method, request, **limits)


@dataclass
class Coordinator:
    """What an auditor asks of the coordinator."""

    run: Run

    async def get_run(self) -> RunInfo:
        folder, archive = self.run.checkpoint(CHECKPOINTS[0]), SeedPeer(self.run).archive
        return RunInfo(
            spec=self.run.parts.spec,
            signed_spec=read_provenance(folder, None).signed_spec,
            genesis=archive.genesis,
            signed_genesis=Signed.FromString((self.run.archive / "genesis.sig").read_bytes()),
            seed_addresses=(),
            manifest_bytes=b"",
            tokenizer_bytes=b"",
            clock_offset_s=0.0,
        )

    async def metadata(self) -> dict[str, bytes]:
        repository = Repository(self.run.parts.spec, (ORGANIZER,), PUBLISHER)
        for number in CHECKPOINTS:
            repository.publish(await self.checkpoint(number), number)
        return repository.files

    async def checkpoint(self, round_number: int) -> Publication:
        return read_provenance(self.run.checkpoint(round_number), None).publication

    async def mirrors(self) -> tuple[str, ...]:
        return ()

    async def chunk(self, digest: bytes, offset: int, length: int) -> bytes:
        files = CheckpointFiles(self.run.folder, self.run.parts.run_id, self.run.parts.spec)
        return files.piece(digest, offset, length)

    async def close(self) -> None:
        pass


@pytest.fixture
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def audit_by_invite(run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str, at: str = "") -> Result:
    async def connect(_invite: Invite) -> Coordinator:
        return Coordinator(run)

    @asynccontextmanager
    async def network(*_arguments: object) -> AsyncIterator[SeedPeer]:
        yield SeedPeer(run)

    monkeypatch.setattr(CoordinatorClient, "connect", connect)
    for module in (audit, reaching):
        monkeypatch.setattr(module, "network", network)
    invite = Invite(run_id=run.parts.run_id, tls_pin=b"t" * 32, addresses=("localhost:1",)).encode()
    return CliRunner().invoke(app, [invite + at, *arguments])


def test_a_round_is_audited_by_invite_from_the_genesis_or_from_an_earlier_round(
    tmp_path: Path, data_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path).make()
    for at, start, first, last in (("@4", (), 0, 4), ("", ("--from", "2"), 2, 6)):
        result = audit_by_invite(run, monkeypatch, *start, "--json", at=at)
        assert result.exception is None, result.exception
        found = json.loads(result.stdout)
        assert (found["outcome"], found["from_round"], found["equal_to"]) == ("equal", first, last)
        assert found["folder"] is None
    told = audit_by_invite(run, monkeypatch, "--from", str(run.checkpoint(4))).stdout
    assert "round 6 of sample: equal" in told and "state that its witnesses signed" in told
    assert len(list(data_home.glob("**/audits/*/momentum-*"))) == 2


def test_a_lie_and_a_gap_are_told_by_round_over_the_network_too(
    tmp_path: Path, data_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path).make(lie_at=3)
    result = audit_by_invite(run, monkeypatch, "--from", "2", "--json")
    assert isinstance(result.exception, VerificationError) and json.loads(result.stdout)["differs_at"] == 3
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "of another auditor"))
    run.average_of(5).unlink()
    result = audit_by_invite(run, monkeypatch, "--from", "4", "--json")
    assert isinstance(result.exception, NotFound) and json.loads(result.stdout)["missing"] == [5, 5]


def test_a_start_that_is_not_before_the_round_or_a_run_that_is_another_is_refused_before_anything_is_fetched(
    tmp_path: Path, data_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path).make()
    for arguments, words in ((("--from", "6"), "earlier"), (("--run", "a" * 40), "another run")):
        result = audit_by_invite(run, monkeypatch, *arguments, at="@4")
        assert isinstance(result.exception, ConfigError) and words in str(result.exception)
