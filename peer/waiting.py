"""Waiting for news, no longer than a while, in loops that somebody will cancel."""

from __future__ import annotations

import asyncio


async def wait_for_news(news: asyncio.Event, at_most_s: float) -> bool:
    """Whether ``news`` was set within ``at_most_s``.

    `asyncio.wait_for` loses a cancellation that comes together with the news (until Python 3.12): a loop around it then
    never ends, and a peer that leaves waits for it.
    """
    waiter = asyncio.ensure_future(news.wait())
    try:
        done, _ = await asyncio.wait({waiter}, timeout=max(0.0, at_most_s))
        return bool(done)
    finally:
        waiter.cancel()
