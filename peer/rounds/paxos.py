"""Single-decree Paxos for one round: the acceptor that a voter is, the proposer that a leader is.

Pure. Follows Lamport, "Paxos Made Simple" (2001): an acceptor answers a prepare with the highest-numbered proposal that
it accepted, a proposer adopts the highest that a majority tells it. The value is a serialised `Record`. Durability is
the caller's: nothing that these functions return may be sent before the new state is on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from swarm.proto import round_pb2

Ballot = tuple[int, bytes]
"""(number from 1, public key of the leader): totally ordered, and two leaders never share one."""

NO_BALLOT: Ballot = (0, b"")


def ballot_of(message: round_pb2.Ballot) -> Ballot:
    return (message.number, message.leader)


def to_message(ballot: Ballot) -> round_pb2.Ballot:
    return round_pb2.Ballot(number=ballot[0], leader=ballot[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptor:
    """What a voter must never forget within a round."""

    promised: Ballot = NO_BALLOT
    accepted: Ballot = NO_BALLOT
    record: bytes = b""

    def promise(self, ballot: Ballot) -> Acceptor | None:
        """The state after promising ``ballot``; None where a higher one is promised already."""
        return replace(self, promised=ballot) if ballot >= self.promised else None

    def accept(self, ballot: Ballot, record: bytes) -> Acceptor | None:
        """The state after accepting ``record``; None where a higher ballot, or another record, came first."""
        if ballot < self.promised or (ballot == self.accepted and record != self.record):
            return None
        return Acceptor(promised=ballot, accepted=ballot, record=record)


@dataclass(slots=True)
class Proposer:
    """A leader's count of promises for one ballot."""

    ballot: Ballot
    decides: Callable[[Collection[bytes]], bool]
    """whether these voters are a majority"""
    promises: dict[bytes, tuple[Ballot, bytes]] = field(default_factory=dict)

    def on_promise(self, voter: bytes, accepted: Ballot, record: bytes) -> None:
        self.promises[voter] = (accepted, record)

    @property
    def prepared(self) -> bool:
        return self.decides(self.promises)

    def adopted(self) -> tuple[bytes, list[bytes]] | None:
        """(record, voters that accepted it) that must be proposed again; None where the leader is free."""
        ballot, record = max(self.promises.values(), default=(NO_BALLOT, b""))
        if ballot == NO_BALLOT:
            return None
        return record, [voter for voter, promise in self.promises.items() if promise[1] == record]
