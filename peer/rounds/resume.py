"""What a restarted replica finds on its own disk besides a state: the rounds after it, and what it still owes.

Decides that a replica owes after a restart what it owed before: a file beside the log, written after every round, says
what and since when. Rounds that were committed after that and counted this peer took what was offered to them, so what
is owed to their parts is forgotten; the error of that one encoding is all that is lost. Leaves states and votes to
`peer.rounds.ledger`, and what is owed to `peer.rounds.shard`.

    debt    round (8 bytes, little endian), log digest after it, CRC of the rest, then the bytes of the blocks
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from peer.rounds.blocks import Blocks, size_bytes
from peer.rounds.ledger import Ledger
from peer.rounds.planning import part_values
from peer.rounds.shard import Shard
from swarm.digest import DIGEST_BYTES
from swarm.errors import NotFound
from swarm.files import write_durably
from swarm.log import LogHead, parse_record
from swarm.proto.round_pb2 import Record

_FILE = "debt"
_ROUND_BYTES = 8
_CRC_BYTES = 4
_HEADER_BYTES = _ROUND_BYTES + DIGEST_BYTES + _CRC_BYTES
_PAGE = 128

log = logging.getLogger(__name__)


def save(ledger: Ledger, head: LogHead, shard: Shard) -> None:
    """Make durable what is owed after ``head``, and the state where it is due. Raises `DiskFull`."""
    if shard.feedback is not None:
        data = shard.feedback.data
        header = head.round.to_bytes(_ROUND_BYTES, "little") + head.log_digest
        write_durably(ledger.folder / _FILE, header + zlib.crc32(data.data).to_bytes(_CRC_BYTES, "little"), data.data)
    if ledger.is_state_due(head.round):
        ledger.save_state(head.round, shard)


OnRound = Callable[[LogHead, Shard], None]


def resume(ledger: Ledger, head: LogHead, shard: Shard, me: bytes, on_round: OnRound) -> LogHead:
    """Apply to ``shard``, which stands at ``head``, the rounds that lie whole on this disk; gives the head then.

    ``on_round`` sees every state on the way, the first among them: nobody else does.
    """
    on_round(head, shard)
    for record in _records(ledger, head.round, ledger.head.round):
        try:
            parts = ledger.parts_of(record)
        except NotFound:
            break  # the exchange fetches them
        if record.state_digest != shard.state_digest:
            break  # the exchange tells what that means
        shard.apply(record, parts)
        head = ledger.heads[record.round]
        on_round(head, shard)
    shard.feedback = _owed(ledger, head, shard.num_values, me)
    return head


def _owed(ledger: Ledger, head: LogHead, num_values: int, me: bytes) -> Blocks | None:
    found = _read(ledger.folder / _FILE, num_values)
    if found is None:
        return None
    number, log_digest, owed = found
    if number > head.round or ledger.heads[number].log_digest != log_digest:
        log.warning("what was owed after round %d is of no use for the state after round %d", number, head.round)
        return None
    for record in _records(ledger, number, head.round):
        for part in record.parts:
            if me in {*(share.peer_key for share in part.shares), *(r.peer_key for r in part.rejections)}:
                owed.clear(part_values(part.first_slice, part.num_slices, num_values))
    return owed


def _read(path: Path, num_values: int) -> tuple[int, bytes, Blocks] | None:
    """(round, log digest, what is owed); None where there is no whole file of this size."""
    try:
        raw = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        return None
    if len(raw) != _HEADER_BYTES + size_bytes(num_values):
        return None
    header, data = raw[:_HEADER_BYTES].tobytes(), raw[_HEADER_BYTES:].copy()
    if zlib.crc32(data.data) != int.from_bytes(header[-_CRC_BYTES:], "little"):
        log.warning("%s is damaged: what this replica owed is forgotten", path)
        return None
    return int.from_bytes(header[:_ROUND_BYTES], "little"), header[_ROUND_BYTES:-_CRC_BYTES], Blocks(num_values, data)


def _records(ledger: Ledger, after: int, last: int) -> Iterator[Record]:
    for first in range(after + 1, last + 1, _PAGE):
        for commit in ledger.commits(first, min(_PAGE, last + 1 - first)):
            yield parse_record(commit.record, ledger.heads[first - 1])
            first += 1
