"""Witnesses: what a replica signs about a checkpoint's state, and when enough of them signed the same.

Pure. Decides what an attestation says, how many a checkpoint needs, and whether the witnesses beside a checkpoint are a
quorum for its manifest. Which replicas live is the coordinator's word, signed by the publication key; what they signed
is their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from swarm import digest
from swarm.errors import ProtocolError, VerificationError
from swarm.identity import PUBLIC_KEY_BYTES, peer_id_of, verify
from swarm.manifest import CheckpointManifest, ShardState
from swarm.proto.checkpoint_pb2 import Attestation, Witnesses
from swarm.proto.common_pb2 import Signed
from swarm.run_spec import Checkpoints

ATTESTATION_CONTEXT = "attestation"
WITNESSES_CONTEXT = "witnesses"
MAX_ATTESTATION_BYTES = 512
MAX_WITNESSES_BYTES = 16 << 20
MAX_REPLICAS = 256  # of one shard


def attestations_of(checkpoint: CheckpointManifest) -> tuple[Attestation, ...]:
    """What a replica that holds this checkpoint's states says of them: of every shard, in order.

    Raises `VerificationError` where the manifest's anchor is not in a state that it names.
    """
    return tuple(_attestation_of(checkpoint, shard, state) for shard, state in enumerate(checkpoint.states))


def _attestation_of(checkpoint: CheckpointManifest, shard: int, state: ShardState) -> Attestation:
    anchor, momentum = bytes.fromhex(state.anchor_digest), bytes.fromhex(state.momentum_digest)
    if digest.join_subtrees(anchor, momentum).hex() != state.state_digest:
        raise VerificationError(f"round {checkpoint.round}: the weights are not those of the state that is named")
    return Attestation(
        shard=shard,
        round=checkpoint.round,
        log_digest=bytes.fromhex(state.log_digest),
        state_digest=bytes.fromhex(state.state_digest),
        anchor_digest=anchor,
        momentum_digest=momentum,
        layout_digest=checkpoint.anchor.layout_digest,
    )


def parse_attestation(signed: Signed, run_id: bytes) -> Attestation:
    """The attestation inside ``signed``, once its signature is right and it does not contradict itself."""
    if len(signed.payload) > MAX_ATTESTATION_BYTES:
        raise ProtocolError(f"an attestation of {len(signed.payload)} bytes is too large")
    payload = verify(signed, ATTESTATION_CONTEXT, run_id)
    try:
        attestation = Attestation.FromString(payload)
    except DecodeError as error:
        raise ProtocolError("an attestation cannot be read") from error
    digests = (attestation.log_digest, attestation.layout_digest, attestation.anchor_digest)
    if any(len(item) != digest.DIGEST_BYTES for item in (*digests, attestation.momentum_digest)):
        raise ProtocolError("a digest in an attestation has a wrong length")
    if attestation.state_digest != digest.join_subtrees(attestation.anchor_digest, attestation.momentum_digest):
        raise ProtocolError("an attestation of a state that is not made of its anchor and momentum")
    return attestation


def said(attestation: Attestation) -> tuple[bytes, ...]:
    """What an attestation says about its round; two that say the same are of one state."""
    return (
        attestation.log_digest,
        attestation.state_digest,
        attestation.layout_digest,
    )


def needed(num_live: int, rules: Checkpoints) -> int:
    """How many of ``num_live`` replicas must have signed the same state."""
    return max(math.floor(num_live * rules.witness_share) + 1, min(num_live, rules.min_witnesses))


def parse_witnesses(signed: Signed, run_id: bytes, publication_key: bytes) -> Witnesses:
    """The witnesses inside ``signed``, once the publication key signed them."""
    if len(signed.payload) > MAX_WITNESSES_BYTES:
        raise ProtocolError(f"witnesses of {len(signed.payload)} bytes are too large")
    payload = verify(signed, WITNESSES_CONTEXT, run_id, publication_key)
    try:
        return Witnesses.FromString(payload)
    except DecodeError as error:
        raise ProtocolError("the witnesses cannot be read") from error


def check_quorum(witnesses: Witnesses, run_id: bytes, rules: Checkpoints, checkpoint: CheckpointManifest) -> None:
    """Raise `VerificationError` unless enough of the live replicas attested this checkpoint's very state.

    Of several shards, each has a quorum of its own.
    """
    replicas = set(witnesses.replicas)
    if witnesses.round != checkpoint.round or not replicas:
        raise ProtocolError("the witnesses belong to another round, or no replica is named")
    if len(replicas) != len(witnesses.replicas) or any(len(key) != PUBLIC_KEY_BYTES for key in replicas):
        raise ProtocolError("the witnesses name a replica twice, or a key of a wrong length")
    expected = attestations_of(checkpoint)
    if len(witnesses.attestations) > len(replicas) * len(expected):
        raise ProtocolError("more attestations than replicas")
    live = _live(witnesses, len(expected))
    if max(map(len, live)) > MAX_REPLICAS or len(replicas) > MAX_REPLICAS * len(expected):
        raise ProtocolError(f"the witnesses name more than {MAX_REPLICAS} replicas of a shard")
    signers: list[set[bytes]] = [set() for _ in expected]
    for signed in witnesses.attestations:
        attestation = parse_attestation(signed, run_id)
        if signed.signer not in replicas:
            raise VerificationError(f"round {checkpoint.round}: a witness is none of the live replicas")
        if attestation.shard >= len(expected) or attestation.round != checkpoint.round:
            raise VerificationError(f"round {checkpoint.round}: a witness signed another round")
        if said(attestation) != said(expected[attestation.shard]):
            raise VerificationError(f"round {checkpoint.round}: a witness signed another state than the manifest's")
        signers[attestation.shard].add(signed.signer)
    for shard, (signed_by, lived) in enumerate(zip(signers, live, strict=True)):
        wanted, found = needed(len(lived), rules), len(signed_by & lived)
        if found < wanted:
            name = named(expected[shard])
            raise VerificationError(f"{name}: {found} of {len(lived)} live replicas are witnesses; {wanted} needed")


def _live(witnesses: Witnesses, num_shards: int) -> list[set[bytes]]:
    """Who lived of each shard's replicas."""
    if not witnesses.shards:
        return [set(witnesses.replicas)] * num_shards
    if len(witnesses.shards) != num_shards:
        raise ProtocolError(f"the replicas of {len(witnesses.shards)} shards; the checkpoint has {num_shards}")
    of_shards = [[place for place in shard.places if place < len(witnesses.replicas)] for shard in witnesses.shards]
    if not all(of_shards):
        raise ProtocolError("the witnesses name a shard without a replica")
    return [{witnesses.replicas[place] for place in places} for places in of_shards]


def disagreement(attestations: Sequence[tuple[bytes, Attestation]]) -> str | None:
    """Who signed what, in a sentence, where these (signer, attestation) of one shard's round do not say the same."""
    by_state: dict[tuple[bytes, ...], list[bytes]] = {}
    for signer, attestation in attestations:
        by_state.setdefault(said(attestation), []).append(signer)
    if len(by_state) < 2:
        return None
    parts = []
    for (log_digest, state_digest, layout_digest), signers in sorted(by_state.items(), key=lambda item: -len(item[1])):
        names = ", ".join(sorted(peer_id_of(signer) for signer in set(signers)))
        digests = f"state {state_digest.hex()} (log {log_digest.hex()[:16]}, layout {layout_digest.hex()[:16]})"
        parts.append(f"{names} signed {digests}")
    return f"{named(attestations[0][1])}: witnesses disagree: " + "; ".join(parts)


def named(attestation: Attestation) -> str:
    """What it is of, for people; the first shard is not mentioned, as it is the only one of most runs."""
    return f"round {attestation.round}" + (f", shard {attestation.shard}" if attestation.shard else "")
