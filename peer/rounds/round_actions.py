"""What a round machine may ask its edge to do, and the settings it is born with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from peer.rounds.paxos import Acceptor, Ballot
from peer.rounds.planning import Candidate
from swarm.files import Kept
from swarm.log import LogHead
from swarm.proto.common_pb2 import Signed
from swarm.proto.round_pb2 import Commit, HandedOver, OpenRound, Record, RoundMessage, Share


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSettings:
    """What does not change during one round of one shard, as one replica sees it."""

    me: bytes
    head: LogHead
    founders: tuple[bytes, ...]
    state_digest: bytes
    num_slices: int
    codec: str
    part_size_bytes: Callable[[int, int], int]
    """(first_slice, num_slices) -> encoded bytes"""
    round_bytes: int
    """what a round brings to one replica at most: contributions to its parts, and averages"""
    check_contribution: Callable[[int, int, str, bytes], None]
    """(first_slice, num_slices, codec, encoded): raises `ProtocolError` unless it is one of this run"""
    check_handed_over: Callable[[int, int, HandedOver], None]
    """(first_slice, num_slices, what): raises `ProtocolError` unless it is of these slices"""
    check_part: Callable[[int, int, bytes], None]
    """(first_slice, num_slices, encoded): raises `ProtocolError` unless it decodes to finite numbers"""
    sign_vote: Callable[[bytes], Signed]
    sign_average: Callable[[bytes], Signed]
    round_tokens: int
    """after which the round opens"""
    max_weight_tokens: int
    """more is refused: what one peer trained while rounds did not come about"""
    max_members: int
    may_vote: bool
    reduce_timeout_s: float
    takeover_timeout_s: float
    resend_s: float = 1.0
    keep: Callable[[bytes], Kept] = lambda data: data
    """where encoded parts wait: in memory, unless somebody has a better place"""

    @property
    def round(self) -> int:
        return self.head.round + 1

    @property
    def is_voter(self) -> bool:
        return self.may_vote and self.me in self.head.voters


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Who is live and stands where we stand, from signed statuses: hints, so nothing unsafe follows from them."""

    candidates: tuple[Candidate, ...] = ()
    ready: bool = False
    """the tokens of the round are reached, and it is the shard's turn"""

    @property
    def tokens(self) -> int:
        """Trained towards the round, by all of them."""
        return sum(candidate.tokens for candidate in self.candidates if candidate.trains)


@dataclass(frozen=True, slots=True)
class HandOver:
    """What is owed to some slices of a part: ``encoded`` has one after another."""

    slices: tuple[int, ...]
    encoded: Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A member's own part in an attempt: ``encoded[i]`` and ``owed[i]`` are of part i.

    Weight 0 and nothing encoded: nothing to add. None is owed where earlier averages of the part lost nothing here.
    """

    weight_tokens: int = 0
    codec: str = ""
    encoded: Sequence[Kept] = ()
    norms: Sequence[tuple[float, float]] = ()
    """of each part, as its reducer may find it: at least, at most"""
    owed: Sequence[HandOver | None] = ()


@dataclass(frozen=True, slots=True)
class Send:
    """``encoded``, ``owed``: what a contribution or an average carries; not in ``message`` until it leaves."""

    to: bytes
    message: RoundMessage
    encoded: Kept | None = None
    owed: HandOver | None = None

    @property
    def is_large(self) -> bool:
        return self.encoded is not None or self.owed is not None

    def full(self) -> RoundMessage:
        """The message with all that it carries."""
        if not self.is_large:
            return self.message
        message = RoundMessage()
        message.CopyFrom(self.message)
        if self.encoded is not None:
            (message.contribution if message.HasField("contribution") else message.average).encoded = self.encoded[:]
        if self.owed is not None:
            message.contribution.handed_over.slices.extend(self.owed.slices)
            message.contribution.handed_over.encoded = self.owed.encoded[:]
        return message


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the acceptor's state and these parts durable; only then perform ``then``.

    In the order in which the machine asked: a later state speaks of parts that an earlier one brought.
    """

    acceptor: Acceptor
    parts: Mapping[bytes, Kept]
    then: tuple[Send, ...]


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Between two inner steps: note the replica, encode its pseudo-gradient part by part; answer `on_snapshot`."""

    ballot: Ballot
    open: OpenRound


@dataclass(frozen=True, slots=True)
class Reduce:
    """Check, average and encode contributions of one part, in this order; answer `on_reduced`."""

    ballot: Ballot
    part: int
    first_slice: int
    num_slices: int
    contributions: tuple[tuple[Share, str, Kept], ...]
    """(whose, codec, encoded)"""
    handed_over: tuple[tuple[bytes, HandOver], ...] = ()
    """(by whom, what)"""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get the bytes of a part from whoever holds them; answer `on_fetched` (None: nobody had them)."""

    digest: bytes
    size_bytes: int
    holders: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    """The round is decided and all its bytes are here. The last action of a machine."""

    commit: Commit
    record: Record
    parts: Mapping[bytes, Kept]


Action = Send | Persist | TakeSnapshot | Reduce | Fetch | Apply


@dataclass(slots=True)
class Outbox:
    """Actions in the order in which they were decided; messages to oneself come back as events instead.

    But for those that carry something: a replica's own parts are as many bytes as others'.
    """

    me: bytes
    actions: list[Action] = field(default_factory=list)
    to_self: list[RoundMessage] = field(default_factory=list)

    def send(self, to: bytes, message: RoundMessage, encoded: Kept | None = None, owed: HandOver | None = None) -> None:
        if to == self.me and encoded is None:
            self.to_self.append(message)
        else:
            self.actions.append(Send(to, message, encoded, owed))
