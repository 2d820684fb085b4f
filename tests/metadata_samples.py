"""A run's TUF metadata in memory, as organizers and a coordinator make it, for the tests of those who read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from swarm import governance, metadata
from swarm.digest import sha256
from swarm.governance import Change, Offline
from swarm.identity import Identity
from swarm.manifest import SPEC_FILE
from swarm.metadata import Entry, Online, Period
from swarm.publication import Publication
from swarm.run_spec import RunSpec
from tests.checkpoint_samples import ORGANIZER, PUBLISHER, SignedCheckpoint


def first_offline(spec: RunSpec, organizers: Sequence[Identity], now: datetime) -> Offline:
    change = governance.propose(spec.run_id, governance.governance_of(spec), 1, now)
    return governance.first(spec.run_id, spec, signed(change, organizers))


def signed(change: Change, organizers: Sequence[Identity]) -> Change:
    for organizer in organizers:
        change = governance.sign(change, organizer)
    return change


@dataclass
class Repository:
    """``now``: when everything is signed; ``files``: what is served, by name."""

    spec: RunSpec
    organizers: tuple[Identity, ...]
    publisher: Identity
    now: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    online: Online | None = None

    def __post_init__(self) -> None:
        self.offline = first_offline(self.spec, self.organizers, self.now)
        self.entries: list[Entry] = []
        self.sign()

    @property
    def files(self) -> dict[str, bytes]:
        assert self.online is not None
        return self.offline.files | self.online.files

    def sign(self) -> None:
        period = Period(now=self.now)
        self.online = metadata.publish(self.offline.targets, self.online, self.entries, self.publisher, period)

    def add(self, round_number: int) -> None:
        """A checkpoint of which only digests are known."""
        manifest = b"manifest %d" % round_number
        self._add(round_number, manifest, b"witnesses")

    def publish(self, publication: Publication, round_number: int) -> None:
        self._add(round_number, publication.manifest.payload, publication.witnesses.payload)

    def change(
        self,
        by: Sequence[Identity],
        organizers: Sequence[Identity] | None = None,
        publisher: Identity | None = None,
        threshold: int | None = None,
    ) -> None:
        """Another root, signed by ``by``."""
        before = governance.describe(self.offline.roots[-1])
        after = replace(
            before,
            version=before.version + 1,
            organizers=tuple(who.public_key for who in organizers or self.organizers),
            threshold=threshold or before.threshold,
            publication_key=(publisher or self.publisher).public_key,
        )
        change = governance.propose(self.spec.run_id, after, self.offline.targets_version + 1, self.now)
        self.offline = governance.adopt(self.spec.run_id, self.offline, signed(change, by))
        self.organizers, self.publisher = tuple(organizers or self.organizers), publisher or self.publisher
        self.sign()

    def _add(self, round_number: int, manifest: bytes, witnesses: bytes) -> None:
        entry = Entry(
            round=round_number,
            manifest_bytes=len(manifest),
            manifest_digest=sha256(manifest),
            witnesses_digest=sha256(witnesses),
        )
        self.entries.append(entry)
        self.sign()


def mirror_metadata(folder: Path, spec: RunSpec, made: Mapping[int, SignedCheckpoint]) -> None:
    """Beside these checkpoints on a mirror, what says that they are published, as a coordinator mirrors it."""
    repository = Repository(spec, (ORGANIZER,), PUBLISHER)
    for number, each in made.items():
        repository.publish(each.publication, number)
    (folder / "metadata").mkdir(parents=True)
    for name, raw in repository.files.items():
        (folder / "metadata" / name).write_bytes(raw)
    signed_spec = next(iter(made.values())).signed_spec
    (folder / "metadata" / SPEC_FILE).write_bytes(signed_spec.SerializeToString())
