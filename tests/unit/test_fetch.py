"""Fetching by digest: from anybody, in parallel, never a wrong byte."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import FetchLimits, HolderBook, Outcome, Wanted, fetch_chunk, fetch_many, reply_data
from swarm.digest import sha256
from swarm.errors import ConfigError, DiskFull, NetworkError, NotFound, ProtocolError
from swarm.proto.round_pb2 import ChunkReply, ChunkRequest
from tests.checkpoint_samples import Answer, FakeTransport

DATA = b"the wanted bytes"
DIGEST = sha256(DATA)
QUICK = FetchLimits(timeout_s=5, retry_pause_s=0)
A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


def holds(*blobs: bytes) -> Answer:
    by_digest = {sha256(blob): blob for blob in blobs}

    async def answer(caller: bytes, request: bytes) -> bytes:
        blob = by_digest.get(ChunkRequest.FromString(request).digest)
        await asyncio.sleep(0)
        return ChunkReply(found=blob is not None, data=blob or b"").SerializeToString()

    return answer


def always(raw: bytes) -> Answer:
    async def answer(caller: bytes, request: bytes) -> bytes:
        return raw

    return answer


async def hangs(caller: bytes, request: bytes) -> bytes:
    await asyncio.Event().wait()
    return b""


async def busy(caller: bytes, request: bytes) -> bytes:
    raise NetworkError("busy")


BAD_HOLDERS = {
    "wrong bytes": (always(ChunkReply(found=True, data=b"other bytes").SerializeToString()), "lies"),
    "empty bytes": (always(ChunkReply(found=True).SerializeToString()), "lies"),
    "more bytes than wanted": (always(ChunkReply(found=True, data=DATA + b"!").SerializeToString()), "lies"),
    "far too many bytes": (always(b"x" * 1000), "lies"),
    "no message": (always(b"\xff\xff\xff"), "lies"),
    "lacks it": (holds(), "misses"),
    "busy": (busy, "failures"),
    "never answers": (hangs, "failures"),
}


@pytest.mark.parametrize(("bad", "counted"), BAD_HOLDERS.values(), ids=BAD_HOLDERS.keys())
def test_a_holder_that_does_not_help_is_noted_and_the_next_one_is_asked(bad: Answer, counted: str) -> None:
    lies: list[bytes] = []
    book = HolderBook(random.Random(1), on_lie=lambda holder, what: lies.append(holder))
    transport = FakeTransport({A: bad, B: holds(DATA)})
    with pytest.raises(NotFound):
        asyncio.run(fetch_chunk(transport, DIGEST, len(DATA), [A], 0.05, book))
    assert asyncio.run(fetch_chunk(transport, DIGEST, len(DATA), [A, B], 0.05)) == DATA
    assert getattr(book.record(A), counted) == 1
    assert lies == ([A] if counted == "lies" else [])


def test_a_liar_is_not_asked_again() -> None:
    book = HolderBook(random.Random(1))
    transport = FakeTransport({A: BAD_HOLDERS["wrong bytes"][0], B: holds(DATA)})
    with pytest.raises(NotFound, match="1 sent wrong bytes"):
        asyncio.run(fetch_chunk(transport, DIGEST, len(DATA), [A], 1, book))
    for _ in range(5):
        assert asyncio.run(fetch_chunk(transport, DIGEST, len(DATA), [A, B], 1, book)) == DATA
    assert transport.calls == [A, B, B, B, B, B]
    with pytest.raises(NotFound, match="1 sent wrong bytes"):
        asyncio.run(fetch_chunk(transport, DIGEST, len(DATA), [A], 1, book))
    assert len(transport.calls) == 6


def test_not_found_says_what_each_holder_did() -> None:
    transport = FakeTransport({A: holds(), B: BAD_HOLDERS["wrong bytes"][0]})
    with pytest.raises(NotFound, match=r"1 lacks it, 1 sent wrong bytes, 1 could not be reached"):
        asyncio.run(fetch_chunk(transport, DIGEST, len(DATA), [A, B, C], 1))


def test_holders_are_asked_in_the_given_order_and_never_oneself() -> None:
    transport = FakeTransport({B: holds(DATA)})
    asyncio.run(fetch_chunk(transport, DIGEST, len(DATA), [transport.public_key, C, A, C, B], 1))
    assert transport.calls == [C, A, B]


def test_the_book_puts_fast_holders_before_slow_ones_and_failing_ones_last() -> None:
    book = HolderBook(random.Random(3))
    book.succeeded(A, 1000, 1.0)
    book.succeeded(B, 9000, 1.0)
    for _ in range(3):
        book.disappointed(C, Outcome.FAILED, "")
    assert book.order([A, B, C]) == [B, A, C]


def test_a_holder_that_lacks_more_than_it_serves_comes_after_one_that_serves() -> None:
    book = HolderBook(random.Random(3))
    book.succeeded(A, 1000, 1.0)
    book.disappointed(B, Outcome.MISSING, "")
    assert book.order([B, A]) == book.order([A, B]) == [A, B]


def test_what_was_here_already_says_nothing_about_a_holders_speed() -> None:
    book = HolderBook(random.Random(3))
    book.succeeded(A, 0, 0.0)
    assert book.record(A).bytes_per_s == 0
    book.succeeded(A, 1000, 1.0)
    book.succeeded(A, 0, 9.0)
    assert (book.record(A).served, book.record(A).bytes_per_s) == (3, 1000)


def test_untried_holders_are_ordered_by_chance() -> None:
    orders = {tuple(HolderBook(random.Random(seed)).order([A, B, C])) for seed in range(50)}
    assert len(orders) == 6


def blobs(count: int) -> list[bytes]:
    return [number.to_bytes(4, "big") * 10 for number in range(count)]


def run_many(transport: FakeTransport, holders: list[bytes], wanted: list[bytes], limits: FetchLimits = QUICK) -> None:
    """Fetch ``wanted`` and make sure that each arrived exactly once."""
    got: list[bytes] = []

    async def on_chunk(item: Wanted, data: bytes) -> None:
        await asyncio.sleep(0)
        got.append(data)

    items = [Wanted(sha256(blob), len(blob)) for blob in wanted]
    asyncio.run(fetch_many(transport, items, holders, on_chunk, limits, HolderBook(random.Random(5))))
    assert sorted(got) == sorted(wanted)


def test_many_blobs_come_from_all_holders_at_once() -> None:
    wanted = blobs(60)
    transport = FakeTransport({A: holds(*wanted), B: holds(*wanted), C: holds(*wanted)})
    run_many(transport, [A, B, C], wanted)
    assert len(set(transport.calls)) == 3
    assert len(transport.calls) == 60


def test_each_blob_is_found_wherever_it_is() -> None:
    wanted = blobs(30)
    parts = {A: wanted[::3], B: wanted[1::3], C: wanted[2::3]}
    run_many(FakeTransport({peer: holds(*part) for peer, part in parts.items()}), [A, B, C], wanted)


@pytest.mark.parametrize("name", BAD_HOLDERS)
def test_a_bad_holder_among_good_ones_costs_nothing_but_time(name: str) -> None:
    wanted = blobs(20)
    transport = FakeTransport({A: BAD_HOLDERS[name][0], B: holds(*wanted)})
    run_many(transport, [A, B], wanted, FetchLimits(timeout_s=0.05, retry_pause_s=0))


def test_a_single_holder_that_is_busy_for_a_moment_is_asked_again() -> None:
    wanted = blobs(5)
    honest = holds(*wanted)
    refusals = iter([True] * 5)

    async def busy_at_first(caller: bytes, request: bytes) -> bytes:
        if next(refusals, False):
            raise NetworkError("busy")
        return await honest(caller, request)

    run_many(FakeTransport({A: busy_at_first}), [A], wanted)


def test_a_holder_that_never_recovers_is_asked_a_bounded_number_of_times() -> None:
    transport = FakeTransport({A: busy})
    with pytest.raises(NotFound, match="3 could not be reached"):
        run_many(transport, [A], blobs(1))
    assert len(transport.calls) == 3


def test_what_is_in_flight_stays_within_the_limits() -> None:
    wanted = blobs(40)
    honest = holds(*wanted)
    now: Counter[bytes] = Counter()
    peak: Counter[bytes] = Counter()

    def counted(peer: bytes) -> Answer:
        async def answer(caller: bytes, request: bytes) -> bytes:
            now[peer] += 1
            now[b"all"] += 1
            for key in (peer, b"all"):
                peak[key] = max(peak[key], now[key])
            for _ in range(3):
                await asyncio.sleep(0)
            now[peer] -= 1
            now[b"all"] -= 1
            return await honest(caller, request)

        return answer

    transport = FakeTransport({peer: counted(peer) for peer in (A, B, C)})
    run_many(transport, [A, B, C], wanted, FetchLimits(per_holder=2, total=5, timeout_s=5))
    assert max(peak[A], peak[B], peak[C]) == 2
    assert peak[b"all"] == 5


def test_a_blob_that_nobody_has_ends_the_fetch_and_cancels_the_rest() -> None:
    wanted = blobs(3)
    cancelled = []

    async def slow(caller: bytes, request: bytes) -> bytes:
        if ChunkRequest.FromString(request).digest == sha256(wanted[0]):
            return ChunkReply(found=False).SerializeToString()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request)
            raise
        return b""

    with pytest.raises(NotFound):
        run_many(FakeTransport({A: slow}), [A], wanted)
    assert len(cancelled) == 2


def test_an_error_of_the_receiver_ends_the_fetch() -> None:
    wanted = blobs(50)
    transport = FakeTransport({A: holds(*wanted)})

    async def full(item: Wanted, data: bytes) -> None:
        raise DiskFull("no space left")

    items = [Wanted(sha256(blob), len(blob)) for blob in wanted]
    with pytest.raises(DiskFull):
        asyncio.run(fetch_many(transport, items, [A], full, QUICK))
    assert len(transport.calls) < 50


def test_without_holders_nothing_is_found() -> None:
    with pytest.raises(NotFound, match="no holder to ask"):
        run_many(FakeTransport(), [], blobs(1))


def test_nothing_wanted_is_nothing_asked() -> None:
    run_many(FakeTransport(), [], [])


def test_limits_must_be_positive() -> None:
    with pytest.raises(ConfigError):
        FetchLimits(total=0)


def test_a_real_store_answers_a_real_fetch(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 1000)
    store.put(DATA)
    transport = FakeTransport({A: store.handle_chunk})
    assert asyncio.run(fetch_chunk(transport, DIGEST, len(DATA), [A], 5)) == DATA


REPLY = ChunkReply(found=True, data=b"x" * 300).SerializeToString()
BAD_REPLIES = {
    "empty": (b"", NotFound),
    "not found": (ChunkReply(found=False, data=b"").SerializeToString(), NotFound),
    "data that was not found": (ChunkReply(data=b"x" * 300).SerializeToString(), ProtocolError),
    "too little": (ChunkReply(found=True, data=b"x" * 299).SerializeToString(), ProtocolError),
    "cut": (REPLY[:-1], ProtocolError),
    "cut before the data": (REPLY[:3], ProtocolError),
    "more behind it": (REPLY + b"y", ProtocolError),
    "no reply": (b"\xff" * 305, ProtocolError),
}


def data_of(raw: bytes, part_bytes: int, length: int = 300) -> bytes:
    async def parts() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(raw), part_bytes):
            yield raw[start : start + part_bytes]

    async def joined() -> bytes:
        return b"".join([piece async for piece in reply_data(parts(), length)])

    return asyncio.run(joined())


@pytest.mark.parametrize("part_bytes", [1, 2, 4, 5, 6, 1000])
def test_a_reply_in_parts_is_its_data_wherever_it_was_cut(part_bytes: int) -> None:
    assert data_of(REPLY, part_bytes) == b"x" * 300


@pytest.mark.parametrize("length", [1, 127, 128, 4 << 20])
def test_a_reply_in_parts_is_read_at_any_length(length: int) -> None:
    raw = ChunkReply(found=True, data=b"x" * length).SerializeToString()
    assert data_of(raw, 1 << 16, length) == b"x" * length


@pytest.mark.parametrize("case", BAD_REPLIES)
@pytest.mark.parametrize("part_bytes", [1, 1000])
def test_a_reply_in_parts_that_is_anything_else_is_refused(case: str, part_bytes: int) -> None:
    raw, error = BAD_REPLIES[case]
    with pytest.raises(error):
        data_of(raw, part_bytes)
