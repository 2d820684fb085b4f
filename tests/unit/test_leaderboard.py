"""`swarm leaderboard`: runs and folders side by side, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from peer.checkpoints.evaluations import record
from peer.checkpoints.leaderboard import (
    VALIDATION_LOSS,
    Row,
    merged,
    metrics_of,
    plot,
    rows_of_listing,
    scores_of,
    told_evaluations,
    with_evaluations,
)
from peer.coordinator_client import CoordinatorClient
from swarm.cli.evaluate import evaluate
from swarm.cli.leaderboard import leaderboard
from swarm.digest import sha256
from swarm.errors import ConfigError
from swarm.evaluation import Evaluation, SignedEvaluation
from swarm.identity import Identity
from swarm.invite import Invite
from swarm.proto.common_pb2 import Signed
from swarm.proto.coordinator_pb2 import CheckpointInfo
from tests.checkpoint_samples import SignedCheckpoint, evaluation, small_checkpoint

app = typer.Typer()
app.command()(leaderboard)


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    return small_checkpoint(tmp_path / "c")


def by(signer: int, found: Evaluation) -> SignedEvaluation:
    return SignedEvaluation(name="", signer=bytes([signer]) * 32, evaluation=found)


def test_a_score_is_the_median_of_whole_evaluations_and_limited_ones_count_only_alone(made: SignedCheckpoint) -> None:
    name = "tiny acc (5-shot)"

    def scores(*values: float, **changes: Any) -> dict[str, float]:
        return scores_of([by(number, evaluation(made, value, **changes)) for number, value in enumerate(values)])

    limited = by(9, evaluation(made, 0.9, limit=2))
    whole = [by(number, evaluation(made, value)) for number, value in enumerate((0.2, 0.4))]
    assert scores_of([*whole, limited]) == {name: pytest.approx(0.3)}
    assert scores(0.2, 0.3, 99.0) == {name: 0.3}
    assert scores_of([limited]) == {name: 0.9}


def test_scores_of_the_rounded_set_stand_beside_those_of_the_checkpoint_and_move_none(made: SignedCheckpoint) -> None:
    of_bf16 = evaluation(made, 0.9).model_copy(update={"versions": {"lm_eval": "0.4.13", "weights": "bf16"}})
    scores = scores_of([by(0, evaluation(made, 0.5)), *[by(signer, of_bf16) for signer in range(1, 4)]])
    assert scores == {"tiny acc (5-shot)": 0.5, "tiny acc, bf16 (5-shot)": 0.9}


def test_who_tells_one_result_often_counts_as_one(made: SignedCheckpoint) -> None:
    honest = [by(signer, evaluation(made, 0.5)) for signer in range(2)]
    liar = [by(9, evaluation(made, 0.9)) for _ in range(8)]
    assert scores_of([*honest, *liar]) == {"tiny acc (5-shot)": 0.5}
    assert scores_of([*honest[:1], *liar[:1], by(9, evaluation(made, 0.7))]) == {
        "tiny acc (5-shot)": pytest.approx(0.65)
    }, "of its own results one has the median too"


def test_what_a_run_was_told_counts_where_its_signer_signed_it_of_this_checkpoint(made: SignedCheckpoint) -> None:
    anna, boris = Identity(b"a" * 32), Identity(b"b" * 32)
    manifest_digest = sha256(made.signed_manifest.payload)

    def signed(value: float, who: Identity = anna, **changes: Any) -> Signed:
        payload = evaluation(made, value).model_copy(update=changes).canonical_bytes()
        return who.sign("evaluation", made.run_id, payload)

    forged = signed(0.9)
    forged.signer = boris.public_key
    others = [forged, signed(0.8, manifest_digest="a" * 64), signed(0.7, run_id="a" * 40), Signed(payload=b"{")]
    found = told_evaluations([signed(0.25), *others, signed(0.5, boris)], made.run_id, manifest_digest)
    measured = with_evaluations(row("a", 10, loss=2.0), found)
    assert measured.scores == {"loss": 2.0, "tiny acc (5-shot)": 0.375}
    assert measured.measured_by == {anna.peer_id, boris.peer_id}


def row(run: str, number: int, **scores: float) -> Row:
    return Row(run=run, run_id=run * 4, round=number, total_tokens=100 * number, scores=scores)


def test_one_checkpoint_from_two_sources_is_one_row_and_rounds_are_in_order() -> None:
    rows = merged([row("b", 2, x=1.0), row("a", 10), row("a", 9), row("b", 2, y=2.0)])
    assert [(found.run, found.round) for found in rows] == [("a", 9), ("a", 10), ("b", 2)]
    assert rows[2].scores == {"x": 1.0, "y": 2.0}


def unread(run: str, number: int, **scores: float) -> Row:
    """Of a checkpoint whose manifest nobody has shown."""
    return replace(row(run, number, **scores), total_tokens=None)


def test_tokens_that_one_source_knows_are_kept_where_another_does_not() -> None:
    for rows in ([row("a", 9), unread("a", 9)], [unread("a", 9), row("a", 9)]):
        assert [found.total_tokens for found in merged(rows)] == [900]


def test_a_checkpoint_of_unknown_tokens_is_told_without_them_and_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = SimpleNamespace(record=None, manifest=None, entry=SimpleNamespace(round=5, manifest_digest=b"d"))
    spec = SimpleNamespace(name="sample", run_id=b"r")
    listing: Any = SimpleNamespace(checkpoints=[item], spec=spec, evaluations=lambda digest: ())
    assert [found.total_tokens for found in rows_of_listing(listing)] == [None]
    with pytest.raises(ConfigError, match="nothing was measured"):
        plot([unread("a", 1, x=1.0)], tmp_path / "a.svg")
    monkeypatch.setattr("swarm.cli.leaderboard._rows", lambda *_: [unread("a", 5, x=1.0), row("a", 9, x=2.0)])
    picture = str(tmp_path / "b.svg")
    done = CliRunner().invoke(app, ["INVITE", "--plot", picture], catch_exceptions=False)
    (told,) = [line for line in done.stdout.splitlines() if "1.0000" in line]
    assert told.split()[:3] == ["a", "5", "-"]


def test_the_validation_loss_comes_first() -> None:
    assert metrics_of([row("a", 1, **{"arc acc": 0.1, VALIDATION_LOSS: 3.0})]) == [VALIDATION_LOSS, "arc acc"]


class FakeClient:
    """A run with a measured and an unmeasured checkpoint."""

    async def get_run(self) -> Any:
        return SimpleNamespace(spec=SimpleNamespace(name="sample"))

    async def checkpoints(self) -> list[Any]:
        return [
            CheckpointInfo(round=10, total_tokens=500, validation_loss=2.5),
            CheckpointInfo(round=5, total_tokens=250, validation_loss=math.nan),
        ]

    async def close(self) -> None:
        pass


def test_a_run_and_a_folder_of_it_are_compared_and_drawn(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(invite: Invite) -> FakeClient:
        return FakeClient()

    monkeypatch.setattr(CoordinatorClient, "connect", connect)
    record(made.folder, evaluation(made, 0.25), Identity.generate())
    invite = Invite(run_id=made.run_id, tls_pin=b"t" * 32, addresses=("localhost:1",)).encode()
    picture = tmp_path / "board.svg"
    arguments = [invite, str(made.folder), "--plot", str(picture)]
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert told["metrics"] == [VALIDATION_LOSS, "tiny acc (5-shot)"]
    assert [found["round"] for found in told["checkpoints"]] == [5, 10]
    assert told["checkpoints"][1]["scores"] == {VALIDATION_LOSS: 2.5, "tiny acc (5-shot)": 0.25}
    assert picture.read_text().count("<path") > 5 and "</svg>" in picture.read_text()
    plain = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "2.5000" in plain.stdout and "0.2500" in plain.stdout


class ToldClient(FakeClient):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Signed] = []
        self.manifest_digest = ""

    async def tell_evaluation(self, signed: Signed) -> None:
        self.told.append(signed)

    async def evaluations(self, round_number: int) -> list[Signed]:
        return self.told

    async def checkpoints(self) -> list[Any]:
        manifest_digest = bytes.fromhex(self.manifest_digest)
        return [CheckpointInfo(round=10, validation_loss=2.5, manifest_digest=manifest_digest, num_evaluations=1)]


def test_what_was_measured_before_is_told_to_the_run_whose_leaderboard_then_shows_it(
    made: SignedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ToldClient()

    async def connect(invite: Invite) -> ToldClient:
        return client

    monkeypatch.setattr(CoordinatorClient, "connect", connect)
    client.manifest_digest = sha256(made.signed_manifest.payload).hex()
    record(made.folder, evaluation(made, 0.25), Identity.generate())
    invite = Invite(run_id=made.run_id, tls_pin=b"t" * 32, addresses=("localhost:1",)).encode()
    evaluating = typer.Typer()
    evaluating.command()(evaluate)
    done = CliRunner().invoke(evaluating, [str(made.folder), "--run", invite], catch_exceptions=False)
    assert done.stdout == "told to the run: 1 evaluations\n"
    board = json.loads(CliRunner().invoke(app, [invite, "--json"], catch_exceptions=False).stdout)
    assert board["checkpoints"][0]["scores"] == {VALIDATION_LOSS: 2.5, "tiny acc (5-shot)": 0.25}


def test_an_invite_longer_than_any_name_of_a_folder_is_an_invite(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(invite: Invite) -> FakeClient:
        return FakeClient()

    monkeypatch.setattr(CoordinatorClient, "connect", connect)
    addresses = tuple(f"{'a' * 200}{number}.example:1" for number in range(3))
    invite = Invite(run_id=b"r" * 20, tls_pin=b"t" * 32, addresses=addresses).encode()
    assert len(invite) > 255
    done = CliRunner().invoke(app, [invite, "--json"], catch_exceptions=False)
    assert [found["round"] for found in json.loads(done.stdout)["checkpoints"]] == [5, 10]


def test_what_cannot_be_drawn_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no picture"):
        plot([row("a", 1, x=1.0)], tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="nothing was measured"):
        plot([row("a", 1)], tmp_path / "a.svg")
