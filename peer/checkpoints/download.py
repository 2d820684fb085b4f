"""Downloading a checkpoint: from many holders at once, every chunk checked before it is written, resumed at will.

Decides where a checkpoint lies: ``TARGET/round-000010`` (its bf16 set: ``round-000010-bf16``), built in a folder
``TARGET/.partial-10`` and renamed when every byte and signature was verified in place. A target holds one run. A newer
round that lies there already is never replaced by an older "newest" (rollback), unless the person names the older
round. Nothing outside the target is written. Leaves filling the files to `peer.checkpoints.filling` and starting the
network to the caller.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from peer.checkpoints.checkpoint import write_signed
from peer.checkpoints.filling import Fetching, fill
from peer.checkpoints.sets import BF16_ENDING
from peer.checkpoints.verify import (
    KnownOf,
    Provenance,
    Report,
    check_provenance,
    knows_nothing,
    read_provenance,
    verify_folder,
)
from peer.p2p.fetch import MAX_HOLDERS
from peer.p2p.transport import Transport
from peer.rounds.statuses import StatusRules, read_statuses, status_key
from swarm.errors import AlreadyRunning, ConfigError, DataError, NetworkError, SwarmError, VerificationError
from swarm.files import TEMPORARY_PREFIX, disk_errors, fsync_folder
from swarm.manifest import BF16, FP32, MANIFEST_FILE
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication, parse_roots

MAX_TARGET_ENTRIES = 10_000
CONNECT_TIMEOUT_S = 10.0
_ROUND_FOLDER = re.compile(rf"round-([0-9]{{6,19}})({BF16_ENDING})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to download and where to. ``any_round``: the person asked for this very round, however old it is.

    ``dtype``: which of the checkpoint's sets.
    """

    run_id: bytes
    signed_spec: Signed
    publication: Publication
    target: Path
    dtype: str = FP32
    any_round: bool = False
    known_of: KnownOf = knows_nothing


def round_folder(target: Path, round_number: int, dtype: str = FP32) -> Path:
    """Where the checkpoint of this round lies once it is complete."""
    return target / (f"round-{round_number:06d}" + _ending(dtype))


def _ending(dtype: str) -> str:
    return BF16_ENDING if dtype == BF16 else ""


async def download(order: Order, fetching: Fetching) -> Report:
    """Fetch the checkpoint and verify it in place; the report names its folder. What an earlier attempt left is
    checked and kept.

    Raises `VerificationError` (signature, rollback), `ConfigError` (the target holds another run), `AlreadyRunning`,
    `DiskFull`, `NotFound` (run it again later: it resumes), `DataError` (the checkpoint has no such set).
    """
    provenance = check_provenance(order.signed_spec, order.publication, order.run_id, order.known_of)
    manifest = provenance.manifest
    files = manifest.file_set(order.dtype)
    final = round_folder(order.target, manifest.round, order.dtype)
    partial = order.target / f".partial-{manifest.round}{_ending(order.dtype)}"
    held = held_checkpoints(order.target)
    refuse_rollback(order.target, held, provenance, order.any_round)
    complete = await asyncio.to_thread(_complete_report, final, provenance, order.dtype)
    if complete is not None:
        fetching.tally.on_progress(files.size_bytes, files.size_bytes)
        return await asyncio.to_thread(_signed_anew, complete, provenance, order)
    with disk_errors(order.target):
        order.target.mkdir(parents=True, exist_ok=True)
        with locked(order.target), disk_errors(partial):
            _open_partial(partial, final)
            earlier = [(folder, found.manifest) for folder, found in held.items() if folder != final]
            await fill(partial, files, earlier, fetching)
            return await asyncio.to_thread(_finish, partial, final, order)


async def find_holders(transport: Transport, rules: StatusRules, round_number: int, now_unix_s: float) -> list[bytes]:
    """Who may have this round: the founders (seed peers), then peers that say so and can be reached.

    One shard's directory is enough: whoever serves a checkpoint serves all of it.
    """
    try:
        statuses = read_statuses(await transport.lookup(status_key(0)), rules, now_unix_s)
    except NetworkError:
        statuses = {}  # the seed peers alone will do
    known = [
        (peer, status)
        for peer, status in sorted(statuses.items())
        if status.checkpoint_round >= round_number and peer not in (*rules.founders, transport.public_key)
    ][:MAX_HOLDERS]
    reached = await asyncio.gather(*(_is_reachable(transport, peer, tuple(s.addresses)) for peer, s in known))
    return [*rules.founders, *(peer for (peer, _), ok in zip(known, reached, strict=True) if ok)]


