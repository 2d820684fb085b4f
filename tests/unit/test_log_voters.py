"""Who decides: majorities, founders, voters that are gone, and which of two branches everybody follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from swarm import log
from swarm.errors import ProtocolError, VerificationError
from swarm.proto.round_pb2 import Commit
from tests.unit.test_log import HEAD, RUN_ID, VOTERS, _record, _vote


@pytest.mark.parametrize(("voters", "majority"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4), (7, 4)])
def test_two_majorities_always_share_a_voter(voters: int, majority: int) -> None:
    """More than half, for every number of voters."""
    head = log.LogHead(
        run_id=RUN_ID, shard=0, round=0, log_digest=b"", voters=tuple(bytes([i]) for i in range(voters)), total_tokens=0
    )
    sizes = [size for size in range(voters + 1) if head.decides(head.voters[:size])]
    assert sizes[0] == majority and 2 * majority > voters


@pytest.mark.parametrize(
    ("voters", "founders", "signers", "decide"),
    [
        ([0, 1, 2, 3], [0], [0], True),
        ([0, 1, 2, 3], [0], [1, 2, 3], False),
        ([0, 1, 2, 3], [0, 1], [0, 2], False),
        ([0, 1, 2, 3], [0, 1], [0, 2, 3], True),
        ([0, 1, 2, 3], [4], [0, 1], False),
        ([0, 1, 2, 3, 4], [0], [0, 1], False),
        ([0, 1, 2, 3, 4], [0], [1, 2, 3], True),
    ],
)
def test_founders_outweigh_the_others_in_a_small_swarm_only(
    voters: list[int], founders: list[int], signers: list[int], decide: bool
) -> None:
    """Below five voters no number of others decides without a founder; from five on all weigh the same."""
    keys = [voter.public_key for voter in VOTERS]
    head = replace(HEAD, voters=tuple(keys[i] for i in voters), founders=tuple(keys[i] for i in founders))
    assert head.decides([keys[i] for i in signers]) is decide


def _without(signers: Sequence[int], gone: Sequence[int]) -> Commit:
    """A commit by some of the five voters that declares others gone, in order."""
    raw = _record().SerializeToString(deterministic=True)
    keys = sorted(VOTERS[i].public_key for i in gone)
    return Commit(record=raw, votes=[_vote(VOTERS[i], raw, gone=keys) for i in signers])


def _split_gone() -> Commit:
    """Voters 0 and 1 of five, each without the other four."""
    return Commit(
        record=_without([0], [1, 2, 3, 4]).record,
        votes=[*_without([0], [2, 3, 4]).votes, *_without([1], [0, 2, 3]).votes],
    )


def test_the_rest_of_the_voters_proves_a_commit_that_declares_the_majority_gone() -> None:
    """Two of two that remain, of five; and a lone one, where four are gone."""
    for signers, gone in (([0, 1], [2, 3, 4]), ([0], [1, 2, 3, 4])):
        commit = _without(signers, gone)
        assert log.verify_commit(HEAD, commit)[0] == _record()
        assert log.gone_of(commit, HEAD) == tuple(sorted(VOTERS[i].public_key for i in gone))
        assert log.verify_commit(HEAD, log.canonical(commit, HEAD))[0] == _record()


@pytest.mark.parametrize(
    ("name", "commit", "match"),
    [
        ("half of the rest", _without([0], [2, 3, 4]), "no majority"),
        ("a minority is gone", _without([0, 1], [3, 4]), "cannot be"),
        ("everybody is gone", _without([0], [0, 1, 2, 3, 4]), "cannot be"),
        ("one signs who is gone", _without([0, 1, 2], [2, 3, 4]), "cannot be"),
        ("votes that disagree on who is gone", _split_gone(), "no majority"),
    ],
)
def test_a_commit_that_goes_on_without_the_wrong_voters_is_refused(name: str, commit: Commit, match: str) -> None:
    """Nobody is declared gone who leaves a majority behind, and the rest has to agree on who is."""
    with pytest.raises(VerificationError, match=match):
        log.verify_commit(HEAD, commit)


def test_gone_voters_are_named_in_order_and_once() -> None:
    raw = _record().SerializeToString(deterministic=True)
    keys = sorted(VOTERS[i].public_key for i in (2, 3, 4))
    for named in (keys[::-1], [*keys, keys[0]], [*keys, b"x" * 32]):
        with pytest.raises(ProtocolError, match="cannot be"):
            log.verify_commit(HEAD, Commit(record=raw, votes=[_vote(VOTERS[0], raw, gone=named)]))


@pytest.mark.parametrize(
    ("case", "tokens", "log_digest", "behind"),
    [
        ("more tokens win", 101, b"z" * 32, True),
        ("fewer tokens lose", 99, b"a" * 32, False),
        ("as many: the lower digest wins", 100, b"a" * 32, True),
        ("as many: the higher digest loses", 100, b"z" * 32, False),
        ("the same", 100, b"m" * 32, False),
    ],
)
def test_of_two_branches_everybody_follows_the_same(case: str, tokens: int, log_digest: bytes, behind: bool) -> None:
    ours = replace(HEAD, total_tokens=100, log_digest=b"m" * 32)
    theirs = replace(HEAD, total_tokens=tokens, log_digest=log_digest)
    assert ours.is_behind(theirs) is behind, case
