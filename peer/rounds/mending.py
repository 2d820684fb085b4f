"""What giving up a branch takes: the incident on record, the winner's state, and what is offered again.

Decides who offers the lost branch's movement; leaves the moment to `peer.rounds.exchange`. See docs/decisions/0013.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peer.rounds.branches import Branch
from peer.rounds.catch_up import Newcomer, fetch_anchor, fetch_state
from peer.rounds.codec import Float32
from peer.rounds.ledger import Ledger
from peer.rounds.shard import Shard
from swarm.errors import DivergedError, SwarmError
from swarm.files import disk_errors
from swarm.identity import peer_id_of
from swarm.log import LogHead, gone_of, tokens_by_peer
from swarm.proto.round_pb2 import Commit, Record

ATTEMPTS = 20
RETRY_S = 1.5

INCIDENTS_FILE = "incidents"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One branch of an incident: where it stood, and who began it without whom (peer ids)."""

    round: int
    log_digest: str
    tokens: int
    signers: tuple[str, ...]
    gone: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Two branches met: ours was given up."""

    at_unix_s: int
    shard: int
    fork_round: int
    lost: Side
    kept: Side
    offered_by: str
    """who offers again what the lost branch moved"""

    def __str__(self) -> str:
        return (
            f"rounds {self.fork_round + 1} to {self.lost.round} of this branch are given up for another, which has"
            f" {self.kept.tokens} tokens and not {self.lost.tokens}; {self.offered_by} offers again what they moved"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Debt:
    """What the lost branch moved since the fork, to be owed by one peer, and the tokens behind it."""

    fork_anchor: Float32
    tokens: int


def describe(branch: Branch, ledger: Ledger, at_unix_s: int) -> Incident:
    """The incident of following ``branch`` instead of what ``ledger`` holds now."""
    fork = branch.fork
    return Incident(
        at_unix_s=at_unix_s,
        shard=fork.shard,
        fork_round=fork.round,
        lost=_side(ledger.commits(fork.round + 1, 1)[0], fork, ledger.head),
        kept=_side(branch.tail[0][0], fork, branch.head),
        offered_by=peer_id_of(heir(branch, ledger)),
    )


def heir(branch: Branch, ledger: Ledger) -> bytes:
    """Who offers again what our branch moved: everybody on it comes to the same, whatever round it stands at."""
    first = ledger.commits(branch.fork.round + 1, 1)[0]
    return min(tokens_by_peer(Record.FromString(first.record)))


def record_incident(folder: Path, incident: Mapping[str, object]) -> None:
    """One line of JSON more in ``folder``/incidents, durable."""
    path = folder / INCIDENTS_FILE
    with disk_errors(path), open(path, "a") as file:
        file.write(json.dumps(incident, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def incidents_bytes(folder: Path) -> int:
    """What is written there so far."""
    path = folder / INCIDENTS_FILE
    with disk_errors(path):
        return path.stat().st_size if path.exists() else 0


async def debt_of(branch: Branch, newcomer: Newcomer, holders: Sequence[bytes], applied: LogHead) -> Debt | None:
    """What our branch moved, for its heir, who applied it up to ``applied``; None where the fork's state is gone."""
    if applied.round <= branch.fork.round:
        return None
    try:
        anchor = await fetch_anchor(newcomer, branch.fork.round, holders)
    except SwarmError as error:
        log.error("the state after round %d is not to be had: its branch is lost (%s)", branch.fork.round, error)
        return None
    return Debt(fork_anchor=anchor, tokens=applied.total_tokens - branch.fork.total_tokens)


async def state_of_branch(newcomer: Newcomer, holders: Sequence[bytes]) -> tuple[LogHead, Shard]:
    """A state that the new log proves, from whoever has it, or from our own disk."""
    for _ in range(ATTEMPTS):
        try:
            return await fetch_state(newcomer, holders)
        except SwarmError as error:
            own = newcomer.ledger.load_state(newcomer.spec, newcomer.shard, newcomer.num_values)
            if own is not None:
                return own
            log.info("no state of the other branch yet: %s", error)
        await asyncio.sleep(RETRY_S)
    raise DivergedError("the state of the branch to be followed is not to be had", "join again")


def _side(first: Commit, fork: LogHead, head: LogHead) -> Side:
    return Side(
        round=head.round,
        log_digest=head.log_digest.hex(),
        tokens=head.total_tokens,
        signers=tuple(peer_id_of(vote.signer) for vote in first.votes),
        gone=tuple(peer_id_of(voter) for voter in gone_of(first, fork)),
    )
