"""Checkpoints are made, served and published as rounds come, and found again after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from peer.checkpoints import publishing
from peer.checkpoints.facts import read_facts
from peer.checkpoints.publishing import CheckpointMaker, StateCopy, Template
from peer.checkpoints.verify import verify_folder
from peer.p2p.chunk_store import ChunkStore
from peer.training.layout import Layout
from swarm import manifest as manifests
from swarm import run_spec
from swarm.energy import estimate
from swarm.errors import NotFound, Unreachable
from swarm.proto.checkpoint_pb2 import Attestation
from swarm.publication import Publication
from swarm.run_record import Contributor, RunRecord
from tests.checkpoint_samples import (
    ORGANIZER,
    make_parts,
    publication_of,
    shard_parts_of,
)

PARTS = make_parts(num_values=1000)
LAYOUT = Layout.of((name, tensor.shape) for name, tensor in sorted(PARTS.tensors.items()))


class FakeCoordinator:
    def __init__(self) -> None:
        self.failures = 0
        self.published: list[int] = []
        self.attested: list[Attestation] = []
        self.lacks_witnesses: set[int] = set()

    async def attest(self, attestation: Attestation) -> None:
        if self.failures:
            self.failures -= 1
            raise Unreachable("away")
        self.attested.append(attestation)

    async def run_record(self, round_number: int) -> bytes:
        return RunRecord(
            round=round_number,
            num_peers=2,
            contributors=(Contributor(name="Ada", tokens=7),),
            energy=estimate(()),
        ).canonical_bytes()

    async def publish(self, manifest_bytes: bytes) -> Publication:
        number = manifests.parse(manifest_bytes).round
        if number in self.lacks_witnesses:
            raise NotFound("too few witnesses")
        self.published.append(number)
        return publication_of(manifest_bytes, PARTS.run_id)


def make(
    folder: Path, coordinator: FakeCoordinator, ready: list[int], kept: int = 2, publishes: bool = True
) -> CheckpointMaker:
    template = Template(
        folder=folder,
        parts=PARTS,
        layout=LAYOUT,
        signed_spec=ORGANIZER.sign(run_spec.CONTEXT, PARTS.run_id, PARTS.spec.canonical_bytes()),
        coordinator=coordinator,
        publishes=publishes,
        kept=kept,
    )
    return CheckpointMaker(template, ChunkStore(folder / "chunks", 1 << 26), ready.append)


def state(round_number: int) -> StateCopy:
    anchor = np.full(LAYOUT.num_values, round_number, np.float32)
    return StateCopy(round=round_number, total_tokens=9, states=(shard_parts_of(LAYOUT.views(anchor)),), anchor=anchor)


async def until(maker: CheckpointMaker, done: Callable[[], bool]) -> None:
    task = asyncio.ensure_future(maker.run())
    for _ in range(500):
        if done():
            break
        await asyncio.sleep(0.02)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert done()


def chunk_of(folder: Path, round_number: int) -> bytes:
    manifest = manifests.parse((folder / f"checkpoint-{round_number}" / manifests.MANIFEST_FILE).read_bytes())
    return bytes.fromhex(manifest.files[-1].chunks[0])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "RETRY_S", 0.01)


def test_a_seed_peer_publishes_every_checkpoint_and_it_verifies(tmp_path: Path) -> None:
    coordinator, ready = FakeCoordinator(), list[int]()

    async def main() -> None:
        maker = make(tmp_path, coordinator, ready)
        maker.offer(state(10))
        maker.offer(state(20))
        await until(maker, lambda: ready == [10, 20])

    asyncio.run(main())
    assert coordinator.published == [10, 20]
    assert verify_folder(tmp_path / "checkpoint-20", PARTS.run_id).ok


def test_a_published_card_tells_what_the_coordinator_knows_and_its_chunks_are_served(tmp_path: Path) -> None:
    ready = list[int]()

    async def main() -> bytes:
        maker = make(tmp_path, FakeCoordinator(), ready)
        maker.offer(state(10))
        await until(maker, lambda: ready == [10])
        facts = read_facts(tmp_path / "checkpoint-10", PARTS.run_id)
        assert facts.card.record is not None
        assert [item.name for item in facts.card.record.contributors] == ["Ada"]
        listed = next(file for file in facts.provenance.manifest.files if file.name == "README.md")
        served = maker._chunks.get(bytes.fromhex(listed.chunks[0]))
        assert served is not None
        return bytes(served)

    card = asyncio.run(main())
    assert card == (tmp_path / "checkpoint-10" / "README.md").read_bytes()
    assert "| Ada | 7 |" in card.decode() and "round 10" in card.decode()


def test_a_volunteer_leaves_the_card_as_every_replica_assembles_it(tmp_path: Path) -> None:
    ready = list[int]()

    async def main() -> None:
        maker = make(tmp_path, FakeCoordinator(), ready, publishes=False)
        maker.offer(state(10))
        await until(maker, lambda: ready == [10])

    asyncio.run(main())
    assert not (tmp_path / "checkpoint-10" / "run-record.json").exists()


def test_a_coordinator_that_is_away_is_asked_again(tmp_path: Path) -> None:
    coordinator, ready = FakeCoordinator(), list[int]()
    coordinator.failures = 5

    async def main() -> None:
        maker = make(tmp_path, coordinator, ready)
        maker.offer(state(10))
        await until(maker, lambda: ready == [10])

    asyncio.run(main())
    assert coordinator.published == [10] and coordinator.failures == 0


def test_a_checkpoint_that_lacks_witnesses_does_not_hold_up_the_next(tmp_path: Path) -> None:
    coordinator, ready = FakeCoordinator(), list[int]()
    coordinator.lacks_witnesses = {10}

    async def main() -> None:
        maker = make(tmp_path, coordinator, ready)
        maker.offer(state(10))
        maker.offer(state(20))
        task = asyncio.ensure_future(until(maker, lambda: ready == [20, 10]))
        for _ in range(500):
            await asyncio.sleep(0.01)
            if ready == [20]:
                coordinator.lacks_witnesses = set()
        await task

    asyncio.run(main())


def test_a_checkpoint_that_newer_ones_replaced_on_disk_before_it_was_told_is_attested_only(tmp_path: Path) -> None:
    coordinator, ready = FakeCoordinator(), list[int]()
    coordinator.failures = 10**6

    async def main() -> None:
        maker = make(tmp_path, coordinator, ready)
        for number in (10, 20, 30):
            maker.offer(state(number))
        await until(maker, lambda: len(maker._untold) == 3)
        coordinator.failures = 0
        await until(maker, lambda: ready == [20, 30])

    asyncio.run(main())
    assert coordinator.published == [20, 30]
    assert [attestation.round for attestation in coordinator.attested] == [10, 20, 30]


def test_files_that_go_while_the_coordinator_is_asked_do_not_hold_up_the_next(tmp_path: Path) -> None:
    coordinator, ready = FakeCoordinator(), list[int]()
    publish = coordinator.publish

    async def publish_slowly(manifest_bytes: bytes) -> Publication:
        publication = await publish(manifest_bytes)
        shutil.rmtree(tmp_path / "checkpoint-10", ignore_errors=True)
        return publication

    coordinator.publish = publish_slowly  # type: ignore[method-assign]

    async def main() -> None:
        maker = make(tmp_path, coordinator, ready)
        maker.offer(state(10))
        maker.offer(state(20))
        await until(maker, lambda: ready == [20] and not maker._untold)

    asyncio.run(main())
    assert coordinator.published == [10, 20]


@pytest.mark.parametrize("publishes", [True, False], ids=["seed peer", "volunteer"])
def test_every_replica_attests_the_state_of_its_checkpoint_once(tmp_path: Path, publishes: bool) -> None:
    coordinator, ready, copy = FakeCoordinator(), list[int](), state(10)
    coordinator.failures = 2

    async def main() -> None:
        maker = make(tmp_path, coordinator, ready, publishes=publishes)
        maker.offer(copy)
        await until(maker, lambda: ready == [10] and len(coordinator.attested) == 1)

    asyncio.run(main())
    attestation = coordinator.attested[0]
    assert (attestation.round, attestation.state_digest) == (10, copy.states[0].state_digest)
    assert attestation.log_digest == copy.states[0].log_digest


def test_a_state_that_is_not_the_one_of_its_digest_is_not_told(tmp_path: Path) -> None:
    coordinator, ready, damaged = FakeCoordinator(), list[int](), state(10)
    damaged.anchor[5] += 1

    async def main() -> None:
        maker = make(tmp_path, coordinator, ready)
        maker.offer(damaged)
        maker.offer(state(20))
        await until(maker, lambda: ready == [20])

    asyncio.run(main())
    assert [attestation.round for attestation in coordinator.attested] == [20]


def test_a_volunteer_serves_its_newest_checkpoint_only(tmp_path: Path) -> None:
    ready = list[int]()

    async def main() -> None:
        maker = make(tmp_path, FakeCoordinator(), ready, kept=1, publishes=False)
        maker.offer(state(10))
        maker.offer(state(20))
        await until(maker, lambda: ready == [10, 20])

    asyncio.run(main())
    assert not (tmp_path / "checkpoint-10").exists() and (tmp_path / "checkpoint-20").is_dir()


def test_after_a_restart_published_checkpoints_are_served_and_others_are_gone(tmp_path: Path) -> None:
    ready = list[int]()

    async def main() -> None:
        maker = make(tmp_path, FakeCoordinator(), ready)
        maker.offer(state(10))
        await until(maker, lambda: ready == [10])
        unsigned = tmp_path / "checkpoint-30"
        unsigned.mkdir()
        (unsigned / "config.json").write_text("{}")
        chunks = ChunkStore(tmp_path / "chunks", 1 << 26)
        again = CheckpointMaker(maker._template, chunks, ready.append)
        assert again.resume(PARTS.run_id) == 10
        assert chunks.get(chunk_of(tmp_path, 10)) is not None
        assert not unsigned.exists()

    asyncio.run(main())


def test_a_checkpoint_that_was_made_but_not_published_is_published_after_a_restart(tmp_path: Path) -> None:
    away, back, ready = FakeCoordinator(), FakeCoordinator(), list[int]()
    away.failures = 10**6

    async def main() -> None:
        first = make(tmp_path, away, ready)
        first.offer(state(10))
        await until(first, lambda: (tmp_path / "checkpoint-10" / manifests.MANIFEST_FILE).exists())
        second = make(tmp_path, back, ready)
        second.resume(PARTS.run_id)
        await until(second, lambda: ready == [10])

    asyncio.run(main())
    assert verify_folder(tmp_path / "checkpoint-10", PARTS.run_id).ok
