"""Fetching by digest: whoever holds the bytes may serve them, because every byte is checked before it is used.

Decides whom to ask, in which order, how often and how many at once. A holder whose bytes do not match the digest is
not asked again by the same `HolderBook`. Leaves finding holders and storing the bytes to the callers.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from peer.p2p.call_stream import head
from peer.p2p.chunk_store import CHUNK_METHOD, REPLY_OVERHEAD_BYTES
from peer.p2p.transport import Transport
from swarm import digest as digests
from swarm.errors import ConfigError, NotFound, ProtocolError, SwarmError, VerificationError
from swarm.proto.round_pb2 import ChunkReply, ChunkRequest

MAX_HOLDERS = 256
_SPEED_MEMORY = 0.7  # weight of the past in the moving average of a holder's speed


@dataclass(frozen=True, slots=True)
class Brought:
    """A blob that has its digest, and how much of it this question brought in how many seconds: the rest was here."""

    data: bytes
    received_bytes: int
    seconds: float


class Outcome(enum.Enum):
    """What became of one question to one holder that did not bring the bytes."""

    MISSING = "lacks it"
    LIED = "sent wrong bytes"
    FAILED = "could not be reached in time"


@dataclass(slots=True)
class HolderRecord:
    """What one holder did so far; ``bytes_per_s`` is 0 until it has served something."""

    served: int = 0
    misses: int = 0
    failures: int = 0
    lies: int = 0
    bytes_per_s: float = 0.0
    failures_in_row: int = 0
    misses_in_row: int = 0


class HolderBook:
    """What is known about holders; orders them by it. ``on_lie(holder, what)`` hears of wrong bytes once per lie."""

    def __init__(self, rng: random.Random, on_lie: Callable[[bytes, str], None] | None = None) -> None:
        self._rng = rng
        self._on_lie = on_lie
        self._records: dict[bytes, HolderRecord] = {}

    def record(self, holder: bytes) -> HolderRecord:
        """The record of ``holder``, empty at first."""
        return self._records.setdefault(holder, HolderRecord())

    def order(self, holders: Iterable[bytes]) -> list[bytes]:
        """Holders worth asking: liars left out, untried and fast ones first, ties by chance; at most MAX_HOLDERS."""
        distinct = [holder for holder in dict.fromkeys(holders) if not self.record(holder).lies]
        self._rng.shuffle(distinct)
        return sorted(distinct, key=lambda holder: self.seconds_per_byte(holder))[:MAX_HOLDERS]

    def seconds_per_byte(self, holder: bytes) -> float:
        """Expected cost; 0 for a holder that nothing is known about, so that it is tried."""
        record = self.record(holder)
        if record.failures + record.misses > record.served:
            return float(record.failures + record.misses)
        return 1.0 / record.bytes_per_s if record.bytes_per_s else 0.0

    def liars(self, holders: Iterable[bytes]) -> list[Outcome]:
        """One LIED for each of ``holders`` that is no longer asked."""
        return [Outcome.LIED for holder in holders if self.record(holder).lies]

    def succeeded(self, holder: bytes, num_bytes: int, seconds: float) -> None:
        record = self.record(holder)
        record.served += 1
        record.failures_in_row = record.misses_in_row = 0
        if num_bytes == 0:
            return  # what was here already says nothing about the holder
        speed = num_bytes / max(seconds, 1e-6)
        before = record.bytes_per_s
        record.bytes_per_s = before * _SPEED_MEMORY + speed * (1 - _SPEED_MEMORY) if before else speed

    def disappointed(self, holder: bytes, outcome: Outcome, what: str) -> None:
        """Note that ``holder`` did not bring what it was asked for, and why."""
        record = self.record(holder)
        if outcome is Outcome.MISSING:
            record.misses += 1
            record.misses_in_row += 1
        elif outcome is Outcome.FAILED:
            record.failures += 1
            record.failures_in_row += 1
        else:
            record.lies += 1
            if self._on_lie is not None:
                self._on_lie(holder, what)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A blob to fetch; ``size_bytes`` bounds (and for checkpoints equals) its size."""

    digest: bytes
    size_bytes: int


