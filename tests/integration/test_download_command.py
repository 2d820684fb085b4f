"""`swarm download` and `swarm verify --repair` as a researcher runs them, against the coordinator and a web mirror.

No peer can be reached here, as from a network that lets nothing but the web and the coordinator through.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from typer.testing import CliRunner, Result

from coordinator.checkpoint_files import CheckpointFiles, PublishedFolder
from coordinator.mirroring import write_mirror
from peer.checkpoints.verify import verify_folder
from peer.coordinator_client import CoordinatorClient, RunInfo
from swarm.cli import compare, push, reaching
from swarm.cli import download as commands
from swarm.cli.audit import audit
from swarm.cli.generate import generate
from swarm.cli.leaderboard import leaderboard
from swarm.errors import (
    ConfigError,
    NotFound,
    PinError,
    RefusedCheckpoint,
    SignatureError,
    SwarmError,
    Unreachable,
    VerificationError,
)
from swarm.identity import Identity
from swarm.invite import Invite, parse
from swarm.manifest import MANIFEST_FILE, SIGNATURE_FILE, SPEC_FILE
from swarm.proto.checkpoint_pb2 import Roots
from swarm.proto.common_pb2 import Genesis
from swarm.publication import Publication
from swarm.storage import Storage
from tests.checkpoint_samples import (
    ORGANIZER,
    PUBLISHER,
    SignedCheckpoint,
    make_parts,
    publication_of,
    signed_checkpoint,
)
from tests.metadata_samples import Repository
from tests.mirror_servers import WebMirror, web_mirror

PEER = b"a" * 32
NEW_PUBLISHER = Identity(b"n" * 32)
NOW = datetime.now(timezone.utc)

app = typer.Typer()
for command in (commands.download, commands.verify):
    app.command()(command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    if result.exception is not None:
        raise result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@dataclass
class Coordinator:
    """What a researcher asks of the coordinator; the files that it serves are as on the organizer's disk."""

    made: SignedCheckpoint
    files: CheckpointFiles
    urls: tuple[str, ...] = ()
    has_new_key: bool = False
    has_withdrawn: bool = False
    renewed: Publication | None = None
    is_away: SwarmError | None = None

    def mirror_metadata(self, folder: Path, now: datetime = NOW) -> None:
        """As `coordinator.mirroring` writes it."""
        (folder / "metadata").mkdir(exist_ok=True)
        files = asyncio.run(self._repository(now)).files
        for name, raw in {**files, SPEC_FILE: self.made.signed_spec.SerializeToString()}.items():
            (folder / "metadata" / name).write_bytes(raw)

    async def get_run(self) -> RunInfo:
        return RunInfo(
            spec=verify_folder(self.made.folder, self.made.run_id).provenance.spec,
            signed_spec=self.made.signed_spec,
            genesis=Genesis(run_id=self.made.run_id, voters=[PEER]),
            signed_genesis=self.made.signed_spec,
            seed_addresses=(),
            manifest_bytes=b"",
            tokenizer_bytes=b"",
            clock_offset_s=0.0,
        )

    async def metadata(self) -> dict[str, bytes]:
        return (await self._repository()).files

    async def _repository(self, now: datetime = NOW) -> Repository:
        repository = Repository((await self.get_run()).spec, (ORGANIZER,), PUBLISHER, now=now)
        if self.has_new_key:
            repository.change([ORGANIZER], publisher=NEW_PUBLISHER)
        if not self.has_withdrawn:
            repository.publish(await self.checkpoint(0), self.made.manifest.round)
        return repository

    async def checkpoint(self, round_number: int) -> Publication:
        if round_number not in (0, self.made.manifest.round):
            raise NotFound(f"no checkpoint of round {round_number}")
        return self.renewed or self.made.publication

    async def replace_key(self) -> None:
        """The organizer replaces the publication key; what is published is signed anew."""
        self.has_new_key = True
        payload = Roots(roots=(await self._repository()).offline.roots).SerializeToString()
        self.renewed = replace(
            publication_of(self.made.signed_manifest.payload, self.made.run_id, publisher=NEW_PUBLISHER),
            roots=NEW_PUBLISHER.sign("roots", self.made.run_id, payload),
        )

    async def mirrors(self) -> tuple[str, ...]:
        return self.urls

    async def chunk(self, digest: bytes, offset: int, length: int) -> bytes:
        return self.files.piece(digest, offset, length)

    async def close(self) -> None:
        pass


