"""Floods of a round machine by strangers and members: what is kept is bounded, what is asked for is asked for once."""

from __future__ import annotations

import random

import pytest

from peer.rounds.round import MAX_EARLY, RoundMachine
from peer.rounds.round_actions import Fetch, TakeSnapshot
from swarm.digest import sha256
from swarm.errors import ProtocolError
from swarm.proto.round_pb2 import Average, Contribution, Member, OpenRound, RoundMessage, Share
from tests.simulation.machines import BYTES_PER_SLICE, NUM_SLICES, STATE, Machines
from tests.unit.test_round_hostile import STRANGER, contributor, message, signed, voter
from tests.unit.test_round_timing import accept

FLOOD = 1000


def early_bytes(machine: RoundMachine) -> int:
    return sum(len(kept) for _, kept in machine._early)


def machine_at(machines: Machines, index: int) -> RoundMachine:
    """The machine of a replica that knows who is live."""
    for item in [item for item in machines.waiting if item.peer is machines.peers[index]]:
        item.event()
    machine = machines.peers[index].machine
    assert machine is not None
    return machine


def contribution(machines: Machines, number: int, size: int, part: int = 0) -> RoundMessage:
    return message(
        machines, voter(machines), number, contribution=Contribution(part=part, weight_tokens=1, encoded=bytes(size))
    )


def opening(machines: Machines, number: int) -> RoundMessage:
    """The round opened by its voter for everybody, who averages all of it itself."""
    members = [Member(peer_key=peer.key, contributes=peer.trains) for peer in machines.peers]
    opened = OpenRound(log_digest=machines.head.log_digest, state_digest=STATE, members=members)
    opened.parts.add(first_slice=0, num_slices=NUM_SLICES, reducer=len(members) - 1)
    return message(machines, voter(machines), number, open=opened)


@pytest.mark.parametrize("size", [0, 4, 60_000])
def test_bytes_of_a_member_that_overtake_their_opening_are_kept_within_bounds(size: int) -> None:
    """As many messages as an attempt can have, and as many bytes as two of it; the rest is dropped."""
    machines = Machines(5, 1, random.Random(1))
    machine = machine_at(machines, 1)
    for number in range(FLOOD):
        machine.on_message(contributor(machines), contribution(machines, 1 + number % 500, size), 0.0)
    assert 0 < len(machine._early) <= MAX_EARLY
    assert early_bytes(machine) <= 2 * NUM_SLICES * BYTES_PER_SLICE + (1 << 16)


def test_bytes_of_a_stranger_that_overtake_an_opening_are_not_kept() -> None:
    machines = Machines(5, 1, random.Random(1))
    machine = machine_at(machines, 1)
    for number in range(FLOOD):
        machine.on_message(STRANGER, contribution(machines, 1 + number % 500, 4), 0.0)
    assert machine._early == []


def test_an_opening_that_is_repeated_asks_for_one_snapshot() -> None:
    machines = Machines(5, 1, random.Random(1))
    machine = machine_at(machines, 0)
    actions = [a for _ in range(FLOOD) for a in machine.on_message(voter(machines), opening(machines, 1), 0.0)]
    assert [type(action) for action in actions] == [TakeSnapshot]


def test_openings_by_strangers_are_refused_and_leave_nothing_behind() -> None:
    machines = Machines(5, 1, random.Random(1))
    machine = machine_at(machines, 0)
    for number in range(1, 100):
        forged = opening(machines, number)
        forged.ballot.leader = STRANGER
        with pytest.raises(ProtocolError, match="may not lead"):
            machine.on_message(STRANGER, forged, 0.0)
    assert machine.attempt is None and machine.next_wakeup() is None


def test_openings_of_rising_ballots_leave_one_attempt_and_the_averages_of_none_before() -> None:
    """A hostile leader opens again and again, and averages something else each time."""
    machines = Machines(5, 1, random.Random(1))
    machine = machine_at(machines, 0)
    share = Share(peer_key=machines.peers[1].key, weight_tokens=1)
    for number in range(1, FLOOD):
        machine.on_message(voter(machines), opening(machines, number), 0.0)
        encoded = number.to_bytes(BYTES_PER_SLICE, "big") * NUM_SLICES
        average = Average(part=0, shares=[share], encoded=encoded)
        assert machine.attempt is not None
        machine.on_message(voter(machines), signed(machines, machine.attempt, average), 0.0)
    assert machine.attempt is not None and machine.attempt.ballot[0] == FLOOD - 1
    assert len(machine.held.by_digest) <= 2


def test_records_of_rising_ballots_leave_the_bytes_of_none_but_the_last() -> None:
    """A hostile leader proposes again and again, and serves whatever bytes it names."""
    machines = Machines(5, 3, random.Random(1))
    machine = machine_at(machines, 3)
    leader = voter(machines)
    late = []
    for number in range(1, FLOOD):
        encoded = number.to_bytes(BYTES_PER_SLICE, "big") * NUM_SLICES
        actions = machine.on_message(leader, accept(machines, number, leader, sha256(encoded)), 0.0)
        (wanted,) = [action.digest for action in actions if isinstance(action, Fetch)]
        if number % 3:
            late.append((wanted, encoded if number % 3 == 1 else None))
        else:
            machine.on_fetched(wanted, None, 0.0)
    for wanted, data in late:
        machine.on_fetched(wanted, data, 1.0)
    assert len(machine.held.by_digest) + len(machine.held._fetching) <= 2
