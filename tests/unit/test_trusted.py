"""What a client believes of a run's metadata: the attacks of TUF's specification, against a repository in memory."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from peer.checkpoints import mirrored, trusted
from peer.checkpoints.checkpoint import write_signed
from peer.checkpoints.trusted import Source, files_source, known_of, refresh
from peer.checkpoints.verify import verify_folder
from swarm import governance, metadata
from swarm.errors import (
    DeadlineExceeded,
    DigestError,
    NotFound,
    SignatureError,
    SwarmError,
    VerificationError,
)
from swarm.governance import Change
from swarm.identity import Identity
from swarm.manifest import SPEC_FILE
from swarm.metadata import Online, Period, mirror_name
from swarm.proto.checkpoint_pb2 import Roots
from swarm.publication import Known
from swarm.run_spec import CONTEXT, RunSpec
from tests.checkpoint_samples import (
    ORGANIZER,
    PUBLISHER,
    data_manifest,
    make_parts,
    make_spec,
    publication_of,
    small_checkpoint,
)
from tests.metadata_samples import Repository, signed

BEA, CARL = (Identity(bytes([number]) * 32) for number in (1, 2))
THIEF = Identity(b"t" * 32)
NEW_PUBLISHER = Identity(b"n" * 32)
NOW = datetime.now(timezone.utc)


def governed_spec(threshold: int = 2) -> RunSpec:
    rules = {"organizers": [BEA.public_key.hex(), CARL.public_key.hex()], "threshold": threshold}
    return RunSpec.model_validate(make_spec(data_manifest()).model_dump() | {"governance": rules})


SPEC = governed_spec()


@dataclass
class World:
    """A run that three people govern, two of whom must sign; a client that saw rounds 10 and 20."""

    folder: Path

    def __post_init__(self) -> None:
        self.repository = Repository(SPEC, (ORGANIZER, BEA, CARL), PUBLISHER)
        self.repository.add(10)
        self.old_files = self.repository.files
        self.repository.add(20)
        self.refresh(self.repository.files)

    def refresh(self, files: dict[str, bytes] | Source | Stalling) -> trusted.Trusted:
        if isinstance(files, Stalling):
            return asyncio.run(mirrored.trusted_by(files, self.folder, SPEC.run_id))[1]
        source = files_source(files) if isinstance(files, dict) else files
        return refresh(self.folder, SPEC.run_id, SPEC, source)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "trusted")


def arbitrary_installation(world: World) -> dict[str, bytes]:
    world.repository.publisher = THIEF
    world.repository.add(30)
    return world.repository.files


def endless(name: str) -> Callable[[World], Source]:
    def attack(world: World) -> Source:
        world.repository.add(30)
        honest = files_source(world.repository.files)

        def source(asked: str) -> Iterator[bytes]:
            return itertools.repeat(b" " * 100_000) if asked.endswith(name) else iter(honest(asked))

        return source

    return attack


def extraneous_dependencies(world: World) -> dict[str, bytes]:
    """The publication key names more than checkpoints."""
    world.repository.add(30)
    assert world.repository.online is not None
    checkpoints = world.repository.online.checkpoints.replace(
        b"checkpoints/30/swarm-manifest", b"checkpoints/30/code.py-"
    )
    return with_online(world, resigned(checkpoints))


def fast_forward(world: World) -> dict[str, bytes]:
    """A thief of the publication key counts the versions far up; the organizers then replace the key."""
    honest = world.repository.online
    for _ in range(50):
        world.repository.sign()
    world.refresh(world.repository.files)
    world.repository.online = honest
    world.repository.change([ORGANIZER, BEA], publisher=NEW_PUBLISHER)
    return world.repository.files


def indefinite_freeze(world: World) -> dict[str, bytes]:
    world.repository.now = NOW - timedelta(days=8)
    world.repository.add(30)
    return world.repository.files


def malicious_mirror_preventing_updates(world: World) -> dict[str, bytes]:
    return {}


def mix_and_match_snapshot(world: World) -> dict[str, bytes]:
    """An old snapshot under the name of the new one."""
    world.repository.add(30)
    old = next(raw for name, raw in world.old_files.items() if name.endswith("snapshot.json"))
    return {name: old if name.endswith("snapshot.json") else raw for name, raw in world.repository.files.items()}


def mix_and_match_checkpoints(world: World) -> dict[str, bytes]:
    world.repository.add(30)
    old = next(raw for name, raw in world.old_files.items() if "checkpoints" in name)
    return {name: old if "checkpoints" in name else raw for name, raw in world.repository.files.items()}


def rollback_all(world: World) -> dict[str, bytes]:
    return world.old_files


def rollback_checkpoints(world: World) -> dict[str, bytes]:
    """With the publication key: a new timestamp over an older list."""
    assert world.repository.online is not None
    old = next(raw for name, raw in world.old_files.items() if "checkpoints" in name)
    return with_online(world, replace(world.repository.online, checkpoints=old))


def mix_and_match_as_long(world: World) -> dict[str, bytes]:
    """With the publication key: a list of another digest, as long and as new as the one that the snapshot names."""
    world.repository.add(30)
    named = next(raw for name, raw in world.repository.files.items() if "checkpoints" in name)
    digest = world.repository.entries[-1].manifest_digest.hex().encode()
    other = resigned(named.replace(digest, digest[::-1])).checkpoints
    assert len(other) == len(named) and other != named
    return {name: other if "checkpoints" in name else raw for name, raw in world.repository.files.items()}


@dataclass
class Stalling:
    """A mirror that sends what it must to be asked for more, and then next to nothing."""

    files: dict[str, bytes]

    async def file(self, name: str, max_bytes: int) -> bytes:
        if name.endswith("timestamp.json"):
            await asyncio.sleep(3600)
        if name not in self.files:
            raise NotFound(name)
        return self.files[name]


def slow_retrieval(world: World) -> Stalling:
    spec = ORGANIZER.sign(CONTEXT, SPEC.run_id, SPEC.canonical_bytes()).SerializeToString()
    return Stalling({mirror_name(name): raw for name, raw in {**world.repository.files, SPEC_FILE: spec}.items()})


def key_compromise(world: World) -> dict[str, bytes]:
    """One stolen organizer's key of the two that are needed, and the publication key."""
    return forged_root(world, [ORGANIZER, THIEF], organizers=[THIEF])