@dataclass
class Place:
    """A published checkpoint, its coordinator, a web mirror of it, and the invite that leads there."""

    made: SignedCheckpoint
    coordinator: Coordinator
    mirror: WebMirror
    folder: Path

    @property
    def invite(self) -> str:
        return Invite(run_id=self.made.run_id, tls_pin=b"t" * 32, addresses=("localhost:1",)).encode()

    @property
    def size_bytes(self) -> int:
        return self.made.manifest.size_bytes


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Weights of three chunks; no peer can be reached."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    made = signed_checkpoint(tmp_path / "home" / "checkpoint-10", make_parts())
    write_mirror(Storage(f"file://{tmp_path}/www"), PublishedFolder(path=made.folder, manifest=made.manifest))
    coordinator = Coordinator(made, CheckpointFiles(tmp_path / "home", made.run_id, make_parts().spec))

    async def connect(invite: Invite) -> Coordinator:
        if coordinator.is_away is not None:
            raise coordinator.is_away
        return coordinator

    @asynccontextmanager
    async def no_network(*arguments: object) -> AsyncIterator[None]:
        raise Unreachable("no seed peer answers")
        yield

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(CoordinatorClient, "connect", connect)
    monkeypatch.setattr(reaching, "network", no_network)
    with web_mirror(tmp_path / "www") as mirror:
        yield Place(made, coordinator, mirror, tmp_path)


def test_a_researcher_without_peers_downloads_from_the_coordinator(place: Place) -> None:
    result = run("download", place.invite, "--out", place.folder / "got")
    assert result.exit_code == 0, result.exception
    assert "warning: no peer can be reached" in result.stderr
    assert f"coordinator {place.size_bytes / 1e6:,.1f} MB" in result.stdout
    assert verify_folder(place.folder / "got" / "round-000010", place.made.run_id).ok


def test_mirrors_that_the_coordinator_tells_and_the_person_names_serve_beside_it(place: Place) -> None:
    place.coordinator.urls = (place.mirror.url, "file:///etc")
    got = run_json("download", place.invite, "--out", place.folder / "got", "--mirror", f"file://{place.folder}/www")
    assert got["ok"] and got["round"] == 10
    assert sum(source["received_bytes"] for source in got["sources"]) == place.size_bytes
    names = {source["name"] for source in got["sources"]}
    assert names <= {"coordinator", f"{place.mirror.url}/checkpoint-10", f"file://{place.folder}/www/checkpoint-10"}
    assert len(names) >= 2
    assert got["chunks_fetched"] == sum(len(file.chunks) for file in place.made.manifest.files)


def test_a_lying_mirror_and_a_coordinator_that_lacks_chunks_end_in_not_found(place: Place, tmp_path: Path) -> None:
    place.mirror.spoil = lambda data: bytes(len(data))
    place.coordinator.files = CheckpointFiles(None, place.made.run_id, make_parts().spec)
    result = run("download", place.invite, "--out", tmp_path / "got", "--mirror", place.mirror.url)
    assert isinstance(result.exception, NotFound)
    assert [path.name for path in (tmp_path / "got").iterdir()] == [".partial-10"]


def test_a_rate_limit_is_kept_by_the_command(place: Place) -> None:
    started = time.monotonic()
    run_json("download", place.invite, "--out", place.folder / "got", "--max-rate", 80)
    assert time.monotonic() - started >= 0.9 * place.size_bytes * 8 / 80e6


AWAY = Unreachable("no coordinator answers")


def test_a_mirror_alone_will_do_while_the_coordinator_is_away(place: Place) -> None:
    place.coordinator.is_away = AWAY
    place.coordinator.mirror_metadata(place.folder / "www")
    for round_name in ("", "@10"):
        got = run("download", place.invite + round_name, "--out", place.folder / "got", "--mirror", place.mirror.url)
        assert got.exit_code == 0, got.stderr
        assert "asking mirrors what is published" in got.stderr
    assert verify_folder(place.folder / "got" / "round-000010", place.made.run_id).ok
    missing = run("download", f"{place.invite}@9", "--out", place.folder / "got", "--mirror", place.mirror.url)
    assert missing.exception is AWAY and "no checkpoint of round 9" in missing.stderr


