"""What strangers, contributors, reducers and voters cannot do to a round: attacks are refused, the round goes on."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from peer.rounds.attempt import Attempt
from peer.rounds.disputes import false_averages
from peer.rounds.paxos import to_message
from swarm import averages
from swarm.digest import sha256
from swarm.errors import SignatureError, SwarmError
from swarm.proto.round_pb2 import (
    Accept,
    Average,
    Ballot,
    Commit,
    Contribution,
    OpenRound,
    PartResult,
    Prepare,
    Promise,
    Record,
    Refusal,
    Rejection,
    RoundMessage,
    Share,
)
from tests.signed_averages import sign_averages
from tests.simulation.machines import NUM_SLICES, Machine, Machines, records_of

STRANGER = b"?" * 32
Attack = Callable[[Machines], tuple[bytes, RoundMessage]]


def message(machines: Machines, leader: bytes, number: int = 1, **body: object) -> RoundMessage:
    return RoundMessage(round=machines.head.round + 1, ballot=Ballot(number=number, leader=leader), **body)  # type: ignore[arg-type]


def voter(machines: Machines) -> bytes:
    return machines.peers[-1].key


def contributor(machines: Machines) -> bytes:
    return machines.peers[0].key


def false_record(machines: Machines, **changes: object) -> Record:
    part = PartResult(num_slices=NUM_SLICES, digest=b"d" * 32, size_bytes=NUM_SLICES * 4)
    part.shares.append(Share(peer_key=contributor(machines), weight_tokens=10))
    fields: dict[str, object] = {
        "round": machines.head.round + 1,
        "log_digest": machines.head.log_digest,
        "state_digest": b"s" * 32,
        "parts": [part],
        "next_voters": [contributor(machines)],
        "total_tokens": machines.head.total_tokens + 10,
        "codec": "int8",
    }
    record = Record(**{**fields, **changes})  # type: ignore[arg-type]
    return sign_averages(record, machines.head.run_id)


def accept(**changes: object) -> Attack:
    def attack(machines: Machines) -> tuple[bytes, RoundMessage]:
        raw = false_record(machines, **changes).SerializeToString()
        return voter(machines), message(machines, voter(machines), accept=Accept(record=raw))

    return attack


def accept_after(change: Callable[[PartResult], None]) -> Attack:
    """A record that its leader changed after the reducer had signed."""

    def attack(machines: Machines) -> tuple[bytes, RoundMessage]:
        record = false_record(machines)
        change(record.parts[0])
        return voter(machines), message(machines, voter(machines), accept=Accept(record=record.SerializeToString()))

    return attack


ATTACKS: dict[str, Attack] = {
    "a stranger's commit without votes": lambda m: (
        STRANGER,
        message(m, STRANGER, commit=Commit(record=false_record(m).SerializeToString())),
    ),
    "a commit that extends another log": lambda m: (
        STRANGER,
        message(m, STRANGER, commit=Commit(record=false_record(m, log_digest=b"x" * 32).SerializeToString())),
    ),
    "a stranger's commit with a field without end": lambda m: (
        STRANGER,
        message(
            m,
            STRANGER,
            commit=Commit(record=false_record(m).SerializeToString() + Record(codec="x" * 70_000).SerializeToString()),
        ),
    ),
    "a stranger who leads": lambda m: (
        STRANGER,
        message(m, STRANGER, prepare=Prepare(log_digest=m.head.log_digest)),
    ),
    "a voter who leads in another's name": lambda m: (
        voter(m),
        message(m, contributor(m), prepare=Prepare(log_digest=m.head.log_digest)),
    ),
    "a ballot at the end of all numbers": lambda m: (
        voter(m),
        message(m, voter(m), 2**32 - 1, prepare=Prepare(log_digest=m.head.log_digest)),
    ),
    "a ballot for another log": lambda m: (voter(m), message(m, voter(m), prepare=Prepare(log_digest=b"x" * 32))),
    "a round opened without members": lambda m: (
        voter(m),
        message(m, voter(m), open=OpenRound(log_digest=m.head.log_digest, state_digest=b"s" * 32)),
    ),
    "a record in which every part is absent": accept(parts=[PartResult(num_slices=NUM_SLICES)], total_tokens=100),
    "a record with voters that had no part": accept(next_voters=[STRANGER]),
    "a record with tokens that do not add up": accept(total_tokens=10**6),
    "a record from another state": accept(state_digest=b"x" * 32),
    "a record in another codec": accept(codec="int4"),
    "a record with an average that no reducer signed": accept_after(lambda part: setattr(part, "digest", b"x" * 32)),
    "a record with another weight than the reducer's": accept_after(lambda part: setattr(part.shares[0], "norm", 5.0)),
    "a record whose leader says that it averaged": accept_after(lambda part: setattr(part, "reducer", b"l" * 32)),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_attack_is_refused_by_name_and_the_round_goes_on(attack: Attack) -> None:
    machines = Machines(5, 3, random.Random(3))
    target = machines.peers[-2]
    assert target.machine is not None
    sender, hostile = attack(machines)
    before = target.machine.acceptor
    with pytest.raises(SwarmError):
        target.machine.on_message(sender, hostile, 0.0)
    assert target.machine.acceptor == before and target.machine.attempt is None
    machines.settle()
    assert len(machines.commits) == 1 and all(peer.applied is not None for peer in machines.peers)


@pytest.mark.parametrize("attack", [name for name in ATTACKS if "reducer" in name or "averaged" in name])
def test_a_leader_cannot_name_what_no_reducer_signed(attack: str) -> None:
    machines = Machines(5, 3, random.Random(3))
    target = machines.peers[-2]
    assert target.machine is not None
    sender, hostile = ATTACKS[attack](machines)
    with pytest.raises(SignatureError):
        target.machine.on_message(sender, hostile, 0.0)


def test_a_voter_refuses_a_part_that_somebody_else_was_to_average() -> None:
    """Signed as it should be, but by whoever the opening does not name."""
    machines = gathering()
    machine = machines.peers[-1].machine
    assert machine is not None and machine.attempt is not None
    record = false_record(machines, opened_by=to_message(machine.attempt.ballot))
    with pytest.raises(SwarmError, match="was not to average it"):
        machine.attempt.check_reducers(record)


def test_a_record_that_another_leader_adopted_is_accepted_and_held_against_its_reducer_later() -> None:
    """A voter may have accepted it that never had the opening: refused for good, it would end the round for good."""
    machines = gathering()
    machine = machines.peers[-1].machine
    assert machine is not None and machine.attempt is not None
    opened = machine.attempt.ballot
    record = false_record(machines, opened_by=to_message(opened))
    proposal = Accept(record=record.SerializeToString())
    with pytest.raises(SwarmError, match="was not to average it"):
        machine.on_message(opened[1], message(machines, opened[1], opened[0], accept=proposal), machines.now)
    adopter = next(key for key in machines.head.voters if key != opened[1])
    machine.on_message(adopter, message(machines, adopter, 50, accept=proposal), machines.now)
    assert machine._to_accept is not None
    (false,) = false_averages(record, machine.attempt, [])
    assert "was not to average it" in false.why and false.signature == record.parts[0].signature.hex()


def test_more_parts_than_the_round_has_are_an_incident_and_end_no_peer() -> None:
    """Though a reducer signed in each of them that we contributed."""
    machines = gathering()
    machine = machines.peers[0].machine
    assert machine is not None and machine.attempt is not None
    attempt = machine.attempt
    while attempt.offered is None:
        let_one_thing_happen(machines)
    parts = [
        PartResult(first_slice=index, num_slices=1, digest=b"d" * 32, reducer=attempt.reducer_of(0))
        for index in range(len(attempt.open.parts) + 1)
    ]
    for part in parts:
        part.shares.append(Share(peer_key=attempt.settings.me, weight_tokens=10))
    found = false_averages(Record(opened_by=to_message(attempt.ballot), parts=parts), attempt, [])
    assert len(found) >= 1 and "was not to average it" in found[-1].why


def test_a_refusal_by_a_stranger_or_with_an_absurd_ballot_is_not_believed() -> None:
    machines = Machines(5, 3, random.Random(3))
    absurd = Refusal(promised=Ballot(number=2**32 - 1, leader=STRANGER))
    for peer in machines.peers:
        assert peer.machine is not None
        for sender in (STRANGER, voter(machines)):
            peer.machine.on_message(sender, message(machines, sender, 0, refusal=absurd), 0.0)
    machines.settle()
    assert len(machines.commits) == 1


def let_one_thing_happen(machines: Machines) -> None:
    """An event that is under way, any of them; where nothing is, time moves on."""
    if machines.waiting:
        machines.deliver(machines.rng.randrange(len(machines.waiting)), faults=False)
    else:
        machines.pass_time(0.2)


def gathering(seed: int = 5) -> Machines:
    """Somebody has opened the round, and nobody has averaged yet."""
    machines = Machines(5, 3, random.Random(seed))
    for _ in range(2000):
        if all(peer.machine is not None and peer.machine.attempt is not None for peer in machines.peers):
            return machines
        let_one_thing_happen(machines)
    raise AssertionError("no round was opened")


def signed(machines: Machines, attempt: Attempt, average: Average) -> RoundMessage:
    """``average`` as its reducer signs and sends it."""
    reducer = machines.peer(attempt.reducer_of(average.part)).identity
    payload = averages.payload(attempt.opened, attempt.result(average, average.encoded))
    average.signature = reducer.sign(averages.AVERAGE_CONTEXT, machines.head.run_id, payload).signature
    return RoundMessage(round=machines.head.round + 1, ballot=to_message(attempt.ballot), average=average)


def whoever_leads(machines: Machines) -> Machine:
    """The first who has taken a ballot of its own."""
    for _ in range(3000):
        for peer in machines.peers:
            if peer.machine is not None and peer.machine._leader._proposer is not None:
                return peer
        let_one_thing_happen(machines)
    raise AssertionError("nobody ever led")


@pytest.mark.parametrize(
    ("case", "shares"),
    [
        ("one contributor twice", [0, 0]),
        ("out of order", [1, 0]),
        ("somebody who is no contributor", [4]),
    ],
)
def test_an_average_with_false_shares_is_refused(case: str, shares: list[int]) -> None:
    machines = gathering()
    target = machines.peers[-1]
    assert target.machine is not None and target.machine.attempt is not None
    attempt = target.machine.attempt
    reducer = attempt.reducer_of(0)
    listed = [Share(peer_key=machines.peers[i].key, weight_tokens=10) for i in shares]
    if case == "out of order":
        listed.sort(key=lambda share: attempt.contributors.index(share.peer_key), reverse=True)
    average = Average(part=0, shares=listed, encoded=b"a" * attempt.part_size_bytes(0))
    forged = RoundMessage(round=machines.head.round + 1, ballot=to_message(attempt.ballot), average=average)
    with pytest.raises(SwarmError, match="counts"):
        target.machine.on_message(reducer, forged, machines.now)


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("averaged as well", "twice"),
        ("a stranger", "no contributor"),
        ("named twice", "counts somebody twice"),
        ("though it agrees", "impossible cosine"),
    ],
)
def test_an_average_with_false_rejections_is_refused(case: str, told: str) -> None:
    machines = gathering()
    target = machines.peers[-1]
    assert target.machine is not None and target.machine.attempt is not None
    attempt = target.machine.attempt
    first, second = attempt.contributors[:2]
    rejected = Rejection(peer_key=second, cosine=-0.5, min_cosine=0.1)
    rejections = [rejected]
    if case == "averaged as well":
        rejected.peer_key = first
    elif case == "a stranger":
        rejected.peer_key = STRANGER
    elif case == "named twice":
        rejections = [rejected, rejected]
    else:
        rejected.cosine = 0.5
    share = Share(peer_key=first, weight_tokens=10)
    average = Average(part=0, shares=[share], rejections=rejections, encoded=b"a" * attempt.part_size_bytes(0))
    forged = signed(machines, attempt, average)
    with pytest.raises(SwarmError, match=told):
        target.machine.on_message(attempt.reducer_of(0), forged, machines.now)


def test_a_claimed_weight_counts_for_no_more_than_was_told_before_and_an_average_cannot_say_otherwise() -> None:
    """Twice what the sender's status told, and twice an even share of the round's tokens; far more is refused."""
    machines = gathering()
    machine = next(
        p.machine for p in machines.peers if p.machine and p.machine.attempt and p.machine.attempt.my_parts()
    )
    attempt = machine.attempt
    assert attempt is not None
    first, second = attempt.contributors[:2]
    even_share = -(-machine.settings.round_tokens // len(attempt.contributors))
    next(member for member in attempt.open.members if member.peer_key == first).tokens = 100
    assert (attempt.most_tokens(first), attempt.most_tokens(second)) == (200 + 2 * even_share, 2 * even_share)

    claim = Contribution(part=attempt.my_parts()[0], state_digest=b"s" * 32, codec="int8", encoded=b"c")
    claim.weight_tokens = machine.settings.max_weight_tokens + 1
    with pytest.raises(SwarmError, match="more than the round allows"):
        attempt.on_contribution(first, claim)
    claim.weight_tokens = machine.settings.max_weight_tokens
    attempt.contributions.clear()
    attempt.reduced.clear()
    for key in (first, second):
        attempt.on_contribution(key, claim)
    reduce = next(work for work in attempt.due_reductions(attempt.deadline) if work.part == claim.part)
    assert [share.weight_tokens for share, _, _ in reduce.contributions] == [200 + 2 * even_share, 2 * even_share]

    share = Share(peer_key=second, weight_tokens=2 * even_share + 1)
    average = Average(part=0, shares=[share], encoded=b"a" * attempt.part_size_bytes(0))
    with pytest.raises(SwarmError, match="a weight out of bounds"):
        attempt.on_average(attempt.reducer_of(0), average)


def test_a_rejection_is_in_the_record_and_its_peer_is_not_silent() -> None:
    machines = gathering()
    target = machines.peers[-1]
    assert target.machine is not None and target.machine.attempt is not None
    attempt = target.machine.attempt
    first, second = attempt.contributors[:2]
    average = Average(
        part=0,
        shares=[Share(peer_key=first, weight_tokens=10)],
        rejections=[Rejection(peer_key=second, cosine=-0.5, min_cosine=0.1)],
        encoded=b"a" * attempt.part_size_bytes(0),
    )
    told = signed(machines, attempt, average)
    target.machine.on_message(attempt.reducer_of(0), told, machines.now)
    assert list(attempt.results()[0].rejections) == list(average.rejections)
    assert second not in attempt.silent()


def test_a_reducer_that_sends_two_averages_does_not_change_what_is_kept() -> None:
    machines = gathering()
    target = machines.peers[-1]
    assert target.machine is not None and target.machine.attempt is not None
    attempt = target.machine.attempt
    share = Share(peer_key=attempt.contributors[0], weight_tokens=10)
    for byte in (b"a", b"b"):
        average = Average(part=0, shares=[share], encoded=byte * attempt.part_size_bytes(0))
        told = signed(machines, attempt, average)
        target.machine.on_message(attempt.reducer_of(0), told, machines.now)
    kept = attempt.averages[0].digest
    assert sha256(target.machine.held.by_digest[kept]) == kept


def test_a_promise_that_tells_of_an_impossible_acceptance_does_not_count() -> None:
    """A lying voter cannot slip in a record of its own by claiming that it was accepted under a later ballot."""
    machines = Machines(5, 3, random.Random(1))
    leader = whoever_leads(machines)
    assert leader.machine is not None
    proposer = leader.machine._leader._proposer
    assert proposer is not None
    liar = next(key for key in machines.head.voters if key != leader.key)
    forged = Promise(
        accepted_ballot=Ballot(number=proposer.ballot[0] + 5, leader=liar),
        accepted_record=false_record(machines).SerializeToString(),
    )
    lie = RoundMessage(round=machines.head.round + 1, ballot=to_message(proposer.ballot), promise=forged)
    with pytest.raises(SwarmError, match="cannot have been"):
        leader.machine.on_message(liar, lie, machines.now)
    assert liar not in proposer.promises


def test_a_leader_is_a_member_of_its_own_round_however_many_contribute() -> None:
    machines = Machines(8, 1, random.Random(2), max_members=4)
    machines.settle()
    assert len(machines.commits) == 1
    assert all(len(part.shares) == 3 for part in records_of(machines)[0].parts if part.digest)
