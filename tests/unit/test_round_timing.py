"""When a round machine speaks and waits: its own promise first, each half in half the time, no tick without reason."""

from __future__ import annotations

import random

import pytest

from peer.rounds.exchange_parts import Lookout
from peer.rounds.paxos import to_message
from peer.rounds.planning import Candidate, leader_order
from peer.rounds.round import RoundMachine
from peer.rounds.round_actions import Action, Fetch, Persist, Send, View
from swarm.proto.round_pb2 import Accept, PartResult, Prepare, RoundMessage, Share
from tests.simulation.machines import NUM_SLICES, STATE, Machine, Machines, records_of
from tests.unit.test_round_hostile import false_record, let_one_thing_happen

REDUCE_TIMEOUT_S = 8.0
"""as the machines of the tests have it"""


def ready(machines: Machines) -> View:
    candidates = tuple(Candidate(key=peer.key, trains=peer.trains, upload_bps=1) for peer in machines.peers)
    return View(candidates=candidates, ready=True)


def first_leader(machines: Machines) -> Machine:
    """The voter that leads without waiting."""
    key = leader_order(machines.head, machines.head.round + 1)[0]
    return next(peer for peer in machines.peers if peer.key == key)


def machine_of(peer: Machine) -> RoundMachine:
    assert peer.machine is not None
    return peer.machine


def asked(actions: list[Action]) -> set[bytes]:
    """Who is asked for a promise."""
    sends = [action for action in actions if isinstance(action, Send)]
    return {send.to for send in sends if send.message.WhichOneof("body") == "prepare"}


# ---- the leader's own promise ---------------------------------------------------------------------------------------


def test_a_leader_asks_the_others_once_its_own_promise_is_on_disk() -> None:
    """A ballot that others heard of before a crash must not be taken anew after it."""
    machines = Machines(5, 3, random.Random(1))
    leader = first_leader(machines)
    machine = machine_of(leader)
    actions = machine.on_view(ready(machines), 0.0)
    assert asked(actions) == set()
    for later in (1.1, 2.2, 3.3):  # a slow disk: however often it looks, nobody else hears of the ballot
        assert asked(machine.on_tick(later)) == set()
    promise = next(action for action in actions if isinstance(action, Persist))
    assert promise.acceptor.promised == (1, leader.key)
    (answer,) = promise.then
    actions = machine.on_message(leader.key, answer.message, 3.4)
    assert asked(actions) == set(machines.head.voters) - {leader.key}


def test_a_leader_that_crashed_after_its_promise_never_takes_the_same_ballot_again() -> None:
    machines = Machines(5, 3, random.Random(1))
    leader = first_leader(machines)
    actions = machine_of(leader).on_view(ready(machines), 0.0)
    promise = next(action for action in actions if isinstance(action, Persist))
    restarted = RoundMachine(machine_of(leader).settings, promise.acceptor)
    restarted.standing = machine_of(leader).standing
    taken = []
    for now in range(60):
        taken += [a for a in restarted.on_view(ready(machines), float(now)) if isinstance(a, Persist)]
    assert taken and all(action.acceptor.promised > promise.acceptor.promised for action in taken)


# ---- half the reduce timeout for each half --------------------------------------------------------------------------


def opened(machines: Machines) -> float:
    """Run until everybody has the opening, then silence the first volunteer; the time of it."""
    silent = machines.peers[0].key
    machines.separate({silent}, {peer.key for peer in machines.peers})
    for _ in range(200):
        if all(machine_of(peer).attempt is not None for peer in machines.peers):
            return machines.now
        machines.go_on()
    raise AssertionError("no round was opened")


def test_contributions_have_half_the_reduce_timeout_and_averages_the_other_half() -> None:
    """A reducer that waited for a silent member until its deadline still gets its average into the record."""
    machines = Machines(4, 1, random.Random(4))
    opened_at = opened(machines)
    reducers = [peer for peer in machines.peers[1:] if machine_of(peer).attempt.my_parts()]  # type: ignore[union-attr]
    assert reducers
    while machines.now < opened_at + REDUCE_TIMEOUT_S / 2 - 0.6:
        machines.go_on()
        assert not any(machine_of(peer).attempt.reduced for peer in reducers), "a member may still be slow"  # type: ignore[union-attr]
    while machines.now < opened_at + REDUCE_TIMEOUT_S - 1:
        machines.go_on()
        assert not machines.commits, "a reducer may still be slow"
    assert all(not machine_of(peer).attempt.is_waiting() for peer in reducers)  # type: ignore[union-attr]
    while machines.now < opened_at + REDUCE_TIMEOUT_S + 1:
        machines.go_on()
    record = records_of(machines)[0]
    contributors = {machines.peers[1].key, machines.peers[2].key}
    assert [{share.peer_key for share in part.shares} for part in record.parts if part.digest] == [
        contributors for _ in reducers
    ]


