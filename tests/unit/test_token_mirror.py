"""A further seed peer fetches every token shard, goes on where it stopped, and asks again for what nobody brought."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from peer import token_mirror
from peer.p2p.chunk_store import token_shard_source
from peer.token_mirror import FOLDER, TokenMirror
from swarm.data_manifest import DataManifest, TokenShard
from swarm.digest import sha256
from swarm.errors import NotFound

TOKENS = {name: np.full(8, i, "<u2").tobytes() for i, name in enumerate(("train-00000", "train-00001"))}
TOKENS["validation-00000"] = np.full(4, 9, "<u2").tobytes()


def shards(split: str) -> list[TokenShard]:
    chosen = {name: data for name, data in TOKENS.items() if name.startswith(split)}
    return [
        TokenShard(file=f"{name}.bin", digest=sha256(data).hex(), num_tokens=len(data) // 2)
        for name, data in chosen.items()
    ]


MANIFEST = DataManifest.model_validate(
    {
        "tokenizer_digest": "00" * 32,
        "vocab_size": 300,
        "end_of_text_id": 0,
        "dtype": "uint16",
        "train": [shard.model_dump() for shard in shards("train")],
        "validation": [shard.model_dump() for shard in shards("validation")],
        "sources": [],
    }
)


def test_all_token_shards_come_at_last_and_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_mirror, "ASK_AGAIN_S", 0.01)
    asked: list[bytes] = []

    async def fetch(digest: bytes, size: int) -> bytes:
        asked.append(digest)
        if asked.count(digest) == 1 and digest == sha256(TOKENS["train-00001"]):
            raise NotFound("nobody has it now")
        data = next(data for data in TOKENS.values() if sha256(data) == digest)
        assert len(data) == size
        return data

    async def until_whole(mirror: TokenMirror) -> None:
        running = asyncio.create_task(mirror.run())
        while mirror.num_here < mirror.num_shards:
            await asyncio.wait({running}, timeout=0.01)
            assert not running.done()
        running.cancel()

    mirror = TokenMirror(tmp_path, MANIFEST, fetch)
    assert mirror.told == "0 of 3"
    asyncio.run(asyncio.wait_for(until_whole(mirror), 20))
    assert len(asked) == 4 and mirror.told == "3 of 3"
    source = token_shard_source(tmp_path / FOLDER, MANIFEST)
    assert [source(sha256(data)) for data in TOKENS.values()] == list(TOKENS.values())
    asyncio.run(asyncio.wait_for(until_whole(TokenMirror(tmp_path, MANIFEST, fetch)), 20))
    assert len(asked) == 4, "what is here is not asked for again"
