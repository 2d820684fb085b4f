"""What is published reaches the organizer's targets, whatever fails on the way; the coordinator serves it too."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator import mirroring
from coordinator.checkpoint_files import MAX_PIECE_BYTES, MAX_READS_AT_ONCE, CheckpointFiles, published_folders
from coordinator.mirroring import Mirrored, PublishedRun, _catch_up, _Target, _write_metadata, keep_mirrors
from peer.checkpoints.checkpoint import write_signed
from swarm.digest import sha256
from swarm.errors import Busy, ConfigError, NetworkError, NotFound, ProtocolError
from swarm.manifest import ROOTS_FILE, SIGNATURE_FILE
from swarm.proto.checkpoint_pb2 import Roots
from swarm.publication import ROOTS_CONTEXT
from swarm.storage import Storage
from tests.checkpoint_samples import (
    ORGANIZER,
    PUBLISHER,
    WITNESSES,
    SignedCheckpoint,
    make_parts,
    publication_of,
    signed_checkpoint,
    small_checkpoint,
)
from tests.metadata_samples import Repository

SPEC = make_parts().spec


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The seed peer's folder of the run."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def checkpoint(home: Path, number: int) -> SignedCheckpoint:
    return small_checkpoint(home / f"checkpoint-{number}", round_number=number)


def mirror_until(
    home: Path, run_id: bytes, urls: list[str], count: int, repository: Repository | None = None
) -> list[Mirrored]:
    """What is told while `keep_mirrors` runs, until ``count`` things were; then until the metadata is there, too."""
    heard: list[Mirrored] = []

    async def body() -> None:
        enough = asyncio.Event()

        def tell(what: Mirrored) -> None:
            heard.append(what)
            if len(heard) >= count:
                enough.set()

        async def metadata() -> dict[str, bytes]:
            return repository.files if repository is not None else {}

        async def wait() -> None:
            await enough.wait()
            timestamp = Path(urls[0].removeprefix("file://")) / "metadata" / "timestamp.json"
            while repository is not None and not timestamp.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)

        published = PublishedRun(folder=home, run_id=run_id, spec=SPEC)
        keeping = asyncio.create_task(keep_mirrors(published, urls, tell, metadata))
        waiting = asyncio.create_task(wait())
        await asyncio.wait((keeping, waiting), timeout=30, return_when=asyncio.FIRST_COMPLETED)
        keeping.cancel()
        waiting.cancel()
        results = await asyncio.gather(keeping, waiting, return_exceptions=True)
        for error in results:
            if isinstance(error, Exception):
                raise error

    asyncio.run(body())
    return heard


def test_every_signed_checkpoint_reaches_every_target(home: Path, tmp_path: Path) -> None:
    first, _ = checkpoint(home, 9), checkpoint(home, 10)
    (home / "checkpoint-11").mkdir()
    unsigned = checkpoint(home, 12)
    (unsigned.folder / SIGNATURE_FILE).unlink()
    urls = [f"file://{tmp_path}/one", f"file://{tmp_path}/two"]
    heard = mirror_until(home, first.run_id, urls, 4)
    assert {(one.round, one.url, one.error) for one in heard} == {(n, url, "") for n in (9, 10) for url in urls}
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_what_another_key_signed_or_another_run_made_is_not_mirrored(home: Path) -> None:
    made = checkpoint(home, 10)
    small_checkpoint(home / "checkpoint-11", round_number=11, name="other")
    assert [one.manifest.round for one in published_folders(home, made.run_id, SPEC)] == [10]
    other = SPEC.model_copy(update={"publication_key": ORGANIZER.public_key.hex()})
    assert list(published_folders(home, made.run_id, other)) == []


def test_what_a_new_publication_key_signed_is_served_and_mirrored_beside_what_the_old_one_did(home: Path) -> None:
    checkpoint(home, 10)
    made = checkpoint(home, 20)
    repository = Repository(SPEC, (ORGANIZER,), PUBLISHER)
    repository.change([ORGANIZER], publisher=WITNESSES[0])
    payload, roots = made.signed_manifest.payload, Roots(roots=repository.offline.roots).SerializeToString()
    signed_roots = WITNESSES[0].sign(ROOTS_CONTEXT, made.run_id, roots)
    renewed = replace(publication_of(payload, made.run_id, publisher=WITNESSES[0]), roots=signed_roots)
    write_signed(made.folder, renewed, made.signed_spec)
    assert [one.manifest.round for one in published_folders(home, made.run_id, SPEC)] == [10, 20]
    (made.folder / ROOTS_FILE).unlink()
    assert [one.manifest.round for one in published_folders(home, made.run_id, SPEC)] == [10]


def test_a_target_that_fails_is_tried_again_and_then_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint(home, 10)
    tries: list[str] = []
    real = mirroring.write_mirror

    def fails(storage: Storage, one: object) -> None:
        tries.append(storage.url)
        if "bad" in storage.url or tries.count(storage.url) < 3:
            raise NetworkError("no space there")
        real(storage, one)  # type: ignore[arg-type]

    monkeypatch.setattr(mirroring, "write_mirror", fails)
    for name, value in {"FIRST_PAUSE_S": 0.001, "LAST_PAUSE_S": 0.01, "LOOK_INTERVAL_S": 0.02, "MAX_TRIES": 5}.items():
        monkeypatch.setattr(mirroring, name, value)
    good, bad = f"file://{tmp_path}/good", f"file://{tmp_path}/bad"
    heard = mirror_until(home, made.run_id, [good, bad], 2)
    assert {one.url: one.error for one in heard} == {good: "", bad: "no space there"}
    assert (tries.count(good), tries.count(bad)) == (3, 5)


def test_a_target_that_is_none_is_a_config_error_at_once(home: Path) -> None:
    with pytest.raises(ConfigError):
        mirror_until(home, b"r" * 20, ["gopher://host/x"], 1)


# ---- served by the coordinator --------------------------------------------------------------------------------------


def test_chunks_of_signed_checkpoints_are_served_in_pieces_as_they_come_and_go(home: Path) -> None:
    made = signed_checkpoint(home / "checkpoint-10", make_parts())
    files = CheckpointFiles(home, made.run_id, SPEC)
    weights = next(file for file in made.manifest.files if file.name == "model.safetensors")
    digest = bytes.fromhex(weights.chunks[1])
    pieces = [files.piece(digest, offset, MAX_PIECE_BYTES) for offset in range(0, 4 << 20, MAX_PIECE_BYTES)]
    assert sha256(b"".join(pieces)) == digest
    later = checkpoint(home, 20)
    other = bytes.fromhex(next(file for file in later.manifest.files if file.name == "model.safetensors").chunks[0])
    assert files.piece(other, 0, 100)
    shutil.rmtree(made.folder)
    with pytest.raises(NotFound):
        files.piece(digest, 0, 100)


def test_a_request_for_more_than_a_piece_is_refused(home: Path) -> None:
    made = checkpoint(home, 10)
    files = CheckpointFiles(home, made.run_id, SPEC)
    digest = bytes.fromhex(made.manifest.files[0].chunks[0])
    for bad in ((digest, 0, MAX_PIECE_BYTES + 1), (digest, 0, 0), (b"short", 0, 1), (digest, 5 << 20, 1)):
        with pytest.raises(ProtocolError):
            files.piece(*bad)
    with pytest.raises(NotFound):
        files.piece(b"u" * 32, 0, 1)
    with pytest.raises(NotFound):
        CheckpointFiles(None, made.run_id, SPEC).piece(digest, 0, 1)


def test_too_many_readers_at_once_are_sent_elsewhere(home: Path) -> None:
    made = checkpoint(home, 10)
    files = CheckpointFiles(home, made.run_id, SPEC)
    files._reading = MAX_READS_AT_ONCE
    with pytest.raises(Busy, match="busy"):
        files.piece(bytes.fromhex(made.manifest.files[0].chunks[0]), 0, 1)


def test_metadata_lies_beside_the_checkpoints_that_it_names_and_is_written_last(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that lacks the newest checkpoint is told nothing of it."""
    made = checkpoint(home, 10)
    repository = Repository(SPEC, (ORGANIZER,), PUBLISHER)
    repository.publish(made.publication, 10)
    written: list[str] = []
    write = Storage.write

    def noted(self: Storage, name: str, source: Path) -> None:
        if "late" in self.url and name == "checkpoint-10/swarm-manifest.sig":
            raise NetworkError("not now")
        written.append(name)
        write(self, name, source)

    monkeypatch.setattr(Storage, "write", noted)
    monkeypatch.setattr(mirroring, "LOOK_INTERVAL_S", 0.05)
    mirror_until(home, made.run_id, [f"file://{tmp_path}/www", f"file://{tmp_path}/late"], 1, repository)
    assert written[-1] == "metadata/timestamp.json"
    assert {name: (tmp_path / "www" / "metadata" / name).read_bytes() for name in repository.files} == repository.files
    assert not (tmp_path / "late" / "metadata").exists()


def test_a_target_that_failed_for_good_is_told_of_no_checkpoint_that_it_lacks_until_its_metadata_is_old(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint(home, 10)
    repository = Repository(SPEC, (ORGANIZER,), PUBLISHER)
    repository.publish(made.publication, 10)

    def fails(storage: Storage, one: object) -> None:
        raise NetworkError("no space there")

    monkeypatch.setattr(mirroring, "write_mirror", fails)
    monkeypatch.setattr(mirroring, "MAX_TRIES", 1)
    monkeypatch.setattr(mirroring, "FIRST_PAUSE_S", 0.0)
    written, heard = tmp_path / "www" / "metadata" / "timestamp.json", list[Mirrored]()

    async def body() -> None:
        found = list(published_folders(home, made.run_id, SPEC))
        target = _Target(Storage(f"file://{tmp_path}/www"), asyncio.get_running_loop().time())
        for _ in range(2):
            await _catch_up(target, found, heard.append)
        await _write_metadata(target, repository.files)
        assert [one.error for one in heard] == ["no space there"] and not written.exists()
        target.renewed_s -= mirroring.OLDEST_METADATA_S
        await _write_metadata(target, repository.files)

    asyncio.run(body())
    assert written.exists()