Ask = Callable[[bytes, Wanted], Awaitable[Brought | bytes | None]]
"""(holder, item) -> the bytes; None where the holder lacks them. Ends within a time of its own.

Plain bytes: not compared with the digest yet; all of them came now, over the whole time of the question.

A `VerificationError` is a lie of the holder's, any other `SwarmError` a failure.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """How hard `fetch_many` pulls. Memory in use is at most ``total`` blobs."""

    per_holder: int = 4
    total: int = 16
    timeout_s: float = 60.0  # for one answer of one holder
    attempts_per_holder: int = 3  # per blob, where a holder could not be reached in time
    rest_s: float = 60.0  # for a holder that failed so often in a row, while others are there
    retry_pause_s: float = 0.5  # before one blob is asked of one holder again

    def __post_init__(self) -> None:
        if min(self.per_holder, self.total, self.attempts_per_holder) < 1 or self.timeout_s <= 0:
            raise ConfigError("fetch limits must be positive")


async def fetch_chunk(
    transport: Transport,
    digest: bytes,
    max_bytes: int,
    holders: Sequence[bytes],
    timeout_s: float,
    book: HolderBook | None = None,
) -> bytes:
    """The bytes with this SHA-256 from the first holder that has them, asked one after another.

    Holders are asked in the order given, or in the order of ``book``. ``timeout_s`` is for each holder.
    Raises `NotFound` when nobody brought them.
    """
    asked = book.order(holders) if book is not None else list(dict.fromkeys(holders))[:MAX_HOLDERS]
    book = book or HolderBook(random.Random(0))
    reasons: list[Outcome] = []
    for holder in asked:
        if holder == transport.public_key:
            continue
        result = await _ask(_peers(transport, timeout_s), holder, Wanted(digest, max_bytes), book)
        if isinstance(result, bytes):
            return result
        reasons.append(result)
    raise _nobody(digest, reasons or book.liars(holders))


async def fetch_many(
    transport: Transport,
    wanted: Iterable[Wanted],
    holders: Sequence[bytes],
    on_chunk: Callable[[Wanted, bytes], Awaitable[None]],
    limits: FetchLimits | None = None,
    book: HolderBook | None = None,
) -> None:
    """`fetch_from` peers, whole blobs at a time."""
    limits = limits or FetchLimits()
    others = [holder for holder in holders if holder != transport.public_key]
    await fetch_from(_peers(transport, limits.timeout_s), wanted, others, on_chunk, limits, book)


async def fetch_from(
    ask: Ask,
    wanted: Iterable[Wanted],
    holders: Sequence[bytes],
    on_chunk: Callable[[Wanted, bytes], Awaitable[None]],
    limits: FetchLimits,
    book: HolderBook | None = None,
) -> None:
    """Fetch every blob from all holders at once; ``on_chunk(item, data)`` gets each once, verified, in any order.

    A blob that one holder does not bring is asked of the others; fast holders serve more. Raises `NotFound` when one
    blob is nowhere to be had, or what ``on_chunk`` raises; what was still under way is then cancelled.
    """
    pool = _Pool(ask, holders, limits, book or HolderBook(random.Random(0)))

    async def fetch_one(item: Wanted) -> None:
        await on_chunk(item, await pool.fetch(item))

    pending: set[asyncio.Task[None]] = set()
    try:
        for item in wanted:
            while len(pending) >= pool.limits.total:
                await _reap(pending)
            pending.add(asyncio.create_task(fetch_one(item)))
        while pending:
            await _reap(pending)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _reap(pending: set[asyncio.Task[None]]) -> None:
    """Wait for the first of ``pending``; take out what is done and raise its error."""
    done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    pending -= done
    errors = [error for task in done if (error := task.exception()) is not None]
    if errors:
        raise errors[0]


@dataclass(slots=True)
class _Tries:
    """What one blob has been through: failed attempts per holder, and holders that are out."""

    failures: dict[bytes, int] = field(default_factory=dict)
    out: set[bytes] = field(default_factory=set)
    reasons: list[Outcome] = field(default_factory=list)


class _Pool:
    """Spreads questions over holders: the one with the shortest expected wait that has a free place."""

    def __init__(self, ask: Ask, holders: Sequence[bytes], limits: FetchLimits, book: HolderBook) -> None:
        self.limits = limits
        self._ask = ask
        self._holders = holders
        self._book = book
        self._load = dict.fromkeys(book.order(holders), 0)
        self._rests_until: dict[bytes, float] = {}
        self._freed = asyncio.Event()

    async def fetch(self, item: Wanted) -> bytes:
        tries = _Tries()
        while True:
            holder = await self._reserve(tries)
            if holder is None:
                raise _nobody(item.digest, tries.reasons or self._book.liars(self._holders))
            try:
                if holder in tries.failures:
                    await asyncio.sleep(self.limits.retry_pause_s)
                result = await _ask(self._ask, holder, item, self._book)
                if self._is_useless(holder):
                    self._rests_until[holder] = asyncio.get_running_loop().time() + self.limits.rest_s
            finally:
                self._load[holder] -= 1
                self._freed.set()
            if isinstance(result, bytes):
                return result
            tries.reasons.append(result)
            if result is Outcome.FAILED:
                tries.failures[holder] = tries.failures.get(holder, 0) + 1
            if result is not Outcome.FAILED or tries.failures[holder] >= self.limits.attempts_per_holder:
                tries.out.add(holder)

    async def _reserve(self, tries: _Tries) -> bytes | None:
        """A place at a holder that may still bring the blob; None where there is none.

        The wait ends: every question has a deadline, and its end sets ``_freed``.
        """
        while True:
            usable = [h for h in self._load if h not in tries.out and not self._book.record(h).lies]
            if not usable:
                return None
            # The places of a fetch are few: holders that only fail must not take them from those that serve.
            now = asyncio.get_running_loop().time()
            awake = [h for h in usable if self._rests_until.get(h, now) <= now]
            free = [h for h in awake or usable if self._load[h] < self.limits.per_holder]
            if free:
                holder = min(free, key=lambda h: (tries.failures.get(h, 0), self._wait(h), self._load[h]))
                self._load[holder] += 1
                return holder
            self._freed.clear()
            await self._freed.wait()

    def _is_useless(self, holder: bytes) -> bool:
        """It failed so often in a row, or lacked whatever it was asked for and never brought anything."""
        record, most = self._book.record(holder), self.limits.attempts_per_holder
        return record.failures_in_row >= most or (record.misses_in_row >= most and not record.served)

    def _wait(self, holder: bytes) -> float:
        return (self._load[holder] + 1) * self._book.seconds_per_byte(holder)


def _peers(transport: Transport, timeout_s: float) -> Ask:
    """Asking peers for whole blobs."""

    async def ask(holder: bytes, item: Wanted) -> bytes | None:
        raw = await transport.call(
            holder,
            CHUNK_METHOD,
            ChunkRequest(digest=item.digest).SerializeToString(),
            timeout_s=timeout_s,
            max_response_bytes=item.size_bytes + REPLY_OVERHEAD_BYTES,
        )
        return parse_reply(raw, item)

    return ask


async def _ask(ask: Ask, holder: bytes, item: Wanted, book: HolderBook) -> bytes | Outcome:
    """The verified bytes, or why this holder did not bring them; the book hears of it either way."""
    clock = asyncio.get_running_loop().time
    start = clock()
    try:
        answer = await ask(holder, item)
        if isinstance(answer, bytes):
            digests.check(answer, item.digest, "chunk")
            answer = Brought(answer, len(answer), clock() - start)
    except NotFound as error:
        outcome, what = Outcome.MISSING, str(error)
    except VerificationError as error:
        outcome, what = Outcome.LIED, str(error)
    except SwarmError as error:
        outcome, what = Outcome.FAILED, str(error)
    else:
        if answer is not None:
            book.succeeded(holder, answer.received_bytes, answer.seconds)
            return answer.data
        outcome, what = Outcome.MISSING, ""
    book.disappointed(holder, outcome, what)
    return outcome


def parse_reply(raw: bytes, item: Wanted) -> bytes | None:
    """The bytes of a `ChunkReply`, at most ``item.size_bytes``, not compared with the digest; None: not there."""
    try:
        reply = ChunkReply.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("a chunk reply cannot be read") from error
    if not reply.found:
        return None
    if len(reply.data) > item.size_bytes:
        raise ProtocolError(f"a chunk of {len(reply.data)} bytes instead of at most {item.size_bytes}")
    return reply.data


async def reply_data(reply: AsyncIterator[bytes], length: int) -> AsyncGenerator[bytes, None]:
    """The data of a `ChunkReply` that comes in parts: ``length`` bytes, not compared with the digest.

    Raises `NotFound` where the holder lacks them, `ProtocolError` where anything else comes before or after them.
    """
    expected = ChunkReply(found=True).SerializeToString() + head(ChunkReply.DATA_FIELD_NUMBER, length)
    read, left = bytearray(), length
    async for part in reply:
        taken = len(expected) - len(read)
        read += part[:taken]
        if not expected.startswith(read):
            raise ProtocolError("a chunk reply cannot be read")
        if data := part[taken:]:
            left -= len(data)
            yield data
    if not read:
        raise NotFound("the peer lacks the chunk")
    if left:
        raise ProtocolError(f"{length - left} bytes of a chunk instead of {length}")


def _nobody(digest: bytes, reasons: Sequence[Outcome]) -> NotFound:
    told = ", ".join(f"{reasons.count(reason)} {reason.value}" for reason in Outcome if reason in reasons)
    return NotFound(
        f"nobody brought the bytes {digest.hex()[:16]} ({told or 'no holder to ask'})",
        "try again when more peers are online",
    )
