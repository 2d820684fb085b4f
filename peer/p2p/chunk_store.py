"""Blobs by digest: the disk store behind every large thing that a peer keeps, and the handler that serves it.

Decides where a blob lies (``FOLDER/ab/abcd...``), what is evicted (the least recently used blob that no group pins),
and that nothing damaged is ever handed out: every read is checked against its SHA-256. Leaves to the owners which
blobs must stay: they pin groups such as ``checkpoint:10`` *before* they put, and unpin whole groups; pins live in
memory and are made again after a restart. Files that exist anyway (token shards, checkpoint files) are served in
place by sources, without a copy.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from google.protobuf.message import DecodeError

from peer.p2p.transport import MAX_CALL_BYTES
from swarm.data_manifest import DataManifest
from swarm.digest import DIGEST_BYTES, sha256
from swarm.errors import DiskFull, NetworkError, ProtocolError
from swarm.file_ranges import FileRange, FileRanges
from swarm.files import TEMPORARY_PREFIX, Kept, disk_errors, fsync_folder, write_durably
from swarm.manifest import FILE_CHUNK_BYTES
from swarm.proto.round_pb2 import ChunkReply, ChunkRequest

CHUNK_METHOD = "chunk"
REPLY_OVERHEAD_BYTES = 64
MAX_BLOB_BYTES = MAX_CALL_BYTES - REPLY_OVERHEAD_BYTES
MAX_REQUEST_BYTES = 64
MAX_READS_AT_ONCE = 4
MAX_READS_WAITING = 256
SYNCS_AT_ONCE = 4
MAX_RECENT = 4  # blobs, of 4 MiB at most, held in memory while they are asked for piece by piece

Source = Callable[[bytes], bytes | None]
"""digest -> the bytes, or None; what it returns is verified before it is used."""


def token_shard_source(folder: Path, manifest: DataManifest) -> FileRanges:
    """The token shards of ``manifest`` that lie in ``folder``, each as one blob."""
    return FileRanges(
        {
            bytes.fromhex(shard.digest): FileRange(folder / shard.file, 0, manifest.size_bytes(shard))
            for shard in (*manifest.train, *manifest.validation)
        }
    )


class ChunkStore:
    """Blobs named by their SHA-256 in ``folder``, at most ``max_bytes`` of them. Safe to use from several threads.

    ``read_in_thread=False`` makes `handle_chunk` and `keep` work on the event loop, for simulations whose clock is not
    real.
    """

    def __init__(self, folder: Path, max_bytes: int, *, read_in_thread: bool = True) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._read_in_thread = read_in_thread
        self._lock = threading.Lock()
        self._sizes: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._used_bytes = 0
        self._groups: dict[str, set[bytes]] = {}
        self._pins: Counter[bytes] = Counter()
        self._sources: list[Source] = []
        self._recent: OrderedDict[bytes, bytes] = OrderedDict()
        self._reads = asyncio.Semaphore(MAX_READS_AT_ONCE)
        self._waiting = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._scan()

    @property
    def used_bytes(self) -> int:
        """Bytes of the blobs on disk, file system overhead not counted."""
        return self._used_bytes

    def room_bytes(self) -> int:
        """What the disk limit leaves beside the pinned blobs: others are evicted where room is needed."""
        with self._lock:
            return self._max_bytes - sum(size for digest, size in self._sizes.items() if digest in self._pins)

    def put(self, data: bytes) -> bytes:
        """Store ``data`` durably; its digest. Raises `DiskFull` where eviction of unpinned blobs is not enough."""
        if len(data) > MAX_BLOB_BYTES:
            raise ProtocolError(f"a blob of {len(data)} bytes is larger than one call carries")
        digest = sha256(data)
        with self._lock:
            if digest in self._sizes and self._path(digest).is_file():
                self._sizes.move_to_end(digest)
                return digest
            self._forget(digest)
            self._make_room(len(data))
            self._used_bytes += len(data)  # reserved while the lock is open
        try:
            self._write(digest, data)
        except BaseException:
            with self._lock:
                self._used_bytes -= len(data)
            raise
        with self._lock:
            if digest in self._sizes:  # another thread stored the same bytes meanwhile
                self._used_bytes -= len(data)
            self._sizes[digest] = len(data)
            self._sizes.move_to_end(digest)
        return digest

    def put_all(self, blobs: Mapping[bytes, Kept]) -> None:
        """`put` of what is not here yet, side by side: a disk syncs several files about as fast as one."""
        with self._lock:
            missing = [digest for digest in blobs if digest not in self._sizes or not self._path(digest).is_file()]
        with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
            for _ in pool.map(lambda digest: self.put(blobs[digest][:]), missing):
                pass

    async def keep(self, data: bytes) -> None:
        """`put` beside the event loop: a disk's sync takes as long as a chunk's way over a fast link."""
        if self._read_in_thread:
            await asyncio.to_thread(self.put, data)
        else:
            self.put(data)

    def get(self, digest: bytes) -> bytes | None:
        """The bytes with this digest, verified, from the store or a source. A damaged file is removed."""
        with self._lock:
            stored = digest in self._sizes
            sources = tuple(self._sources)
        data = self._read_stored(digest) if stored else None
        if data is not None:
            return data
        for source in sources:
            data = source(digest)
            if data is not None and sha256(data) == digest:
                return data
        return None

    def has(self, digest: bytes) -> bool:
        """Whether the store itself (not a source) holds this digest; reads nothing."""
        with self._lock:
            return digest in self._sizes

    def pin(self, group: str, digests: Iterable[bytes]) -> None:
        """Add ``digests`` to ``group``: they are not evicted until `unpin`. They may be put later."""
        with self._lock:
            members = self._groups.setdefault(group, set())
            for digest in set(digests) - members:
                members.add(digest)
                self._pins[digest] += 1

    def unpin(self, group: str) -> None:
        """Release a whole group; blobs that no other group pins may be evicted from now on."""
        with self._lock:
            for digest in self._groups.pop(group, set()):
                self._pins[digest] -= 1
                if not self._pins[digest]:
                    del self._pins[digest]

    def add_source(self, source: Source) -> None:
        """Ask ``source`` for digests that the store lacks."""
        with self._lock:
            self._sources.append(source)

    def remove_source(self, source: Source) -> None:
        """Stop asking ``source``."""
        with self._lock:
            if source in self._sources:
                self._sources.remove(source)

    async def handle_chunk(self, caller: bytes, request: bytes) -> bytes:
        """Transport handler of method ``chunk``: serialised ChunkRequest in, ChunkReply out.

        Raises `ProtocolError` on a malformed request, `NetworkError` when too many requests wait.
        """
        wanted = _parse_request(request)
        if self._waiting >= MAX_READS_WAITING:
            raise NetworkError("busy: too many chunk requests wait", "ask another holder, or try again later")
        self._waiting += 1
        try:
            async with self._reads:
                data = await asyncio.to_thread(self._part, wanted) if self._read_in_thread else self._part(wanted)
        finally:
            self._waiting -= 1
        return ChunkReply(found=data is not None, data=data or b"").SerializeToString()

    def _part(self, wanted: ChunkRequest) -> bytes | None:
        """What ``wanted`` asks for. Of a blob that is fetched in pieces, the whole is read and checked once."""
        if not (wanted.offset or wanted.length):
            return self.get(wanted.digest)
        with self._lock:
            data = self._recent.get(wanted.digest)
        if data is None:
            data = self.get(wanted.digest)
        if data is None:
            return None
        if len(data) <= FILE_CHUNK_BYTES:
            with self._lock:
                self._recent[wanted.digest] = data
                self._recent.move_to_end(wanted.digest)
                while len(self._recent) > MAX_RECENT:
                    self._recent.popitem(last=False)
        return data[wanted.offset : wanted.offset + wanted.length if wanted.length else None]

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._folder / name[:2] / name

    def _scan(self) -> None:
        """Take stock of the folder, oldest first, and clear what a crash left half written."""
        found: list[tuple[float, bytes, int]] = []
        for path in self._folder.glob("[0-9a-f][0-9a-f]/*"):
            if path.name.startswith(TEMPORARY_PREFIX):
                path.unlink(missing_ok=True)
                continue
            try:
                digest = bytes.fromhex(path.name)
            except ValueError:
                continue
            if len(digest) == DIGEST_BYTES and path == self._path(digest):
                status = path.stat()
                found.append((status.st_mtime, digest, status.st_size))
        for _, digest, size_bytes in sorted(found):
            self._sizes[digest] = size_bytes
            self._used_bytes += size_bytes

    def _write(self, digest: bytes, data: bytes) -> None:
        path = self._path(digest)
        try:
            self._write_once(path, data)
        except DiskFull:
            # The disk is fuller than our own limit allows for: give up old blobs of at least this size, try once more.
            with self._lock:
                if not self._evict(len(data)):
                    raise
            self._write_once(path, data)

    def _write_once(self, path: Path, data: bytes) -> None:
        if not path.parent.is_dir():
            with disk_errors(path):
                path.parent.mkdir(exist_ok=True)
                fsync_folder(self._folder)
        write_durably(path, data)

    def _read_stored(self, digest: bytes) -> bytes | None:
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        with self._lock:
            if sha256(data) != digest:
                self._remove(digest)
                return None
            if digest in self._sizes:
                self._sizes.move_to_end(digest)
        return data

    def _make_room(self, num_bytes: int) -> None:
        excess = self._used_bytes + num_bytes - self._max_bytes
        if excess > 0 and not self._evict(excess):
            raise DiskFull(
                f"the disk limit of {self._max_bytes} bytes for {self._folder} is reached",
                "raise the disk limit, or free what is no longer needed",
            )

    def _evict(self, num_bytes: int) -> bool:
        """Free ``num_bytes`` from unpinned blobs, least recently used first; where they are not enough, keep all."""
        victims: list[bytes] = []
        freed_bytes = 0
        for digest, size_bytes in self._sizes.items():
            if freed_bytes >= num_bytes:
                break
            if digest not in self._pins:
                victims.append(digest)
                freed_bytes += size_bytes
        if freed_bytes < num_bytes:
            return False
        for digest in victims:
            self._remove(digest)
        return True

    def _remove(self, digest: bytes) -> None:
        self._forget(digest)
        self._path(digest).unlink(missing_ok=True)

    def _forget(self, digest: bytes) -> None:
        self._used_bytes -= self._sizes.pop(digest, 0)


def _parse_request(raw: bytes) -> ChunkRequest:
    if len(raw) > MAX_REQUEST_BYTES:
        raise ProtocolError(f"a chunk request of {len(raw)} bytes is too large")
    try:
        request = ChunkRequest.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("a chunk request cannot be read") from error
    if len(request.digest) != DIGEST_BYTES:
        raise ProtocolError(f"a chunk request with a digest of {len(request.digest)} bytes")
    return request
