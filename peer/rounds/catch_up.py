"""Joining and catching up: the log proves itself from genesis, the log proves the state, chunks prove the bytes.

A newcomer takes commits from any holder and verifies each against the one before, picks the newest offered state whose
digest the log names, fetches its chunks from all holders at once, and loads it once the whole has that digest. Nobody
is believed. The rounds after that state are replayed by the exchange.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import FetchLimits, HolderBook, Wanted, fetch_many
from peer.p2p.transport import Transport
from peer.rounds import blocks
from peer.rounds.codec import Float32
from peer.rounds.ledger import Ledger
from peer.rounds.shard import Shard, StateBuffers, load_state
from swarm import digest
from swarm.errors import (
    Busy,
    DeadlineExceeded,
    DiskFull,
    NetworkError,
    NotFound,
    ProtocolError,
    SwarmError,
    VerificationError,
)
from swarm.log import LogHead, canonical, parse_record, verify_commit
from swarm.proto.round_pb2 import Commit, LogReply, LogRequest, StateReply, StateRequest
from swarm.run_spec import RunSpec

LOG_METHOD = "log"
STATE_METHOD = "state"
COMMITS_PER_PAGE = 128
MAX_LOG_REPLY_BYTES = 64 << 20
MAX_STATE_REPLY_BYTES = 64 << 20
CALL_TIMEOUT_S = 20.0
MOMENTUM_WAIT_S, MOMENTUM_PAUSE_S = 120.0, 2.0
MAX_PAGES = 100_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomer:
    """What fetching a state needs; ``genesis_digest`` and ``num_values`` are the organizer's word for round 0."""

    transport: Transport
    ledger: Ledger
    chunks: ChunkStore
    spec: RunSpec
    shard: int
    genesis_digest: bytes
    num_values: int
    book: HolderBook


async def fetch_commits(transport: Transport, holder: bytes, shard: int, first_round: int) -> dict[int, Commit]:
    """Up to a page of commits from ``first_round`` on, by round, unverified."""
    request = LogRequest(shard=shard, first_round=first_round, max_commits=COMMITS_PER_PAGE)
    raw = await transport.call(
        holder,
        LOG_METHOD,
        request.SerializeToString(),
        timeout_s=CALL_TIMEOUT_S,
        max_response_bytes=MAX_LOG_REPLY_BYTES,
    )
    try:
        reply = LogReply.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("a page of the log cannot be read") from error
    return {first_round + i: commit for i, commit in enumerate(reply.commits[:COMMITS_PER_PAGE])}


async def extend_log(newcomer: Newcomer, holder: bytes) -> None:
    """Append every commit that ``holder`` has and the log on our disk lacks, each verified against the one before."""
    for _ in range(MAX_PAGES):
        page = await fetch_commits(newcomer.transport, holder, newcomer.shard, newcomer.ledger.head.round + 1)
        for commit in page.values():
            _, head = verify_commit(newcomer.ledger.head, commit)
            newcomer.ledger.append(canonical(commit, newcomer.ledger.head), head, {})
        if len(page) < COMMITS_PER_PAGE:
            return


async def obtain_state(newcomer: Newcomer, holders: Sequence[bytes]) -> tuple[LogHead, Shard]:
    """The state to start from: this disk's where replaying is cheaper, otherwise the newest that holders prove."""
    for holder in holders:
        try:
            await extend_log(newcomer, holder)
        except (NetworkError, VerificationError) as error:
            log.info("a holder's log is of no use: %s", error)
    own = newcomer.ledger.load_state(newcomer.spec, newcomer.shard, newcomer.num_values)
    if own is not None and not _state_is_cheaper(newcomer, own[1], newcomer.ledger.head.round - own[0].round):
        return own
    try:
        return await fetch_state(newcomer, holders)
    except SwarmError:
        if own is None:
            raise
        return own