def test_mirrors_that_the_coordinator_told_once_are_remembered_for_when_it_is_away(place: Place) -> None:
    place.coordinator.urls = (place.mirror.url,)
    downloaded(place)
    place.coordinator.is_away = AWAY
    place.coordinator.mirror_metadata(place.folder / "www")
    got = run_json("download", place.invite, "--out", place.folder / "other")
    assert got["ok"] and {source["kind"] for source in got["sources"]} == {"mirrors"}


def test_without_a_mirror_an_absent_coordinator_is_told(place: Place) -> None:
    place.coordinator.is_away = AWAY
    assert run("download", place.invite, "--out", place.folder / "got").exception is AWAY


@pytest.mark.parametrize("case", ["stale", "of another run", "another manifest", "endless", "no signatures"])
def test_a_mirror_cannot_pass_off_what_the_run_does_not_vouch_for(place: Place, case: str) -> None:
    """TUF's rules hold without the coordinator, too: an old timestamp holds newer checkpoints back, say."""
    place.coordinator.is_away = AWAY
    www = place.folder / "www"
    place.coordinator.mirror_metadata(www, now=NOW - timedelta(days=8) if case == "stale" else NOW)
    signature = www / "checkpoint-10" / SIGNATURE_FILE
    if case == "of another run":
        other = signed_checkpoint(place.folder / "other" / "checkpoint-10", make_parts(name="other"))
        (www / "metadata" / SPEC_FILE).write_bytes(other.signed_spec.SerializeToString())
    elif case == "another manifest":
        other = signed_checkpoint(place.folder / "other" / "checkpoint-10", make_parts(num_values=2_000))
        signature.write_bytes(other.signed_manifest.SerializeToString())
    elif case == "endless":
        (www / "metadata" / "timestamp.json").write_bytes(b" " * 5_000_001)
    elif case == "no signatures":
        signature.unlink()
    result = run("download", place.invite, "--out", place.folder / "got", "--mirror", place.mirror.url)
    expected = {"of another run": SwarmError, "no signatures": Unreachable}.get(case, VerificationError)
    assert isinstance(result.exception, expected), result.exception
    assert not (place.folder / "got" / "round-000010").exists()


def test_another_key_in_the_coordinators_place_is_refused_whatever_mirrors_say(place: Place) -> None:
    place.coordinator.is_away = PinError("another key answers")
    place.coordinator.mirror_metadata(place.folder / "www")
    result = run("download", place.invite, "--out", place.folder / "got", "--mirror", place.mirror.url)
    assert isinstance(result.exception, PinError)


READERS: dict[str, tuple[Callable[..., None], tuple[object, ...]]] = {
    "verify": (commands.verify, ()),
    "generate": (generate, ("hello",)),
    "audit": (audit, ("--archive", "nowhere")),
    "lineage": (compare.lineage, ()),
    "leaderboard": (leaderboard, ()),
    "push": (push.push, ("hf://somebody/model",)),
}


@pytest.mark.parametrize("name", READERS)
def test_every_command_refuses_a_replaced_keys_checkpoint_that_the_new_key_does_not_list(
    name: str, place: Place
) -> None:
    folder, asking = downloaded(place), cast(CoordinatorClient, place.coordinator)
    asyncio.run(place.coordinator.replace_key())
    place.coordinator.has_withdrawn = True
    with pytest.raises(NotFound, match="no checkpoint"):
        asyncio.run(reaching.current_publication(asking, parse(place.invite), 0))
    one = typer.Typer()
    one.command()(READERS[name][0])
    result = CliRunner().invoke(one, [str(folder), *map(str, READERS[name][1])])
    assert isinstance(result.exception, SignatureError) and "replaced" in str(result.exception)


def test_a_checkpoint_from_before_a_change_of_keys_verifies_offline_and_from_an_old_mirror(place: Place) -> None:
    """The mirror still has the old key's signatures beside the files, and the new metadata, which lists them."""
    folder = downloaded(place)
    asyncio.run(place.coordinator.replace_key())
    asyncio.run(reaching.current_publication(cast(CoordinatorClient, place.coordinator), parse(place.invite), 0))
    assert run_json("verify", folder, "--run", place.invite)["ok"]
    place.coordinator.mirror_metadata(place.folder / "www")
    place.coordinator.is_away = Unreachable("nobody there")
    got = run_json("download", place.invite, "--out", place.folder / "again", "--mirror", place.mirror.url)
    assert got["ok"]


