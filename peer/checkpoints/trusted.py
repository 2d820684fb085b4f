"""What this machine trusts of a run's published metadata: TUF's client workflow, kept on disk.

Decides which checkpoints a run has published and which key signs them, by roots that follow from the run spec, and
never goes back: versions only grow, a timestamp that has expired is refused, all else is what the timestamp names.
``tuf.ngclient`` walks the workflow; this is its door. Leaves where files come from (the coordinator, a mirror) to the
caller, and the checkpoint itself to `peer.checkpoints.verify`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.ngclient import FetcherInterface, Updater

from swarm import governance, metadata
from swarm.errors import NotFound, VerificationError
from swarm.files import disk_errors
from swarm.manifest import CheckpointManifest
from swarm.metadata import Entry
from swarm.publication import Known, Publication
from swarm.run_spec import RunSpec

Source = Callable[[str], Iterable[bytes]]
"""name of a metadata file -> its bytes in pieces; `NotFound` where there is none"""

_BASE = "run:/"
_FIRST_ROOT = "1.root.json"
_ADVICE = "nothing was changed; try another source, and tell the organizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trusted:
    """The run's newest metadata, verified. ``checkpoints``: what is published, by round."""

    run_id: bytes
    spec: RunSpec
    roots: tuple[bytes, ...]
    checkpoints: Mapping[int, Entry]

    @property
    def newest_round(self) -> int:
        """`NotFound` where nothing is published."""
        if not self.checkpoints:
            raise NotFound("no checkpoint yet is published", "try again later")
        return max(self.checkpoints)

    def check(self, publication: Publication) -> CheckpointManifest:
        """The manifest of ``publication``, once the metadata names exactly it and its witnesses."""
        known = Known(roots=self.roots, checkpoints=self.checkpoints)
        checkpoint = publication.verified(self.run_id, self.spec, known)
        if self.checkpoints.get(checkpoint.round) != publication.entry(checkpoint.round):
            raise VerificationError(
                f"round {checkpoint.round}: the run's metadata names another checkpoint, or none (withdrawn?)", _ADVICE
            )
        return checkpoint


def files_source(files: Mapping[str, bytes]) -> Source:
    """A source that has all files already."""

    def read(name: str) -> Iterator[bytes]:
        if name not in files:
            raise NotFound(f"there is no {name}")
        yield files[name]

    return read


def refresh(folder: Path, run_id: bytes, spec: RunSpec, source: Source) -> Trusted:
    """Bring what ``folder`` holds of this run up to date from ``source``. Blocks.

    Raises `VerificationError` for anything that TUF refuses (`folder` then still holds what was proven), `NotFound`
    where the source lacks a file, `DiskFull`.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            return _refresh(folder, run_id, spec, source)


def known_of(folder: Path, run_id: bytes, spec: RunSpec) -> Known:
    """What ``folder`` holds of this run; nothing where it was never refreshed. It may be old: nobody is asked."""
    roots = _roots(folder)
    key = governance.publication_key(run_id, spec, roots)
    listed = folder / f"{metadata.CHECKPOINTS}.json"
    raw = listed.read_bytes() if roots and listed.exists() else None
    # A refresh may have brought a root and ended before the list that its key signs.
    is_current = raw is not None and metadata.is_signed(raw, key)
    return Known(roots=roots, checkpoints=metadata.entries(raw) if raw is not None and is_current else {})


def _roots(folder: Path) -> tuple[bytes, ...]:
    roots: list[bytes] = []
    for version in range(1, governance.MAX_ROOTS + 1):
        try:
            roots.append((folder / "root_history" / f"{version}.root.json").read_bytes())
        except FileNotFoundError:
            break
    return tuple(roots)


def _refresh(folder: Path, run_id: bytes, spec: RunSpec, source: Source) -> Trusted:
    fetcher = _Fetcher(source, run_id)
    try:
        first = _first_root(folder, run_id, spec, fetcher)
        updater = Updater(str(folder), _BASE, fetcher=fetcher, bootstrap=first)
        updater.refresh()
        updater.get_targetinfo(metadata.manifest_path(0))  # loads the role that names checkpoints
    except ExpiredMetadataError as error:
        raise VerificationError(
            f"the run's metadata: {error}: newer checkpoints are held back, or nobody keeps the run any more",
            "set this machine's clock if it is wrong; try another source, or ask the organizer",
        ) from error
    except DownloadHTTPError as error:
        raise NotFound(f"the run's metadata is not complete: {error}") from error
    except (DownloadError, RepositoryError) as error:
        raise VerificationError(f"the run's metadata: {error}", _ADVICE) from error
    roots = _roots(folder)
    governance.publication_key(run_id, spec, roots)
    checkpoints = metadata.entries((folder / f"{metadata.CHECKPOINTS}.json").read_bytes())
    return Trusted(run_id=run_id, spec=spec, roots=roots, checkpoints=checkpoints)


def _first_root(folder: Path, run_id: bytes, spec: RunSpec, fetcher: _Fetcher) -> bytes:
    """Root 1, which the run spec vouches for."""
    kept = folder / "root_history" / _FIRST_ROOT
    whole = metadata.MAX_FILE_BYTES
    raw = kept.read_bytes() if kept.exists() else fetcher.download_bytes(_BASE + _FIRST_ROOT, whole)
    governance.publication_key(run_id, spec, [raw])
    return raw


class _Fetcher(FetcherInterface):
    """Hands files of this run to the workflow, and no others."""

    def __init__(self, source: Source, run_id: bytes) -> None:
        self._source, self._run_id = source, run_id

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(_BASE)
        raw = bytearray()
        try:
            for piece in self._source(name):
                raw += piece
                if len(raw) > metadata.MAX_FILE_BYTES:
                    raise VerificationError(f"{name} of the run's metadata does not end", _ADVICE)
        except NotFound as error:
            raise DownloadHTTPError(str(error), 404) from error
        metadata.check_run(bytes(raw), self._run_id)
        yield bytes(raw)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One refresh at a time; another process waits, for as long as that takes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