def key_compromise_threshold(world: World) -> dict[str, bytes]:
    return forged_root(world, [ORGANIZER], threshold=1)


def key_compromise_unaccepted(world: World) -> dict[str, bytes]:
    """Signed by those of before, and not by those who shall follow."""
    return forged_root(world, [ORGANIZER, BEA], organizers=[CARL, THIEF])


def skipped_root(world: World) -> dict[str, bytes]:
    world.repository.change([ORGANIZER, BEA], publisher=NEW_PUBLISHER)
    files = world.repository.files
    return {**files, "2.root.json": files["1.root.json"]}


def wrong_software(world: World) -> dict[str, bytes]:
    """All of it is right, but it is that of another run of the same people."""
    other = SPEC.model_copy(update={"seed": 1})
    repository = Repository(other, (ORGANIZER, BEA, CARL), PUBLISHER)
    for number in (10, 20, 30):
        repository.add(number)
    return repository.files


def resigned(checkpoints: bytes) -> Online:
    """``checkpoints`` signed by the publication key as they are, and a snapshot over them."""
    read = metadata.read(checkpoints, metadata.Targets)
    read.signatures.clear()
    metadata.add_signature(read, PUBLISHER)
    return Online(checkpoints=read.to_bytes(), snapshot=b"", timestamp=b"")


def with_online(world: World, online: Online) -> dict[str, bytes]:
    """The publication key signs a newer snapshot and timestamp over these checkpoints."""
    before = world.repository.online
    assert before is not None
    snapshot = metadata.read(before.snapshot, metadata.Snapshot)
    snapshot.signed.version += 1
    snapshot.signed.meta["checkpoints.json"] = metadata._meta(online.checkpoints)
    snapshot.signatures.clear()
    metadata.add_signature(snapshot, PUBLISHER)
    whole = replace(online, snapshot=snapshot.to_bytes(), timestamp=before.timestamp)
    return world.repository.offline.files | metadata.renew(whole, PUBLISHER, Period(now=NOW)).files


def forged_root(
    world: World, by: list[Identity], organizers: list[Identity] | None = None, threshold: int = 2
) -> dict[str, bytes]:
    before = governance.describe(world.repository.offline.roots[-1])
    keys = tuple(who.public_key for who in organizers) if organizers else before.organizers
    said = replace(before, version=2, organizers=keys, threshold=min(threshold, len(keys)))
    change = signed(governance.propose(SPEC.run_id, said, 2, NOW), by)
    return world.repository.files | {"2.root.json": change.root}