def test_a_download_gives_a_complete_checkpoint_the_new_keys_signatures(place: Place) -> None:
    folder = downloaded(place)
    asyncio.run(place.coordinator.replace_key())
    got = run_json("download", place.invite, "--out", place.folder / "got")
    assert got["ok"] and got["chunks_fetched"] == 0
    assert run_json("verify", folder)["ok"]


# ---- repair ---------------------------------------------------------------------------------------------------------


def downloaded(place: Place) -> Path:
    return Path(run_json("download", place.invite, "--out", place.folder / "got")["folder"])


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x40]))


def same(place: Place, folder: Path) -> bool:
    return {path.name: path.read_bytes() for path in place.made.folder.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_repair_fetches_the_one_chunk_with_a_flipped_byte(place: Place) -> None:
    folder = downloaded(place)
    flip(folder / "model.safetensors", 5 << 20)
    place.mirror.ranges.clear()
    got = run_json("verify", folder, "--repair", "--mirror", place.mirror.url)
    assert got["ok"] and got["chunks_fetched"] == 1
    assert [(first, last) for _, first, last in place.mirror.ranges] == [(4 << 20, (8 << 20) - 1)]
    assert same(place, folder)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a missing file": lambda folder: (folder / "config.json").unlink(),
    "a file cut short": lambda folder: os.truncate(folder / "model.safetensors", 5 << 20),
    "a file too long": lambda folder: os.truncate(folder / "model.safetensors", 50 << 20),
    "a changed manifest": lambda folder: (folder / MANIFEST_FILE).write_bytes(b"{}"),
    "a signature flipped": lambda folder: flip(folder / SIGNATURE_FILE, 100),
    "a signature missing": lambda folder: (folder / SIGNATURE_FILE).unlink(),
    "the spec missing": lambda folder: (folder / SPEC_FILE).unlink(),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_repair_mends_any_file_from_the_run_itself(case: str, place: Place) -> None:
    folder = downloaded(place)
    DAMAGE[case](folder)
    assert run("verify", folder).exception is not None
    got = run_json("verify", folder, "--repair", "--run", f"{place.invite}@10")
    assert got["ok"]
    assert same(place, folder)


def test_repair_of_a_sound_folder_fetches_nothing(place: Place) -> None:
    folder = downloaded(place)
    assert "nothing had to be repaired" in run("verify", folder, "--repair", "--mirror", place.mirror.url).stdout
    assert place.mirror.ranges == []


def test_repair_without_a_source_says_what_to_name(place: Place) -> None:
    result = run("verify", downloaded(place), "--repair")
    assert isinstance(result.exception, ConfigError)
    assert "--mirror" in result.exception.advice


def test_repair_from_a_mirror_alone_needs_the_folders_own_signature(place: Place) -> None:
    folder = downloaded(place)
    flip(folder / SIGNATURE_FILE, 100)
    assert isinstance(run("verify", folder, "--repair", "--mirror", place.mirror.url).exception, SwarmError)


def test_repair_leaves_a_checkpoint_of_another_run_alone(place: Place) -> None:
    other = signed_checkpoint(place.folder / "other", make_parts(name="other"))
    before = {path.name: path.read_bytes() for path in other.folder.iterdir()}
    result = run("verify", other.folder, "--repair", "--run", place.invite)
    assert isinstance(result.exception, ConfigError) and "another run" in str(result.exception)
    assert {path.name: path.read_bytes() for path in other.folder.iterdir()} == before


def test_repair_never_writes_through_a_link(place: Place) -> None:
    folder = downloaded(place)
    precious = place.folder / "precious"
    precious.write_bytes(b"precious")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(precious)
    result = run("verify", folder, "--repair", "--mirror", place.mirror.url)
    assert isinstance(result.exception, ConfigError)
    assert precious.read_bytes() == b"precious"


def test_a_strangers_file_stays_and_is_still_told_after_repair(place: Place) -> None:
    folder = downloaded(place)
    (folder / "extra.safetensors").write_bytes(b"x")
    result = run("verify", folder, "--repair", "--mirror", place.mirror.url)
    assert isinstance(result.exception, RefusedCheckpoint)
    assert (folder / "extra.safetensors").exists()
