"""An audit finds equality, the first round that differs, or the range that is missing."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from peer.checkpoints import audit as auditing
from peer.checkpoints.checkpoint import CheckpointParts
from peer.checkpoints.gathering import Gathering
from peer.checkpoints.publishing import StateCopy
from peer.checkpoints.verify import verify_folder
from peer.p2p.chunk_store import ChunkStore
from peer.rounds import archive as archives
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.planning import num_slices
from peer.rounds.shard import Shard
from peer.training.layout import Layout
from swarm import digest
from swarm.cli import audit
from swarm.errors import DataError, DigestError, NotFound, SwarmError, VerificationError
from swarm.identity import Identity
from swarm.log import GENESIS_CONTEXT, VOTE_CONTEXT, genesis_head, next_head
from swarm.proto.common_pb2 import Genesis, ShardGenesis
from swarm.proto.round_pb2 import Ballot, Commit, PartResult, Record, Share, Vote
from tests.checkpoint_samples import ORGANIZER, make_parts, signed_checkpoint
from tests.signed_averages import sign_averages

VOTER = Identity(b"v" * 32)
PARTS = make_parts(num_values=40_000)
SPEC = PARTS.spec
LAYOUT = Layout.of((name, tensor.shape) for name, tensor in PARTS.tensors.items())
ROUNDS, CHECKPOINTS = 6, (2, 4, 6)

app = typer.Typer()
app.command()(audit.audit)


@dataclass
class Run:
    """A seed peer's folder after six rounds, and the checkpoints of every second one beside it."""

    folder: Path
    num_shards: int = 1

    @property
    def archive(self) -> Path:
        return self.folder / "archive"

    def checkpoint(self, number: int) -> Path:
        return self.folder / f"checkpoint-{number}"

    @property
    def parts(self) -> CheckpointParts:
        spec = SPEC.model_copy(update={"num_shards": self.num_shards})
        return replace(PARTS, spec=spec, run_id=spec.run_id)

    def make(self, lie_at: int = 0, liar: int = 0) -> Run:
        """``lie_at``: after this round the voters of shard ``liar`` sign, and publish, another state than the average
        makes."""
        spec = self.parts.spec
        whole = np.concatenate([tensor.reshape(-1) for tensor in PARTS.tensors.values()])
        anchors = np.array_split(whole, self.num_shards)
        shards = [Shard(spec, number, anchor.copy()) for number, anchor in enumerate(anchors)]
        genesis = Genesis(
            run_id=spec.run_id,
            voters=[VOTER.public_key],
            shards=[ShardGenesis(state_digest=each.state_digest, num_values=each.num_values) for each in shards],
        )
        self.archive.mkdir()
        signed = ORGANIZER.sign(GENESIS_CONTEXT, spec.run_id, genesis.SerializeToString())
        archives.keep_genesis(self.archive, signed)
        gathering = Gathering(self.archive, [shard.num_values for shard in shards], archive=True)
        chunks = ChunkStore(self.archive / "chunks", 1 << 28)
        ledgers = [
            Ledger(self.archive / f"shard-{number}", genesis_head(genesis, number), chunks, LedgerOptions(archive=True))
            for number in range(self.num_shards)
        ]
        for number in range(ROUNDS + 1):
            for ledger, shard in zip(ledgers, shards, strict=True):
                if number:
                    self._commit(ledger, shard, number)
                if number and number == lie_at and shard.index == liar:
                    shard.anchor[7] += 1
                    shard._note_digests()
                ledger.save_state(number, shard)
                if number in CHECKPOINTS:
                    self._publish(gathering.add(ledger.head, shard))
        return self

    def _commit(self, ledger: Ledger, shard: Shard, number: int) -> None:
        rng = np.random.default_rng([number, shard.index])
        data = shard.codec.encode(rng.standard_normal(shard.num_values).astype(np.float32) * 1e-3)
        result = PartResult(
            num_slices=num_slices(shard.num_values),
            digest=digest.sha256(data),
            size_bytes=len(data),
            shares=[Share(peer_key=VOTER.public_key, weight_tokens=5, norm=1e6)],
        )
        record = Record(
            shard=shard.index,
            round=number,
            log_digest=ledger.head.log_digest,
            state_digest=shard.state_digest,
            parts=[result],
            next_voters=[VOTER.public_key],
            total_tokens=ledger.head.total_tokens + 5,
            codec=shard.codec.name,
        )
        sign_averages(record, self.parts.run_id)
        raw = record.SerializeToString()
        ballot = Ballot(number=1, leader=VOTER.public_key)
        vote = Vote(shard=shard.index, round=number, ballot=ballot, record_digest=digest.sha256(raw))
        commit = Commit(record=raw, votes=[VOTER.sign(VOTE_CONTEXT, self.parts.run_id, vote.SerializeToString())])
        ledger.append(commit, next_head(ledger.head, raw, record), {result.digest: data})
        shard.apply(record, {result.digest: data})

    def _publish(self, copy: StateCopy | None) -> None:
        if copy is None:
            return
        parts = replace(
            self.parts,
            round=copy.round,
            total_tokens=copy.total_tokens,
            states=copy.states,
            tensors=LAYOUT.views(copy.anchor),
        )
        signed_checkpoint(self.checkpoint(copy.round), parts)

    def audit(self, later: int, earlier: int | None = None) -> dict[str, object]:
        """What ``--json`` prints, and the error that ends the command."""
        start = [] if earlier is None else ["--from", str(self.checkpoint(earlier))]
        arguments = [str(self.checkpoint(later)), "--archive", str(self.archive), *start, "--json"]
        result = CliRunner().invoke(app, arguments)
        if not result.stdout:
            assert isinstance(result.exception, SwarmError), result.exception
            raise result.exception
        return json.loads(result.stdout) | {"error": type(result.exception), "told": str(result.exception)}

    def average_of(self, number: int, shard: int = 0) -> Path:
        """The file of a round's average."""
        reader = archives.Archive(self.archive, self.parts.spec).shard(shard)
        record = next(record for record, _ in reader.commits() if record.round == number)
        name = record.parts[0].digest.hex()
        return self.archive / "chunks" / name[:2] / name


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path).make()


