"""Which statuses count, and what follows from them."""

from __future__ import annotations

import math

import pytest

from peer.rounds.statuses import (
    ADMISSION_CONTEXT,
    StatusRules,
    further_on,
    make_view,
    read_status,
    read_statuses,
    sign_status,
)
from swarm.errors import SwarmError
from swarm.identity import Identity
from swarm.proto.common_pb2 import Admission
from swarm.proto.round_pb2 import Status

RUN_ID, NOW = b"r" * 20, 1_000_000.0
PUBLICATION, PEER, FOUNDER = Identity(b"p" * 32), Identity(b"v" * 32), Identity(b"f" * 32)
RULES = StatusRules(
    run_id=RUN_ID, publication_key=PUBLICATION.public_key, founders=(FOUNDER.public_key,), lifetime_s=10
)


def status(**changes: object) -> Status:
    admission = Admission(peer_key=PEER.public_key, expires_unix_s=int(NOW) + 100)
    fields: dict[str, object] = {
        "round": 3,
        "log_digest": b"l" * 32,
        "state_digest": b"s" * 32,
        "tokens": 100,
        "trains": True,
        "sent_unix_ms": int(NOW * 1000),
        "admission": PUBLICATION.sign(ADMISSION_CONTEXT, RUN_ID, admission.SerializeToString()),
    }
    return Status(**{**fields, **changes})  # type: ignore[arg-type]


def admission(by: Identity, **fields: object) -> object:
    values = {"peer_key": PEER.public_key, "expires_unix_s": int(NOW) + 100, **fields}
    return by.sign(ADMISSION_CONTEXT, RUN_ID, Admission(**values).SerializeToString())


def test_an_honest_status_counts() -> None:
    assert read_status(sign_status(PEER, RUN_ID, status()), PEER.public_key, RULES, NOW).tokens == 100


def test_a_founder_needs_no_admission() -> None:
    raw = sign_status(FOUNDER, RUN_ID, status(admission=None))
    assert read_status(raw, FOUNDER.public_key, RULES, NOW).round == 3


@pytest.mark.parametrize(
    ("case", "raw"),
    [
        ("no message at all", b"\xff\xff"),
        ("signed by somebody else", sign_status(FOUNDER, RUN_ID, status())),
        ("of another run", sign_status(PEER, b"x" * 20, status())),
        ("too old", sign_status(PEER, RUN_ID, status(sent_unix_ms=int((NOW - 11) * 1000)))),
        ("from the future", sign_status(PEER, RUN_ID, status(sent_unix_ms=int((NOW + 11) * 1000)))),
        ("no round", sign_status(PEER, RUN_ID, status(round=0))),
        ("a digest cut short", sign_status(PEER, RUN_ID, status(state_digest=b"s"))),
        ("too many addresses", sign_status(PEER, RUN_ID, status(addresses=["/a"] * 9))),
        ("an address too long", sign_status(PEER, RUN_ID, status(addresses=["/" + "a" * 256]))),
        *(
            (f"{name} {rate}", sign_status(PEER, RUN_ID, status(**{name: rate})))
            for name in ("tokens_per_s", "service_tokens_per_s")
            for rate in (math.nan, math.inf, -1.0, 1e300)
        ),
        ("no admission", sign_status(PEER, RUN_ID, status(admission=None))),
        ("an admission that the peer made itself", sign_status(PEER, RUN_ID, status(admission=admission(PEER)))),
        (
            "somebody else's admission",
            sign_status(PEER, RUN_ID, status(admission=admission(PUBLICATION, peer_key=b"o" * 32))),
        ),
        (
            "an expired admission",
            sign_status(PEER, RUN_ID, status(admission=admission(PUBLICATION, expires_unix_s=int(NOW) - 1))),
        ),
    ],
)
def test_a_status_that_does_not_count(case: str, raw: bytes) -> None:
    with pytest.raises(SwarmError):
        read_status(raw, PEER.public_key, RULES, NOW)
    assert read_statuses({PEER.public_key: raw}, RULES, NOW) == {}, case


def test_only_those_who_stand_where_we_stand_are_candidates() -> None:
    mine = status(tokens=50)
    others = {
        b"a" * 32: status(tokens=60),
        b"b" * 32: status(round=4),
        b"c" * 32: status(state_digest=b"t" * 32),
        b"d" * 32: status(log_digest=b"m" * 32),
        b"e" * 32: status(leaving=True),
        b"g" * 32: status(trains=False, tokens=999),
    }
    view = make_view(others, mine, PEER.public_key)
    told = {candidate.key: candidate.tokens for candidate in view.candidates}
    assert told == {b"a" * 32: 60, b"g" * 32: 999, PEER.public_key: 50}
    assert view.tokens == 110, "a seed peer's tokens do not count"


def test_those_who_are_further_on_come_furthest_first() -> None:
    statuses = {b"a" * 32: status(round=4), b"b" * 32: status(round=9), b"c" * 32: status(round=3)}
    assert further_on(statuses, 3) == [b"b" * 32, b"a" * 32]
