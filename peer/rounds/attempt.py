"""One attempt of a round (one ballot), as a member and as a reducer sees it.

Decides which contributions and averages count, when a part is ready to be averaged, and what is still awaited.
Pure: it keeps bytes that arrived, and asks for nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from peer.rounds.paxos import Ballot, to_message
from peer.rounds.round_actions import HandOver, Offered, Reduce, RoundSettings
from swarm.averages import check_signature
from swarm.digest import sha256
from swarm.errors import ProtocolError
from swarm.files import Kept
from swarm.log import MAX_MEMBERS, MAX_PARTS, check_verdicts
from swarm.proto.round_pb2 import Average, Contribution, OpenRound, PartResult, Record, Rejection, Share


def check_open(settings: RoundSettings, message: OpenRound) -> None:
    """Raise `ProtocolError` unless the opened round starts where we stand and its parts cover the shard once."""
    if message.log_digest != settings.head.log_digest or message.state_digest != settings.state_digest:
        raise ProtocolError("the round starts from another state than ours")
    keys = [member.peer_key for member in message.members]
    if not 1 <= len(keys) <= min(MAX_MEMBERS, settings.max_members) or len(set(keys)) != len(keys):
        raise ProtocolError("the round names no members, too many, or one twice")
    if settings.me not in keys:
        raise ProtocolError("we are no member of this round")
    expected = 0
    for part in message.parts[: MAX_PARTS + 1]:
        if part.first_slice != expected or part.num_slices < 1 or part.reducer >= len(keys):
            raise ProtocolError("the parts of the round do not cover the shard once")
        expected += part.num_slices
    if expected != settings.num_slices or len(message.parts) > MAX_PARTS:
        raise ProtocolError("the parts of the round do not cover the shard once")


@dataclass(slots=True)
class Attempt:
    """What arrived so far under one ballot."""

    settings: RoundSettings
    ballot: Ballot
    open: OpenRound
    opened_at: float
    contributions: dict[tuple[int, bytes], tuple[int, str, Kept]] = field(default_factory=dict)
    """(part, contributor) -> (weight in tokens, codec, encoded); weight 0: nothing to add"""
    handed_over: dict[tuple[int, bytes], HandOver] = field(default_factory=dict)
    averages: dict[int, PartResult] = field(default_factory=dict)
    reduced: set[int] = field(default_factory=set)
    unreachable: set[bytes] = field(default_factory=set)
    offered: Offered | None = None
    """what we contributed; None until we did"""

    @property
    def deadline(self) -> float:
        """When reducers stop waiting for contributions; averages have as long again."""
        return self.opened_at + self.settings.reduce_timeout_s / 2

    @property
    def contributors(self) -> list[bytes]:
        return [member.peer_key for member in self.open.members if member.contributes]

    @property
    def members(self) -> list[bytes]:
        return [member.peer_key for member in self.open.members]

    def most_tokens(self, contributor: bytes) -> int:
        """What a contribution may weigh at most: twice what its sender told before the round was opened, and twice an
        even share of the round's tokens. Statuses lag behind, and training goes on until the snapshot.
        """
        told = {member.peer_key: member.tokens for member in self.open.members}
        even_share = -(-self.settings.round_tokens // len(self.contributors))
        return min(2 * (told[contributor] + even_share), self.settings.max_weight_tokens)

    def reducer_of(self, part: int) -> bytes:
        return bytes(self.open.members[self.open.parts[part].reducer].peer_key)

    def my_parts(self) -> list[int]:
        return [i for i in range(len(self.open.parts)) if self.reducer_of(i) == self.settings.me]

    def part_size_bytes(self, part: int) -> int:
        return self.settings.part_size_bytes(self.open.parts[part].first_slice, self.open.parts[part].num_slices)

    def contribution(self, part: int, offered: Offered) -> Contribution:
        """Our own to ``part``, without its bytes."""
        return Contribution(
            part=part,
            weight_tokens=offered.weight_tokens,
            state_digest=self.settings.state_digest,
            codec=offered.codec if offered.weight_tokens else "",
        )

    def keep_own_contribution(self, part: int, offered: Offered) -> None:
        """As if it had been sent to ourselves."""
        if (part, self.settings.me) not in self.contributions:
            encoded = offered.encoded[part] if offered.weight_tokens else b""
            self.contributions[part, self.settings.me] = (offered.weight_tokens, offered.codec, encoded)

    def on_contribution(self, sender: bytes, message: Contribution) -> None:
        """Keep a contribution; `ProtocolError` tells the contributor why it is refused."""
        if message.part >= len(self.open.parts) or self.reducer_of(message.part) != self.settings.me:
            raise ProtocolError("a contribution to a part that we do not average")
        if sender not in self.contributors:
            raise ProtocolError("a contribution by somebody who is no contributor of this round")
        if message.state_digest != self.settings.state_digest:
            raise ProtocolError("a contribution that starts from another state")
        if message.weight_tokens > self.settings.max_weight_tokens:
            raise ProtocolError(f"a weight of {message.weight_tokens} tokens is more than the round allows")
        part = self.open.parts[message.part]
        if message.weight_tokens:
            self.settings.check_contribution(part.first_slice, part.num_slices, message.codec, message.encoded)
        elif message.encoded:
            raise ProtocolError(f"a contribution of {len(message.encoded)} bytes without a weight")
        if message.HasField("handed_over"):
            self.settings.check_handed_over(part.first_slice, part.num_slices, message.handed_over)
        if (message.part, sender) not in self.contributions:
            kept = self.settings.keep(message.encoded)
            self.contributions[message.part, sender] = (message.weight_tokens, message.codec, kept)
            if message.handed_over.slices:
                owed = HandOver(tuple(message.handed_over.slices), self.settings.keep(message.handed_over.encoded))
                self.handed_over[message.part, sender] = owed

    def due_reductions(self, now: float) -> list[Reduce]:
        """Parts of ours that can be averaged now: everybody reachable is in, or the time is up."""
        due = []
        for part in self.my_parts():
            missing = [
                key
                for key in self.contributors
                if (part, key) not in self.contributions and key not in self.unreachable
            ]
            if part in self.reduced or (missing and now < self.deadline):
                continue
            self.reduced.add(part)
            due.append(self._reduce(part))
        return due

    def _reduce(self, part: int) -> Reduce:
        contributions, handed_over = [], []
        for key in self.contributors:
            owed = self.handed_over.pop((part, key), None)
            if owed is not None:
                handed_over.append((key, owed))
            weight, codec, encoded = self.contributions.pop((part, key), (0, "", b""))
            if weight:
                share = Share(peer_key=key, weight_tokens=min(weight, self.most_tokens(key)))
                contributions.append((share, codec, encoded))
        return Reduce(
            self.ballot,
            part,
            self.open.parts[part].first_slice,
            self.open.parts[part].num_slices,
            tuple(contributions),
            tuple(handed_over),
        )

    @property
    def opened(self) -> Record:
        """What a record of this attempt says of itself before it has any parts."""
        return Record(
            shard=self.settings.head.shard,
            round=self.settings.round,
            log_digest=self.settings.head.log_digest,
            state_digest=self.settings.state_digest,
            codec=self.settings.codec,
            opened_by=to_message(self.ballot),
        )

    def result(self, average: Average, encoded: bytes) -> PartResult:
        """What a record says of ``average``; without its reducer's signature."""
        part = self.open.parts[average.part]
        result = PartResult(first_slice=part.first_slice, num_slices=part.num_slices)
        if average.shares:
            result.digest, result.size_bytes = sha256(encoded), len(encoded)
            result.shares.extend(average.shares)
            result.rejections.extend(average.rejections)
            result.handed_over_by.extend(average.handed_over_by)
            result.reducer = self.reducer_of(average.part)
        return result

    def on_average(self, sender: bytes, message: Average) -> bytes | None:
        """Keep a part's average (or the word that there is none); raise where it cannot be one, or is not signed.

        Gives the digest of bytes that are to be kept with it: a second average of the part is none.
        """
        if message.part >= len(self.open.parts) or self.reducer_of(message.part) != sender:
            raise ProtocolError("an average by somebody who does not average that part")
        places = {key: place for place, key in enumerate(self.contributors)}
        averaged, rejected = [s.peer_key for s in message.shares], [r.peer_key for r in message.rejections]
        for keys in (averaged, rejected, message.handed_over_by):
            order = [places.get(key, -1) for key in keys]
            if -1 in order or any(a >= b for a, b in itertools.pairwise(order)):
                raise ProtocolError("an average that counts somebody twice, or somebody who is no contributor")
        check_verdicts(message.shares, message.rejections)
        if any(not 0 < share.weight_tokens <= self.most_tokens(share.peer_key) for share in message.shares):
            raise ProtocolError("an average with a weight out of bounds")
        expected = self.part_size_bytes(message.part) if message.shares else 0
        if len(message.encoded) != expected:
            raise ProtocolError(f"an average of {len(message.encoded)} bytes instead of {expected}")
        part, result = self.open.parts[message.part], self.result(message, message.encoded)
        if message.shares:
            self.settings.check_part(part.first_slice, part.num_slices, message.encoded)
            result.signature = message.signature
            check_signature(self.settings.head.run_id, self.opened, result)
            if (lie := self.lie_about(message.part, result)) is not None:
                raise ProtocolError(lie)
        first = self.averages.setdefault(message.part, result)
        return result.digest if message.shares and first.digest == result.digest else None

    def check_reducers(self, record: Record) -> None:
        """Raise `ProtocolError` unless each part of a record of this attempt was averaged by who had to."""
        for index, part in enumerate(record.parts):
            if part.digest and (why := self._is_misplaced(index, part)) is not None:
                raise ProtocolError(why)

    def _is_misplaced(self, part: int, result: PartResult) -> str | None:
        if part >= len(self.open.parts) or result.reducer != self.reducer_of(part):
            return "the record has a part by somebody who was not to average it"
        place = self.open.parts[part]
        if (result.first_slice, result.num_slices) != (place.first_slice, place.num_slices):
            return "the record has other parts than the round"
        return None

    def lie_about(self, part: int, result: PartResult) -> str | None:
        """What ``result`` says that is not so, as far as the opening and our own contribution show."""
        if (why := self._is_misplaced(part, result)) is not None:
            return why
        told: list[Share | Rejection] = [*result.shares, *result.rejections]
        mine = [one for one in told if one.peer_key == self.settings.me]
        if not mine or self.offered is None:
            return "an average counts a contribution that was not sent" if mine else None
        weight, (least, most) = self.offered.weight_tokens, self.offered.norms[part]
        if mine[0].weight_tokens > weight:
            return f"an average counts our contribution with {mine[0].weight_tokens} tokens instead of {weight}"
        if not least <= mine[0].norm <= most:
            return f"an average counts our contribution with the norm {mine[0].norm:.6g} instead of {most:.6g}"
        return None

    def is_waiting(self) -> bool:
        """Some part of ours is not averaged yet."""
        return any(part not in self.reduced for part in self.my_parts())

    def is_gathered(self) -> bool:
        """Every part is averaged, declared empty, or in the hands of somebody unreachable."""
        return all(
            part in self.averages or self.reducer_of(part) in self.unreachable for part in range(len(self.open.parts))
        )

    def awaited(self) -> set[bytes]:
        """Peers that something is still expected of: a contribution to our parts, or the average of theirs."""
        contributing = {
            key
            for part in self.my_parts()
            if part not in self.reduced
            for key in self.contributors
            if (part, key) not in self.contributions
        }
        averaging = {self.reducer_of(part) for part in range(len(self.open.parts)) if part not in self.averages}
        return (contributing | averaging) - self.unreachable - {self.settings.me}

    def silent(self) -> set[bytes]:
        """Contributors that are unreachable, or in no average though others are: of no use to the next attempt."""
        heard = {share.peer_key for result in self.averages.values() for share in result.shares}
        heard |= {rejection.peer_key for result in self.averages.values() for rejection in result.rejections}
        return self.unreachable | (set(self.contributors) - heard if heard else set())

    def results(self) -> list[PartResult]:
        """One result per part, in order; parts that did not arrive are absent."""
        return [
            self.averages.get(i) or PartResult(first_slice=part.first_slice, num_slices=part.num_slices)
            for i, part in enumerate(self.open.parts)
        ]
