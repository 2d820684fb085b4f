"""What a publication key signed that organizers replaced: good while the new one lists it, and nothing more."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from peer.checkpoints import trusted
from peer.checkpoints.checkpoint import write_signed
from peer.checkpoints.download import Order, download
from peer.checkpoints.filling import Fetching
from peer.checkpoints.sources import PeerSource
from peer.checkpoints.trusted import files_source, known_of, refresh
from peer.checkpoints.verify import Report, verify_folder
from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import FetchLimits
from swarm.checkpoint_chunks import FileChunks
from swarm.errors import NotFound, SignatureError
from swarm.identity import Identity
from swarm.manifest import ROOTS_FILE
from swarm.proto.checkpoint_pb2 import Roots
from swarm.publication import ROOTS_CONTEXT, Publication
from tests.checkpoint_samples import (
    ORGANIZER,
    PUBLISHER,
    WITNESSES,
    FakeTransport,
    make_parts,
    publication_of,
    small_checkpoint,
)
from tests.metadata_samples import Repository

THIEF = Identity(b"t" * 32)
NEW_PUBLISHER = Identity(b"n" * 32)


@dataclass
class Rotated:
    """Rounds 10 and 20 were published, then another key took over; ``listed`` says what it goes on to vouch for."""

    tmp_path: Path
    listed: tuple[int, ...] = (10, 20)

    def __post_init__(self) -> None:
        self.made = {number: small_checkpoint(self.tmp_path / f"c-{number}", number) for number in (10, 20, 30)}
        self.repository = Repository(make_parts().spec, (ORGANIZER,), PUBLISHER)
        for number in (10, 20):
            self.repository.publish(self.made[number].publication, number)
        self.refresh()
        self.repository.entries = [entry for entry in self.repository.entries if entry.round in self.listed]
        self.repository.change([ORGANIZER], publisher=NEW_PUBLISHER)

    def refresh(self) -> trusted.Trusted:
        spec = self.repository.spec
        return refresh(self.tmp_path / "t", spec.run_id, spec, files_source(self.repository.files))

    def verify(self, number: int) -> bool:
        made = self.made[number]
        return verify_folder(made.folder, made.run_id, known_of=partial(known_of, self.tmp_path / "t")).ok

    def signed_anew(self, number: int) -> Publication:
        """As the coordinator hands out a checkpoint of before, with the key that took over."""
        made = self.made[number]
        roots = Roots(roots=self.refresh().roots).SerializeToString()
        renewed = publication_of(made.signed_manifest.payload, made.run_id, publisher=NEW_PUBLISHER)
        return replace(renewed, roots=NEW_PUBLISHER.sign(ROOTS_CONTEXT, made.run_id, roots))

    def download(self, publication: Publication) -> Report:
        """Round 10, with the signatures that ``publication`` offers."""
        made = self.made[10]
        store = ChunkStore(self.tmp_path / "store", 0, read_in_thread=False)
        store.add_source(FileChunks(made.folder, made.manifest))
        order = Order(
            run_id=made.run_id,
            signed_spec=made.signed_spec,
            publication=publication,
            target=self.tmp_path / "out",
            known_of=partial(known_of, self.tmp_path / "t"),
        )
        source = PeerSource(FakeTransport({b"a" * 32: store.handle_chunk}), b"a" * 32)
        limits = FetchLimits(timeout_s=5, retry_pause_s=0)
        return asyncio.run(download(order, Fetching(sources=[source], limits=limits)))


def test_what_a_replaced_key_signed_verifies_while_the_new_key_lists_it(tmp_path: Path) -> None:
    rotated = Rotated(tmp_path)
    trusted_now = rotated.refresh()
    assert rotated.verify(10) and rotated.verify(20)
    assert trusted_now.check(rotated.made[10].publication).round == 10
    rotated.repository.change([ORGANIZER], publisher=THIEF)
    rotated.refresh()
    assert rotated.verify(10)


def test_what_a_replaced_key_signs_later_is_refused_by_who_has_heard_of_it(tmp_path: Path) -> None:
    rotated = Rotated(tmp_path)
    assert rotated.verify(30)  # nobody here knows yet that the key is no longer the run's
    rotated.refresh()
    with pytest.raises(SignatureError, match="replaced"):
        rotated.verify(30)


def test_what_the_new_key_does_not_list_any_more_is_refused(tmp_path: Path) -> None:
    """Organizers who withdraw what a thief published leave it out."""
    rotated = Rotated(tmp_path, listed=(10,))
    rotated.refresh()
    assert rotated.verify(10)
    with pytest.raises(SignatureError, match="does not list it"):
        rotated.verify(20)


@pytest.mark.parametrize("what", ["manifest", "witnesses"])
def test_another_checkpoint_in_the_place_of_a_listed_one_is_refused(tmp_path: Path, what: str) -> None:
    """The thief of a replaced key signs other bytes for a round that the new key lists."""
    rotated = Rotated(tmp_path)
    rotated.refresh()
    made = rotated.made[10]
    changed = made.manifest.model_copy(update={"total_tokens": 501} if what == "manifest" else {})
    signers = WITNESSES[:2] if what == "manifest" else WITNESSES[1:]
    forged = publication_of(changed.canonical_bytes(), made.run_id, signers=signers)
    write_signed(made.folder, forged, made.signed_spec)
    with pytest.raises(SignatureError, match="replaced"):
        rotated.verify(10)


def test_a_list_that_the_replaced_key_signed_vouches_for_nothing(tmp_path: Path) -> None:
    """A refresh that brought the new root and then ended: what lies here is still the old key's list."""
    rotated = Rotated(tmp_path)
    files = {name: raw for name, raw in rotated.repository.files.items() if name.endswith("root.json")}
    with pytest.raises(NotFound):
        refresh(tmp_path / "t", rotated.repository.spec.run_id, rotated.repository.spec, files_source(files))
    known = known_of(tmp_path / "t", rotated.repository.spec.run_id, rotated.repository.spec)
    assert len(known.roots) == 2 and (tmp_path / "t" / "checkpoints.json").exists()
    with pytest.raises(SignatureError, match="replaced"):
        rotated.verify(10)


def test_a_folder_that_the_new_key_signed_stays_as_it_is_where_a_mirror_offers_the_replaced_keys_signatures(
    tmp_path: Path,
) -> None:
    rotated = Rotated(tmp_path)
    renewed = rotated.signed_anew(10)
    folder = rotated.download(renewed).folder
    again = rotated.download(rotated.made[10].publication)
    assert again.provenance.publication == renewed
    assert verify_folder(folder, rotated.made[10].run_id).ok


def test_a_folder_of_the_replaced_key_takes_the_new_keys_signatures(tmp_path: Path) -> None:
    rotated = Rotated(tmp_path)
    renewed = rotated.signed_anew(10)
    folder = rotated.download(rotated.made[10].publication).folder
    assert rotated.download(renewed).provenance.publication == renewed
    assert (folder / ROOTS_FILE).exists() and verify_folder(folder, rotated.made[10].run_id).ok


def test_a_damaged_folder_of_the_new_key_is_whole_again_with_the_replaced_keys_signatures(tmp_path: Path) -> None:
    """Roots that stayed beside them would lead to another key than the one that signed."""
    rotated = Rotated(tmp_path)
    folder = rotated.download(rotated.signed_anew(10)).folder
    (folder / "config.json").write_bytes(b"{}")
    assert rotated.download(rotated.made[10].publication).ok
    assert not (folder / ROOTS_FILE).exists() and verify_folder(folder, rotated.made[10].run_id).ok