# ---- no tick without a reason ---------------------------------------------------------------------------------------


def ticks_of_a_silent_minute(machine: RoundMachine, now: float) -> int:
    """How often the machine asks to look at the clock while no message and no disk answers, and no part is found."""
    ticks, end = 0, now + 60
    while (at := machine.next_wakeup()) is not None and at <= end:
        now = max(at, now)
        for action in machine.on_tick(now):
            if isinstance(action, Fetch):
                assert fetched(machine.on_fetched(action.digest, None, now)) == [], "not at once again"
        ticks += 1
        assert ticks < 1000, "it is never content"
    return ticks


def fetched(actions: list[Action]) -> list[bytes]:
    """The digests that are asked for."""
    return [action.digest for action in actions if isinstance(action, Fetch)]


MOST_TICKS = 150
"""in a minute: what is sent or fetched again is so once a second"""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("size", "voters"), [(4, 1), (5, 3), (8, 7)])
def test_whenever_the_world_falls_silent_a_machine_looks_at_the_clock_seldom(size: int, voters: int, seed: int) -> None:
    """At no moment of a round is there a wake-up in the past that nothing ends."""
    for happened in range(0, 400, 25):
        machines = Machines(size, voters, random.Random(seed))
        for _ in range(happened):
            let_one_thing_happen(machines)
        for peer in machines.peers:
            if peer.applied is None:
                assert ticks_of_a_silent_minute(machine_of(peer), machines.now) <= MOST_TICKS


def test_a_machine_with_nothing_to_do_asks_for_no_tick() -> None:
    machines = Machines(5, 3, random.Random(1))
    for peer in machines.peers:
        machine_of(peer).on_view(View(), 5.0)
        assert machine_of(peer).next_wakeup() is None


def test_voters_that_wait_for_their_turn_rest_when_the_round_is_ready_no_more() -> None:
    """As when volunteers leave: until then the next in rank had a time to take over."""
    machines = Machines(5, 3, random.Random(1))
    successors = [peer for peer in machines.peers if peer.key in machines.head.voters]
    successors.remove(first_leader(machines))
    for peer in successors:
        machine_of(peer).on_view(ready(machines), 0.0)
        assert machine_of(peer).next_wakeup() is not None
        machine_of(peer).on_view(View(), 1.0)
        assert ticks_of_a_silent_minute(machine_of(peer), 1.0) == 0


def test_a_voter_that_led_and_has_nobody_to_lead_any_more_looks_at_the_clock_seldom() -> None:
    """Everybody that contributes is gone, or its own tokens were counted elsewhere."""
    machines = Machines(5, 3, random.Random(1))
    leader = first_leader(machines)
    machine = machine_of(leader)
    (promise,) = [a for a in machine.on_view(ready(machines), 0.0) if isinstance(a, Persist)]
    machine.on_message(leader.key, promise.then[0].message, 0.1)
    alone = View(candidates=(Candidate(key=leader.key, trains=False, upload_bps=1),), ready=False)
    for other in machines.head.voters:
        answer = RoundMessage()
        answer.CopyFrom(promise.then[0].message)
        machine.on_view(alone, 0.2)
        machine.on_message(other, answer, 0.2)
    assert ticks_of_a_silent_minute(machine, 0.2) <= MOST_TICKS


def accept(machines: Machines, number: int, leader: bytes, digest: bytes) -> RoundMessage:
    """The leader's word that this average is the round's."""
    part = PartResult(num_slices=NUM_SLICES, digest=digest, size_bytes=NUM_SLICES * 4)
    part.shares.append(Share(peer_key=machines.peers[0].key, weight_tokens=10))
    record = false_record(machines, parts=[part], state_digest=STATE)
    return RoundMessage(
        round=machines.head.round + 1,
        ballot=to_message((number, leader)),
        accept=Accept(record=record.SerializeToString()),
    )


