"""The metadata that the publication key signs by itself: up to date with what is published and what organizers say.

Decides when it is signed anew: at a start under other keys or targets, with every checkpoint, and once a day to say
that nothing newer exists. Leaves its form to `swarm.metadata`. All of it writes, so it runs on the writer's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone

from coordinator.published import CheckpointRow
from coordinator.run import Run
from coordinator.store import Store
from swarm import manifest, metadata, publication, schedule, witness
from swarm.digest import sha256
from swarm.metadata import Entry, Online, Period
from swarm.proto.checkpoint_pb2 import Roots
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication


def open_metadata(run: Run, store: Store, now_unix_ms: int) -> None:
    """At a start: metadata, and checkpoints, as the organizers' newest root and targets want them."""
    source, online = run.source, _online(store)
    if online is not None and metadata.is_built_on(online, source.offline.targets, source.publisher.public_key):
        return
    rows = store.published.newest_checkpoints(metadata.MAX_CHECKPOINTS)
    rows = [row if _is_signed_by(row, source.publisher.public_key) else _signed_anew(run, row) for row in rows]
    signed = _sign(run, online, [_entry(row) for row in rows], now_unix_ms, _is_ended(run, rows))
    store.published.replace_checkpoints(rows, asdict(signed))


def add(run: Run, store: Store, row: CheckpointRow) -> None:
    """Publish a checkpoint, and say so."""
    online = _online(store)
    known = metadata.entries(online.checkpoints).values() if online is not None else ()
    ended = _is_ended(run, [row, *store.published.newest_checkpoints(1)])  # an earlier round may be published last
    signed = _sign(run, online, [*known, _entry(row)], row.published_unix_ms, ended)
    store.published.add_checkpoint(row, asdict(signed))


def current_files(run: Run, store: Store, now_unix_ms: int) -> dict[str, bytes]:
    """Every file of the run's metadata by name, in the order in which a mirror writes them; renewed where it is due."""
    online = _online(store)
    if online is None:
        open_metadata(run, store, now_unix_ms)
        return current_files(run, store, now_unix_ms)
    if metadata.is_stale(online, _time(now_unix_ms)):
        ended = _is_ended(run, store.published.newest_checkpoints(1))
        online = metadata.renew(online, run.source.publisher, Period(now=_time(now_unix_ms), ended=ended))
        store.published.set_metadata(asdict(online))
    return run.source.offline.files | online.files


def publication_of(run: Run, row: CheckpointRow) -> Publication:
    """What is published of a checkpoint, with the roots where they are more than the run spec says."""
    roots = run.source.offline.roots
    signed = run.publish(publication.ROOTS_CONTEXT, Roots(roots=roots).SerializeToString()) if len(roots) > 1 else None
    return Publication(
        manifest=Signed.FromString(row.signed_manifest), witnesses=Signed.FromString(row.signed_witnesses), roots=signed
    )


def _online(store: Store) -> Online | None:
    found = store.published.metadata()
    return Online(**found) if found else None


def _sign(run: Run, before: Online | None, entries: Sequence[Entry], now_unix_ms: int, ended: bool) -> Online:
    period = Period(now=_time(now_unix_ms), ended=ended)
    return metadata.publish(run.source.offline.targets, before, entries, run.source.publisher, period)


def _entry(row: CheckpointRow) -> Entry:
    return Entry(
        round=row.round,
        manifest_bytes=len(Signed.FromString(row.signed_manifest).payload),
        manifest_digest=row.manifest_digest,
        witnesses_digest=sha256(Signed.FromString(row.signed_witnesses).payload),
    )


def _is_signed_by(row: CheckpointRow, key: bytes) -> bool:
    return bytes(Signed.FromString(row.signed_manifest).signer) == key


def _signed_anew(run: Run, row: CheckpointRow) -> CheckpointRow:
    payloads = {name: Signed.FromString(getattr(row, name)).payload for name in ("signed_manifest", "signed_witnesses")}
    return replace(
        row,
        signed_manifest=run.publish(manifest.CONTEXT, payloads["signed_manifest"]).SerializeToString(),
        signed_witnesses=run.publish(witness.WITNESSES_CONTEXT, payloads["signed_witnesses"]).SerializeToString(),
    )


def _is_ended(run: Run, newest: Sequence[CheckpointRow]) -> bool:
    return any(schedule.is_finished(run.spec, row.total_tokens) for row in newest)


def _time(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms / 1000, timezone.utc)
