"""Which rung of the ladder an uplink takes, and which ladders a run spec may have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peer.rounds.codec import CODECS
from peer.rounds.ladder import Uplink, choose_rung
from swarm import run_spec
from swarm.errors import SpecError
from swarm.run_spec import Rounds, parse_section

LADDER = ("int8", "int4", "int2", "topk")
# 100 M values and 4 members: 76 MB in int8, 40 in int4, 21 in int2, 2.1 in topk.
UPLINK = Uplink(upload_bps=20_000_000, num_values=10**8, num_members=4, round_s=120.0, timeout_s=60.0)

CASES: list[tuple[str, Uplink, tuple[str, ...], str]] = [
    ("a home uplink, a round of two minutes", UPLINK, LADDER, "int2"),
    ("twice the uplink", replace(UPLINK, upload_bps=41_000_000), LADDER, "int8"),
    ("a little less", replace(UPLINK, upload_bps=38_000_000), LADDER, "int4"),
    ("a phone's uplink", replace(UPLINK, upload_bps=2_000_000), LADDER, "topk"),
    ("longer rounds leave more time", replace(UPLINK, round_s=300.0), LADDER, "int8"),
    ("shorter rounds leave less", replace(UPLINK, round_s=30.0), LADDER, "topk"),
    ("reducers wait no longer", replace(UPLINK, round_s=3600.0, timeout_s=10.0), LADDER, "int2"),
    ("no round was seen yet: only the timeout counts", replace(UPLINK, round_s=None), LADDER, "int8"),
    ("a smaller model", replace(UPLINK, num_values=10**7), LADDER, "int8"),
    ("nothing fits: the thinnest", replace(UPLINK, upload_bps=1000), LADDER, "topk"),
    ("nothing fits, and none is sparse", replace(UPLINK, upload_bps=1000), LADDER[:3], "int2"),
    ("an uplink that claims nothing", replace(UPLINK, upload_bps=0), LADDER, "topk"),
    ("an uplink below nothing", replace(UPLINK, upload_bps=-5), LADDER, "topk"),
    ("an uplink that is not known", replace(UPLINK, upload_bps=None), LADDER, "int8"),
    ("alone, nothing travels", replace(UPLINK, upload_bps=1, num_members=1), LADDER, "int8"),
    ("one rung is no choice", replace(UPLINK, upload_bps=1), ("int4",), "int4"),
]


@pytest.mark.parametrize(("name", "uplink", "ladder", "expected"), CASES, ids=[case[0] for case in CASES])
def test_the_densest_rung_that_fits_is_taken(name: str, uplink: Uplink, ladder: tuple[str, ...], expected: str) -> None:
    """The upload takes at most an eighth of the round, and what reducers wait; the reason names both times."""
    codec, why = choose_rung(ladder, uplink)
    assert codec == expected, why
    assert f"{uplink.upload_s(codec):.1f} s of {uplink.budget_s:.1f} s" in why


def test_the_run_spec_knows_the_codecs_as_they_are() -> None:
    """Names, order and kind of the codecs are those of the code, from dense to thin."""
    assert tuple(CODECS) == run_spec.CODECS
    assert tuple(name for name, codec in CODECS.items() if codec.sparse) == run_spec.SPARSE_CODECS
    sizes = [codec.encoded_size(1 << 20) for codec in CODECS.values()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("rounds", "ladder"),
    [
        (Rounds(), ("int8", "int4", "int2")),
        (Rounds(wire_codec="int4"), ("int4", "int2")),
        (Rounds(wire_codec="int4", contribution_codecs=("int8", "topk")), ("int8", "topk")),
    ],
)
def test_the_ladder_begins_with_the_wire_codec_unless_the_spec_says_otherwise(
    rounds: Rounds, ladder: tuple[str, ...]
) -> None:
    """By default a member takes the codec of averages, or a thinner block-wise one."""
    assert rounds.ladder == ladder


@pytest.mark.parametrize(
    ("case", "values", "told"),
    [
        ("none", {"contribution_codecs": []}, "must be some of int8, int4, int2, topk, in this order"),
        ("out of order", {"contribution_codecs": ["int4", "int8"]}, "in this order"),
        ("twice", {"contribution_codecs": ["int4", "int4"]}, "in this order"),
        ("unknown", {"contribution_codecs": ["fp32"]}, "Input should be 'int8', 'int4', 'int2' or 'topk'"),
        ("sparse averages", {"wire_codec": "topk"}, "Input should be 'int8', 'int4' or 'int2'"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused(case: str, values: dict[str, Any], told: str) -> None:
    """The error names the field and what it takes."""
    with pytest.raises(SpecError, match=told):
        parse_section(Rounds, values, case)


# 10 s of 2.5 MB; what 4 members send of 100 M values takes 0.84 s in topk, 8.4 s in int2.
BESIDE: list[tuple[str, dict[str, Any], str, list[int], int, set[int]]] = [
    ("what fits beside the contribution", {}, "topk", [10_000_000, 10_000_000, 3_000_000], 0, {0, 1}),
    ("less beside a denser one", {}, "int2", [10_000_000, 10_000_000, 3_000_000], 0, {2}),
    ("all of the time without a contribution", {}, "", [20_000_000, 5_000_000, 1], 0, {0, 1}),
    ("another part first in another round", {}, "", [20_000_000, 5_000_000, 20_000_000], 2, {2, 1}),
    ("a small one where the large one does not fit", {}, "", [30_000_000, 5_000_000], 0, {1}),
    ("nothing where even the thinnest takes too long", {"upload_bps": 1000}, "topk", [1, 1], 0, set()),
    ("nothing is owed: nothing takes no time", {"upload_bps": 1000}, "", [0, 0], 0, {0, 1}),
    ("an uplink that is not known", {"upload_bps": None}, "int8", [1 << 40], 0, {0}),
    ("no parts", {}, "", [], 7, set()),
]


@pytest.mark.parametrize(
    ("name", "changes", "codec", "sizes", "turn", "expected"), BESIDE, ids=[case[0] for case in BESIDE]
)
def test_what_is_handed_over_shares_the_time_of_the_contribution(
    name: str, changes: dict[str, Any], codec: str, sizes: list[int], turn: int, expected: set[int]
) -> None:
    uplink = replace(UPLINK, round_s=80.0, **changes)
    chosen = uplink.fit_beside(codec, sizes, turn)
    assert chosen == expected
    sent_s = sum(8 * sizes[index] / 20e6 for index in chosen)
    if changes == {}:
        assert sent_s + (uplink.upload_s(codec) if codec else 0) <= uplink.budget_s
