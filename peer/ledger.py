"""What a replica must find again after a crash: its vote, the log, its last states. One folder per shard.

Decides the files and their order of writing; every answer that depends on them leaves after they are durable. Blobs
(parts, state chunks) lie in the chunk store; the ledger pins what it names.

    acceptor     the vote of the round under way: CRC and serialised fields, replaced atomically
    log          commits of rounds 1, 2, ... each as length, CRC and serialised `Commit`; a torn tail is cut at start
    state-R      which chunks make the state after round R
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from peer.chunk_store import ChunkStore
from peer.paxos import Acceptor
from peer.shard import Shard, load_state, state_bytes
from swarm import digest
from swarm.errors import DigestError, NotFound
from swarm.files import disk_errors, fsync_folder, write_durably
from swarm.log import LogHead, verify_commit
from swarm.proto.round_pb2 import Commit, Record, StateReply
from swarm.run_spec import RunSpec

_FRAME = struct.Struct("<II")
MAX_COMMIT_BYTES = 1 << 20
KEPT_STATES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerOptions:
    """``archive``: keep every part for ever (seed peers). ``state_every_rounds``: how often the state is written."""

    archive: bool = False
    state_every_rounds: int = 4


class Ledger:
    def __init__(self, folder: Path, genesis_head: LogHead, chunks: ChunkStore, options: LedgerOptions) -> None:
        self._folder = folder
        self._chunks = chunks
        self._options = options
        self._offsets: list[int] = []
        self._states: dict[int, StateReply] = {}
        self.heads: list[LogHead] = [genesis_head]
        """heads[r] is the head after round r"""
        folder.mkdir(parents=True, exist_ok=True)
        self._log_path = folder / "log"
        self._read_log()
        self._read_states()

    @property
    def head(self) -> LogHead:
        return self.heads[-1]

    # ---- the vote -----------------------------------------------------------------------------------------------

    def save_acceptor(self, round_number: int, acceptor: Acceptor, parts: Mapping[bytes, bytes]) -> None:
        """Make a promise or an acceptance durable, with the bytes of every part that the record names."""
        self._chunks.pin(self._group("vote", round_number), parts)
        for data in parts.values():
            self._chunks.put(data)
        fields = {
            "round": round_number,
            "promised": [acceptor.promised[0], acceptor.promised[1].hex()],
            "accepted": [acceptor.accepted[0], acceptor.accepted[1].hex()],
            "record": acceptor.record.hex(),
        }
        body = json.dumps(fields).encode()
        write_durably(self._folder / "acceptor", zlib.crc32(body).to_bytes(4, "big") + body)

    def load_acceptor(self, round_number: int) -> Acceptor:
        """The vote of this round; a fresh one where none was cast."""
        path = self._folder / "acceptor"
        if not path.exists():
            return Acceptor()
        raw = path.read_bytes()
        if zlib.crc32(raw[4:]).to_bytes(4, "big") != raw[:4]:
            raise DigestError(f"{path} is damaged", "this replica must not vote: move its folder away and join again")
        fields = json.loads(raw[4:])
        if fields["round"] != round_number:
            return Acceptor()
        (promised, promised_by), (accepted, accepted_by) = fields["promised"], fields["accepted"]
        return Acceptor(
            promised=(promised, bytes.fromhex(promised_by)),
            accepted=(accepted, bytes.fromhex(accepted_by)),
            record=bytes.fromhex(fields["record"]),
        )

    # ---- the log ------------------------------------------------------------------------------------------------

    def append(self, commit: Commit, head: LogHead, parts: Mapping[bytes, bytes]) -> None:
        """Make a verified commit and its parts durable; ``head`` is the head after it."""
        self._chunks.pin(self._group("round", head.round), parts)
        for data in parts.values():
            self._chunks.put(data)
        body = commit.SerializeToString()
        with disk_errors(self._log_path), open(self._log_path, "ab") as file:
            offset = file.tell()
            file.write(_FRAME.pack(len(body), zlib.crc32(body)) + body)
            file.flush()
            os.fsync(file.fileno())
        self._offsets.append(offset)
        self.heads.append(head)
        self._chunks.unpin(self._group("vote", head.round))

    def commits(self, first_round: int, count: int) -> list[Commit]:
        """Commits of rounds ``first_round``, ``first_round + 1``, ... as far as they are here."""
        found = []
        with open(self._log_path, "rb") as file:
            for round_number in range(max(1, first_round), min(self.head.round, first_round + count - 1) + 1):
                file.seek(self._offsets[round_number - 1])
                size, _ = _FRAME.unpack(file.read(_FRAME.size))
                found.append(Commit.FromString(file.read(size)))
        return found

    def parts_of(self, record: Record) -> dict[bytes, bytes]:
        """The bytes of a record's present parts; `NotFound` where one is not here."""
        parts = {}
        for part in record.parts:
            if part.digest:
                data = self._chunks.get(part.digest)
                if data is None:
                    raise NotFound(f"round {record.round}: a part is not on this disk")
                parts[part.digest] = data
        return parts

    # ---- states -------------------------------------------------------------------------------------------------

    def is_state_due(self, round_number: int) -> bool:
        return round_number % self._options.state_every_rounds == 0

    def save_state(self, round_number: int, shard: Shard) -> None:
        """Write the state after a round, chunk by chunk, and forget states and parts that it makes useless."""
        anchor, momentum = shard.chunk_digests()
        self._chunks.pin(self._group("state", round_number), [*anchor, *momentum])
        for vector in (shard.anchor, shard.momentum):
            view = state_bytes(vector)
            for start in range(0, len(view), digest.STATE_CHUNK_BYTES):
                self._chunks.put(bytes(view[start : start + digest.STATE_CHUNK_BYTES]))
        reply = StateReply(round=round_number, anchor_chunks=anchor, momentum_chunks=momentum)
        write_durably(self._folder / f"state-{round_number}", reply.SerializeToString())
        self._states[round_number] = reply
        self._forget_old()

    def offer_state(self) -> StateReply:
        """The newest state that the log itself proves: the commit after it names its digest (or genesis does)."""
        proven = [number for number in self._states if number == 0 or number < self.head.round]
        return self._states[max(proven)] if proven else StateReply()

    def load_state(self, spec: RunSpec, index: int) -> tuple[LogHead, Shard] | None:
        """The newest state on this disk that is whole, with the head that it belongs to."""
        for number in sorted(self._states, reverse=True):
            reply = self._states[number]
            anchor = [self._chunks.get(item) for item in reply.anchor_chunks]
            momentum = [self._chunks.get(item) for item in reply.momentum_chunks]
            if number < len(self.heads) and None not in anchor and None not in momentum:
                expected = digest.state_digest(reply.anchor_chunks, reply.momentum_chunks)
                joined = [b"".join(item or b"" for item in chunks) for chunks in (anchor, momentum)]
                return self.heads[number], load_state(spec, index, joined[0], joined[1], expected)
        return None

    # ---- reading back -------------------------------------------------------------------------------------------

    def _read_log(self) -> None:
        self._log_path.touch()
        raw = self._log_path.read_bytes()
        offset = 0
        while offset + _FRAME.size <= len(raw):
            size, crc = _FRAME.unpack_from(raw, offset)
            body = raw[offset + _FRAME.size : offset + _FRAME.size + size]
            if size > MAX_COMMIT_BYTES or len(body) != size or zlib.crc32(body) != crc:
                break
            try:
                commit = Commit.FromString(body)
            except DecodeError:
                break
            record, head = verify_commit(self.head, commit)
            self._offsets.append(offset)
            self.heads.append(head)
            self._chunks.pin(self._group("round", head.round), [part.digest for part in record.parts if part.digest])
            offset += _FRAME.size + size
        if offset != len(raw):  # a torn tail: its round was never acknowledged as applied
            os.truncate(self._log_path, offset)
            fsync_folder(self._folder)

    def _read_states(self) -> None:
        for path in self._folder.glob("state-*"):
            number = path.name.removeprefix("state-")
            try:
                reply = StateReply.FromString(path.read_bytes())
            except DecodeError:
                continue
            if number.isdigit() and int(number) == reply.round:
                self._states[reply.round] = reply
                self._chunks.pin(self._group("state", reply.round), [*reply.anchor_chunks, *reply.momentum_chunks])
        self._forget_old()

    def _forget_old(self) -> None:
        kept = sorted(self._states)[-KEPT_STATES:]
        for number in sorted(set(self._states) - set(kept)):
            del self._states[number]
            (self._folder / f"state-{number}").unlink(missing_ok=True)
            self._chunks.unpin(self._group("state", number))
        if not self._options.archive and kept:
            for number in range(1, kept[0] + 1):
                self._chunks.unpin(self._group("round", number))

    def _group(self, kind: str, round_number: int) -> str:
        return f"{self._folder.name}:{kind}:{round_number}"