async def _is_reachable(transport: Transport, peer: bytes, addresses: tuple[str, ...]) -> bool:
    try:
        await transport.connect(peer, addresses, timeout_s=CONNECT_TIMEOUT_S)
    except NetworkError:
        return False
    return True


def refuse_rollback(target: Path, found: Mapping[Path, Provenance], offered: Provenance, any_round: bool) -> None:
    """Raise `ConfigError` where ``target`` holds another run, `VerificationError` where it holds a newer round."""
    for held in found.values():
        if held.run_id != offered.run_id:
            raise ConfigError(
                f"{target} holds a checkpoint of another run ({held.manifest.run_name})", "choose another --out folder"
            )
        if held.manifest.round > offered.manifest.round and not any_round:
            raise VerificationError(
                f"round {offered.manifest.round} is offered as the newest, but {target} holds round "
                f"{held.manifest.round}: a checkpoint was withdrawn, or somebody is holding back newer ones",
                f"name the round (INVITE@{offered.manifest.round}) if you want this one",
            )


def held_checkpoints(target: Path) -> dict[Path, Provenance]:
    """Checkpoints in ``target`` whose signatures verify, by folder; anything else there is passed over."""
    found = {}
    for count, path in enumerate(target.iterdir() if target.is_dir() else ()):
        if count >= MAX_TARGET_ENTRIES:
            raise ConfigError(f"{target} has more than {MAX_TARGET_ENTRIES} entries", "choose another --out folder")
        if _ROUND_FOLDER.fullmatch(path.name):
            try:
                found[path] = read_provenance(path, None)
            except SwarmError:
                continue
    return found


def _complete_report(final: Path, wanted: Provenance, dtype: str) -> Report | None:
    """The report on ``final`` where it is this very checkpoint without a flaw."""
    if not (final / MANIFEST_FILE).is_file():
        return None
    try:
        report = verify_folder(final, wanted.run_id)
    except (DataError, VerificationError):
        return None
    is_wanted = report.provenance.manifest == wanted.manifest and report.files.dtype == dtype
    return report if report.ok and is_wanted else None


def _signed_anew(complete: Report, offered: Provenance, order: Order) -> Report:
    """The report once the folder holds the signatures on offer: a key that was replaced has others than before.

    A mirror may offer those of the replaced key still: what lies here by a newer key stays.
    """
    if complete.provenance.publication == offered.publication:
        return complete
    if _num_roots(complete.provenance) > _num_roots(offered):
        with suppress(VerificationError):
            return replace(complete, provenance=read_provenance(complete.folder, order.run_id, order.known_of))
    with disk_errors(order.target), locked(order.target):
        write_signed(complete.folder, order.publication, order.signed_spec)
        return replace(complete, provenance=read_provenance(complete.folder, order.run_id, order.known_of))


def _num_roots(provenance: Provenance) -> int:
    return len(parse_roots(provenance.publication.roots, provenance.run_id, provenance.spec))


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One download at a time per target; the lock ends with the process, also after SIGKILL."""
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(
                f"another download writes into {target}", "wait for it, or choose another --out folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _open_partial(partial: Path, final: Path) -> None:
    """Make the working folder; a damaged checkpoint becomes one, so that only what is damaged is fetched again."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise ConfigError(f"{partial} is no folder", "move it away and try again")
    if final.exists():
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(final, partial)
    partial.mkdir(exist_ok=True)
    for leftover in partial.glob(TEMPORARY_PREFIX + "*"):
        leftover.unlink()


def _finish(partial: Path, final: Path, order: Order) -> Report:
    """Sign off: everything on disk, read back and verified, then one rename."""
    write_signed(partial, order.publication, order.signed_spec)
    for path in partial.iterdir():
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    report = verify_folder(partial, order.run_id)
    report.require_ok()
    os.replace(partial, final)
    fsync_folder(order.target)
    return replace(report, folder=final)
