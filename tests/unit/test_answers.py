"""Answers that nobody reads: how much of the memory they take, and whom they leave alone."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from peer.p2p import call_stream
from peer.p2p.answers import SMALL_ANSWER_BYTES, AnswerLimits, Answers
from peer.p2p.call_stream import Traffic
from peer.p2p.calls import Calls
from peer.p2p.spill import Spill
from swarm.errors import NetworkError, NotFound
from swarm.files import Kept
from swarm.identity import Identity, peer_id_of

MIB = 1 << 20
READER, OTHER = b"reader", b"other"
LIMITS = AnswerLimits(in_memory=4 * MIB, in_memory_per_peer=2 * MIB, held=8 * MIB, held_per_peer=5 * MIB)


async def answering(data: bytes) -> bytes:
    return data


def with_answers(folder: Path, use: Callable[[Answers, AsyncExitStack], Awaitable[None]]) -> Answers:
    answers = Answers(Spill(folder).put, LIMITS)

    async def main() -> None:
        async with AsyncExitStack() as held:
            await use(answers, held)

    asyncio.run(main())
    return answers


def test_answers_beyond_a_peers_share_of_the_memory_lie_on_disk_and_stay_what_they_are(tmp_path: Path) -> None:
    async def use(answers: Answers, held: AsyncExitStack) -> None:
        datas = [bytes([n]) * MIB for n in range(4)]
        kept: list[Kept] = [await held.enter_async_context(answers.holding(READER, answering(data))) for data in datas]
        assert [isinstance(answer, bytes) for answer in kept] == [True, True, False, False]
        assert [answer[:] for answer in kept] == datas
        assert (answers.in_memory[READER], answers.held[READER]) == (2 * MIB, 4 * MIB)
        assert isinstance(await held.enter_async_context(answers.holding(OTHER, answering(datas[0]))), bytes)

    done = with_answers(tmp_path, use)
    assert not done.held and not done.in_memory, "what was sent is counted no longer"


def test_many_peers_together_take_no_more_memory_than_all_may(tmp_path: Path) -> None:
    async def use(answers: Answers, held: AsyncExitStack) -> None:
        for n in range(6):
            await held.enter_async_context(answers.holding(bytes([n]), answering(bytes(MIB))))
        assert answers.in_memory.total() == LIMITS.in_memory < answers.held.total()

    with_answers(tmp_path, use)


def test_a_peer_with_too_much_unread_is_told_busy_and_another_is_not(tmp_path: Path) -> None:
    async def use(answers: Answers, held: AsyncExitStack) -> None:
        for _ in range(5):
            await held.enter_async_context(answers.holding(READER, answering(bytes(MIB))))
        with pytest.raises(NetworkError, match="busy"):
            await held.enter_async_context(answers.holding(READER, answering(bytes(MIB))))
        await held.enter_async_context(answers.holding(READER, answering(bytes(SMALL_ANSWER_BYTES))))
        await held.enter_async_context(answers.holding(OTHER, answering(bytes(3 * MIB))))
        with pytest.raises(NetworkError, match="busy"):
            await held.enter_async_context(answers.holding(b"third", answering(bytes(MIB))))
        assert answers.held.total() == LIMITS.held

    with_answers(tmp_path, use)


def test_the_only_answer_of_a_peer_may_be_larger_than_its_share(tmp_path: Path) -> None:
    async def use(answers: Answers, held: AsyncExitStack) -> None:
        await held.enter_async_context(answers.holding(READER, answering(bytes(LIMITS.held_per_peer + 1))))

    with_answers(tmp_path, use)


def test_a_handler_that_fails_leaves_nothing_counted(tmp_path: Path) -> None:
    async def failing() -> bytes:
        raise NotFound("not here")

    async def use(answers: Answers, held: AsyncExitStack) -> None:
        with pytest.raises(NotFound):
            await held.enter_async_context(answers.holding(READER, failing()))

    assert not with_answers(tmp_path, use).held


def test_calls_whose_answers_nobody_reads_keep_them_on_disk_and_they_arrive_whole_once_read(tmp_path: Path) -> None:
    """Fifty answers of a MiB asked for at once; memory holds two of them, and every one arrives in the end."""

    async def main() -> None:
        calls = Calls(Spill(tmp_path).put)
        spill, loop, on_disk, all_kept = (
            Spill(tmp_path),
            asyncio.get_running_loop(),
            itertools.count(1),
            asyncio.Event(),
        )

        def keep(data: bytes) -> Kept:
            if next(on_disk) == 48:
                loop.call_soon_threadsafe(all_kept.set)
            return spill.put(data)

        calls.answers = Answers(keep, AnswerLimits(in_memory_per_peer=2 * MIB))
        peer, all_asked, asked = peer_id_of(Identity(b"x" * 32).public_key), asyncio.Event(), 0

        async def handle(_: bytes, request: bytes) -> bytes:
            nonlocal asked
            asked += 1
            if asked == 50:
                all_asked.set()
            await all_asked.wait()
            return request * MIB

        calls.handlers["some"] = handle
        readers, serving = [], []
        for n in range(50):
            here, there = socket.socketpair()
            serving.append(
                asyncio.create_task(calls.on_stream("some", peer, *await asyncio.open_unix_connection(sock=here)))
            )
            reader, writer = await asyncio.open_unix_connection(sock=there)
            await call_stream.send_request(writer, bytes([n]), 60.0, calls.traffic)
            readers.append((reader, writer))
        await asyncio.wait_for(all_kept.wait(), 60)
        assert calls.answers.held.total() == 50 * MIB
        assert calls.answers.in_memory.total() == 2 * MIB
        for n, (reader, writer) in enumerate(readers):
            assert await call_stream.receive_response(reader, MIB, Traffic(0)) == bytes([n]) * MIB
            writer.close()
        await asyncio.gather(*serving)
        assert not calls.answers.held and not calls.answers.in_memory

    asyncio.run(main())