def test_a_voter_that_cannot_get_the_bytes_of_a_record_asks_again_once_a_second() -> None:
    """And asks for those of the newest record only."""
    machines = Machines(5, 3, random.Random(1))
    leader = first_leader(machines)
    machine = machine_of(next(p for p in machines.peers if p.key in machines.head.voters and p is not leader))
    actions = machine.on_message(leader.key, accept(machines, 1, leader.key, b"d" * 32), 0.0)
    assert fetched(actions) == [b"d" * 32]
    assert fetched(machine.on_fetched(b"d" * 32, None, 0.0)) == []
    assert 30 <= ticks_of_a_silent_minute(machine, 0.0) <= MOST_TICKS
    actions = machine.on_message(leader.key, accept(machines, 500, leader.key, b"e" * 32), 60.0)
    assert fetched(actions) == [b"e" * 32]
    assert ticks_of_a_silent_minute(machine, 70.0) <= MOST_TICKS, "the first is wanted no more"


# ---- taking over from who is gone -----------------------------------------------------------------------------------

TAKEOVER_TIMEOUT_S = 6.0
"""as the machines of the tests have it"""


def in_turn(machines: Machines) -> list[Machine]:
    """The voters in the order in which they lead."""
    order = leader_order(machines.head, machines.head.round + 1)
    return [next(peer for peer in machines.peers if peer.key == key) for key in order]


def ballots(actions: list[Action]) -> list[int]:
    """The ballots that are taken."""
    return [action.acceptor.promised[0] for action in actions if isinstance(action, Persist)]


def test_once_whoever_leads_is_gone_the_next_that_lives_takes_over_at_once() -> None:
    """Those behind it give it its time, and ask whether all that come before them live."""
    machines = Machines(8, 7, random.Random(1))
    first, second, third = in_turn(machines)[:3]
    for peer, before in ((second, {first.key}), (third, {first.key, second.key})):
        machine_of(peer).on_view(ready(machines), 0.0)
        assert machine_of(peer).awaited() == dict.fromkeys(before, 0.0)
    assert ballots(machine_of(second).on_ended(first.key, 1.0)) == [1]
    assert ballots(machine_of(third).on_ended(first.key, 1.0)) == []
    assert machine_of(third).next_wakeup() == 1.0 + TAKEOVER_TIMEOUT_S
    assert ballots(machine_of(third).on_ended(second.key, 2.0)) == [1]


def test_a_leader_that_is_out_of_reach_for_one_voter_is_interrupted_by_it_only_once() -> None:
    """Two voters without a way between them would otherwise take turns for ever, and no round would end."""
    machines = Machines(8, 7, random.Random(1))
    leader, second = in_turn(machines)[0].key, machine_of(in_turn(machines)[1])
    second.on_view(ready(machines), 0.0)
    assert ballots(second.on_ended(leader, 1.0)) == [1]
    prepare = RoundMessage(
        round=machines.head.round + 1,
        ballot=to_message((2, leader)),
        prepare=Prepare(log_digest=machines.head.log_digest),
    )
    assert ballots(second.on_message(leader, prepare, 2.0)) == [2], "it promises"
    assert ballots(second.on_ended(leader, 3.0)) == []
    assert second.next_wakeup() == 2.0 + REDUCE_TIMEOUT_S + TAKEOVER_TIMEOUT_S


def test_a_member_that_is_gone_is_not_opened_for() -> None:
    """Neither as a contributor nor as a reducer; the others' round has no absent part."""
    machines = Machines(5, 3, random.Random(1))
    gone = machines.peers[0]
    machines.crash(gone)
    gone.machine = None
    for peer in machines.peers[1:]:
        machines.hear_that_it_is_gone(peer, gone.key)
    machines.waiting = [item for item in machines.waiting if item.peer is not gone]
    machines.peers.remove(gone)
    machines.settle(20.0)
    for record in records_of(machines):
        assert all(part.digest and len(part.shares) == 3 for part in record.parts)


def test_who_is_awaited_at_two_looks_is_asked_once_a_second() -> None:
    """However often one looks; a peer that answered for itself meanwhile is not."""
    lookout, asked = Lookout(), []
    for tenth in range(31):
        awaited = {b"a", b"b"} if tenth < 3 else {b"a"}
        due = lookout.asks(lambda a=awaited: dict.fromkeys(a, -1.0), tenth / 10)  # type: ignore[misc]
        asked += [(tenth / 10, peer, round(waited_s, 1)) for peer, waited_s in due.items()]
    assert asked == [(0.3, b"a", 1.3), (1.3, b"a", 2.3), (2.3, b"a", 3.3)]
