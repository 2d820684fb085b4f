"""The run's signed metadata, as The Update Framework (TUF) defines it: the form of its files, and the online roles.

Roles: *root* and *targets* are signed offline by k of n organizers (`swarm.governance`), *snapshot*, *timestamp* and
the delegated role *checkpoints* online by the publication key. Pure: bytes, keys and the time in, bytes or a named
error out. Leaves the client's workflow to `peer.checkpoints.trusted`.

Every file names the run (`RUN_FIELD`): organizers may govern several runs with one key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signature, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Signed, Snapshot, TargetFile, Targets, Timestamp

from swarm.digest import sha256
from swarm.errors import VerificationError
from swarm.identity import Identity

RUN_FIELD = "x-swarmtrain-run"
CHECKPOINTS = "checkpoints"
TIMESTAMP_FILE = "timestamp.json"
FOLDER = "metadata"  # of a mirror
MAX_FILE_BYTES = 5_000_000
MAX_CHECKPOINTS = 10_000  # of about 400 bytes each
_SNAPSHOT_LIFETIME = timedelta(days=365)
_TIMESTAMP_LIFETIME = timedelta(days=7)
_RENEWED_AFTER = timedelta(days=1)
_ENDED_LIFETIME = timedelta(days=5 * 365)  # nothing newer can be held back from whoever sees the last checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    """What the publication key signs."""

    checkpoints: bytes
    snapshot: bytes
    timestamp: bytes

    @property
    def files(self) -> dict[str, bytes]:
        """Names as they are served: what others refer to first, the timestamp last."""
        checkpoints, snapshot = read(self.checkpoints, Targets), read(self.snapshot, Snapshot)
        return {
            f"{checkpoints.signed.version}.{CHECKPOINTS}.json": self.checkpoints,
            f"{snapshot.signed.version}.snapshot.json": self.snapshot,
            TIMESTAMP_FILE: self.timestamp,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A published checkpoint as the metadata names it; ``witnesses_digest``: SHA-256 of the quorum's payload."""

    round: int
    manifest_bytes: int
    manifest_digest: bytes
    witnesses_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """From when on something is signed. ``ended``: nothing newer will come, so it lasts for years."""

    now: datetime
    ended: bool = False


def mirror_name(name: str) -> str:
    """Where a mirror holds a file of the metadata, or the signed run spec, under its own URL."""
    return f"{FOLDER}/{name}"


def manifest_path(round_number: int | str) -> str:
    """The name of a checkpoint's manifest among the targets; of round ``*``: the pattern of all of them."""
    return f"checkpoints/{round_number}/swarm-manifest.json"


# ---- readers --------------------------------------------------------------------------------------------------------


def check_run(raw: bytes, run_id: bytes) -> None:
    """Raise `VerificationError` unless a file says that it is of this run; its signatures cover that."""
    if read(raw, Signed).signed.unrecognized_fields.get(RUN_FIELD) != run_id.hex():
        raise VerificationError("metadata of another run")


def is_signed(raw: bytes, key: bytes) -> bool:
    """Whether ``key`` signed this file."""
    whole = read(raw, Signed)
    signature = whole.signatures.get(key_id_of(key))
    if signature is None:
        return False
    try:
        tuf_key(key).verify_signature(signature, whole.signed_bytes)
    except UnverifiedSignatureError:
        return False
    return True


def entries(checkpoints: bytes) -> dict[int, Entry]:
    """The published checkpoints by round, of the role *checkpoints* as it was verified."""
    found = {}
    for path, target in read(checkpoints, Targets).signed.targets.items():
        entry = _entry(path, target)
        found[entry.round] = entry
    return found


# ---- the publication key --------------------------------------------------------------------------------------------


def publish(targets: bytes, before: Online | None, published: Iterable[Entry], key: Identity, period: Period) -> Online:
    """The online roles anew, under the organizers' ``targets``, naming these checkpoints.

    Versions go on from ``before``. Of more than `MAX_CHECKPOINTS` the newest are named.
    """
    run_field = {RUN_FIELD: read(targets, Targets).signed.unrecognized_fields[RUN_FIELD]}
    expires = period.now + (_ENDED_LIFETIME if period.ended else _SNAPSHOT_LIFETIME)
    newest = sorted(published, key=lambda entry: entry.round)[-MAX_CHECKPOINTS:]
    checkpoints = _signed(
        Targets(
            version=_next_version(before.checkpoints if before else None),
            expires=expires,
            targets={manifest_path(entry.round): _target(entry) for entry in newest},
            unrecognized_fields=dict(run_field),
        ),
        key,
    )
    snapshot = _signed(
        Snapshot(
            version=_next_version(before.snapshot if before else None),
            expires=expires,
            meta={"targets.json": _meta(targets), f"{CHECKPOINTS}.json": _meta(checkpoints)},
            unrecognized_fields=dict(run_field),
        ),
        key,
    )
    online = Online(checkpoints=checkpoints, snapshot=snapshot, timestamp=before.timestamp if before else b"")
    return renew(online, key, period)