@pytest.mark.parametrize(("earlier", "later"), [(None, 2), (None, 6), (2, 4), (2, 6), (4, 6)])
def test_a_checkpoint_is_equal_to_the_log_re_applied(run: Run, earlier: int | None, later: int) -> None:
    found = run.audit(later, earlier)
    assert (found["outcome"], found["from_round"], found["equal_to"]) == ("equal", earlier or 0, later)
    assert found["error"] is type(None)


@pytest.fixture
def sharded(tmp_path: Path) -> Run:
    return Run(tmp_path, num_shards=2).make()


@pytest.mark.parametrize("earlier", [None, 2])
def test_every_shard_of_a_checkpoint_is_equal_to_its_own_log(sharded: Run, earlier: int | None) -> None:
    found = sharded.audit(6, earlier)
    assert (found["outcome"], found["equal_to"], found["num_shards"], found["shard"]) == ("equal", 6, 2, None)


def test_a_lie_about_one_shard_is_told_with_its_round_and_shard(tmp_path: Path) -> None:
    found = Run(tmp_path, num_shards=2).make(lie_at=3, liar=1).audit(6)
    assert (found["outcome"], found["differs_at"], found["shard"], found["equal_to"]) == ("differs", 3, 1, 2)
    assert "round 3 of shard 1 differs" in str(found["told"])


def test_what_one_shards_log_lacks_is_told_with_its_shard(sharded: Run) -> None:
    (sharded.archive / "shard-1" / "log").unlink()
    found = sharded.audit(4)
    assert (found["outcome"], found["missing"], found["shard"]) == ("missing", [1, 4], 1)
    archives.momentum_path(sharded.archive, 2, 1).unlink()
    with pytest.raises(NotFound, match="momentum"):
        sharded.audit(4, 2)


def test_a_checkpoint_of_fewer_shards_than_its_run_is_no_audit_of_it(sharded: Run) -> None:
    later = verify_folder(sharded.checkpoint(6), None).provenance
    narrow = later.manifest.model_copy(update={"shards": ()})
    with pytest.raises(VerificationError, match="other shards"):
        auditing.audit(archives.Archive(sharded.archive, later.spec), replace(later, manifest=narrow), None)