async def fetch_anchor(newcomer: Newcomer, round_number: int, holders: Sequence[bytes]) -> Float32:
    """The anchor after one round, from this disk or from who kept that state; `NotFound` where nobody did."""
    own = newcomer.ledger.read_state(round_number, newcomer.num_values)
    if own is not None:
        return own.anchor
    for holder in holders:
        try:
            reply = await _ask_for_offer(newcomer, holder, round_number)
            return (await _fetch_buffers(newcomer, reply, holders)).anchor
        except SwarmError as error:
            log.info("a holder lacks the state after round %d: %s", round_number, error)
    raise NotFound(f"nobody has the state after round {round_number}")


async def fetch_first_state(newcomer: Newcomer, holders: Sequence[bytes]) -> Shard:
    """The state of round 0, which the organizer signed; `NotFound` where nobody kept it."""
    for holder in holders:
        try:
            reply = await _ask_for_offer(newcomer, holder, first=True)
            buffers = await _fetch_buffers(newcomer, reply, holders)
            return load_state(newcomer.spec, newcomer.shard, buffers, newcomer.genesis_digest)
        except DiskFull:
            raise
        except SwarmError as error:
            log.info("a holder lacks the state of round 0: %s", error)
    raise NotFound("nobody has the state of round 0", "a seed peer keeps it: check that one is running")


async def fetch_momentum(newcomer: Newcomer, round_number: int, root: bytes, holders: Sequence[bytes]) -> memoryview:
    """The outer momentum after a checkpoint round, which has this Merkle root; `NotFound` where nobody kept it."""
    request = StateRequest(shard=newcomer.shard, after_round=round_number, momentum=True)
    for holder in holders:
        try:
            reply = await _ask_patiently(newcomer, holder, request)
            found = memoryview(bytearray(blocks.size_bytes(newcomer.num_values)))
            is_it = digest.merkle_root(reply.momentum_chunks) == root
            if not is_it or len(reply.momentum_chunks) != digest.num_chunks(len(found)):
                raise NotFound("no such momentum is offered")
            await _fetch_chunks(newcomer, [(reply.momentum_chunks, found)], holders)
            return found
        except DiskFull:
            raise
        except SwarmError as error:
            log.info("a holder lacks the momentum after round %d: %s", round_number, error)
    raise NotFound(
        f"nobody has the momentum after round {round_number}",
        "seed peers keep it beside their newest checkpoints: name a later round, or audit from the genesis",
    )


async def _ask_patiently(newcomer: Newcomer, holder: bytes, request: StateRequest) -> StateReply:
    """As `_ask`; again while the holder reads the file, which may take longer than a call."""
    clock = asyncio.get_running_loop().time
    ends = clock() + MOMENTUM_WAIT_S
    while True:
        try:
            return await _ask(newcomer, holder, request)
        except (Busy, DeadlineExceeded):
            if clock() >= ends:
                raise
        await asyncio.sleep(MOMENTUM_PAUSE_S)


async def fetch_state(newcomer: Newcomer, holders: Sequence[bytes]) -> tuple[LogHead, Shard]:
    """The newest state that holders offer and the log proves; `NotFound` where there is none."""
    offers: dict[int, StateReply] = {}
    for holder in holders:
        try:
            reply = await _ask_for_offer(newcomer, holder)
        except (NetworkError, VerificationError) as error:
            log.info("a holder offers no state: %s", error)
            continue
        offers[reply.round] = reply
    for number in sorted(offers, reverse=True):
        reply = offers[number]
        expected = digest.state_digest(reply.anchor_chunks, reply.momentum_chunks)
        try:
            buffers = await _fetch_buffers(newcomer, reply, holders)
            shard = load_state(newcomer.spec, newcomer.shard, buffers, expected)
        except DiskFull:
            raise  # no holder can help: the person has to
        except SwarmError as error:
            log.info("the state after round %d cannot be had whole: %s", number, error)
            continue
        newcomer.ledger.save_state(number, shard)
        return newcomer.ledger.heads[number], shard
    raise NotFound("nobody offers a state that the log proves", "check that a seed peer or a volunteer is running")


