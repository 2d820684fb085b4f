"""The organizer's side of removals: documents found in prepared data, added to the list, signed.

Decides that a list only grows and that its version counts up. Leaves what it means to `swarm.removals`, where documents
lie to `coordinator.document_index`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from google.protobuf.message import DecodeError

from coordinator import document_index
from coordinator.data_prepare import document_hash
from coordinator.data_sources import Selection, Tally, documents
from swarm import removals, run_spec
from swarm.errors import ConfigError, DataError
from swarm.files import write_durably
from swarm.identity import Identity
from swarm.proto.common_pb2 import Signed
from swarm.removals import FILE_NAME, MAX_REMOVALS, Removal, RemovalList
from swarm.run_spec import RunSpec

_HEX_DIGITS = 64


def digests_of(what: str) -> list[bytes]:
    """A document's SHA-256 in hex, or the SHA-256 of every document in a file. Raises `DataError`."""
    if len(what) == _HEX_DIGITS and all(character in "0123456789abcdefABCDEF" for character in what):
        return [bytes.fromhex(what)]
    path = Path(what)
    if not path.is_file():
        raise DataError(f"{what[:80]!r} is neither a SHA-256 nor a file", "name 64 hexadecimal digits, or a file")
    try:
        found = [document_hash(text) for text in documents(path, Selection(), Tally(strict=True))]
    except DataError as error:
        raise DataError(str(error), "mend the file: every document in it has to be removed") from error
    if not found:
        raise DataError(f"{path} holds no documents")
    return list(dict.fromkeys(found))


def read_list(state: Path, spec: RunSpec) -> RemovalList | None:
    """The list that the coordinator serves from its folder; None where there is none yet. Raises `ConfigError`."""
    try:
        signed = Signed.FromString((state / FILE_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, DecodeError) as error:
        raise ConfigError(f"{state / FILE_NAME} cannot be read", "restore it from a backup") from error
    return removals.parse_signed(signed, spec.run_id, bytes.fromhex(spec.organizer_key))


def read_spec(state: Path) -> RunSpec:
    """The spec of the run whose folder this is. Raises `ConfigError`."""
    try:
        signed = Signed.FromString((state / "spec.sig").read_bytes())
    except (OSError, DecodeError) as error:
        raise ConfigError(
            f"{state} is no folder of a run that was started", "name the folder `state` beside the run file"
        ) from error
    return run_spec.parse_signed(signed, run_spec.run_id_of(signed.signer, signed.payload))


def add(data: Path, state: Path, organizer: Identity, wanted: Sequence[bytes], why: tuple[str, int]) -> RemovalList:
    """Sign the list with these documents too; ``why``: the reason, and the round from which on. Files that the
    coordinator reads anew are replaced whole.

    Raises `DataError` for a document that the data does not hold or that is held out, `ConfigError` for the key of
    another organizer, or where nothing new is removed.
    """
    spec = read_spec(state)
    if organizer.public_key.hex() != spec.organizer_key:
        raise ConfigError("this is not the key of the run's organizer", "run this where `swarm start` was run first")
    old = read_list(state, spec)
    kept = list(old.removals) if old is not None else []
    known = {(removal.document, removal.start) for removal in kept}
    reason, from_round = why
    for digest in wanted:
        places = document_index.find(data, digest)
        if not places:
            raise DataError(f"the data in {data} holds no document {digest.hex()}")
        for place in places:
            if place.split != "train":
                raise DataError(f"document {digest.hex()} is held out: nobody trains on it")
            if (digest.hex(), place.start) not in known:
                kept.append(
                    Removal(
                        document=digest.hex(),
                        reason=reason,
                        from_round=from_round,
                        start=place.start,
                        num_tokens=place.num_tokens,
                    )
                )
    if len(kept) == len(known):
        raise ConfigError("every one of these documents is removed already")
    if len(kept) > MAX_REMOVALS:
        raise ConfigError(f"a list holds at most {MAX_REMOVALS} documents", "prepare the data again without them")
    made = RemovalList(version=old.version + 1 if old is not None else 1, removals=tuple(kept))
    signed = organizer.sign(removals.CONTEXT, spec.run_id, made.canonical_bytes())
    write_durably(state / FILE_NAME, signed.SerializeToString(deterministic=True))
    return made
