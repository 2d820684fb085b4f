"""What a replica must find again after a crash: its vote, the log, its last states. One folder per shard.

Decides the files and their order of writing; every answer that depends on them leaves after they are durable. Blobs
(parts, state chunks) lie in the chunk store; the ledger pins what it names.

    acceptor     the vote of the round under way: CRC and serialised fields, replaced atomically
    log          commits of rounds 1, 2, ... each as length, CRC and serialised `Commit`; a torn tail is cut at start
    state-R      which chunks make the state after round R
"""

from __future__ import annotations

import functools
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from peer.p2p.chunk_store import ChunkStore
from peer.rounds.paxos import Acceptor
from peer.rounds.shard import Shard, StateBuffers, load_state
from swarm import digest
from swarm.errors import DigestError, DiskFull, EarlierVersion, NotFound, ProtocolError
from swarm.files import Kept, disk_errors, fsync_folder, write_durably
from swarm.log import LogHead, gone_of, verify_commit
from swarm.proto.round_pb2 import Commit, PartResult, Record, StateReply
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
        self._voted_round = 0
        self._archived_from = 1
        self._fork: int | None = None
        """the round after which the newest branch in our log began: its state is kept, as peers of another may ask"""
        self.heads: list[LogHead] = [genesis_head]
        """heads[r] is the head after round r"""
        folder.mkdir(parents=True, exist_ok=True)
        self._log_path = folder / "log"
        self._read_log()
        self._find_vote()
        self._read_states()

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def head(self) -> LogHead:
        return self.heads[-1]

    # ---- the vote -----------------------------------------------------------------------------------------------

    def save_acceptor(self, round_number: int, acceptor: Acceptor, parts: Mapping[bytes, Kept]) -> None:
        """Make a promise or an acceptance durable, with the bytes of every part that the record names.

        Raises `ProtocolError` for a round before the one voted in last: a vote is never replaced by an older one.
        """
        if round_number < self._voted_round or round_number <= self.head.round:
            raise ProtocolError(f"round {round_number} is over: no more votes in it")
        self._voted_round = round_number
        self._chunks.pin(self._group("vote", round_number), parts)
        self._with_room(round_number, functools.partial(self._chunks.put_all, parts))
        fields = {
            "round": round_number,
            "promised": [acceptor.promised[0], acceptor.promised[1].hex()],
            "accepted": [acceptor.accepted[0], acceptor.accepted[1].hex()],
            "record": acceptor.record.hex(),
            "log_digest": self.head.log_digest.hex(),
        }
        body = json.dumps(fields).encode()
        write_durably(self._folder / "acceptor", zlib.crc32(body).to_bytes(4, "big") + body)

    def load_acceptor(self, round_number: int) -> Acceptor:
        """The vote of this round; a fresh one where none was cast."""
        voted, acceptor = self._read_vote()
        return acceptor if voted == round_number else Acceptor()

    def _read_vote(self) -> tuple[int, Acceptor]:
        path = self._folder / "acceptor"
        if not path.exists():
            return 0, Acceptor()
        raw = path.read_bytes()
        if zlib.crc32(raw[4:]).to_bytes(4, "big") != raw[:4]:
            raise DigestError(f"{path} is damaged", "this replica must not vote: move its folder away and join again")
        fields = json.loads(raw[4:])
        before = fields["round"] - 1
        if before <= self.head.round and self.heads[before].log_digest.hex() != fields["log_digest"]:
            return 0, Acceptor()  # of a branch that was given up
        (promised, promised_by), (accepted, accepted_by) = fields["promised"], fields["accepted"]
        acceptor = Acceptor(
            promised=(promised, bytes.fromhex(promised_by)),
            accepted=(accepted, bytes.fromhex(accepted_by)),
            record=bytes.fromhex(fields["record"]),
        )
        return fields["round"], acceptor

    def _find_vote(self) -> None:
        """What was voted in last; parts of an acceptance that is not decided yet stay pinned."""
        self._voted_round, acceptor = self._read_vote()
        if self._voted_round > self.head.round and acceptor.record:
            parts = Record.FromString(acceptor.record).parts
            self._chunks.pin(self._group("vote", self._voted_round), [part.digest for part in parts if part.digest])

    # ---- the log ------------------------------------------------------------------------------------------------

    def append(self, commit: Commit, head: LogHead, parts: Mapping[bytes, Kept]) -> None:
        """Make a verified commit (`swarm.log.canonical`) and its parts durable; ``head`` is the head after it."""
        frame = _frame(commit)
        self.keep_parts(head.round, parts)
        with disk_errors(self._log_path), open(self._log_path, "ab") as file:
            offset = file.tell()
            file.write(frame)
            file.flush()
            os.fsync(file.fileno())
        self._note(commit, offset, head)
        self._chunks.unpin(self._group("vote", head.round))

    def replace_tail(self, fork: LogHead, tail: Sequence[tuple[Commit, LogHead]]) -> None:
        """Commits after ``fork`` give way to the verified ``tail``: after a crash the log is one or the other.

        The states of what goes, go first: the new log alone could not tell its last one from ours. The vote goes last:
        it is of no use with the new log, and is needed with the old.
        """
        frames = [(_frame(commit), commit, head) for commit, head in tail]
        for number in [number for number in self._states if number > fork.round]:
            self._drop_state(number)
        fsync_folder(self._folder)
        kept = self._log_path.read_bytes()[: [*self._offsets, None][fork.round]]
        write_durably(self._log_path, kept + b"".join(frame for frame, _, _ in frames))
        for number in range(fork.round + 1, self.head.round + 1):
            self._chunks.unpin(self._group("round", number))
        self._chunks.unpin(self._group("vote", self._voted_round))
        del self._offsets[fork.round :], self.heads[fork.round + 1 :]
        self._fork = None if self._fork is None or self._fork >= fork.round else self._fork
        offset = len(kept)
        for frame, commit, head in frames:
            self._note(commit, offset, head)
            offset += len(frame)
        (self._folder / "acceptor").unlink(missing_ok=True)
        self._voted_round = 0

    def _note(self, commit: Commit, offset: int, head: LogHead) -> None:
        if gone_of(commit, self.head):
            self._fork = self.head.round
        self._offsets.append(offset)
        self.heads.append(head)

    def keep_parts(self, round_number: int, parts: Mapping[bytes, Kept]) -> None:
        """Keep the averages of a round."""
        self._chunks.pin(self._group("round", round_number), parts)
        self._with_room(round_number, functools.partial(self._chunks.put_all, parts))

    def _with_room(self, round_number: int, put: Callable[[], object]) -> None:
        """``put`` what this round writes; an archive whose disk limit is reached gives up its oldest rounds for it."""
        while True:
            try:
                put()
                return
            except DiskFull:
                if not self._options.archive or self._archived_from >= round_number:
                    raise
                self.release_rounds(self._archived_from + max(1, (round_number - self._archived_from) // 4))

    def lacking(self, round_number: int) -> list[PartResult]:
        """The averages of a round that are not on this disk, and will stay once they are; none of what was given up.

        Raises `NotFound` where the log has no such round, as after a branch that was longer.
        """
        if round_number < self._archived_from:
            return []
        commits = self.commits(round_number, 1)
        if not commits:
            raise NotFound(f"round {round_number} is not in the log")
        parts = [part for part in Record.FromString(commits[0].record).parts if part.digest]
        self._chunks.pin(self._group("round", round_number), [part.digest for part in parts])
        return [part for part in parts if not self._chunks.has(part.digest)]

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
        reply = StateReply(round=round_number, anchor_chunks=anchor, momentum_chunks=momentum)
        self._chunks.pin(self._group("state", round_number), [*anchor, *momentum])
        try:
            for view in shard.state_bytes():
                for start in range(0, len(view), digest.STATE_CHUNK_BYTES):
                    data = bytes(view[start : start + digest.STATE_CHUNK_BYTES])
                    self._with_room(round_number, functools.partial(self._chunks.put, data))
            write_durably(self._folder / f"state-{round_number}", reply.SerializeToString())
        except BaseException:
            if round_number not in self._states:  # else its chunks could never be evicted
                self._chunks.unpin(self._group("state", round_number))
            raise
        self._states[round_number] = reply
        self._forget_old()

    def offer_state(self, after_round: int = 0, first: bool = False) -> StateReply:
        """The newest state that the log itself proves: the commit after it names its digest (or genesis does).

        Or that ``after_round``, where one is named, or that of round 0; nothing where it is not here.
        """
        if after_round or first:
            return self._states.get(after_round, StateReply())
        proven = [number for number in self._states if number == 0 or number < self.head.round]
        return self._states[max(proven)] if proven else StateReply()

    def load_state(self, spec: RunSpec, index: int, num_values: int) -> tuple[LogHead, Shard] | None:
        """The newest state on this disk that is whole, with the head that it belongs to."""
        for number in sorted(self._states, reverse=True):
            reply = self._states[number]
            expected = digest.state_digest(reply.anchor_chunks, reply.momentum_chunks)
            if number >= len(self.heads) or not self._may_be(number, expected):
                continue
            buffers = self.read_state(number, num_values)
            if buffers is not None:
                return self.heads[number], load_state(spec, index, buffers, expected)
        return None

    def read_state(self, number: int, num_values: int) -> StateBuffers | None:
        """The bytes of the state after a round; None where it is not here, or not whole."""
        buffers, reply = StateBuffers(num_values), self._states.get(number)
        return buffers if reply is not None and self._read_chunks(reply, buffers) else None

    def _read_chunks(self, reply: StateReply, buffers: StateBuffers) -> bool:
        """Fill ``buffers``; False where a chunk is not here, or they are not of this size."""
        for chunks, view in zip((reply.anchor_chunks, reply.momentum_chunks), buffers.views, strict=True):
            if len(chunks) != digest.num_chunks(len(view)):
                return False
            for index, item in enumerate(chunks):
                room = view[index * digest.STATE_CHUNK_BYTES :][: digest.STATE_CHUNK_BYTES]
                data = self._chunks.get(item)
                if data is None or len(data) != len(room):
                    return False
                room[:] = data
        return True

    def _may_be(self, number: int, state_digest: bytes) -> bool:
        """False where the log names another digest for the state after this round."""
        commits = self.commits(number + 1, 1)
        return not commits or Record.FromString(commits[0].record).state_digest == state_digest

    # ---- reading back -------------------------------------------------------------------------------------------

    def _read_log(self) -> None:
        self._log_path.touch()
        raw = self._log_path.read_bytes()
        offset = 0
        while offset < len(raw):
            commit = self._read_frame(raw, offset)
            if commit is None:  # a torn tail: its round was never acknowledged as applied
                os.truncate(self._log_path, offset)
                fsync_folder(self._folder)
                return
            record, head = self._verified(commit)
            self._note(commit, offset, head)
            self._chunks.pin(self._group("round", head.round), [part.digest for part in record.parts if part.digest])
            offset += _FRAME.size + _FRAME.unpack_from(raw, offset)[0]

    def _verified(self, commit: Commit) -> tuple[Record, LogHead]:
        try:
            return verify_commit(self.head, commit)
        except EarlierVersion as error:
            raise EarlierVersion(f"round {self.head.round + 1} in {self._log_path} was {error}") from error

    def _read_frame(self, raw: bytes, offset: int) -> Commit | None:
        """The commit at ``offset``; None where the last frame is incomplete. Damage before that is an error."""
        if offset + _FRAME.size > len(raw):
            return None
        size, crc = _FRAME.unpack_from(raw, offset)
        end = offset + _FRAME.size + size
        body = raw[offset + _FRAME.size : end]
        if len(body) == size and zlib.crc32(body) == crc:
            return Commit.FromString(body)
        if end >= len(raw) and size <= MAX_COMMIT_BYTES:
            return None
        raise DigestError(f"{self._log_path} is damaged", "move this peer's folder of the run away and join again")

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
        genesis = {0} if self._options.archive else set[int]()  # auditors start from it
        for number in sorted(set(self._states) - {*kept, self._fork, *genesis}):
            self._drop_state(number)
        if not self._options.archive and kept:
            self.release_rounds(kept[0] + 1)

    def _drop_state(self, number: int) -> None:
        del self._states[number]
        (self._folder / f"state-{number}").unlink(missing_ok=True)
        self._chunks.unpin(self._group("state", number))

    def release_rounds(self, before: int) -> None:
        """The averages of earlier rounds need not stay."""
        for number in range(self._archived_from, before):
            self._chunks.unpin(self._group("round", number))
        self._archived_from = max(self._archived_from, before)

    def _group(self, kind: str, round_number: int) -> str:
        return f"{self._folder.name}:{kind}:{round_number}"


def _frame(commit: Commit) -> bytes:
    body = commit.SerializeToString()
    if len(body) > MAX_COMMIT_BYTES:
        raise ProtocolError(f"a commit of {len(body)} bytes is too large")
    return _FRAME.pack(len(body), zlib.crc32(body)) + body