async def _ask_for_offer(newcomer: Newcomer, holder: bytes, after_round: int = 0, *, first: bool = False) -> StateReply:
    """What a holder offers, once the log on our disk names the digest of exactly these chunks.

    ``after_round``: the state after this very round; 0: its newest, or with ``first`` that of round 0.
    """
    request = StateRequest(shard=newcomer.shard, after_round=after_round, first=first)
    reply = await _ask(newcomer, holder, request)
    if (after_round or first) and reply.round != after_round:
        raise NotFound(f"the state after round {after_round} is not offered")
    sizes = (4 * newcomer.num_values, blocks.size_bytes(newcomer.num_values))
    offered = (len(reply.anchor_chunks), len(reply.momentum_chunks))
    if offered != tuple(map(digest.num_chunks, sizes)):
        raise NotFound("no state of this shard is offered")
    if digest.state_digest(reply.anchor_chunks, reply.momentum_chunks) != proven_digest(newcomer, reply.round):
        raise VerificationError(f"the state offered for round {reply.round} is not the one that the log names")
    return reply


async def _ask(newcomer: Newcomer, holder: bytes, request: StateRequest) -> StateReply:
    raw = await newcomer.transport.call(
        holder,
        STATE_METHOD,
        request.SerializeToString(),
        timeout_s=CALL_TIMEOUT_S,
        max_response_bytes=MAX_STATE_REPLY_BYTES,
    )
    try:
        return StateReply.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("an offer of a state cannot be read") from error


def proven_digest(newcomer: Newcomer, round_number: int) -> bytes:
    """The state digest after a round, as the organizer (round 0) or the next round's voters signed it."""
    if round_number == 0:
        return newcomer.genesis_digest
    commits = newcomer.ledger.commits(round_number + 1, 1)
    if not commits:
        raise VerificationError(f"no commit in the log names the state after round {round_number}")
    return bytes(parse_record(commits[0].record, newcomer.ledger.heads[round_number]).state_digest)


async def _fetch_buffers(newcomer: Newcomer, reply: StateReply, donors: Sequence[bytes]) -> StateBuffers:
    buffers = StateBuffers(newcomer.num_values)
    rooms = list(zip((reply.anchor_chunks, reply.momentum_chunks), buffers.views, strict=True))
    await _fetch_chunks(newcomer, rooms, donors)
    return buffers


async def _fetch_chunks(
    newcomer: Newcomer, rooms: Sequence[tuple[Sequence[bytes], memoryview]], donors: Sequence[bytes]
) -> None:
    """Every chunk in its place. Raises `VerificationError` for one of another size than its place has."""
    places: dict[bytes, list[memoryview]] = {}
    for chunks, view in rooms:
        for index, item in enumerate(chunks):
            room = view[index * digest.STATE_CHUNK_BYTES :][: digest.STATE_CHUNK_BYTES]
            places.setdefault(item, []).append(room)

    async def keep(item: Wanted, data: bytes) -> None:
        for room in places[item.digest]:
            if len(room) != len(data):
                raise VerificationError("a chunk of a state is not as large as its place")
            room[:] = data

    async def keep_fetched(item: Wanted, data: bytes) -> None:
        await keep(item, data)
        await newcomer.chunks.keep(data)  # while others are on their way; and it is not fetched again after a kill

    wanted = []
    for item in places:
        data = newcomer.chunks.get(item)
        if data is None:
            wanted.append(Wanted(item, digest.STATE_CHUNK_BYTES))
        else:
            await keep(Wanted(item, len(data)), data)
    await fetch_many(newcomer.transport, wanted, donors, keep_fetched, FetchLimits(), newcomer.book)


def _state_is_cheaper(newcomer: Newcomer, shard: Shard, missed_rounds: int) -> bool:
    state_bytes = sum(len(view) for view in shard.state_bytes())
    return missed_rounds * shard.codec.encoded_size(shard.num_values) > state_bytes
