"""Mirroring: what is published is also written to the targets that the organizer names.

Decides the order (a checkpoint's files first, its manifest and its signature last, so that a half-written mirror is
never believed; then the run's metadata, which says what is published), how often a target is tried, and that nothing is
removed there: old checkpoints stay. What lies at a target complete is not written again. Leaves the way of writing to
`swarm.storage`.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from coordinator.checkpoint_files import PublishedFolder, published_folders
from swarm.derived import derive
from swarm.digest import sha256
from swarm.errors import NetworkError, SwarmError
from swarm.files import TEMPORARY_PREFIX
from swarm.manifest import BF16, MANIFEST_FILE, SIGNATURE_FILE, SPEC_FILE, WITNESSES_FILE, mirror_folder
from swarm.metadata import CHECKPOINTS, entries, mirror_name
from swarm.run_spec import RunSpec
from swarm.storage import Storage

LOOK_INTERVAL_S = 2.0
FIRST_PAUSE_S, LAST_PAUSE_S = 5.0, 600.0
MAX_TRIES = 10  # per checkpoint and target: about half an hour; the next start of the coordinator tries again
METADATA_INTERVAL_S = 60.0
OLDEST_METADATA_S = 3 * 86_400.0  # it lasts 7 days
_LAST = (SPEC_FILE, WITNESSES_FILE, MANIFEST_FILE, SIGNATURE_FILE)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRun:
    """Where the checkpoints of a run lie on this machine."""

    folder: Path
    run_id: bytes
    spec: RunSpec

    def folders(self) -> list[PublishedFolder]:
        return list(published_folders(self.folder, self.run_id, self.spec))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirrored:
    """What became of one checkpoint at one target; ``error`` empty: it is there."""

    round: int
    url: str
    error: str = ""


@dataclass(slots=True)
class _Target:
    storage: Storage
    renewed_s: float
    """when its metadata was written, or its mirroring began"""
    done: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)
    tries: int = 0
    not_before: float = 0.0
    metadata: dict[str, bytes] = field(default_factory=dict)
    """digests of the files that lie there"""


Metadata = Callable[[], Awaitable[Mapping[str, bytes]]]
"""The run's metadata and its signed spec, by file name, in the order in which they are written."""


async def keep_mirrors(
    published: PublishedRun, urls: Sequence[str], on_news: Callable[[Mirrored], object], metadata: Metadata
) -> None:
    """Write every signed checkpoint of ``published``, now and later, and its metadata, to all targets, until cancelled.

    Raises `ConfigError` where a target is none.
    """
    clock = asyncio.get_running_loop().time
    targets = [_Target(Storage(url), clock()) for url in urls]
    asked, files = clock(), await metadata() if targets else {}
    while targets:
        found = await asyncio.to_thread(published.folders)
        if clock() - asked > METADATA_INTERVAL_S or any(one.manifest.round > _newest(files) for one in found):
            asked, files = clock(), await metadata()
        await asyncio.gather(*(_catch_up(target, found, on_news) for target in targets))
        await asyncio.gather(*(_write_metadata(target, files) for target in targets))
        await asyncio.sleep(LOOK_INTERVAL_S)


async def _write_metadata(target: _Target, files: Mapping[str, bytes]) -> None:
    """What the target lacks of the metadata, once it has the newest checkpoint that this names: whoever reads there
    alone would otherwise be told of what is not to be had. Before what lies there expires it is written all the same:
    without it, nothing there can be verified."""
    clock = asyncio.get_running_loop().time
    changed = {name: raw for name, raw in files.items() if target.metadata.get(name) != sha256(raw)}
    is_due = _newest(files) in target.done or clock() - target.renewed_s > OLDEST_METADATA_S
    if not changed or not is_due or clock() < target.not_before:
        return
    try:
        await _beside(partial(_write_files, target.storage, changed))
    except SwarmError as error:
        target.not_before = clock() + FIRST_PAUSE_S
        log.warning("the metadata is not mirrored: %s; next try in %.0f s", error, FIRST_PAUSE_S)
    else:
        target.metadata, target.renewed_s = {name: sha256(raw) for name, raw in files.items()}, clock()


def _write_files(storage: Storage, files: Mapping[str, bytes]) -> None:
    for name, raw in files.items():
        storage.write_bytes(mirror_name(name), raw)


def _newest(files: Mapping[str, bytes]) -> int:
    """The newest round that metadata names; 0: none."""
    named = [raw for name, raw in files.items() if name.endswith(f".{CHECKPOINTS}.json")]
    return max((number for raw in named for number in entries(raw)), default=0)


async def _catch_up(target: _Target, found: Sequence[PublishedFolder], on_news: Callable[[Mirrored], object]) -> None:
    """The next checkpoints that the target lacks, until one fails; that one is tried again after a pause."""
    clock = asyncio.get_running_loop().time
    for one in found:
        number = one.manifest.round
        if number in target.done or number in target.given_up or clock() < target.not_before:
            continue
        try:
            await _beside(partial(write_mirror, target.storage, one))
        except SwarmError as error:
            target.tries += 1
            pause_s = min(FIRST_PAUSE_S * 2**target.tries, LAST_PAUSE_S)
            target.not_before = clock() + pause_s
            if target.tries < MAX_TRIES:
                log.warning("round %d is not mirrored: %s; next try in %.0f s", number, error, pause_s)
                return
            target.given_up.add(number)
            on_news(Mirrored(round=number, url=target.storage.url, error=str(error)))
        else:
            target.done.add(number)
            on_news(Mirrored(round=number, url=target.storage.url))
        target.tries = 0


async def _beside(write: Callable[[], None]) -> None:
    """Run ``write`` in a thread that dies with the process: an upload of gigabytes must not hold up its end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def work() -> None:
        error: BaseException | None = None
        try:
            write()
        except BaseException as caught:
            error = caught
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=work, name="mirroring", daemon=True).start()
    await done


def write_mirror(storage: Storage, one: PublishedFolder) -> None:
    """Write one checkpoint; files that lie there with their size are kept. Blocks; raises `NetworkError`."""
    base = mirror_folder(one.manifest.round)
    listed = [file.name for file in one.manifest.files]
    try:
        here = sorted(path.name for path in one.path.iterdir() if path.is_file())
        beside = [name for name in here if name not in listed and not name.startswith(TEMPORARY_PREFIX)]
        _write_bf16(storage, f"{base}/{BF16}", one)
        names = [*listed, *(name for name in beside if name not in _LAST), *_LAST]
        for name in names:
            path = one.path / name
            if name in _LAST or storage.size(f"{base}/{name}") != path.stat().st_size:
                storage.write(f"{base}/{name}", path)
    except OSError as error:  # the seed peer keeps only the newest: this one may have gone meanwhile
        raise NetworkError(f"{one.path} cannot be read: {error.strerror}") from error


def _write_bf16(storage: Storage, base: str, one: PublishedFolder) -> None:
    """The files that the bf16 set has of its own: nobody keeps them, so each is made for as long as it is
    written, beside the others: what a crash leaves goes with them."""
    for file in one.manifest.bf16:
        if storage.size(f"{base}/{file.name}") == file.size_bytes:
            continue
        with tempfile.NamedTemporaryFile(dir=one.path, prefix=TEMPORARY_PREFIX) as made:
            for chunk in derive(one.path / file.name).chunks():
                made.write(chunk)
            made.flush()
            storage.write(f"{base}/{file.name}", Path(made.name))
