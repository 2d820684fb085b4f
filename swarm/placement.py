"""Placement: which span a peer that cannot hold the whole model takes on, and when it moves to another.

Pure. Decides by what the run as a whole gains: the tokens/s that all peers can train together, each able to work on the
shards of its span only. Leaves what fits into a memory to `swarm.fitting`, and statuses to the peers.

Whoever can hold the whole model holds it, and does not move: it needs nobody, and may serve every hop. Peers see
statuses of different ages, so a peer moves only where the run gains a stated margin, only in the round whose mover it
is, and after a wait that differs from peer to peer; then it looks again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from swarm.digest import sha256
from swarm.errors import ConfigError

# A move costs a download of the span's state, and the replica that leaves is missed meanwhile.
MOVE_MARGIN = 0.1
_HALVINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """Shards [``first``, ``last``) that one peer hosts, or could."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ConfigError(f"shards [{self.first}, {self.last}) are no span")

    @property
    def shards(self) -> range:
        return range(self.first, self.last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A peer and what it can do: ``work_per_s`` is in the unit of a shard's work, which is that of one token."""

    key: bytes
    span: Hosted
    work_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """``tokens_per_s``: of the whole run then."""

    span: Hosted
    tokens_per_s: float
    reason: str


def hosts_of(rates: Sequence[Mapping[bytes, float]], work: Sequence[float]) -> tuple[Host, ...]:
    """Who hosts what, by the statuses of each shard: tokens/s by peer. ``work``: of a token in each shard.

    A peer with statuses of shards that are not neighbours counts for the first run of them.
    """
    found = []
    for key in sorted({key for told in rates for key in told}):
        first = next(shard for shard, told in enumerate(rates) if key in told)
        last = next((shard for shard in range(first, len(rates)) if key not in rates[shard]), len(rates))
        tokens_per_s = max(0.0, rates[first][key])
        span = Hosted(first=first, last=last)
        found.append(Host(key=key, span=span, work_per_s=tokens_per_s * sum(work[first:last])))
    return tuple(found)


def throughput(hosts: Sequence[Host], work: Sequence[float]) -> float:
    """The tokens/s that ``hosts`` can train together, if each divides its work among its shards as is best."""
    by_span = {host.span: host.work_per_s for host in merged(hosts)}
    by_end = sorted(by_span, key=lambda span: span.last)
    of_shards = [[span for span in by_end if shard in span.shards] for shard in range(len(work))]
    high = sum(by_span.values()) / sum(work)
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _is_feasible(middle, by_span, of_shards, work) else (low, middle)
    return low


def merged(hosts: Sequence[Host]) -> list[Host]:
    """As if all hosts of a span were one: they can do the same together, and there are far fewer spans than peers."""
    found: dict[Hosted, Host] = {}
    for host in hosts:
        work_per_s = found[host.span].work_per_s if host.span in found else 0.0
        found[host.span] = replace(host, work_per_s=work_per_s + host.work_per_s)
    return list(found.values())


def _is_feasible(
    tokens_per_s: float, by_span: Mapping[Hosted, float], of_shards: Sequence[Sequence[Hosted]], work: Sequence[float]
) -> bool:
    """Shard by shard, whoever has the fewest ahead gives first: as spans are contiguous, no other way does more.

    ``of_shards``: the spans with each shard, in the order in which they give.
    """
    left = dict(by_span)
    for needed, spans in zip(work, of_shards, strict=True):
        wanted = needed * tokens_per_s
        for span in spans:
            given = min(wanted, left[span])
            left[span] -= given
            wanted -= given
        if wanted > 1e-12 * needed * tokens_per_s:
            return False
    return True


def choose(
    me: bytes, work_per_s: float, fits: Collection[Hosted], others: Sequence[Host], work: Sequence[float]
) -> Place:
    """The span, of those that fit, with which the run trains the most; ``fits`` is not empty.

    The whole model where that fits. Where no span makes the run go (other shards lack a replica): what leaves the
    fewest shards without one. Of equal ones: that which evens the shards out most; the larger; by a hash of ``me``.
    """
    whole, others = Hosted(first=0, last=len(work)), merged(others)
    if whole in fits:
        with_me = [*others, Host(key=me, span=whole, work_per_s=work_per_s)]
        return Place(span=whole, tokens_per_s=throughput(with_me, work), reason="the whole model fits")

    def score(span: Hosted) -> tuple[float, int, float, int, bytes]:
        with_me = [*others, Host(key=me, span=span, work_per_s=work_per_s)]
        uncovered = _uncovered(with_me, work)
        tie = sha256(me + bytes([span.first % 256, span.last % 256]))
        return (round(throughput(with_me, work), 6), -uncovered, -_unevenness(with_me, work), len(span.shards), tie)

    scores = {span: score(span) for span in fits}
    best = max(scores, key=scores.__getitem__)
    tokens_per_s, uncovered = scores[best][0], -scores[best][1]
    alone = throughput(others, work)
    reason = f"{tokens_per_s:.0f} tokens/s with it, {alone:.0f} without"
    if uncovered:
        reason = f"{uncovered} shards still lack a replica, the fewest possible"
    return Place(span=best, tokens_per_s=tokens_per_s, reason=reason)


def consider_move(
    mine: Host, fits: Collection[Hosted], others: Sequence[Host], work: Sequence[float]
) -> tuple[Hosted, str]:
    """The span to host from now on, which is nearly always the one that ``mine`` is, and why."""
    if len(mine.span.shards) == len(work):
        return mine.span, "the whole model is here"
    if mine.work_per_s <= 0:
        return mine.span, "how fast this peer is has yet to be seen"
    now = throughput([*others, mine], work)
    best = choose(mine.key, mine.work_per_s, fits, others, work)
    if best.span == mine.span:
        return mine.span, "no other span is better"
    leaves = [shard for shard in mine.span.shards if not any(shard in host.span.shards for host in others)]
    if any(shard not in best.span.shards for shard in leaves):
        return mine.span, f"shard {leaves[0]} would lose its only replica"
    uncovered = _uncovered([*others, replace(mine, span=best.span)], work)
    if uncovered < _uncovered([*others, mine], work):
        return best.span, f"{uncovered} shards lack a replica then, fewer than now"
    # Where several shards bound the run alike, the first who moves gains it nothing yet: to even them out counts, too.
    evened = _unevenness([*others, mine], work) / _unevenness([*others, replace(mine, span=best.span)], work)
    if max(best.tokens_per_s / now if now else 1.0, evened) <= 1 + MOVE_MARGIN:
        return mine.span, f"{best.tokens_per_s:.0f} tokens/s instead of {now:.0f} are not worth a move"
    return best.span, f"{best.tokens_per_s:.0f} tokens/s instead of {now:.0f}"


def _uncovered(hosts: Sequence[Host], work: Sequence[float]) -> int:
    """Shards without a replica."""
    return sum(not any(shard in host.span.shards for host in hosts) for shard in range(len(work)))


def _unevenness(hosts: Sequence[Host], work: Sequence[float]) -> float:
    """Seconds that a token would take through all shards that have a replica, if each worked for itself."""
    speeds = [0.0] * len(work)
    for host in hosts:
        of_span = sum(work[shard] for shard in host.span.shards)
        for shard in host.span.shards:
            speeds[shard] += host.work_per_s / of_span
    return sum(1 / speed for speed in speeds if speed)


def bottlenecks(replicas: Sequence[int], could_tokens_per_s: Sequence[float]) -> frozenset[int]:
    """The shards that bound the run: those without a replica, or else the one whose replicas could do the least.

    None where all could do the same, and before the replicas of each have been measured.
    """
    without = frozenset(shard for shard, number in enumerate(replicas) if not number)
    least = min(could_tokens_per_s)
    if without or not 0 < least < max(could_tokens_per_s):
        return without
    return frozenset([could_tokens_per_s.index(least)])


def lack(replicas: Sequence[int]) -> str:
    """What a run waits for whose shards have so many ``replicas``, in words; empty where none lacks one."""
    without = [shard for shard, number in enumerate(replicas) if not number]
    more = f" and of {len(without) - 1} more" if len(without) > 1 else ""
    return f"a replica of shard {without[0]}{more}" if without else ""


def mover(round_number: int, hosts: Sequence[Host], num_shards: int) -> bytes | None:
    """The one peer that may move in a round (rendezvous hash); None where all hold the whole model."""
    able = [host.key for host in hosts if len(host.span.shards) < num_shards]
    return max(able, key=lambda key: _draw(round_number, key), default=None)


def wait_share(round_number: int, key: bytes) -> float:
    """The share of a round, from 0 to 1, that a mover waits before it looks again and moves."""
    return int.from_bytes(_draw(round_number, b"wait" + key)[:4], "big") / 2**32


def _draw(round_number: int, key: bytes) -> bytes:
    return sha256(b"swarm.v1 mover" + round_number.to_bytes(8, "big") + key)
