"""What is published, read from a mirror: for researchers whose run's coordinator is away.

Decides which files of a mirror are read for that (`swarm.metadata`'s in ``metadata/``, the signed run spec among them,
and the signatures beside a checkpoint), how large each may be, and which mirrors are remembered. Nothing of it is
believed: the run id binds the spec, the spec the first root, and `peer.checkpoints.trusted` walks TUF's workflow from
there, so a mirror can neither go back nor hold back for longer than the timestamp lasts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError

from peer.checkpoints import trusted
from peer.checkpoints.trusted import Trusted
from swarm import manifest, metadata, run_spec, witness
from swarm.errors import (
    DeadlineExceeded,
    NetworkError,
    NotFound,
    ProtocolError,
    RefusedCheckpoint,
    SpecError,
    SwarmError,
)
from swarm.files import write_durably
from swarm.manifest import mirror_folder
from swarm.metadata import mirror_name
from swarm.proto.common_pb2 import Signed
from swarm.publication import MAX_ROOTS_BYTES, Publication
from swarm.run_spec import RunSpec

FILE_TIMEOUT_S = 300.0
MAX_SPEC_BYTES = 1 << 20
MAX_REMEMBERED = 16
_REMEMBERED_FILE = "mirrors.json"
_SIGNATURE_BYTES = 1024  # more than what `Signed` adds to its payload


class Mirror(Protocol):
    """The root of a mirror."""

    async def file(self, name: str, max_bytes: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A published checkpoint, by the run's metadata."""

    spec: RunSpec
    signed_spec: Signed
    publication: Publication

    @property
    def round(self) -> int:
        return manifest.parse(self.publication.manifest.payload).round


async def offer_of(mirror: Mirror, folder: Path, run_id: bytes, round_number: int) -> Offer:
    """What ``mirror`` has of a round (0: the newest), by metadata that ``folder`` then trusts.

    Raises `NetworkError` where it cannot be read, `NotFound` where it lacks something, `VerificationError`.
    """
    signed_spec, known = await trusted_by(mirror, folder, run_id)
    number = round_number or known.newest_round
    entry = known.checkpoints.get(number)
    if entry is None:
        raise NotFound(f"no checkpoint of round {number} is published")
    base = mirror_folder(number)
    publication = Publication(
        manifest=await _signed(mirror, f"{base}/{manifest.SIGNATURE_FILE}", entry.manifest_bytes),
        witnesses=await _signed(mirror, f"{base}/{manifest.WITNESSES_FILE}", witness.MAX_WITNESSES_BYTES),
        roots=await _roots(mirror, f"{base}/{manifest.ROOTS_FILE}"),
    )
    known.check(publication)
    return Offer(spec=known.spec, signed_spec=signed_spec, publication=publication)


async def trusted_by(mirror: Mirror, folder: Path, run_id: bytes) -> tuple[Signed, Trusted]:
    """The signed run spec and the newest metadata of ``mirror``, which ``folder`` then holds. Raises as `offer_of`."""
    signed_spec = await _signed(mirror, mirror_name(manifest.SPEC_FILE), MAX_SPEC_BYTES)
    try:
        spec = run_spec.parse_signed(signed_spec, run_id)
    except SpecError as error:
        raise RefusedCheckpoint(f"a mirror of another run, or its run spec was changed: {error}") from error
    return signed_spec, await _refreshed(mirror, folder, run_id, spec)


def remember(folder: Path, urls: Sequence[str]) -> None:
    """Keep where mirrors are, for when the coordinator is away. Raises `DiskFull`."""
    if list(remembered(folder)) != list(urls):
        write_durably(folder / _REMEMBERED_FILE, json.dumps(list(urls)[:MAX_REMEMBERED]).encode())


def remembered(folder: Path) -> tuple[str, ...]:
    """What was remembered; nothing where the file is of no use."""
    try:
        urls = json.loads((folder / _REMEMBERED_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return ()
    return tuple(url for url in urls if isinstance(url, str)) if isinstance(urls, list) else ()


async def _refreshed(mirror: Mirror, folder: Path, run_id: bytes, spec: RunSpec) -> Trusted:
    loop, failures = asyncio.get_running_loop(), list[SwarmError]()

    def source(name: str) -> Iterator[bytes]:
        asking = read_file(mirror, mirror_name(name), metadata.MAX_FILE_BYTES)
        try:
            yield asyncio.run_coroutine_threadsafe(asking, loop).result()
        except NotFound:
            raise
        except NetworkError as error:  # TUF's client would call it a failure of the metadata
            failures.append(error)
            raise

    def refresh(source: trusted.Source) -> Trusted:
        return trusted.refresh(folder, run_id, spec, source)

    try:
        return await asyncio.to_thread(refresh, source)
    except SwarmError as error:
        raise failures[0] if failures else error from error


async def _roots(mirror: Mirror, name: str) -> Signed | None:
    try:
        return await _signed(mirror, name, MAX_ROOTS_BYTES)
    except NotFound:
        return None


async def _signed(mirror: Mirror, name: str, max_payload_bytes: int) -> Signed:
    try:
        return Signed.FromString(await read_file(mirror, name, max_payload_bytes + _SIGNATURE_BYTES))
    except DecodeError as error:
        raise ProtocolError(f"{name} of a mirror cannot be read") from error


async def read_file(mirror: Mirror, name: str, max_bytes: int) -> bytes:
    """A whole file, unverified. Raises `VerificationError` for a larger one."""
    try:
        return await asyncio.wait_for(mirror.file(name, max_bytes), FILE_TIMEOUT_S)
    except asyncio.TimeoutError as error:
        raise DeadlineExceeded(f"{name} of a mirror did not come in time") from error
