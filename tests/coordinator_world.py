"""A small run for tests of the coordinator: its people, its signed parts, and commits that prove themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from coordinator.run import Run, RunSource, open_run
from swarm import log, manifest, witness
from swarm.data_manifest import DataManifest
from swarm.digest import join_subtrees, sha256
from swarm.evaluation import Evaluation, Result
from swarm.identity import Identity
from swarm.log import LogHead
from swarm.manifest import CheckpointManifest
from swarm.proto import coordinator_pb2 as pb
from swarm.proto.checkpoint_pb2 import Attestation
from swarm.proto.common_pb2 import Genesis, ShardGenesis, Signed
from swarm.proto.round_pb2 import Ballot, Commit, PartResult, Record, Share, Vote
from swarm.run_spec import RunSpec
from tests.metadata_samples import first_offline
from tests.signed_averages import sign_averages

NOW_UNIX_S = 1_800_000_000.0
NOW_UNIX_MS = int(NOW_UNIX_S * 1000)
TOKEN = "open sesame"
TOKENIZER = b'{"a": "tokenizer"}'


def identity(number: int) -> Identity:
    return Identity(sha256(b"test identity %d" % number))


ORGANIZER, PUBLICATION, SEED, ANNA, BORIS, STRANGER = (identity(number) for number in range(6))


def subtrees_after(round_number: int) -> tuple[bytes, bytes]:
    """Roots of anchor and momentum."""
    return sha256(b"anchor after %d" % round_number), sha256(b"momentum after %d" % round_number)


def state_digest_after(round_number: int) -> bytes:
    return join_subtrees(*subtrees_after(round_number))


@dataclass
class World:
    """``admission``: the spec's section; ``heads``: log heads by round, of the commits made so far."""

    admission: Mapping[str, Any] = field(default_factory=dict)
    voters: tuple[Identity, ...] = (SEED, ANNA, BORIS)
    num_shards: int = 1

    def __post_init__(self) -> None:
        self.data_manifest = _data_manifest()
        self.spec = _spec(self.data_manifest, self.admission, self.num_shards)
        self.run_id = self.spec.run_id
        genesis = Genesis(
            run_id=self.run_id,
            voters=[voter.public_key for voter in self.voters],
            shards=[ShardGenesis(state_digest=state_digest_after(0), num_values=100)] * self.num_shards,
        )
        self.heads: list[LogHead] = [log.genesis_head(genesis, 0)]
        self.genesis = genesis
        self.source = RunSource(
            spec=ORGANIZER.sign("run-spec", self.run_id, self.spec.canonical_bytes()),
            genesis=ORGANIZER.sign("genesis", self.run_id, genesis.SerializeToString()),
            data_manifest=self.data_manifest,
            tokenizer=TOKENIZER,
            publication=PUBLICATION,
            offline=first_offline(self.spec, [ORGANIZER], datetime.now(timezone.utc)),
            publisher=PUBLICATION,
        )

    @property
    def run(self) -> Run:
        return open_run(self.source)

    def commit(
        self, tokens: int = 100, signers: Sequence[Identity] | None = None, head: LogHead | None = None
    ) -> Commit:
        """The next round's commit: Anna contributed ``tokens``, Boris twice as many; the second part is absent."""
        extends = head or self.heads[-1]
        record = _record(extends, self.voters, tokens)
        commit = _signed_commit(extends, record, self.voters if signers is None else signers)
        if head is None:
            self.heads.append(log.next_head(extends, commit.record, record))
        return commit

    def commits(self, count: int) -> list[Commit]:
        return [self.commit() for _ in range(count)]

    def commits_of(self, shard: int, count: int) -> tuple[list[Commit], list[LogHead]]:
        """The first commits of a shard, and the heads after each of them."""
        commits, heads = [], [log.genesis_head(self.genesis, shard)]
        for _ in range(count):
            commits.append(self.commit(head=heads[-1]))
            record = Record.FromString(commits[-1].record)
            heads.append(log.next_head(heads[-1], commits[-1].record, record))
        return commits, heads

    def manifest(self, round_number: int, **changes: Any) -> bytes:
        """The manifest of the checkpoint after a round, as an honest seed peer writes it."""
        head = self.heads[round_number]
        anchor, momentum = subtrees_after(round_number)
        values: dict[str, Any] = {
            "run_id": self.run_id.hex(),
            "run_name": self.spec.name,
            "round": round_number,
            "total_tokens": head.total_tokens,
            "state_digest": state_digest_after(round_number).hex(),
            "log_digest": head.log_digest.hex(),
            "data_manifest_digest": self.spec.data.manifest_digest,
            "anchor": {
                "digest": anchor.hex(),
                "momentum_digest": momentum.hex(),
                "parameters": [{"name": "a.weight", "shape": [100]}],
            },
            "files": [{"name": "config.json", "size_bytes": 2, "sha256": sha256(b"{}").hex(), "chunks": ["0" * 64]}],
        }
        return CheckpointManifest.model_validate({**values, **changes}).canonical_bytes()

    def attestation(self, round_number: int, **changes: Any) -> Attestation:
        """What a replica that holds the state after a round says of it."""
        attestation = witness.attestations_of(manifest.parse(self.manifest(round_number)))[0]
        return Attestation(**{field.name: value for field, value in attestation.ListFields()} | changes)

    def attest_request(self, who: Identity, round_number: int, **changes: Any) -> Signed:
        payload = self.attestation(round_number, **changes).SerializeToString(deterministic=True)
        return who.sign("attestation", self.run_id, payload)

    def evaluation_by(self, who: Identity, round_number: int, **changes: Any) -> Signed:
        """What somebody says to have measured on the checkpoint after a round."""
        values: dict[str, Any] = {
            "run_id": self.run_id.hex(),
            "round": round_number,
            "manifest_digest": sha256(self.manifest(round_number)).hex(),
            "asked": ("tiny",),
            "results": (Result(task="tiny", metric="acc", value=0.25, num_samples=40),),
            "versions": {"lm_eval": "0.4.13"},
            "seed": 1,
            "batch_size": 8,
            "device": "cpu",
        }
        made = Evaluation(**values | changes)
        return who.sign("evaluation", bytes.fromhex(made.run_id), made.canonical_bytes())

    def admit_request(self, who: Identity, **changes: Any) -> Signed:
        values = {"token": TOKEN, "sent_unix_ms": NOW_UNIX_MS, "agent": "test/1", **changes}
        return who.sign("admit", self.run_id, pb.AdmitPayload(**values).SerializeToString())

    def report_request(self, who: Identity, **changes: Any) -> Signed:
        return who.sign("report", self.run_id, report_payload(**changes).SerializeToString())