Attack = Callable[[World], dict[str, bytes] | Source | Stalling]
# The names of TUF's specification, version 1.0.30, "Goals to protect against specific attacks".
SPECIFIED = {
    "arbitrary installation",
    "endless data",
    "extraneous dependencies",
    "fast-forward",
    "indefinite freeze",
    "malicious mirrors preventing updates",
    "mix-and-match",
    "rollback",
    "vulnerability to key compromises",
    "wrong software installation",
}
ATTACKS: dict[str, tuple[Attack, type[SwarmError], str]] = {
    "arbitrary installation": (arbitrary_installation, VerificationError, "signed by 0/1 keys"),
    "endless data: timestamp": (endless("timestamp.json"), VerificationError, "does not end"),
    "endless data: snapshot": (endless("snapshot.json"), VerificationError, "does not end"),
    "endless data: checkpoints": (endless("checkpoints.json"), VerificationError, "does not end"),
    "endless data: root": (endless("root.json"), VerificationError, "does not end"),
    "extraneous dependencies": (extraneous_dependencies, VerificationError, "which is no checkpoint"),
    "indefinite freeze": (indefinite_freeze, VerificationError, "timestamp.json is expired"),
    "malicious mirrors preventing updates": (malicious_mirror_preventing_updates, NotFound, "not complete"),
    "mix-and-match: snapshot": (mix_and_match_snapshot, VerificationError, "expected length"),
    "mix-and-match: checkpoints": (mix_and_match_checkpoints, VerificationError, "expected length"),
    "mix-and-match: as long": (mix_and_match_as_long, VerificationError, "expected hash"),
    "rollback: everything": (rollback_all, VerificationError, "must be >="),
    "rollback: checkpoints": (rollback_checkpoints, VerificationError, "Expected checkpoints.json version"),
    "slow retrieval": (slow_retrieval, DeadlineExceeded, "did not come in time"),
    "vulnerability to key compromises: too few": (key_compromise, VerificationError, "1/2 keys"),
    "vulnerability to key compromises: a lower threshold": (key_compromise_threshold, VerificationError, "1/2 keys"),
    "vulnerability to key compromises: not accepted": (key_compromise_unaccepted, VerificationError, "0/2 keys"),
    "vulnerability to key compromises: a root left out": (skipped_root, VerificationError, "Expected root version 2"),
    "wrong software installation": (wrong_software, VerificationError, "of another run"),
}
UNDONE = {"fast-forward"}  # versions may be counted up by whoever has the key: that is undone, not refused
BESIDES = {"slow retrieval"}  # of earlier versions of the specification


def test_every_attack_that_the_specification_names_is_tried() -> None:
    assert {name.partition(":")[0] for name in ATTACKS} | UNDONE == SPECIFIED | BESIDES


@pytest.mark.parametrize(("attack", "error", "words"), ATTACKS.values(), ids=ATTACKS.keys())
def test_an_attack_is_refused_and_the_client_goes_on_with_honest_files(
    world: World, monkeypatch: pytest.MonkeyPatch, attack: Attack, error: type[SwarmError], words: str
) -> None:
    monkeypatch.setattr(mirrored, "FILE_TIMEOUT_S", 0.2)
    attacked = copy.copy(world)
    attacked.repository = copy.deepcopy(world.repository)
    with pytest.raises(error, match=words):
        world.refresh(attack(attacked))
    for number in (30, 40, 50):
        world.repository.add(number)
    assert sorted(world.refresh(world.repository.files).checkpoints) == [10, 20, 30, 40, 50]


def test_fast_forward_is_undone_by_a_new_publication_key(world: World) -> None:
    assert world.refresh(fast_forward(world)).newest_round == 20
    world.repository.add(30)
    assert world.refresh(world.repository.files).newest_round == 30


def test_new_checkpoints_appear_and_nothing_new_is_fine_too(world: World) -> None:
    assert sorted(world.refresh(world.repository.files).checkpoints) == [10, 20]
    world.repository.add(30)
    found = world.refresh(world.repository.files)
    assert (found.newest_round, len(found.roots)) == (30, 1)


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    files = Repository(SPEC, (ORGANIZER, BEA), PUBLISHER).files
    with pytest.raises(NotFound, match="no checkpoint"):
        _ = refresh(tmp_path / "t", SPEC.run_id, SPEC, files_source(files)).newest_round


def test_keys_are_rotated_by_enough_organizers_and_clients_follow(world: World) -> None:
    repository = world.repository
    repository.change([ORGANIZER, CARL], publisher=NEW_PUBLISHER)
    repository.change([BEA, CARL, THIEF], organizers=[BEA, CARL, THIEF])
    repository.change([THIEF, BEA, CARL], threshold=3)
    repository.add(30)
    found = world.refresh(repository.files)
    assert found.newest_round == 30 and len(found.roots) == 4
    said = governance.describe(found.roots[-1])
    assert (said.threshold, said.publication_key) == (3, NEW_PUBLISHER.public_key)
    assert known_of(world.folder, SPEC.run_id, SPEC) == Known(roots=found.roots, checkpoints=found.checkpoints)


