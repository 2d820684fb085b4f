"""Plans of a round, as tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.p2p.punching import PUNCH_S
from peer.rounds.planning import (
    Candidate,
    choose_members,
    choose_voters,
    dial_patience_s,
    leader_order,
    num_slices,
    part_values,
    spared,
    split_parts,
    takeover_rank,
)
from swarm.log import LogHead
from swarm.proto.round_pb2 import Member

KEYS = [bytes([i]) * 32 for i in range(1, 12)]


def head(voters: Sequence[bytes]) -> LogHead:
    return LogHead(
        run_id=b"r" * 20,
        shard=0,
        round=0,
        log_digest=bytes(32),
        voters=tuple(voters),
        total_tokens=0,
        founders=(KEYS[0],),
    )


def test_everybody_computes_the_same_order_and_rounds_rotate_the_leader() -> None:
    orders = [leader_order(head(KEYS[:5]), number) for number in range(1, 60)]
    assert all(sorted(order) == KEYS[:5] for order in orders)
    assert orders == [leader_order(head(list(reversed(KEYS[:5]))), number) for number in range(1, 60)]
    assert {order[0] for order in orders} == set(KEYS[:5])


def test_the_founder_of_a_small_swarm_leads_first() -> None:
    """It needs nobody else's vote; in a larger swarm it is one among others."""
    small = [leader_order(head(KEYS[:4]), number)[0] for number in range(1, 30)]
    assert set(small) == {KEYS[0]}


@pytest.mark.parametrize(
    ("case", "me", "after", "rank"),
    [
        ("nobody led yet: my place", 2, None, 2),
        ("the first to lead waits for nobody", 0, None, 0),
        ("the one after the last leader", 1, 0, 1),
        ("around the end", 0, 2, 1),
        ("the leader itself comes last", 1, 1, 3),
    ],
)
def test_takeover_rank(case: str, me: int, after: int | None, rank: int) -> None:
    order = KEYS[:3]
    assert takeover_rank(order, order[me], None if after is None else order[after]) == rank, case


def test_contributors_and_fast_uplinks_come_first_where_not_all_fit() -> None:
    candidates = [
        Candidate(key=KEYS[0], trains=False, upload_bps=10**9),
        Candidate(key=KEYS[1], trains=True, upload_bps=10, tokens=7),
        Candidate(key=KEYS[2], trains=True, upload_bps=1000),
    ]
    assert [m.peer_key for m in choose_members(candidates, 2, KEYS[1])] == [KEYS[1], KEYS[2]]
    assert [m.contributes for m in choose_members(candidates, 3, KEYS[1])] == [False, True, True]
    assert [m.tokens for m in choose_members(candidates, 3, KEYS[1])] == [0, 7, 0], "what each told"
    assert [m.peer_key for m in choose_members(candidates, 2, KEYS[0])] == [KEYS[0], KEYS[2]], "the leader is always in"


@given(
    slices=st.integers(1, 500),
    uplinks=st.lists(st.integers(0, 10**10), min_size=1, max_size=10),
)
def test_parts_cover_every_slice_once_in_proportion_to_uplinks(slices: int, uplinks: list[int]) -> None:
    members = [Member(peer_key=KEYS[i], contributes=True) for i in range(len(uplinks))]
    parts = split_parts(members, dict(zip(KEYS, uplinks, strict=False)), slices)
    assert [part.first_slice for part in parts] == [sum(p.num_slices for p in parts[:i]) for i in range(len(parts))]
    assert sum(part.num_slices for part in parts) == slices
    claimed = [max(1, uplink) for uplink in uplinks]
    believed = [min(claim, 4 * statistics.median_low(claimed)) for claim in claimed]
    for reducer in {part.reducer for part in parts}:
        exact = slices * believed[reducer] / sum(believed)
        assert abs(sum(part.num_slices for part in parts if part.reducer == reducer) - exact) < 1.0001


def test_large_models_have_several_parts_per_reducer_and_never_too_many() -> None:
    members = [Member(peer_key=key, contributes=True) for key in KEYS[:3]]
    parts = split_parts(members, {}, 3 * 10_000)
    assert all(part.num_slices * 16384 * 4 <= 64 << 20 for part in parts)
    assert len(split_parts(members, {}, 10**6)) <= 64


def test_a_large_share_is_several_parts_and_a_small_one_stays_whole() -> None:
    """A share travels on several streams, unless its parts would be too small to be worth a call each."""
    members = [Member(peer_key=key, contributes=True) for key in KEYS[:4]]
    assert [part.num_slices for part in split_parts(members, {}, 4 * 15)] == [15] * 4
    assert [part.num_slices for part in split_parts(members, {}, 4 * 40)] == [14, 13, 13] * 4
    assert [part.num_slices for part in split_parts(members, {}, 4 * 400)] == [100] * 16


