"""The genesis: what may start a log, as a table of honest and hostile ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarm import digest, log
from swarm.errors import ProtocolError, SignatureError, SwarmError
from swarm.identity import Identity
from swarm.proto.common_pb2 import Genesis, Signed
from tests.unit.test_log import GENESIS, HEAD, ORGANIZER, RUN_ID, STRANGER


def _sign_genesis(genesis: Genesis, signer: Identity = ORGANIZER) -> Signed:
    return signer.sign(log.GENESIS_CONTEXT, RUN_ID, genesis.SerializeToString())


def test_the_organizers_genesis_starts_the_log() -> None:
    """Round 0, no tokens, the voters that the organizer named."""
    assert log.parse_genesis(_sign_genesis(GENESIS), RUN_ID, ORGANIZER.public_key, 1) == GENESIS
    assert (HEAD.round, HEAD.total_tokens, HEAD.founders) == (0, 0, tuple(GENESIS.voters))
    assert HEAD.log_digest == digest.log_genesis(RUN_ID, 0)


def _genesis_with(change: Callable[[Genesis], object]) -> Signed:
    genesis = Genesis.FromString(GENESIS.SerializeToString())
    change(genesis)
    return _sign_genesis(genesis)


GENESIS_CASES: list[tuple[str, Signed, type[SwarmError], str]] = [
    ("another signer", _sign_genesis(GENESIS, STRANGER), SignatureError, "another key"),
    ("not a genesis", ORGANIZER.sign("genesis", RUN_ID, b"\xff"), ProtocolError, "cannot be read"),
    ("another kind", ORGANIZER.sign("vote", RUN_ID, b""), SignatureError, "does not verify"),
    ("another run", _genesis_with(lambda g: setattr(g, "run_id", b"x" * 20)), ProtocolError, "another run"),
    ("two shards", _genesis_with(lambda g: g.shards.append(g.shards[0])), ProtocolError, "another run"),
    ("no voters", _genesis_with(lambda g: g.ClearField("voters")), ProtocolError, "0 voters"),
    ("no state", _genesis_with(lambda g: setattr(g.shards[0], "state_digest", b"")), ProtocolError, "no state"),
    ("an empty state", _genesis_with(lambda g: setattr(g.shards[0], "num_values", 0)), ProtocolError, "no state"),
]


@pytest.mark.parametrize(("name", "signed", "error", "match"), GENESIS_CASES, ids=[case[0] for case in GENESIS_CASES])
def test_a_bad_genesis_is_refused(name: str, signed: Signed, error: type[SwarmError], match: str) -> None:
    """Nothing starts from what the organizer did not sign, or from no state."""
    with pytest.raises(error, match=match):
        log.parse_genesis(signed, RUN_ID, ORGANIZER.public_key, 1)