def test_a_round_whose_result_is_not_what_the_log_makes_is_named(tmp_path: Path) -> None:
    """All signatures are right: voters and witnesses lied together."""
    run = Run(tmp_path).make(lie_at=3)
    assert verify_folder(run.checkpoint(4), SPEC.run_id).ok
    assert run.audit(2)["outcome"] == "equal"
    for later, earlier in ((4, None), (6, None), (6, 2)):
        found = run.audit(later, earlier)
        assert (found["outcome"], found["differs_at"], found["equal_to"]) == ("differs", 3, 2)
        assert found["error"] is VerificationError and "round 3 differs" in str(found["told"])
    assert run.audit(6, 4)["outcome"] == "equal", "what came after the lie is what the log makes of it"


def test_a_checkpoint_of_another_state_than_its_rounds_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path).make(lie_at=6)
    found = run.audit(6)
    assert (found["outcome"], found["differs_at"], found["equal_to"]) == ("differs", 6, 5)


def test_a_tampered_average_is_not_used_and_its_round_is_missing(run: Run) -> None:
    path = run.average_of(5)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    found = run.audit(6)
    assert (found["outcome"], found["missing"], found["equal_to"]) == ("missing", [5, 5], 3)
    assert found["error"] is NotFound and "rounds 5 to 5" in str(found["told"])
    assert path.read_bytes() == raw, "an audit leaves the archive as it is"
    assert run.audit(4)["outcome"] == "equal"


def test_the_range_of_missing_averages_is_told(run: Run) -> None:
    for number in (3, 4):
        run.average_of(number).unlink()
    found = run.audit(6)
    assert (found["outcome"], found["missing"]) == ("missing", [3, 4])
    assert run.audit(6, 4)["outcome"] == "equal"


def test_the_range_that_a_log_lacks_at_its_end_is_told(run: Run) -> None:
    path = run.archive / "shard-0" / "log"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 4 // 6 + 10])  # in the midst of the fifth commit
    found = run.audit(6)
    assert (found["outcome"], found["missing"]) == ("missing", [5, 6])


def test_a_lie_before_a_gap_is_told_all_the_same(tmp_path: Path) -> None:
    run = Run(tmp_path).make(lie_at=2)
    run.average_of(5).unlink()
    assert run.audit(6)["differs_at"] == 2


def test_a_commit_that_no_voter_signed_ends_the_audit(run: Run) -> None:
    path = run.archive / "shard-0" / "log"
    frames = list(archives.Archive(run.archive, SPEC).shard(0)._frames())
    forged = Commit.FromString(frames[2])
    forged.votes[0].signature = b"s" * 64
    frames[2] = forged.SerializeToString()
    path.write_bytes(b"".join(struct.pack("<II", len(body), zlib.crc32(body)) + body for body in frames))
    with pytest.raises(VerificationError, match="signature"):
        run.audit(6)


def test_another_log_than_the_checkpoints_is_refused(run: Run) -> None:
    parts = replace(PARTS, round=6, states=(replace(PARTS.states[0], log_digest=b"l" * 32),))
    signed_checkpoint(run.folder / "checkpoint-6", parts)
    with pytest.raises(VerificationError, match="not the one that the checkpoint names"):
        run.audit(6)


@pytest.mark.parametrize("change", ["gone", "cut", "flipped"])
def test_momentum_that_is_not_the_states_is_no_start(run: Run, change: str) -> None:
    path = archives.momentum_path(run.archive, 2)
    raw = bytearray(path.read_bytes())
    if change == "gone":
        path.unlink()
    else:
        raw[-1] ^= 1
        path.write_bytes(raw[:-1] if change == "cut" else raw)
    errors = {"gone": NotFound, "cut": DataError, "flipped": DigestError}
    with pytest.raises(errors[change], match="momentum"):
        run.audit(6, 2)


def test_a_folder_that_is_no_archive_and_rounds_in_the_wrong_order_are_refused(run: Run) -> None:
    with pytest.raises(VerificationError, match="not before"):
        run.audit(4, 6)
    (run.archive / archives.GENESIS_FILE).unlink()
    with pytest.raises(DataError, match="no archive"):
        run.audit(6)
