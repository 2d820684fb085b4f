"""Plans of a round: who dials whom, who leads, who takes part, who averages what, who decides next, who measures.

Pure functions over numbers and keys; the round machine (`peer.rounds.round`) calls them, tests tabulate them.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from swarm.log import MAX_PARTS, MAX_VOTERS, SMALL_SWARM, LogHead
from swarm.proto.round_pb2 import Member, Part

# Wire blocks are a divisor of this, so a part never splits a block.
SLICE_VALUES = 16384
MAX_UPLINK_RATIO = 4
# 8 MiB of fp32, of which a replica has a part at once. A large shard has larger ones, as their number is bounded.
MAX_PART_SLICES = 128
# A reducer's share travels as so many parts side by side, each on a stream of its own: a stream's window, 256 KiB at
# first, opens too slowly for a long path. A part in the densest codec that fits the first window is small enough.
PARTS_PER_REDUCER = 4
SMALL_PART_SLICES = 15
# Time to be dialled: the lower key may not know us, or not reach us; whoever is behind a router has to see us first.
SECOND_DIAL_S = 1.0
RELAYED_DIAL_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A live replica that stands where we stand (same round, log digest and state digest)."""

    key: bytes
    trains: bool
    upload_bps: int
    tokens: int = 0
    """trained on towards this round"""
    relayed: bool = False
    """nobody can dial it"""


def num_slices(num_values: int) -> int:
    return -(-num_values // SLICE_VALUES)


def part_values(part_first_slice: int, part_num_slices: int, num_values: int) -> slice:
    """The values (as a slice of the flat vector) that a run of slices covers."""
    start = part_first_slice * SLICE_VALUES
    return slice(start, min(num_values, start + part_num_slices * SLICE_VALUES))


def leader_order(head: LogHead, round_number: int) -> list[bytes]:
    """Voters by rendezvous hash (Thaler and Ravishankar 1998): the first leads, the next take over in turn.

    In a small swarm founders come first: they need nobody else's vote.
    """
    key = head.shard.to_bytes(4, "big") + round_number.to_bytes(8, "big")

    def place(voter: bytes) -> tuple[int, bytes]:
        return -head.weight(voter), hashlib.sha256(b"leader" + key + voter).digest()

    return sorted(head.voters, key=place)


def takeover_rank(order: Sequence[bytes], me: bytes, after: bytes | None) -> int:
    """How many takeover timeouts ``me`` waits: its place in the order, counted from the leader that was seen last."""
    if after is None or after not in order:
        return order.index(me)
    distance = (order.index(me) - order.index(after)) % len(order)
    return distance or len(order)


def choose_members(candidates: Iterable[Candidate], max_members: int, leader: bytes) -> list[Member]:
    """The leader, then contributors before receivers, faster uplinks first where not all fit; given in key order."""
    ranked = sorted(candidates, key=lambda c: (c.key != leader, not c.trains, -c.upload_bps, c.key))[:max_members]
    ordered = sorted(ranked, key=lambda c: c.key)
    return [Member(peer_key=c.key, contributes=c.trains, tokens=c.tokens) for c in ordered]


def spared(candidates: Iterable[Candidate]) -> frozenset[bytes]:
    """Who averages nothing, as nobody can dial it.

    Whoever averages is sent every member's part, and for such a peer a relay carries all of that. It is spared where
    those that train and can be dialled have half of all uplinks: nobody's share is then more than twice what it was.
    Where they have less, everybody averages.
    """
    training = [candidate for candidate in candidates if candidate.trains]
    dialled_bps = sum(candidate.upload_bps for candidate in training if not candidate.relayed)
    if not 0 < sum(candidate.upload_bps for candidate in training) <= 2 * dialled_bps:
        return frozenset()
    return frozenset(candidate.key for candidate in training if candidate.relayed)


def dial_patience_s(me: bytes, peer: bytes, *, relayed: tuple[bool, bool]) -> float:
    """How long we wait to be dialled before we dial; ``relayed``: of us and of the peer, whether nobody can dial it.

    Whoever cannot be dialled dials, as that makes a connection without a relay. Else the lower key dials first: dials
    that cross may both fail, and libp2p then waits for seconds. Where neither can be dialled it may need a while.
    """
    if relayed == (True, False):
        return 0.0
    if relayed == (False, True):
        return RELAYED_DIAL_S
    second_s = RELAYED_DIAL_S if all(relayed) else SECOND_DIAL_S
    return second_s if peer < me else 0.0


def split_parts(
    members: Sequence[Member], upload_bps: dict[bytes, int], slices: int, idle: Collection[bytes] = ()
) -> list[Part]:
    """Split ``slices`` among the contributing members but ``idle`` in proportion to their uplinks (largest remainder).

    A reducer sends its average to everybody, so its share of the work is its share of the bandwidth; but uplinks are
    hearsay: nobody counts for more than `MAX_UPLINK_RATIO` times the median. Large shares are cut into several parts;
    none is larger than one call carries.
    """
    contributing = [index for index, member in enumerate(members) if member.contributes]
    reducers = [index for index in contributing if members[index].peer_key not in idle] or contributing
    reducers = reducers[:MAX_PARTS]
    claimed = [max(1, upload_bps.get(members[index].peer_key, 1)) for index in reducers]
    weights = [min(claim, MAX_UPLINK_RATIO * statistics.median_low(claimed)) for claim in claimed]
    total = sum(weights)
    exact = [slices * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(reducers)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: slices - sum(counts)]:
        counts[i] += 1
    wanted = max(SMALL_PART_SLICES, -(-slices // (PARTS_PER_REDUCER * len(reducers))))
    largest = max(min(wanted, MAX_PART_SLICES), -(-slices // max(1, MAX_PARTS - len(reducers))))
    parts, first = [], 0
    for index, count in zip(reducers, counts, strict=True):
        pieces = -(-count // largest)
        for piece in range(pieces):
            size = count // pieces + (piece < count % pieces)
            parts.append(Part(first_slice=first, num_slices=size, reducer=index))
            first += size
    return parts


def choose_voters(
    present: Iterable[bytes], founders: Sequence[bytes], current: Sequence[bytes], seed: int
) -> list[bytes]:
    """Who decides the next round: founders that are present, then voters that stay, then others by rendezvous hash.

    An odd number, so that every voter counts; at most 7. All of a small swarm, where founders and others are present:
    those outweigh these until their leases have run out (docs/decisions/0013).
    """

    def preference(key: bytes) -> tuple[bool, bool, bytes]:
        return key not in founders, key not in current, hashlib.sha256(seed.to_bytes(8, "big") + key).digest()

    ranked = sorted(set(present), key=preference)[:MAX_VOTERS]
    if len(ranked) < SMALL_SWARM and 0 < sum(key in founders for key in ranked) < len(ranked):
        return sorted(ranked)
    size = len(ranked) if len(ranked) % 2 else len(ranked) - 1
    return sorted(ranked[: max(1, size)])


def evaluator(round_number: int, contributors: Iterable[bytes]) -> bytes | None:
    """The contributor that measures the validation loss of a round's result, by rendezvous hash."""

    def weight(key: bytes) -> bytes:
        return hashlib.sha256(b"evaluate" + round_number.to_bytes(8, "big") + key).digest()

    return min(contributors, key=weight, default=None)
