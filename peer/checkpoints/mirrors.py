"""Mirrors: published checkpoints as plain files at some URL, read by ranges. The door to aiohttp.

Decides which URLs are mirrors (`https:`, `http:`, and any that `swarm.storage` opens; of those that the coordinator
tells, none that reads this machine), and where a checkpoint lies there (``URL/checkpoint-ROUND/FILE``). A mirror is
trusted with nothing: every chunk is checked by whoever asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp

from peer.checkpoints.sources import LIMITS, MIRROR, PIECE_BYTES, Chunk, Source
from swarm.errors import ConfigError, NetworkError, NotFound, Unreachable
from swarm.manifest import mirror_folder
from swarm.storage import Storage

MAX_MIRRORS = 16
MAX_URL_CHARACTERS = 1024
CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 30.0
MAX_REDIRECTS = 5
_HTTP = ("http", "https")
# What a stranger may make this machine open: nothing that lies on it, and nothing that opens something else.
_TOLD = (*_HTTP, "s3", "hf")
_GONE = (403, 404, 410, 416)  # S3 says 403 of what is not there, 416: the file is shorter


@asynccontextmanager
async def open_mirrors(named: Sequence[str], told: Sequence[str], round_number: int) -> AsyncIterator[list[Source]]:
    """Mirrors as sources of this round's chunks: those that the person ``named``, and what the coordinator ``told``.

    Raises `ConfigError` where the person named what is no mirror; what the coordinator told is then passed over.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S)
    threads = ThreadPoolExecutor(LIMITS.total, thread_name_prefix="mirror")
    try:
        async with aiohttp.ClientSession(timeout=timeout, trust_env=True, auto_decompress=False) as session:

            def opened(url: str) -> Source:
                base = f"{url.rstrip('/')}/{mirror_folder(round_number)}"
                if urlsplit(url).scheme in _HTTP:
                    return HttpMirror(session, base)
                return StorageMirror(Storage(base), threads)

            sources = [opened(url) for url in dict.fromkeys(named)]
            for url in _usable(told):
                with suppress(ConfigError):
                    if url not in named:
                        sources.append(opened(url))
            yield sources[:MAX_MIRRORS]
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _usable(urls: Iterable[str]) -> Iterator[str]:
    """Of the URLs that a coordinator tells, those that may be asked."""
    for url in urls:
        if len(url) <= MAX_URL_CHARACTERS and url.isprintable() and "::" not in url:
            with suppress(ValueError):
                if urlsplit(url).scheme in _TOLD and urlsplit(url).netloc:
                    yield url


@dataclass(frozen=True, slots=True)
class HttpMirror:
    """A checkpoint's folder on a web server that answers ranges. ``name``: its URL."""

    session: aiohttp.ClientSession
    name: str
    kind: str = MIRROR

    async def read(self, chunk: Chunk, start: int) -> AsyncIterator[bytes]:
        first, last = chunk.offset + start, chunk.offset + chunk.length - 1
        headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        url = f"{self.name}/{chunk.file}"
        try:
            async with self.session.get(url, headers=headers, max_redirects=MAX_REDIRECTS) as response:
                if response.status in _GONE:
                    raise NotFound(f"{url}: {response.status} {response.reason}")
                whole = response.status == 200 and first == 0 and response.content_length == chunk.length
                if response.status != 206 and not whole:
                    raise NetworkError(f"{url}: {response.status} {response.reason} where a range was asked for")
                async for piece in response.content.iter_any():
                    yield piece
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise Unreachable(f"{url}: {error or type(error).__name__}") from error


@dataclass(frozen=True, slots=True)
class StorageMirror:
    """A checkpoint's folder wherever `swarm.storage` reads; each piece is one question, in a thread of its own."""

    storage: Storage
    threads: ThreadPoolExecutor
    kind: str = MIRROR

    @property
    def name(self) -> str:
        return self.storage.url

    async def read(self, chunk: Chunk, start: int) -> AsyncIterator[bytes]:
        loop, end = asyncio.get_running_loop(), chunk.offset + chunk.length
        for first in range(chunk.offset + start, end, PIECE_BYTES):
            last = min(first + PIECE_BYTES, end)
            piece = await loop.run_in_executor(self.threads, self.storage.read, chunk.file, first, last)
            if len(piece) < last - first:
                raise NotFound(f"{self.name}/{chunk.file} is shorter than it should be")
            yield piece
