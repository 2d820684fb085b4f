"""Mirroring: what is published is also written to the targets that the organizer names.

Decides the order (a checkpoint's files first, its manifest and its signature last, so that a half-written mirror is
never believed), how often a target is tried, and that nothing is removed there: old checkpoints stay. What lies at a
target complete is not written again. Leaves the way of writing to `swarm.storage`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.checkpoint_files import PublishedFolder, published_folders
from swarm.errors import NetworkError, SwarmError
from swarm.manifest import MANIFEST_FILE, SIGNATURE_FILE, SPEC_FILE, WITNESSES_FILE, mirror_folder
from swarm.run_spec import RunSpec
from swarm.storage import Storage

LOOK_INTERVAL_S = 2.0
FIRST_PAUSE_S, LAST_PAUSE_S = 5.0, 600.0
MAX_TRIES = 10  # per checkpoint and target: about half an hour; the next start of the coordinator tries again
_LAST = (SPEC_FILE, WITNESSES_FILE, MANIFEST_FILE, SIGNATURE_FILE)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirrored:
    """What became of one checkpoint at one target; ``error`` empty: it is there."""

    round: int
    url: str
    error: str = ""


@dataclass(slots=True)
class _Target:
    storage: Storage
    done: set[int] = field(default_factory=set)
    tries: int = 0
    not_before: float = 0.0


async def keep_mirrors(
    folder: Path, run_id: bytes, spec: RunSpec, urls: Sequence[str], on_news: Callable[[Mirrored], object]
) -> None:
    """Write every signed checkpoint of ``folder``, now and later, to every target, until cancelled.

    Raises `ConfigError` where a target is none.
    """
    targets = [_Target(Storage(url)) for url in urls]

    async def look() -> None:
        found = await asyncio.to_thread(lambda: list(published_folders(folder, run_id, spec)))
        await asyncio.gather(*(_catch_up(target, found, on_news) for target in targets))

    while targets:
        await look()
        await asyncio.sleep(LOOK_INTERVAL_S)


async def _catch_up(target: _Target, found: Sequence[PublishedFolder], on_news: Callable[[Mirrored], object]) -> None:
    """The next checkpoints that the target lacks, until one fails; that one is tried again after a pause."""
    clock = asyncio.get_running_loop().time
    for one in found:
        number = one.manifest.round
        if number in target.done or clock() < target.not_before:
            continue
        try:
            await _beside(write_mirror, target.storage, one)
        except SwarmError as error:
            target.tries += 1
            pause_s = min(FIRST_PAUSE_S * 2**target.tries, LAST_PAUSE_S)
            target.not_before = clock() + pause_s
            if target.tries < MAX_TRIES:
                log.warning("round %d is not mirrored: %s; next try in %.0f s", number, error, pause_s)
                return
            on_news(Mirrored(round=number, url=target.storage.url, error=str(error)))
        else:
            on_news(Mirrored(round=number, url=target.storage.url))
        target.tries = 0
        target.done.add(number)


async def _beside(write: Callable[[Storage, PublishedFolder], None], storage: Storage, one: PublishedFolder) -> None:
    """Run ``write`` in a thread that dies with the process: an upload of gigabytes must not hold up its end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def work() -> None:
        error: BaseException | None = None
        try:
            write(storage, one)
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
        beside = sorted(path.name for path in one.path.iterdir() if path.is_file() and path.name not in listed)
        names = [*listed, *(name for name in beside if name not in _LAST), *_LAST]
        for name in names:
            path = one.path / name
            if name in _LAST or storage.size(f"{base}/{name}") != path.stat().st_size:
                storage.write(f"{base}/{name}", path)
    except OSError as error:  # the seed peer keeps only the newest: this one may have gone meanwhile
        raise NetworkError(f"{one.path} cannot be read: {error.strerror}") from error