def test_members_that_only_receive_average_nothing() -> None:
    members = [Member(peer_key=KEYS[0], contributes=False), Member(peer_key=KEYS[1], contributes=True)]
    assert {part.reducer for part in split_parts(members, {}, 7)} == {1}


FAST, SLOW = 100, 10


@pytest.mark.parametrize(
    ("case", "peers", "expected"),
    [
        ("all can be dialled", [(FAST, False), (FAST, False)], []),
        ("one of three cannot: it averages nothing", [(FAST, False), (FAST, True), (FAST, False)], [1]),
        ("half can: the others are spared", [(FAST, True), (FAST, False)], [0]),
        ("those that can are the minority: all average", [(FAST, True), (FAST, False), (FAST, True)], []),
        ("what counts is the uplink", [(SLOW, True), (FAST, False), (SLOW, True), (SLOW, True)], [0, 2, 3]),
        ("nobody can be dialled: all average", [(FAST, True), (SLOW, True)], []),
        ("nobody claims an uplink", [(0, True), (0, False)], []),
    ],
)
def test_who_cannot_be_dialled_averages_nothing_where_others_have_the_uplinks(
    case: str, peers: list[tuple[int, bool]], expected: list[int]
) -> None:
    candidates = [Candidate(key=KEYS[i], trains=True, upload_bps=bps, relayed=r) for i, (bps, r) in enumerate(peers)]
    seed = Candidate(key=KEYS[9], trains=False, upload_bps=10**9)
    assert spared([*candidates, seed]) == {KEYS[i] for i in expected}, case
    members = [Member(peer_key=candidate.key, contributes=True) for candidate in candidates]
    parts = split_parts(members, {}, 1000, spared([*candidates, seed]))
    assert {part.reducer for part in parts} == set(range(len(peers))) - set(expected), case
    assert sum(part.num_slices for part in parts) == 1000


@pytest.mark.parametrize(
    ("case", "me", "peer", "relayed", "dials_first"),
    [
        ("both can be dialled: the lower key", 0, 1, (False, False), True),
        ("both can be dialled: the higher key waits", 1, 0, (False, False), False),
        ("neither can: the lower key", 0, 1, (True, True), True),
        ("neither can: the higher key waits", 1, 0, (True, True), False),
        ("I cannot be dialled, so I dial", 1, 0, (True, False), True),
        ("the other cannot: I wait for it", 0, 1, (False, True), False),
    ],
)
def test_of_two_peers_one_dials_first(
    case: str, me: int, peer: int, relayed: tuple[bool, bool], dials_first: bool
) -> None:
    mine = dial_patience_s(KEYS[me], KEYS[peer], relayed=relayed)
    theirs = dial_patience_s(KEYS[peer], KEYS[me], relayed=relayed[::-1])
    assert (mine < theirs) == dials_first and min(mine, theirs) == 0.0, case
    assert max(mine, theirs) > PUNCH_S or not any(relayed), "a way through both routers takes a while"


@pytest.mark.parametrize(
    ("case", "present", "founders", "current", "expected"),
    [
        ("alone", [0], [0], [0], [0]),
        ("a small swarm: all, as the founder outweighs the others", [0, 1, 2, 3], [0], [0], [0, 1, 2, 3]),
        ("a small swarm of founders alone: an odd number", [0, 1, 2, 3], [0, 1, 2, 3], [0], 3),
        ("a small swarm without its founder: an odd number of the others", [1, 2, 3, 4], [0], [0], 3),
        ("five: all", [0, 1, 2, 3, 4], [0], [0], [0, 1, 2, 3, 4]),
        ("a founder that is away is not named", [1, 2, 3, 4, 5], [0], [0, 1, 2], [1, 2, 3, 4, 5]),
    ],
)
def test_choose_voters(
    case: str, present: list[int], founders: list[int], current: list[int], expected: list[int] | int
) -> None:
    chosen = choose_voters([KEYS[i] for i in present], [KEYS[i] for i in founders], [KEYS[i] for i in current], 1)
    assert (len(chosen) if isinstance(expected, int) else chosen) == (
        expected if isinstance(expected, int) else [KEYS[i] for i in expected]
    ), case


def test_voters_are_odd_at_most_seven_and_stay_where_they_can() -> None:
    current = KEYS[1:6]
    chosen = choose_voters(KEYS, KEYS[:1], current, 9)
    assert len(chosen) == 7 and set(chosen) >= {KEYS[0], *current}


def test_slices_cover_the_vector_and_the_last_is_cut() -> None:
    count = num_slices(40_000)
    assert count == 3
    covered = [part_values(i, 1, 40_000) for i in range(count)]
    assert covered[0].start == 0 and covered[-1].stop == 40_000
    assert all(a.stop == b.start for a, b in itertools.pairwise(covered))
