"""What a further seed peer fetches to serve it: every token shard of the run, verified, in its own folder.

Decides in which order and how often it is asked for; leaves the asking to `peer.p2p.fetch`, and serving what lies there
to `peer.p2p.chunk_store`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from swarm.data_manifest import DataManifest, TokenShard
from swarm.errors import NetworkError
from swarm.files import write_durably

ASK_AGAIN_S = 30.0
FOLDER = "token-shards"

logger = logging.getLogger(__name__)


class TokenMirror:
    def __init__(self, folder: Path, manifest: DataManifest, fetch: Callable[[bytes, int], Awaitable[bytes]]) -> None:
        """``folder``: of this run; ``fetch`` brings verified bytes by digest and size, or raises `NetworkError`."""
        self._folder, self._manifest, self._fetch = folder / FOLDER, manifest, fetch
        self._shards = (*manifest.validation, *manifest.train)
        self.num_here = 0

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    @property
    def told(self) -> str:
        return f"{self.num_here} of {self.num_shards}"

    async def run(self) -> None:
        """Fetch what is not here yet, until cancelled. Raises `DiskFull`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        missing = [shard for shard in self._shards if not self._is_here(shard)]
        while missing:
            self.num_here = self.num_shards - len(missing)
            missing = [shard for shard in missing if not await self._obtain(shard)]
            if missing:
                logger.info("%d token shards were brought by nobody", len(missing))
                await asyncio.sleep(ASK_AGAIN_S)
        self.num_here = self.num_shards
        await asyncio.Event().wait()

    def _is_here(self, shard: TokenShard) -> bool:
        """Whole, as files are written at once; what went bad since is found by whoever reads it."""
        try:
            return (self._folder / shard.file).stat().st_size == self._manifest.size_bytes(shard)
        except FileNotFoundError:
            return False

    async def _obtain(self, shard: TokenShard) -> bool:
        try:
            data = await self._fetch(bytes.fromhex(shard.digest), self._manifest.size_bytes(shard))
        except NetworkError as error:
            logger.info("%s: %s", shard.file, error)
            return False
        await asyncio.to_thread(write_durably, self._folder / shard.file, data)
        self.num_here += 1
        return True
