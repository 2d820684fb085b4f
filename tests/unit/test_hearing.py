"""Pings: whoever answers says for how long it has lived, so that a process that ended is not waited for."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from peer.rounds.answering import Answers
from peer.rounds.hearing import Hearing
from swarm.errors import NotFound, Unreachable
from swarm.log import LogHead
from swarm.proto.round_pb2 import PingReply

ME, OTHER, THIRD = b"m" * 32, b"o" * 32, b"t" * 32
LEASE_S = 30.0
HEAD = LogHead(run_id=b"r" * 20, shard=0, round=3, log_digest=bytes(32), voters=(ME, OTHER), total_tokens=0)


def asking(reply: PingReply) -> Hearing:
    """A peer whose pings are answered with ``reply``."""

    async def call(peer: bytes, method: str, request: bytes, **limits: Any) -> bytes:
        return reply.SerializeToString()

    transport: Any = SimpleNamespace(public_key=ME, call=call)
    return Hearing(transport, HEAD, LEASE_S, lambda: 100.0)


def test_a_process_that_is_younger_than_the_wait_counts_as_another() -> None:
    with pytest.raises(Unreachable):
        asyncio.run(asking(PingReply(round=4, alive_ms=500)).ask(OTHER, waited_s=1.0))
    assert not asyncio.run(asking(PingReply(round=4, alive_ms=1500)).ask(OTHER, waited_s=1.0))


def test_a_process_that_does_not_say_its_age_is_not_taken_for_dead() -> None:
    assert not asyncio.run(asking(PingReply(round=4)).ask(OTHER, waited_s=1.0))


def test_a_process_that_has_just_begun_says_an_age() -> None:
    assert asking(PingReply()).on_ping(OTHER, leaving=False).alive_ms == 1


def test_a_voter_that_hosts_other_shards_now_keeps_nobody_from_voting() -> None:
    """It answers, and will never have anything to say of this shard: as good as a process that ended."""
    moved, time = Answers([]), SimpleNamespace(s=100.0)

    async def call(peer: bytes, method: str, request: bytes, **limits: Any) -> bytes:
        if peer == OTHER:
            return await moved.handle_ping(ME, request)
        return PingReply(round=4, alive_ms=500_000).SerializeToString()

    transport: Any = SimpleNamespace(public_key=ME, call=call)
    hearing = Hearing(transport, replace(HEAD, voters=(ME, OTHER, THIRD)), LEASE_S, lambda: time.s)

    async def ask_all() -> None:
        for voter in hearing.due():
            with contextlib.suppress(NotFound):
                await hearing.ask(voter)

    for _ in range(3):
        time.s += 1.0
        asyncio.run(ask_all())
    assert hearing.standing().present, "a whole lease would be waited for else"
