"""What every `Transport` does. Subclass with `make` (and `run`, `pass_time`, `close` where they differ).

Scenarios run against any implementation: libp2p between processes, or a simulated network under a fake clock.
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from peer.p2p.transport import Transport
from swarm.errors import (
    DeadlineExceeded,
    DigestError,
    NetworkError,
    NotFound,
    ProtocolError,
    SwarmError,
    Unreachable,
)
from swarm.identity import Identity

# The keys that a directory of the contract has.
KEY, OTHER_KEY = "status-0", "status-1"
Scenario = Callable[[Sequence[Transport]], Awaitable[None]]


async def echo(caller: bytes, request: bytes) -> bytes:
    return request


class TransportContract(ABC):
    @abstractmethod
    async def make(self, count: int) -> list[Transport]:
        """``count`` transports of one run that can reach each other."""

    async def close(self, transports: Sequence[Transport]) -> None:
        for transport in reversed(transports):
            await transport.close()

    async def pass_time(self, seconds: float) -> None:
        """Let the directory's clock go on by ``seconds``."""
        await asyncio.sleep(seconds)

    def run(self, scenario: Coroutine[Any, Any, None]) -> None:
        asyncio.run(scenario)

    def check(self, count: int, scenario: Scenario) -> None:
        async def whole() -> None:
            transports = await self.make(count)
            try:
                await asyncio.wait_for(scenario(transports), 60)
            finally:
                await self.close(transports)

        self.run(whole())

    def test_an_answer_is_what_the_handler_returned(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            await peers[1].serve("echo", echo)
            for request in (b"", b"hello", bytes(range(256)) * 10):
                assert await peers[0].call(peers[1].public_key, "echo", request, timeout_s=10) == request

        self.check(2, scenario)

    def test_a_large_message_arrives_whole(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            await peers[1].serve("echo", echo)
            request = os.urandom((8 << 20) + 13)
            assert await peers[0].call(peers[1].public_key, "echo", request, timeout_s=30) == request

        self.check(2, scenario)

    def test_a_response_that_comes_in_parts_is_the_same_bytes_or_error(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            async def long(caller: bytes, request: bytes) -> bytes:
                if not request:
                    raise NotFound("nothing to repeat")
                return request * 1_500_000

            async def parts_of(request: bytes, most: int) -> bytes:
                parts = peers[0].stream(peers[1].public_key, "long", request, timeout_s=30, max_response_bytes=most)
                async with aclosing(parts):
                    return b"".join([part async for part in parts])

            await peers[1].serve("long", long)
            assert await parts_of(b"ab", 3_000_000) == b"ab" * 1_500_000
            with pytest.raises(ProtocolError):
                await parts_of(b"ab", 2_999_999)
            with pytest.raises(NotFound, match="nothing to repeat"):
                await parts_of(b"", 3_000_000)
            nobody = Identity(b"n" * 32).public_key
            with pytest.raises(Unreachable):
                await anext(peers[0].stream(nobody, "long", b"ab", timeout_s=5, max_response_bytes=9))

        self.check(2, scenario)

    def test_calls_run_beside_each_other(self) -> None:
        """All of them are inside the handler at one moment, and each gets its own answer."""

        async def scenario(peers: Sequence[Transport]) -> None:
            inside = 0
            all_inside = asyncio.Event()

            async def meet(caller: bytes, request: bytes) -> bytes:
                nonlocal inside
                inside += 1
                if inside == 20:
                    all_inside.set()
                await all_inside.wait()
                return request

            await peers[1].serve("meet", meet)
            requests = [bytes([number]) * 1000 for number in range(20)]
            calls = [peers[0].call(peers[1].public_key, "meet", request, timeout_s=20) for request in requests]
            assert await asyncio.gather(*calls) == requests

        self.check(2, scenario)

    def test_a_handler_is_told_the_key_of_who_calls(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            async def who(caller: bytes, request: bytes) -> bytes:
                return caller

            await peers[2].serve("who", who)
            for caller in peers[:2]:
                answer = await caller.call(peers[2].public_key, "who", b"", timeout_s=10)
                assert answer == caller.public_key

        self.check(3, scenario)

    @pytest.mark.parametrize(
        "error", [ProtocolError("wrong round"), DigestError("not these bytes"), NotFound("no such chunk")], ids=repr
    )
    def test_a_handlers_error_reaches_the_caller_as_the_same_class(self, error: SwarmError) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            async def refuse(caller: bytes, request: bytes) -> bytes:
                raise error

            await peers[1].serve("refuse", refuse)
            with pytest.raises(type(error), match=str(error)):
                await peers[0].call(peers[1].public_key, "refuse", b"x", timeout_s=10)

        self.check(2, scenario)

    def test_an_unexpected_failure_tells_the_caller_nothing(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            async def fail(caller: bytes, request: bytes) -> bytes:
                raise ValueError("a secret path")

            await peers[1].serve("fail", fail)
            with pytest.raises(NetworkError, match=r"^internal error$"):
                await peers[0].call(peers[1].public_key, "fail", b"x", timeout_s=10)

        self.check(2, scenario)

    def test_an_unknown_method_is_not_found(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            await peers[1].serve("echo", echo)
            with pytest.raises(NotFound):
                await peers[0].call(peers[1].public_key, "nothing", b"", timeout_s=10)

        self.check(2, scenario)

    def test_a_response_larger_than_allowed_is_a_protocol_error(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            await peers[1].serve("echo", echo)
            for size in (1001, 3 << 20):
                with pytest.raises(ProtocolError):
                    await peers[0].call(
                        peers[1].public_key, "echo", bytes(size), timeout_s=10, max_response_bytes=size - 1
                    )
            exact = await peers[0].call(peers[1].public_key, "echo", bytes(1000), timeout_s=10, max_response_bytes=1000)
            assert exact == bytes(1000)

        self.check(2, scenario)

    def test_a_silent_handler_ends_in_a_deadline(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            async def sleep(caller: bytes, request: bytes) -> bytes:
                await asyncio.sleep(3600)
                return b""

            await peers[1].serve("sleep", sleep)
            await peers[1].serve("echo", echo)
            with pytest.raises(DeadlineExceeded):
                await peers[0].call(peers[1].public_key, "sleep", b"", timeout_s=0.5)
            assert await peers[0].call(peers[1].public_key, "echo", b"still here", timeout_s=10) == b"still here"

        self.check(2, scenario)

    def test_a_dead_peer_is_unreachable_at_once(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            await peers[1].serve("echo", echo)
            await peers[0].call(peers[1].public_key, "echo", b"", timeout_s=10)
            await peers[1].close()
            started = time.monotonic()
            with pytest.raises(Unreachable):
                await peers[0].call(peers[1].public_key, "echo", b"", timeout_s=30)
            assert time.monotonic() - started < 5

        self.check(2, scenario)

    def test_a_peer_that_nobody_knows_is_unreachable(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            stranger = Identity(b"s" * 32).public_key
            with pytest.raises(Unreachable):
                await peers[0].call(stranger, "echo", b"", timeout_s=10)
            with pytest.raises(Unreachable):
                await peers[0].connect(stranger, (), timeout_s=10)

        self.check(2, scenario)

    def test_peers_connect_by_their_addresses(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            await peers[2].serve("echo", echo)
            await peers[1].connect(peers[2].public_key, peers[2].addresses, timeout_s=10)
            assert await peers[1].call(peers[2].public_key, "echo", b"x", timeout_s=10) == b"x"

        self.check(3, scenario)

    def test_what_several_peers_publish_everybody_finds(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            for peer in peers:
                await peer.publish(KEY, b"by " + peer.public_key, lifetime_s=60)
            expected = {peer.public_key: b"by " + peer.public_key for peer in peers}
            for peer in peers:
                assert dict(await peer.lookup(KEY)) == expected
                assert dict(await peer.lookup(OTHER_KEY)) == {}

        self.check(3, scenario)

    def test_a_later_value_replaces_the_earlier_one(self) -> None:
        """Also one with a shorter life."""

        async def scenario(peers: Sequence[Transport]) -> None:
            for value, lifetime_s in ((b"first", 60), (b"second", 60), (b"leaving", 20)):
                await peers[1].publish(KEY, value, lifetime_s=lifetime_s)
                assert dict(await peers[0].lookup(KEY)) == {peers[1].public_key: value}

        self.check(2, scenario)

    def test_an_expired_value_vanishes(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            await peers[1].publish(KEY, b"short", lifetime_s=1.5)
            await peers[0].publish(KEY, b"long", lifetime_s=60)
            assert set(await peers[0].lookup(KEY)) == {peers[0].public_key, peers[1].public_key}
            for _ in range(50):
                if len(found := await peers[0].lookup(KEY)) == 1:
                    break
                await self.pass_time(0.1)
            assert dict(found) == {peers[0].public_key: b"long"}

        self.check(2, scenario)

    def test_traffic_counts_the_payload_of_calls(self) -> None:
        async def scenario(peers: Sequence[Transport]) -> None:
            async def double(caller: bytes, request: bytes) -> bytes:
                return request * 2

            await peers[1].serve("double", double)
            before = [peer.traffic() for peer in peers]
            await peers[0].call(peers[1].public_key, "double", bytes(1000), timeout_s=10)
            moved = [
                tuple(now - then for now, then in zip(peer.traffic(), earlier, strict=True))
                for peer, earlier in zip(peers, before, strict=True)
            ]
            assert moved == [(1000, 2000), (2000, 1000)]

        self.check(2, scenario)
