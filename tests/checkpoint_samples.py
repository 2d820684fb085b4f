"""Small signed checkpoints and an in-memory transport for the tests of chunks, downloads and verification."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from peer.checkpoints.anchor import anchor_roots
from peer.checkpoints.checkpoint import CheckpointParts, ShardParts, assemble, write_signed
from peer.p2p.transport import MAX_CALL_BYTES, Handler
from swarm import manifest as manifests
from swarm import run_spec, witness
from swarm.data_manifest import DataManifest, Source, TokenShard
from swarm.digest import join_subtrees, sha256
from swarm.errors import DeadlineExceeded, ProtocolError, Unreachable
from swarm.evaluation import Evaluation, Result
from swarm.identity import Identity
from swarm.invite import Invite
from swarm.proto.checkpoint_pb2 import Witnesses
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication
from swarm.run_spec import RunSpec

ORGANIZER = Identity(b"o" * 32)
PUBLISHER = Identity(b"p" * 32)
WITNESSES = tuple(Identity(sha256(b"witness %d" % number)) for number in range(3))
PART_BYTES = 100_000
MOMENTUM_DIGEST = sha256(b"momentum")
TOKENIZER = json.dumps({"added_tokens": [{"id": 0, "content": "<|endoftext|>"}]}).encode()
CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


def data_manifest(tokenizer: bytes = TOKENIZER, vocab_size: int = 256) -> DataManifest:
    return DataManifest(
        tokenizer_digest=sha256(tokenizer).hex(),
        vocab_size=vocab_size,
        end_of_text_id=0,
        dtype="uint16",
        train=(TokenShard(file="train-00000.bin", digest=sha256(b"train").hex(), num_tokens=10),),
        validation=(TokenShard(file="validation-00000.bin", digest=sha256(b"val").hex(), num_tokens=10),),
        sources=(Source(path="a|b\n# *book*", licence="CC0", digest=sha256(b"s").hex(), documents=2, text_bytes=9),),
    )


def make_spec(data: DataManifest, name: str = "sample") -> RunSpec:
    return RunSpec(
        name=name,
        total_tokens=1000,
        organizer_key=ORGANIZER.public_key.hex(),
        publication_key=PUBLISHER.public_key.hex(),
        model={"family": "llama", "config": {}},
        data={"manifest_digest": sha256(data.canonical_bytes()).hex(), "tokenizer_digest": data.tokenizer_digest},
    )


def make_parts(round_number: int = 10, name: str = "sample", num_values: int = 3_000_000) -> CheckpointParts:
    """12 MB of weights by default: a file of three chunks, the last one short."""
    data = data_manifest()
    spec = make_spec(data, name)
    rng = np.random.default_rng(round_number)
    tensors = {
        "b.weight": rng.random((num_values // 2, 2), dtype=np.float32),
        "a.weight": np.ones(7, np.float32),
    }
    return CheckpointParts(
        run_id=spec.run_id,
        spec=spec,
        data=data,
        data_json=data.canonical_bytes(),
        round=round_number,
        total_tokens=500,
        states=(shard_parts_of(tensors),),
        config_json=CONFIG,
        tokenizer_json=TOKENIZER,
        tensors=tensors,
    )


def shard_parts_of(tensors: Mapping[str, np.ndarray]) -> ShardParts:
    """Of a shard whose anchor is made of ``tensors``, in their order."""
    num_values = sum(tensor.size for tensor in tensors.values())
    anchor_digest = anchor_roots(tensors, [num_values])[0]
    return ShardParts(
        num_values=num_values,
        state_digest=join_subtrees(anchor_digest, MOMENTUM_DIGEST),
        momentum_digest=MOMENTUM_DIGEST,
        log_digest=sha256(b"log"),
    )


@dataclass(frozen=True, slots=True)
class SignedCheckpoint:
    """A checkpoint on disk, and what signs it."""

    folder: Path
    manifest: manifests.CheckpointManifest
    run_id: bytes
    signed_spec: Signed
    publication: Publication

    @property
    def signed_manifest(self) -> Signed:
        return self.publication.manifest


def publication_of(
    payload: bytes,
    run_id: bytes,
    publisher: Identity = PUBLISHER,
    signers: Sequence[Identity] = WITNESSES[:2],
    live: Sequence[Identity] = WITNESSES,
) -> Publication:
    """A manifest as the coordinator publishes it once ``signers``, out of the ``live`` replicas, attested it."""
    said = [attestation.SerializeToString() for attestation in witness.attestations_of(manifests.parse(payload))]
    witnesses = Witnesses(
        round=manifests.parse(payload).round,
        manifest_digest=sha256(payload),
        replicas=[replica.public_key for replica in live],
        attestations=[signer.sign(witness.ATTESTATION_CONTEXT, run_id, each) for each in said for signer in signers],
    )
    return Publication(
        manifest=publisher.sign(manifests.CONTEXT, run_id, payload),
        witnesses=publisher.sign(witness.WITNESSES_CONTEXT, run_id, witnesses.SerializeToString()),
    )


def signed_checkpoint(folder: Path, parts: CheckpointParts) -> SignedCheckpoint:
    manifest = assemble(folder, parts)
    signed_spec = ORGANIZER.sign(run_spec.CONTEXT, parts.run_id, parts.spec.canonical_bytes())
    publication = publication_of(manifest.canonical_bytes(), parts.run_id)
    write_signed(folder, publication, signed_spec)
    return SignedCheckpoint(folder, manifest, parts.run_id, signed_spec, publication)


def small_checkpoint(folder: Path, round_number: int = 10, name: str = "sample") -> SignedCheckpoint:
    return signed_checkpoint(folder, make_parts(round_number, name, num_values=1000))


def invite_to(run_id: bytes) -> str:
    """Its coordinator does not exist."""
    return Invite(run_id=run_id, tls_pin=b"t" * 32, addresses=("localhost:1",)).encode()


def with_tensors(parts: CheckpointParts, tensors: dict[str, np.ndarray]) -> CheckpointParts:
    return replace(parts, tensors=tensors, states=(shard_parts_of(tensors),))


@dataclass
class FakeTransport:
    """Calls answered by plain functions, one per peer; a peer without one is unreachable."""

    peers: dict[bytes, Handler] = field(default_factory=dict)
    public_key: bytes = b"me" * 16
    addresses: tuple[str, ...] = ()
    calls: list[bytes] = field(default_factory=list)
    directory: dict[str, dict[bytes, bytes]] | None = field(default_factory=dict)

    async def call(
        self, peer: bytes, method: str, request: bytes, *, timeout_s: float, max_response_bytes: int = MAX_CALL_BYTES
    ) -> bytes:
        self.calls.append(peer)
        if method != "chunk" or peer not in self.peers:
            raise Unreachable("no such peer")
        try:
            response = await asyncio.wait_for(self.peers[peer](self.public_key, request), timeout_s)
        except asyncio.TimeoutError as error:
            raise DeadlineExceeded("too late") from error
        if len(response) > max_response_bytes:
            raise ProtocolError("the response is too large")
        return response

    async def stream(
        self, peer: bytes, method: str, request: bytes, *, timeout_s: float, max_response_bytes: int
    ) -> AsyncGenerator[bytes, None]:
        response = await self.call(peer, method, request, timeout_s=timeout_s, max_response_bytes=max_response_bytes)
        for start in range(0, len(response), PART_BYTES):
            yield response[start : start + PART_BYTES]

    async def serve(self, method: str, handler: Handler) -> None:
        self.peers[self.public_key] = handler

    async def connect(self, peer: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None:
        if peer not in self.peers:
            raise Unreachable("no such peer")

    async def publish(self, key: str, value: bytes, *, lifetime_s: float) -> None:
        raise Unreachable("no directory")

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        if self.directory is None:
            raise Unreachable("no directory")
        return self.directory.get(key, {})

    def traffic(self) -> tuple[int, int]:
        return (0, 0)

    def uplink_bps(self) -> int | None:
        return None

    async def close(self) -> None:
        self.peers.clear()


Answer = Callable[[bytes, bytes], Awaitable[bytes]]


def evaluation(made: SignedCheckpoint, value: float, limit: int | None = None) -> Evaluation:
    """Of the checkpoint, with one result."""
    return Evaluation(
        run_id=made.run_id.hex(),
        round=made.manifest.round,
        manifest_digest=sha256(made.signed_manifest.payload).hex(),
        asked=("tiny",),
        results=(Result(task="tiny", metric="acc", value=value, num_fewshot=5, num_samples=4),),
        versions={"lm_eval": "0.4.13"},
        seed=0,
        limit=limit,
        batch_size=1,
        device="cpu",
    )