def report_payload(**changes: Any) -> pb.ReportPayload:
    values: dict[str, Any] = {
        "round": 1,
        "train_loss": 3.0,
        "validation_loss": float("nan"),
        "tokens_per_s": 10.5,
        "bytes_sent": 7,
        "bytes_received": 8,
        "sent_unix_ms": NOW_UNIX_MS,
        "state_digest": state_digest_after(1),
        "log_digest": b"l" * 32,
        "device": "cpu",
    }
    return pb.ReportPayload(**{**values, **changes})


def address_of(who: Identity, port: int = 4001) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{who.peer_id}"


def _record(head: LogHead, voters: Sequence[Identity], tokens: int) -> Record:
    shares = [Share(peer_key=ANNA.public_key, weight_tokens=tokens)]
    shares.append(Share(peer_key=BORIS.public_key, weight_tokens=2 * tokens))
    record = Record(
        shard=head.shard,
        round=head.round + 1,
        log_digest=head.log_digest,
        state_digest=state_digest_after(head.round),
        parts=[
            PartResult(first_slice=0, num_slices=2, digest=sha256(b"part"), size_bytes=4, shares=shares),
            PartResult(first_slice=2, num_slices=1),
        ],
        next_voters=[voter.public_key for voter in voters],
        total_tokens=head.total_tokens + 3 * tokens,
        codec="int8",
    )
    return sign_averages(record, head.run_id)


def _signed_commit(head: LogHead, record: Record, signers: Sequence[Identity]) -> Commit:
    raw = record.SerializeToString(deterministic=True)
    vote = Vote(
        shard=record.shard,
        round=record.round,
        ballot=Ballot(number=1, leader=SEED.public_key),
        record_digest=sha256(raw),
    )
    votes = [signer.sign("vote", head.run_id, vote.SerializeToString()) for signer in signers]
    return Commit(record=raw, votes=votes)


def _data_manifest() -> bytes:
    shard = {"digest": "0" * 64, "num_tokens": 1000}
    return DataManifest.model_validate(
        {
            "tokenizer_digest": sha256(TOKENIZER).hex(),
            "vocab_size": 256,
            "end_of_text_id": 0,
            "dtype": "uint16",
            "train": [{"file": "train-00000.bin", **shard}],
            "validation": [{"file": "validation-00000.bin", **shard}],
            "sources": [],
        }
    ).canonical_bytes()


def _spec(data_manifest: bytes, admission: Mapping[str, Any], num_shards: int) -> RunSpec:
    return RunSpec.model_validate_json(
        json.dumps(
            {
                "name": "test-run",
                "num_shards": num_shards,
                "total_tokens": 100_000,
                "organizer_key": ORGANIZER.public_key.hex(),
                "publication_key": PUBLICATION.public_key.hex(),
                "model": {"family": "llama"},
                "data": {
                    "manifest_digest": sha256(data_manifest).hex(),
                    "tokenizer_digest": sha256(TOKENIZER).hex(),
                },
                "admission": dict(admission),
                "checkpoints": {"every_rounds": 1},
            }
        )
    )