def renew(online: Online, key: Identity, period: Period) -> Online:
    """The same with a new timestamp: nothing newer was published until now."""
    snapshot = read(online.snapshot, Snapshot)
    timestamp = Timestamp(
        version=_next_version(online.timestamp),
        expires=period.now + (_ENDED_LIFETIME if period.ended else _TIMESTAMP_LIFETIME),
        snapshot_meta=_meta(online.snapshot),
        unrecognized_fields={RUN_FIELD: snapshot.signed.unrecognized_fields[RUN_FIELD]},
    )
    return replace(online, timestamp=_signed(timestamp, key))


def is_stale(online: Online, now: datetime) -> bool:
    """Whether the timestamp should be renewed: it is a day old, or ends within half of what it usually lasts."""
    expires: datetime = read(online.timestamp, Timestamp).signed.expires
    return expires - now < _TIMESTAMP_LIFETIME - _RENEWED_AFTER


def is_built_on(online: Online, targets: bytes, key: bytes) -> bool:
    """Whether the online roles are signed by this key and name these targets."""
    snapshot = read(online.snapshot, Snapshot)
    return snapshot.signed.meta["targets.json"] == _meta(targets) and key_id_of(key) in snapshot.signatures


# ---- parts ----------------------------------------------------------------------------------------------------------


def read(raw: bytes, kind: type[Any]) -> Any:
    """``raw`` as `Metadata` of a role, not verified. Raises `VerificationError`."""
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(raw)
    except (RepositoryError, ValueError, RecursionError) as error:
        raise VerificationError("a file of the run's metadata cannot be read") from error
    if not isinstance(metadata.signed, kind) or len(raw) > MAX_FILE_BYTES:
        raise VerificationError(f"a file of the run's metadata is too large, or is no {kind.__name__.lower()}")
    return metadata


def _signed(signed: Signed, key: Identity) -> bytes:
    metadata: Metadata[Any] = Metadata(signed)
    add_signature(metadata, key)
    return metadata.to_bytes()


def add_signature(metadata: Metadata[Any], identity: Identity) -> None:
    key_id = key_id_of(identity.public_key)
    metadata.signatures[key_id] = Signature(key_id, identity.sign_metadata(metadata.signed_bytes).hex())


def _next_version(raw: bytes | None) -> int:
    return int(read(raw, Signed).signed.version) + 1 if raw else 1


def _meta(raw: bytes) -> MetaFile:
    version = read(raw, Signed).signed.version
    return MetaFile(version=version, length=len(raw), hashes={"sha256": sha256(raw).hex()})


def _target(entry: Entry) -> TargetFile:
    return TargetFile(
        length=entry.manifest_bytes,
        hashes={"sha256": entry.manifest_digest.hex()},
        path=manifest_path(entry.round),
        unrecognized_fields={"custom": {"witnesses": entry.witnesses_digest.hex()}},
    )


def _entry(path: str, target: TargetFile) -> Entry:
    number = path.removeprefix("checkpoints/").removesuffix("/swarm-manifest.json")
    try:
        entry = Entry(
            round=int(number) if number.isascii() and number.isdigit() and len(number) <= 19 else -1,
            manifest_bytes=target.length,
            manifest_digest=bytes.fromhex(target.hashes["sha256"]),
            witnesses_digest=bytes.fromhex(target.custom["witnesses"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(f"the run's metadata names {path[:80]!r} without its digests") from error
    if path != manifest_path(entry.round):
        raise VerificationError(f"the run's metadata names {path[:80]!r}, which is no checkpoint")
    return entry


def key_id_of(public_key: bytes) -> str:
    """The key itself: it is short, and people can compare it."""
    return public_key.hex()


def tuf_key(public_key: bytes) -> Key:
    return SSlibKey(key_id_of(public_key), "ed25519", "ed25519", {"public": public_key.hex()})


def public_key_of(key: Key) -> bytes:
    """The 32 bytes behind an id. Ids are the keys themselves: one key under two ids would count twice."""
    public = str(key.keyval.get("public", ""))
    if key.keytype != "ed25519" or key.keyid != public or len(public) != 64:
        raise VerificationError("the run's metadata names a key that is no Ed25519 key under its own name")
    return bytes.fromhex(public)
