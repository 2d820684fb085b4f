"""A download from the coordinator alone: it takes few of the places there, and outlasts that others take them all."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from coordinator.checkpoint_files import MAX_READS_AT_ONCE, CheckpointFiles
from peer.checkpoints.download import Order, download
from peer.checkpoints.filling import Fetching
from peer.checkpoints.sources import BUSY_ANSWERS, LIMITS, CoordinatorSource
from peer.p2p.fetch import FetchLimits
from swarm.errors import Busy, NotFound
from tests.checkpoint_samples import SignedCheckpoint, make_parts, signed_checkpoint

ONCE = FetchLimits(per_holder=LIMITS.per_holder, total=LIMITS.total, attempts_per_holder=1, retry_pause_s=0)


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    """Weights of six chunks: as many as one source is asked for at once."""
    return signed_checkpoint(tmp_path / "home" / "checkpoint-10", make_parts(num_values=6_000_000))


@dataclass
class Client:
    """The coordinator's answers; ``others`` read there until that many questions were turned away."""

    files: CheckpointFiles
    others: float = 0
    asked: int = 0
    busy: int = 0

    async def chunk(self, digest: bytes, offset: int, length: int) -> bytes:
        self.asked += 1
        self.files._reading += MAX_READS_AT_ONCE if self.busy < self.others else 0
        try:
            return self.files.piece(digest, offset, length)
        except Busy:
            self.busy += 1
            raise
        finally:
            self.files._reading = 0


@dataclass
class SlowClient(Client):
    """Its disk is slow: every reader that comes meanwhile finds this one still reading."""

    most: int = 0

    async def chunk(self, digest: bytes, offset: int, length: int) -> bytes:
        data = self.files.piece(digest, offset, length)
        self.files._reading += 1
        self.most = max(self.most, self.files._reading)
        for _ in range(20):
            await asyncio.sleep(0)
        self.files._reading -= 1
        return data


def client_of(made: SignedCheckpoint, kind: type[Client] = Client, **more: Any) -> Any:
    return kind(files=CheckpointFiles(made.folder.parent, made.run_id, make_parts().spec), **more)


def get(made: SignedCheckpoint, out: Path, client: Client) -> bool:
    order = Order(run_id=made.run_id, signed_spec=made.signed_spec, publication=made.publication, target=out)
    source = CoordinatorSource(cast("Any", client), busy_pause_s=0)
    return asyncio.run(download(order, Fetching(sources=[source], limits=ONCE))).ok


def test_one_download_alone_leaves_a_place_to_others_however_slow_the_disk_is(
    made: SignedCheckpoint, tmp_path: Path
) -> None:
    client = client_of(made, SlowClient)
    assert get(made, tmp_path / "out", client)
    assert 1 < client.most < MAX_READS_AT_ONCE


def test_a_download_outlasts_that_others_take_every_place_for_a_while(made: SignedCheckpoint, tmp_path: Path) -> None:
    client = client_of(made, others=BUSY_ANSWERS - 1)
    assert get(made, tmp_path / "out", client) and client.busy == BUSY_ANSWERS - 1


def test_a_coordinator_that_stays_busy_ends_the_download(made: SignedCheckpoint, tmp_path: Path) -> None:
    client = client_of(made, others=float("inf"))
    with pytest.raises(NotFound, match="could not be reached in time"):
        get(made, tmp_path / "out", client)
    assert client.asked <= BUSY_ANSWERS * LIMITS.total
