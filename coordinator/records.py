"""The record that a checkpoint's card tells: contributors who want to be named, software, devices, energy.

Decides what goes in: tokens as the signed log credits them, and what peers reported of themselves, which nobody can
check. Made once a round, when the seed peer asks, and kept: two seed peers get the same bytes. Leaves its form to
`swarm.run_record`, estimates to `swarm.energy`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from coordinator import evaluations
from coordinator.run import Run
from coordinator.store import Store
from swarm import schedule
from swarm.digest import sha256
from swarm.energy import PeerWork, estimate
from swarm.errors import NotFound, ProtocolError, VerificationError
from swarm.manifest import CheckpointManifest
from swarm.run_record import MAX_CONTRIBUTORS, RECORD_FILE, Contributor, Energy, RunRecord

MAX_COUNT = 2**63 - 1

logger = logging.getLogger(__name__)


def get(run: Run, store: Store, round_number: int) -> bytes:
    """The record of a checkpoint round, made now where there is none yet.

    Raises `NotFound` while the round is not recorded, `ProtocolError` for one without a checkpoint.
    """
    known = store.published.run_record(round_number) if round_number <= MAX_COUNT else None
    if known is not None:
        return known
    row = store.round(0, round_number) if round_number <= MAX_COUNT else None
    if row is None:
        raise NotFound(f"round {round_number} is not recorded yet", "record its commit first")
    if not schedule.is_checkpoint_round(run.spec, row.round, row.total_tokens):
        raise ProtocolError(f"round {row.round} has no checkpoint")
    told = evaluations.for_record(run, store, round_number)
    made = make(store, round_number, run.spec.num_shards).model_copy(update={"evaluations": told}).canonical_bytes()
    store.published.add_run_record(round_number, made)
    return made


def make(store: Store, round_number: int, num_shards: int) -> RunRecord:
    """What is known by now; of the peers heard from most recently where there are very many.

    A step's tokens are credited by every shard that it trained, and count once.
    """
    heard = store.newest_peers(100 * MAX_CONTRIBUTORS)
    known = [replace(peer, tokens=peer.tokens // num_shards) for peer in heard if peer.tokens >= num_shards]
    told = store.published.introductions()
    named = [
        Contributor(name=told[peer.key].name, tokens=peer.tokens)
        for peer in known
        if peer.key in told and told[peer.key].name
    ]
    losses = store.losses(round_number, round_number).get(round_number)
    work = [
        PeerWork(
            tokens=peer.tokens,
            device=peer.device,
            tokens_per_s=peer.tokens_per_s,
            known_s=max(0, peer.last_seen_unix_ms - peer.first_seen_unix_ms) / 1000,
        )
        for peer in known
    ]
    return RunRecord(
        round=round_number,
        num_peers=len(known),
        contributors=tuple(sorted(named, key=lambda item: (-item.tokens, item.name))[:MAX_CONTRIBUTORS]),
        software=tuple(sorted({told[peer.key].agent for peer in known if peer.key in told})[:MAX_CONTRIBUTORS]),
        validation_loss=losses.validation if losses else None,
        energy=_energy(work),
    )


def _energy(work: Sequence[PeerWork]) -> Energy:
    """The estimate; where the reports fit into none, no energy is known: publication goes on."""
    try:
        return estimate(work)
    except ValueError as error:  # what pydantic raises is one
        logger.warning("energy is not estimated from what peers reported: %s", error)
        return estimate(replace(peer, device="") for peer in work)


def check(store: Store, checkpoint: CheckpointManifest) -> None:
    """Refuse a manifest whose record is not the one that was written here."""
    listed = [file.sha256 for file in checkpoint.files if file.name == RECORD_FILE]
    if not listed:
        return
    known = store.published.run_record(checkpoint.round)
    if known is None or listed != [sha256(known).hex()]:
        raise VerificationError(f"round {checkpoint.round}: the manifest's record is not the coordinator's")
