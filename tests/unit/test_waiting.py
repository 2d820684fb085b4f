"""Waiting for news: what comes together with a cancellation must not undo it."""

from __future__ import annotations

import asyncio

from peer.waiting import wait_for_news


def test_news_and_their_absence_are_told_apart() -> None:
    async def scenario() -> None:
        news = asyncio.Event()
        assert not await wait_for_news(news, 0.001)
        news.set()
        assert await wait_for_news(news, 10)

    asyncio.run(scenario())


def test_a_loop_that_is_cancelled_as_news_come_ends() -> None:
    """Whichever of the two comes first within one turn of the event loop."""

    async def scenario(turns: int) -> None:
        news = asyncio.Event()

        async def loop() -> None:
            while True:
                await wait_for_news(news, 0.01)
                news.clear()

        looping = asyncio.create_task(loop())
        await asyncio.sleep(0.001)
        news.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        looping.cancel()
        _, pending = await asyncio.wait({looping}, timeout=0.5)
        assert not pending

    for turns in range(4):
        asyncio.run(scenario(turns))
