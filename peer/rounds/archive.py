"""The archive of a seed peer, read by an auditor: the log from the genesis on, averages, and states to start from.

Reads only, and believes nothing: every commit is verified against the one before, every average and state has its
digest. So it can be a copy from anywhere, or the folder of a seed peer that runs. Leaves what is re-applied to
`peer.checkpoints.audit`. Files, in the run's folder: ``genesis.sig``, for each shard ``shard-N/log`` and
``shard-N/state-0`` (as `peer.rounds.ledger` writes them), ``chunks``, and the outer momentum after checkpoint round R:
``momentum-R`` of the first shard, ``momentum-R-shard-N`` of the others.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from peer.rounds.ledger import MAX_COMMIT_BYTES
from peer.rounds.shard import Shard, StateBuffers, load_state
from swarm import digest, log
from swarm.errors import DataError, EarlierVersion, NotFound
from swarm.files import write_durably
from swarm.log import LogHead
from swarm.proto.common_pb2 import Genesis, Signed
from swarm.proto.round_pb2 import Commit, Record, StateReply
from swarm.run_spec import RunSpec

GENESIS_FILE = "genesis.sig"
_FRAME = struct.Struct("<II")  # length and CRC of a commit


def keep_genesis(folder: Path, signed: Signed) -> None:
    """Put the signed genesis where an auditor looks for it."""
    write_durably(folder / GENESIS_FILE, signed.SerializeToString(deterministic=True))


def momentum_path(folder: Path, round_number: int, shard: int = 0) -> Path:
    return folder / (f"momentum-{round_number}" + (f"-shard-{shard}" if shard else ""))


def forget_momentum(folder: Path, round_number: int, num_shards: int) -> None:
    """Of all shards."""
    for shard in range(num_shards):
        momentum_path(folder, round_number, shard).unlink(missing_ok=True)


class Archive:
    def __init__(self, folder: Path, spec: RunSpec) -> None:
        """Raises `DataError` where ``folder`` is no archive, `VerificationError` where it is one of another run."""
        self._folder, self._spec = folder, spec
        signed = Signed()
        try:
            signed.ParseFromString((folder / GENESIS_FILE).read_bytes())
        except (OSError, DecodeError) as error:
            raise DataError(
                f"{folder} is no archive of a run: {GENESIS_FILE} cannot be read",
                "name the run's folder of a seed peer (HOME/runs/RUN_ID), or a copy of it",
            ) from error
        organizer = bytes.fromhex(spec.organizer_key)
        self.genesis: Genesis = log.parse_genesis(signed, spec.run_id, organizer, spec.num_shards)

    def shard(self, number: int) -> ShardArchive:
        return ShardArchive(self._folder, self._spec, self.genesis, number)


class ShardArchive:
    """What the archive holds of one shard."""

    def __init__(self, folder: Path, spec: RunSpec, genesis: Genesis, number: int) -> None:
        self._folder, self.spec, self._genesis, self.number = folder, spec, genesis, number

    @property
    def num_values(self) -> int:
        return self._genesis.shards[self.number].num_values

    def commits(self) -> Iterator[tuple[Record, LogHead]]:
        """Every record with the head after it, each verified against the one before, as far as they are here."""
        head = log.genesis_head(self._genesis, self.number)
        for raw in self._frames():
            try:
                commit = Commit.FromString(raw)
            except DecodeError as error:
                raise DataError(f"the archive's log is damaged after round {head.round}") from error
            try:
                record, head = log.verify_commit(head, commit)
            except EarlierVersion as error:
                raise EarlierVersion(f"round {head.round + 1} of this archive was {error}") from error
            yield record, head

    def parts_of(self, record: Record) -> dict[bytes, bytes] | None:
        """The bytes of a record's averages; None where one is missing, or is not what its digest names."""
        parts: dict[bytes, bytes] = {}
        for part in record.parts:
            if part.digest:
                data = self._chunk(part.digest)
                if data is None:
                    return None
                parts[part.digest] = data
        return parts

    def first_state(self) -> Shard:
        """The state of round 0, which the organizer signed. Raises `NotFound` and `VerificationError`."""
        try:
            reply = StateReply.FromString((self._folder / f"shard-{self.number}" / "state-0").read_bytes())
        except (OSError, DecodeError) as error:
            raise NotFound(
                "the archive lacks the state of round 0", "audit from a later checkpoint: --from DIR"
            ) from error
        buffers = StateBuffers(self.num_values)
        for chunks, view in zip((reply.anchor_chunks, reply.momentum_chunks), buffers.views, strict=True):
            for index in range(digest.num_chunks(len(view))):
                room = view[index * digest.STATE_CHUNK_BYTES :][: digest.STATE_CHUNK_BYTES]
                data = self._chunk(chunks[index]) if index < len(chunks) else None
                if data is None or len(data) != len(room):
                    raise NotFound("the archive lacks a chunk of the state of round 0", "audit from a later checkpoint")
                room[:] = data
        return load_state(self.spec, self.number, buffers, self._genesis.shards[self.number].state_digest)

    def read_momentum(self, round_number: int, room: memoryview) -> None:
        """Fill ``room`` with the outer momentum after a checkpoint round; whoever asks checks the state's digest."""
        path = momentum_path(self._folder, round_number, self.number)
        try:
            data = path.read_bytes() if path.stat().st_size == len(room) else b""
        except OSError as error:
            raise NotFound(
                f"the archive lacks the momentum after round {round_number}", "audit from the genesis: leave out --from"
            ) from error
        if len(data) != len(room):
            raise DataError(f"{path} has another size than the run's momentum")
        room[:] = data

    def _frames(self) -> Iterator[bytes]:
        try:
            with (self._folder / f"shard-{self.number}" / "log").open("rb") as file:
                while len(head := file.read(_FRAME.size)) == _FRAME.size:
                    size, crc = _FRAME.unpack(head)
                    body = file.read(min(size, MAX_COMMIT_BYTES))
                    if len(body) != size or zlib.crc32(body) != crc:
                        return  # torn, or still being written: what is missing is told by round
                    yield body
        except FileNotFoundError:
            return

    def _chunk(self, wanted: bytes) -> bytes | None:
        name = wanted.hex()
        try:
            data = (self._folder / "chunks" / name[:2] / name).read_bytes()
        except OSError:
            return None
        return data if digest.sha256(data) == wanted else None
