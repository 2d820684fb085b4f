"""What the benchmark of rounds under faults takes for right and for wrong, and that its faults come from its seed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

from chaos_account import STEP, Account, Life, Told
from chaos_faults import PARTITION, plan

GOOD = Told(
    round=1,
    at=0.0,
    state_digest="d",
    counted=True,
    parts=[(0, 1, [(0, 300), (1, 100)]), (1, 1, [(0, 300)])],
    trained=300,
    uncounted=0,
    offered=300,
    anchor=[(300 * 300 + 100 * 100) / 400 * STEP, 300 * STEP],
    voters=[0],
)
OTHER = replace(GOOD, trained=150, uncounted=50, offered=100)


def judged(first: Told, second: Told | None = OTHER) -> Account:
    other = Life(1, told={1: second}) if second is not None else Life(1, offered=100, ended_in=1)
    lives = [Life(0, told={1: first}), other]
    account = Account(2)
    account.judge(1, lives)
    return account


def test_a_round_that_is_as_its_commit_says_is_right() -> None:
    """Each value moved by the average of what its tokens moved, and the rest waits."""
    account = judged(GOOD)
    assert (account.unequal, account.lost) == (0, [])


def test_the_share_of_a_process_that_was_killed_is_its_own() -> None:
    """It tells nothing any more, and what it sent counts all the same."""
    assert judged(GOOD, None).lost == []


@pytest.mark.parametrize(
    ("case", "first", "second", "unequal", "lost"),
    [
        ("another state", GOOD, replace(OTHER, state_digest="e"), 1, 0),
        ("tokens left an account without a commit", replace(GOOD, uncounted=0, trained=301), OTHER, 0, 1),
        ("tokens are counted and wait all the same", GOOD, replace(OTHER, uncounted=150), 0, 1),
        ("movement is missing", replace(GOOD, anchor=[GOOD.anchor[0], 250 * STEP]), OTHER, 0, 1),
        ("movement came twice", replace(GOOD, anchor=[2 * GOOD.anchor[0], GOOD.anchor[1]]), OTHER, 0, 1),
        ("nobody admits to a share", GOOD, replace(OTHER, counted=False), 0, 1),
    ],
)
def test_what_is_not_as_it_must_be_is_found(case: str, first: Told, second: Told, unequal: int, lost: int) -> None:
    account = judged(first, second)
    assert account.unequal == unequal, case
    assert min(len(account.lost), 1) == lost, case


def test_a_slice_that_was_absent_brings_what_it_owes_the_next_time() -> None:
    """Peer 1 was in no more than the first slice's average: its second slice brings both rounds' movement."""
    lives = [Life(0, told={1: GOOD}), Life(1, told={1: OTHER})]
    account = Account(2)
    account.judge(1, lives)
    step = (100 + 60) * STEP
    parts = [(0, 2, [(1, 60)])]
    anchor = [GOOD.anchor[0] + 60 * STEP, GOOD.anchor[1] + step]
    second = replace(GOOD, round=2, parts=parts, anchor=anchor, trained=160, uncounted=0, offered=160)
    lives[0].told[2] = replace(second, counted=False, trained=300, uncounted=0)
    lives[1].told[2] = second
    account.judge(2, lives)
    assert account.lost == []


def test_a_seed_is_a_list_of_faults() -> None:
    """The same seed, the same faults; partitions only where they are asked for."""
    assert plan(3, 50, 5) == plan(3, 50, 5) != plan(4, 50, 5)
    assert any(fault.one_way for fault in plan(3, 50, 5))
    assert all(fault.kind != PARTITION for fault in plan(3, 50, 5, ("kill", "stall")))


def test_a_process_brings_what_its_disk_said_that_it_owed_unless_its_predecessor_had_sent_it() -> None:
    """The killed process is in the first slice's average: of its debt only the second slice's is left."""
    dead, account = Life(1, owed=[STEP, STEP], offered=100, ended_in=1), Account(2)
    first = replace(GOOD, anchor=[(300 * 300 + 100 * 101) / 400 * STEP, 300 * STEP])
    again = Life(1, owed=[STEP, STEP])
    account.judge(1, [Life(0, told={1: first}), dead])
    account.late(again, replace(first, counted=False, offered=0))
    assert (account.unequal, account.lost) == (0, []) and again.owed == [0.0, STEP]
    anchor = [first.anchor[0] + 50 * STEP, first.anchor[1] + 51 * STEP]
    again.told[2] = replace(GOOD, round=2, parts=[(0, 2, [(1, 50)])], anchor=anchor, trained=50, offered=50)
    account.judge(2, [dead, again])
    assert account.lost == []
