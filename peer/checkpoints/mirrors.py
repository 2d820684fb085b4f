"""Mirrors: published checkpoints as plain files at some URL, read by ranges. The door to aiohttp.

Decides which URLs are mirrors (`https:`, `http:`, and any that `swarm.storage` opens; of those that the coordinator
tells, none that reads this machine), and where a checkpoint lies there (``URL/checkpoint-ROUND/FILE``). A mirror is
trusted with nothing: every chunk and file is checked by whoever asked, and no password of this machine (netrc) is sent
to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from peer.checkpoints.sources import LIMITS, MIRROR, PIECE_BYTES, Chunk
from swarm.errors import ConfigError, NetworkError, NotFound, Unreachable, VerificationError
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
async def open_mirrors(
    named: Sequence[str], told: Sequence[str], round_number: int | None
) -> AsyncIterator[list[HttpMirror | StorageMirror]]:
    """Mirrors as sources of this round's chunks: those that the person ``named``, and what the coordinator ``told``.

    ``round_number`` None: their roots, where everything that is published lies.

    Raises `ConfigError` where the person named what is no mirror; what the coordinator told is then passed over.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S)
    threads = ThreadPoolExecutor(LIMITS.total, thread_name_prefix="mirror")
    try:
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:

            def opened(url: str, is_told: bool) -> HttpMirror | StorageMirror:
                base = url.rstrip("/") + (f"/{mirror_folder(round_number)}" if round_number is not None else "")
                if _is_http(url):
                    # A redirect would take the question to a place that `_usable` has not seen.
                    redirects = 0 if is_told else MAX_REDIRECTS
                    return HttpMirror(session=session, name=base, max_redirects=redirects, proxy=_proxy(url))
                return StorageMirror(Storage(base, anonymous=is_told), threads)

            sources: list[HttpMirror | StorageMirror] = [opened(url, False) for url in dict.fromkeys(named)]
            for url in _usable(told):
                with suppress(ConfigError):
                    if url not in named:
                        sources.append(opened(url, True))
            yield sources[:MAX_MIRRORS]
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _usable(urls: Iterable[str]) -> Iterator[str]:
    """Of the URLs that a coordinator tells, those that may be asked."""
    for url in urls:
        if len(url) <= MAX_URL_CHARACTERS and url.isprintable() and "::" not in url and _is_plain(url):
            with suppress(ValueError):
                if urlsplit(url).scheme in _TOLD and urlsplit(url).netloc:
                    yield url


def _is_http(url: str) -> bool:
    """Whether this is a web server's URL. Raises `ConfigError` for one that no file's name can follow."""
    try:
        is_http = urlsplit(url).scheme in _HTTP
    except ValueError as error:
        raise ConfigError(f"{url[:100]!r} is no URL: {error}", "name a mirror as URL/PATH") from error
    if is_http and not _is_plain(url):
        raise ConfigError("a mirror's URL holds no password, no ? and no #", "name the folder: https://HOST/PATH")
    return is_http


def _is_plain(url: str) -> bool:
    """Neither user info nor query nor fragment: these would make a question about a file any question at all."""
    authority = url.partition("://")[2].partition("/")[0]
    return not {"?", "#", "\\"} & set(url) and "@" not in authority


def _proxy(url: str) -> str | None:
    """The proxy that the environment names. Asked here, since aiohttp takes it only together with netrc's passwords."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpMirror:
    """A checkpoint's folder on a web server that answers ranges. ``name``: its URL."""

    session: aiohttp.ClientSession
    name: str
    max_redirects: int = MAX_REDIRECTS
    proxy: str | None = None
    kind: str = MIRROR

    async def read(self, chunk: Chunk, start: int) -> AsyncIterator[bytes]:
        first, last = chunk.offset + start, chunk.offset + chunk.length - 1
        async with self._answer(chunk.file, {"Range": f"bytes={first}-{last}"}) as response:
            whole = response.status == 200 and first == 0 and response.content_length == chunk.length
            if response.status != 206 and not whole:
                raise NetworkError(f"{response.url}: {response.status} {response.reason} where a range was asked for")
            async for piece in response.content.iter_any():
                yield piece

    async def file(self, name: str, max_bytes: int) -> bytes:
        """A whole file. Raises `VerificationError` for one that is larger."""
        raw = bytearray()
        async with self._answer(name, {}) as response:
            if response.status != 200:
                raise NetworkError(f"{response.url}: {response.status} {response.reason}")
            async for piece in response.content.iter_any():
                raw += piece
                _check_size(name, len(raw), max_bytes)
        return bytes(raw)

    @asynccontextmanager
    async def _answer(self, name: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """What the server says about a file that it has."""
        url = f"{self.name}/{name}"
        asking = self.session.get(
            url,
            headers={**headers, "Accept-Encoding": "identity"},
            allow_redirects=self.max_redirects > 0,
            max_redirects=self.max_redirects,
            proxy=self.proxy,
        )
        try:
            async with asking as response:
                if response.status in _GONE:
                    raise NotFound(f"{url}: {response.status} {response.reason}")
                yield response
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

    async def file(self, name: str, max_bytes: int) -> bytes:
        """A whole file. Raises `VerificationError` for one that is larger."""
        loop = asyncio.get_running_loop()
        raw = await loop.run_in_executor(self.threads, self.storage.read, name, 0, max_bytes + 1)
        _check_size(name, len(raw), max_bytes)
        return raw


def _check_size(name: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise VerificationError(f"{name} of a mirror is larger than {max_bytes} bytes")
