"""Whose turn it is to open a round: by its own tokens, behind the first shard, and never two rounds ahead."""

from __future__ import annotations

import pytest

from peer.rounds.pace import Pace, Standing, may_open
from swarm.run_spec import Rounds

RULES = Rounds(tokens_per_round=1000)


def at(*standings: tuple[int, int]) -> list[Standing]:
    return [Standing(round=number, tokens=tokens) for number, tokens in standings]


CASES = [
    ("one shard, too early", 0, at((5, 999)), False, "999 of 1000"),
    ("one shard, its tokens are reached", 0, at((5, 1000)), True, "trained"),
    ("the first of two does not wait for the second's turn", 0, at((6, 1000), (5, 400)), True, "trained"),
    (
        "the first waits for a shard two rounds behind",
        0,
        at((7, 1000), (5, 4000)),
        False,
        "1 has not committed round 5",
    ),
    ("the second waits for the first's commit", 1, at((5, 2000), (5, 2000)), False, "0 has not committed round 5"),
    ("the second waits for half a round since", 1, at((6, 499), (5, 1499)), False, "499 of 500"),
    ("the second's turn", 1, at((6, 500), (5, 1500)), True, "follows"),
    ("the second opens a little early, to make up for a delay", 1, at((6, 500), (5, 750)), True, "follows"),
    ("but not much", 1, at((6, 500), (5, 749)), False, "749 of 750"),
    ("the third of four: half a round after the first", 2, at((6, 500), (6, 250), (5, 900), (5, 900)), True, "follows"),
    ("the fourth: three quarters", 3, at((6, 749), (6, 499), (6, 249), (5, 999)), False, "749 of 750"),
    ("late: two rounds' tokens wait", 1, at((6, 100), (5, 2000)), True, "follows"),
    ("late: the first is a round further on", 1, at((7, 0), (5, 900)), True, "follows"),
    ("late, yet the third shard is two rounds behind", 1, at((7, 0), (6, 2000), (4, 0)), False, "2 has not committed"),
]


@pytest.mark.parametrize(("shard", "standings", "opens", "why"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_shard_opens_in_its_turn(shard: int, standings: list[Standing], opens: bool, why: str) -> None:
    told, reason = may_open(RULES, shard, standings)
    assert (told, why in reason) == (opens, True), reason


def test_what_members_note_is_what_counts() -> None:
    pace = Pace(2)
    assert not pace.may_open(RULES, 1)[0]
    pace.note(0, Standing(round=2, tokens=500))
    pace.note(1, Standing(round=1, tokens=1500))
    assert pace.may_open(RULES, 1)[0] and not pace.may_open(RULES, 0)[0]