FIRST_ROOTS: dict[str, dict[str, object]] = {
    "other organizers": {"organizers": (ORGANIZER.public_key, BEA.public_key, THIEF.public_key)},
    "a lower threshold": {"threshold": 1},
    "another publication key": {"publication_key": THIEF.public_key},
    "another version": {"version": 2},
}


@pytest.mark.parametrize("changes", FIRST_ROOTS.values(), ids=FIRST_ROOTS.keys())
def test_a_first_root_that_is_not_the_run_specs_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    """The invite pins the run id, that the spec, and the spec the first root."""
    said = replace(governance.governance_of(SPEC), **changes)  # type: ignore[arg-type]
    forged = signed(governance.propose(SPEC.run_id, said, 1, NOW), [ORGANIZER, BEA, THIEF])
    files = Repository(SPEC, (ORGANIZER, BEA), PUBLISHER).files | {"1.root.json": forged.root}
    with pytest.raises(VerificationError, match="run spec"):
        refresh(tmp_path / "t", SPEC.run_id, SPEC, files_source(files))


def test_a_first_root_that_too_few_signed_is_refused(tmp_path: Path) -> None:
    change = signed(governance.propose(SPEC.run_id, governance.governance_of(SPEC), 1, NOW), [ORGANIZER])
    assert governance.missing_signatures(change, None) == (sorted([BEA.public_key, CARL.public_key]), 1)
    with pytest.raises(SignatureError, match="1/2"):
        governance.first(SPEC.run_id, SPEC, change)


def test_one_key_under_two_names_does_not_count_twice() -> None:
    change = governance.propose(SPEC.run_id, governance.governance_of(SPEC), 1, NOW)
    twice = change.root.replace(f'"{BEA.public_key.hex()}":{{'.encode(), b'"%s":{' % (b"0" * 64))
    twice = twice.replace(f'"{BEA.public_key.hex()}"'.encode(), f'"{ORGANIZER.public_key.hex()}"'.encode())
    with pytest.raises((VerificationError, SwarmError)):
        governance.first(SPEC.run_id, SPEC, signed(Change(root=twice, targets=change.targets), [ORGANIZER]))


def test_a_change_survives_its_file_and_a_file_of_nonsense_is_refused() -> None:
    change = signed(governance.propose(SPEC.run_id, governance.governance_of(SPEC), 1, NOW), [ORGANIZER, BEA])
    run_id, read = Change.from_json(change.to_json(SPEC.run_id))
    assert run_id == SPEC.run_id and governance.first(SPEC.run_id, SPEC, read)
    for bad in (b"", b"{}", b"[1]", b'{"run_id": "zz"}', change.to_json(b"x" * 20), b"[" * 100_000):
        with pytest.raises(SwarmError):
            Change.from_json(bad)


# ---- what the metadata says of a checkpoint -------------------------------------------------------------------------


def test_a_checkpoint_is_the_one_that_the_metadata_names(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    spec = make_parts().spec
    repository = Repository(spec, (ORGANIZER,), PUBLISHER)
    repository.publish(made.publication, 10)
    found = refresh(tmp_path / "t", spec.run_id, spec, files_source(repository.files))
    assert found.check(made.publication) == made.manifest
    own = [Identity(b"w" * 32)]
    others = publication_of(made.signed_manifest.payload, made.run_id, live=own, signers=own)
    with pytest.raises(VerificationError, match="names another checkpoint"):
        found.check(others)
    withdrawn = replace(found, checkpoints={})
    with pytest.raises(VerificationError, match="withdrawn"):
        withdrawn.check(made.publication)


def test_a_folder_signed_by_a_new_key_carries_the_roots_that_lead_to_it(tmp_path: Path) -> None:
    made, spec = small_checkpoint(tmp_path / "c"), make_parts().spec
    repository = Repository(spec, (ORGANIZER,), PUBLISHER)
    repository.change([ORGANIZER], publisher=NEW_PUBLISHER)
    renewed = publication_of(made.signed_manifest.payload, made.run_id, publisher=NEW_PUBLISHER)
    write_signed(made.folder, renewed, made.signed_spec)
    with pytest.raises(SignatureError, match="another key"):
        verify_folder(made.folder, made.run_id)
    payload = Roots(roots=repository.offline.roots).SerializeToString()
    renewed = replace(renewed, roots=NEW_PUBLISHER.sign("roots", made.run_id, payload))
    write_signed(made.folder, renewed, made.signed_spec)
    assert verify_folder(made.folder, made.run_id).ok
    raw = (made.folder / "swarm-roots.sig").read_bytes()
    for position in range(0, len(raw), 97):
        flipped = bytearray(raw)
        flipped[position] ^= 1
        (made.folder / "swarm-roots.sig").write_bytes(flipped)
        with pytest.raises((VerificationError, DigestError)):
            verify_folder(made.folder, made.run_id)
