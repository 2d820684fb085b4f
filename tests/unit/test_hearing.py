"""Pings: whoever answers says for how long it has lived, so that a process that ended is not waited for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from peer.rounds.hearing import Hearing
from swarm.errors import Unreachable
from swarm.log import LogHead
from swarm.proto.round_pb2 import PingReply

ME, OTHER = b"m" * 32, b"o" * 32
HEAD = LogHead(run_id=b"r" * 20, shard=0, round=3, log_digest=bytes(32), voters=(ME, OTHER), total_tokens=0)


def asking(reply: PingReply) -> Hearing:
    """A peer whose pings are answered with ``reply``."""

    async def call(peer: bytes, method: str, request: bytes, **limits: Any) -> bytes:
        return reply.SerializeToString()

    transport: Any = SimpleNamespace(public_key=ME, call=call)
    return Hearing(transport, HEAD, 30.0, lambda: 100.0)


def test_a_process_that_is_younger_than_the_wait_counts_as_another() -> None:
    with pytest.raises(Unreachable):
        asyncio.run(asking(PingReply(round=4, alive_ms=500)).ask(OTHER, waited_s=1.0))
    assert not asyncio.run(asking(PingReply(round=4, alive_ms=1500)).ask(OTHER, waited_s=1.0))


def test_a_process_that_does_not_say_its_age_is_not_taken_for_dead() -> None:
    assert not asyncio.run(asking(PingReply(round=4)).ask(OTHER, waited_s=1.0))


def test_a_process_that_has_just_begun_says_an_age() -> None:
    assert asking(PingReply()).on_ping(OTHER, leaving=False).alive_ms == 1
