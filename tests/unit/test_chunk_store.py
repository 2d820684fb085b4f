"""The chunk store: content-addressed, bounded, verified on every read."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peer.p2p import chunk_store
from peer.p2p.chunk_store import ChunkStore, token_shard_source
from swarm.checkpoint_chunks import FileChunks
from swarm.digest import sha256
from swarm.errors import DiskFull, NetworkError, ProtocolError
from swarm.file_ranges import FileRange, FileRanges, read_range
from swarm.proto.round_pb2 import ChunkReply, ChunkRequest
from tests.checkpoint_samples import data_manifest, small_checkpoint


def stored_file(folder: Path, digest: bytes) -> Path:
    return folder / digest.hex()[:2] / digest.hex()


def test_what_is_put_is_got_by_its_digest_also_after_a_restart(tmp_path: Path) -> None:
    digest = ChunkStore(tmp_path, 100).put(b"hello")
    assert digest == sha256(b"hello")
    again = ChunkStore(tmp_path, 100)
    assert again.has(digest)
    assert again.get(digest) == b"hello"
    assert again.used_bytes == 5


def test_what_nobody_put_is_absent(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 100)
    assert store.get(sha256(b"x")) is None
    assert not store.has(sha256(b"x"))


def test_the_same_bytes_count_once(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 100)
    assert store.put(b"hello") == store.put(b"hello")
    assert store.used_bytes == 5


@pytest.mark.parametrize("damage", [b"hellO", b"hell", b""], ids=["flipped", "truncated", "emptied"])
def test_a_damaged_file_is_removed_and_counts_as_absent(tmp_path: Path, damage: bytes) -> None:
    store = ChunkStore(tmp_path, 100)
    digest = store.put(b"hello")
    stored_file(tmp_path, digest).write_bytes(damage)
    assert store.get(digest) is None
    assert not store.has(digest)
    assert not stored_file(tmp_path, digest).exists()
    assert store.used_bytes == 0
    assert store.get(store.put(b"hello")) == b"hello"


def test_a_file_that_somebody_deleted_is_written_again(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 100)
    digest = store.put(b"hello")
    stored_file(tmp_path, digest).unlink()
    store.put(b"hello")
    assert store.get(digest) == b"hello"
    assert store.used_bytes == 5


def test_the_least_recently_used_blob_makes_room(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 10)
    first, second = store.put(b"1" * 5), store.put(b"2" * 5)
    assert store.get(first) is not None
    third = store.put(b"3" * 5)
    assert [store.has(digest) for digest in (first, second, third)] == [True, False, True]


def test_pinned_blobs_stay_until_their_last_group_is_unpinned(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 10)
    digest = sha256(b"1" * 6)
    store.pin("state:4", [digest])
    store.pin("state:4", [digest])
    store.pin("round:7", [digest])
    store.put(b"1" * 6)
    for group in ("state:4", "never pinned"):
        store.unpin(group)
        with pytest.raises(DiskFull, match="limit of 10 bytes"):
            store.put(b"2" * 6)
    store.unpin("round:7")
    store.put(b"2" * 6)
    assert not store.has(digest)


def test_there_is_room_for_all_that_pinned_blobs_leave(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 10)
    store.pin("group", [sha256(b"abcd"), sha256(b"not here yet")])
    for blob in (b"abcd", b"efgh"):
        store.put(blob)
    assert store.room_bytes() == 6
    store.unpin("group")
    assert store.room_bytes() == 10


def test_a_put_that_cannot_fit_evicts_nothing(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 10)
    digest = store.put(b"1" * 5)
    with pytest.raises(DiskFull):
        store.put(b"2" * 11)
    assert store.has(digest)


def test_a_full_disk_first_costs_old_blobs_and_then_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ChunkStore(tmp_path, 1000)
    old = store.put(b"1" * 50)
    real = os.fsync

    def full_while_old_exists(descriptor: int) -> None:
        if stored_file(tmp_path, old).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_while_old_exists)
    new = store.put(b"2" * 40)
    assert store.get(new) == b"2" * 40
    assert not store.has(old)

    def always_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", always_full)
    with pytest.raises(DiskFull, match="no space left"):
        store.put(b"3" * 60)
    assert store.get(new) == b"2" * 40
    assert store.used_bytes == 40
    assert not list(tmp_path.glob("*/.tmp-*"))


def test_half_written_files_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    digest = ChunkStore(tmp_path, 100).put(b"hello")
    half = stored_file(tmp_path, digest).parent / ".tmp-0123"
    half.write_bytes(b"hel")
    assert ChunkStore(tmp_path, 100).get(digest) == b"hello"
    assert not half.exists()


def test_files_with_foreign_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    for name in ("notes.txt", "abcd", sha256(b"x").hex()):
        (tmp_path / "ab" / name).write_bytes(b"mine")
    assert ChunkStore(tmp_path, 0).used_bytes == 0
    assert len(list((tmp_path / "ab").iterdir())) == 3


def test_sources_serve_what_the_store_lacks_and_a_lying_source_is_passed_over(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 100)

    def liar(digest: bytes) -> bytes | None:
        return b"wrong"

    def honest(digest: bytes) -> bytes | None:
        return b"right" if digest == sha256(b"right") else None

    store.add_source(liar)
    assert store.get(sha256(b"right")) is None
    store.add_source(honest)
    assert store.get(sha256(b"right")) == b"right"
    store.remove_source(honest)
    assert store.get(sha256(b"right")) is None


def test_checkpoint_files_are_served_in_place_and_not_after_they_changed(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    store = ChunkStore(tmp_path / "store", 0)
    store.add_source(FileChunks(made.folder, made.manifest))
    for file in made.manifest.files:
        assert store.get(bytes.fromhex(file.chunks[0])) == (made.folder / file.name).read_bytes()
    config = next(file for file in made.manifest.files if file.name == "config.json")
    (made.folder / "config.json").write_bytes(b"x" * config.size_bytes)
    assert store.get(bytes.fromhex(config.chunks[0])) is None


def test_token_shards_are_served_in_place(tmp_path: Path) -> None:
    manifest = data_manifest()
    shard = manifest.train[0]
    (tmp_path / shard.file).write_bytes(b"t" * manifest.size_bytes(shard))
    assert token_shard_source(tmp_path, manifest)(bytes.fromhex(shard.digest)) == b"t" * manifest.size_bytes(shard)


def test_a_range_of_a_short_file_a_link_or_a_pipe_is_absent(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    assert read_range(FileRange(tmp_path / "file", 2, 3)) == b"234"
    ranges = {
        b"short": FileRange(tmp_path / "file", 8, 3),
        b"link": FileRange(tmp_path / "link", 0, 3),
        b"pipe": FileRange(tmp_path / "pipe", 0, 0),
        b"gone": FileRange(tmp_path / "gone", 0, 3),
    }
    source = FileRanges(ranges)
    assert [source(name) for name in ranges] == [None] * 4


@pytest.mark.parametrize("read_in_thread", [True, False])
def test_the_handler_answers_with_the_bytes_or_says_that_it_lacks_them(tmp_path: Path, read_in_thread: bool) -> None:
    store = ChunkStore(tmp_path, 100, read_in_thread=read_in_thread)
    digest = store.put(b"hello")

    async def ask(wanted: bytes) -> ChunkReply:
        raw = await store.handle_chunk(b"caller", ChunkRequest(digest=wanted).SerializeToString())
        return ChunkReply.FromString(raw)

    assert asyncio.run(ask(digest)) == ChunkReply(found=True, data=b"hello")
    assert asyncio.run(ask(sha256(b"other"))) == ChunkReply(found=False)


def test_a_blob_that_is_asked_for_in_pieces_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ChunkStore(tmp_path, 100, read_in_thread=False)
    digest = store.put(b"hello world")
    reads: list[bytes] = []
    real = store.get
    monkeypatch.setattr(store, "get", lambda wanted: (reads.append(wanted), real(wanted))[1])

    def piece(offset: int, length: int) -> bytes:
        request = ChunkRequest(digest=digest, offset=offset, length=length).SerializeToString()
        return ChunkReply.FromString(asyncio.run(store.handle_chunk(b"c", request))).data

    assert [piece(0, 4), piece(4, 4), piece(8, 4), piece(6, 0), piece(50, 4)] == [
        *(b"hell", b"o wo", b"rld", b"world", b"")
    ]
    assert reads == [digest]


def test_large_blobs_are_not_held_in_memory_for_those_who_ask_for_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_store, "FILE_CHUNK_BYTES", 4)
    store = ChunkStore(tmp_path, 100, read_in_thread=False)
    request = ChunkRequest(digest=store.put(b"hello"), length=2).SerializeToString()
    asyncio.run(store.handle_chunk(b"c", request))
    assert not store._recent


MALFORMED = {
    "empty": b"",
    "short digest": ChunkRequest(digest=b"x" * 31).SerializeToString(),
    "long digest": ChunkRequest(digest=b"x" * 33).SerializeToString(),
    "huge": ChunkRequest(digest=b"x" * 1000).SerializeToString(),
    "no message": b"\xff\xff\xff",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_a_protocol_error(tmp_path: Path, request_bytes: bytes) -> None:
    with pytest.raises(ProtocolError):
        asyncio.run(ChunkStore(tmp_path, 100).handle_chunk(b"caller", request_bytes))


def test_too_many_waiting_requests_are_told_that_it_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_store, "MAX_READS_WAITING", 3)
    store = ChunkStore(tmp_path, 100)
    request = ChunkRequest(digest=store.put(b"hello")).SerializeToString()

    async def ask_five() -> list[bytes | BaseException]:
        return await asyncio.gather(*(store.handle_chunk(b"c", request) for _ in range(5)), return_exceptions=True)

    results = asyncio.run(ask_five())
    assert [isinstance(result, NetworkError) for result in results] == [False, False, False, True, True]
    assert asyncio.run(store.handle_chunk(b"c", request))


def test_a_blob_larger_than_a_call_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_store, "MAX_BLOB_BYTES", 4)
    with pytest.raises(ProtocolError, match="larger than one call"):
        ChunkStore(tmp_path, 100).put(b"hello")


def test_blobs_that_were_acknowledged_survive_sigkill(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib\n"
        "from peer.p2p.chunk_store import ChunkStore\n"
        "store = ChunkStore(pathlib.Path(sys.argv[1]), 1 << 20)\n"
        "digests = [store.put(bytes([n]) * 1000) for n in range(20)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60)
    assert killed.returncode == -9
    store = ChunkStore(tmp_path, 1 << 20)
    assert all(store.get(sha256(bytes([n]) * 1000)) for n in range(20))
