"""Downloading: from hostile and honest holders alike only the signed bytes arrive, and nothing is fetched twice."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peer.checkpoints import download as downloads
from peer.checkpoints.download import Order, download, find_holders, held_checkpoints, round_folder
from peer.checkpoints.filling import Fetching
from peer.checkpoints.sources import PeerSource, Tally
from peer.checkpoints.verify import Report, verify_folder
from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import FetchLimits, HolderBook
from peer.rounds.statuses import StatusRules, sign_status
from swarm.checkpoint_chunks import FileChunks
from swarm.errors import (
    AlreadyRunning,
    ConfigError,
    DiskFull,
    NotFound,
    SignatureError,
    VerificationError,
)
from swarm.identity import Identity, peer_id_of
from swarm.proto.common_pb2 import Admission
from swarm.proto.round_pb2 import ChunkReply, Status
from tests.checkpoint_samples import (
    ORGANIZER,
    PART_BYTES,
    PUBLISHER,
    FakeTransport,
    SignedCheckpoint,
    make_parts,
    publication_of,
    signed_checkpoint,
    small_checkpoint,
)

A, B = b"a" * 32, b"b" * 32
QUICK = FetchLimits(timeout_s=5, retry_pause_s=0)


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    """Weights of three chunks."""
    return signed_checkpoint(tmp_path / "made", make_parts())


def serving(tmp_path: Path, *checkpoints: SignedCheckpoint) -> FakeTransport:
    store = ChunkStore(tmp_path / "store", 0, read_in_thread=False)
    for made in checkpoints:
        store.add_source(FileChunks(made.folder, made.manifest))
    return FakeTransport({A: store.handle_chunk})


def order(made: SignedCheckpoint, target: Path, any_round: bool = False) -> Order:
    return Order(
        run_id=made.run_id,
        signed_spec=made.signed_spec,
        publication=made.publication,
        target=target,
        any_round=any_round,
    )


def fetching(transport: FakeTransport, *holders: bytes, **more: Any) -> Fetching:
    sources = [PeerSource(transport, holder) for holder in holders or (A,)]
    return Fetching(**{"sources": sources, "limits": QUICK, **more})


def get(transport: FakeTransport, wanted: Order, tally: Tally | None = None) -> Path:
    return asyncio.run(download(wanted, fetching(transport, tally=tally or Tally()))).folder


def same(made: SignedCheckpoint, folder: Path) -> bool:
    return {path.name: path.read_bytes() for path in made.folder.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_a_download_is_the_checkpoint_byte_for_byte_and_verifies(made: SignedCheckpoint, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    tally = Tally(on_progress=lambda *both: progress.append(both))
    report = asyncio.run(download(order(made, tmp_path / "out"), fetching(serving(tmp_path, made), tally=tally)))
    folder = report.folder
    assert report.ok
    assert folder == tmp_path / "out" / "round-000010"
    assert same(made, folder)
    assert verify_folder(folder, made.run_id).ok
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["round-000010"]
    size = made.manifest.size_bytes
    assert progress[0] == (0, size) and progress[-1] == (size, size)
    assert progress == sorted(progress)


def test_a_complete_download_is_not_fetched_again(made: SignedCheckpoint, tmp_path: Path) -> None:
    folder = get(serving(tmp_path, made), order(made, tmp_path / "out"))
    transport = FakeTransport()
    assert get(transport, order(made, tmp_path / "out")) == folder
    assert transport.calls == []


def test_an_interrupted_download_keeps_what_it_has(made: SignedCheckpoint, tmp_path: Path) -> None:
    transport = serving(tmp_path, made)
    honest = transport.peers[A]
    before = list(itertools.takewhile(lambda file: file.size_bytes < PART_BYTES, made.manifest.files))
    answers = iter([None] * len(before) + [2 * PART_BYTES])  # the small files before the weights, and some of these

    async def dies(caller: bytes, request: bytes) -> bytes:
        return (await honest(caller, request))[: next(answers, 0)]

    transport.peers[A] = dies
    one_by_one = FetchLimits(total=1, timeout_s=5)
    with pytest.raises(NotFound):
        asyncio.run(download(order(made, tmp_path / "out"), fetching(transport, limits=one_by_one)))
    assert not round_folder(tmp_path / "out", 10).exists()
    again = serving(tmp_path, made)
    tally = Tally()
    assert same(made, get(again, order(made, tmp_path / "out"), tally))
    small = sum(file.size_bytes for file in before)
    heads = 7  # what stands before the data of a reply
    assert tally.by_kind() == {"peers": made.manifest.size_bytes - small - 2 * PART_BYTES + heads}


KILLED = """
import asyncio, os, pathlib, signal, sys
from peer.p2p.chunk_store import ChunkStore
from swarm.checkpoint_chunks import FileChunks
from peer.checkpoints.download import Order, download
from peer.checkpoints.filling import Fetching
from peer.checkpoints.sources import PeerSource, Tally
from peer.p2p.fetch import FetchLimits
from peer.checkpoints.verify import read_provenance
from tests.checkpoint_samples import FakeTransport

made, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
found = read_provenance(made, None)
store = ChunkStore(out.parent / "store", 0)
store.add_source(FileChunks(made, found.manifest))
order = Order(
    run_id=found.run_id, signed_spec=found.signed_spec, publication=found.publication, target=out
)
def killed_midway(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
transport = FakeTransport({b"a" * 32: store.handle_chunk})
sources = [PeerSource(transport, b"a" * 32)]
tally = Tally(on_progress=killed_midway)
asyncio.run(download(order, Fetching(sources=sources, tally=tally, limits=FetchLimits(total=1))))
"""


def test_a_download_resumes_after_sigkill(made: SignedCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(made.folder), str(out)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [".partial-10"]
    transport = serving(tmp_path, made)
    tally = Tally()
    assert same(made, get(transport, order(made, out), tally))
    assert 0 < tally.chunks_fetched < sum(len(file.chunks) for file in made.manifest.files)


def test_damage_to_what_was_fetched_before_is_found_and_repaired(made: SignedCheckpoint, tmp_path: Path) -> None:
    folder = get(serving(tmp_path, made), order(made, tmp_path / "out"))
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(5 << 20)
        file.write(b"damage")
    (folder / "config.json").unlink()
    os.truncate(folder / "README.md", 10)
    (tmp_path / "out" / ".partial-10").mkdir()
    tally = Tally()
    assert same(made, get(serving(tmp_path, made), order(made, tmp_path / "out"), tally))
    assert tally.chunks_fetched == 3


def test_a_lying_holder_changes_nothing_and_is_reported(made: SignedCheckpoint, tmp_path: Path) -> None:
    transport = serving(tmp_path, made)

    async def lies(caller: bytes, request: bytes) -> bytes:
        return ChunkReply(found=True, data=b"x" * 100).SerializeToString()

    transport.peers[B] = lies
    liars: list[bytes] = []
    book = HolderBook(random.Random(1), on_lie=lambda holder, what: liars.append(holder))
    folder = asyncio.run(download(order(made, tmp_path / "out"), fetching(transport, B, A, book=book))).folder
    assert same(made, folder)
    assert set(liars) == {peer_id_of(B).encode()}


def test_only_liars_means_no_checkpoint(made: SignedCheckpoint, tmp_path: Path) -> None:
    async def lies(caller: bytes, request: bytes) -> bytes:
        return ChunkReply(found=True, data=b"x").SerializeToString()

    with pytest.raises(NotFound, match="sent wrong bytes"):
        get(FakeTransport({A: lies}), order(made, tmp_path / "out"))
    assert not round_folder(tmp_path / "out", 10).exists()


def test_an_older_round_offered_as_the_newest_is_refused_unless_it_was_asked_for(tmp_path: Path) -> None:
    old, new = (small_checkpoint(tmp_path / f"c{number}", round_number=number) for number in (10, 20))
    transport = serving(tmp_path, old, new)
    get(transport, order(new, tmp_path / "out"))
    with pytest.raises(VerificationError, match=r"round 10 is offered as the newest.*holds round 20"):
        get(transport, order(old, tmp_path / "out"))
    assert not round_folder(tmp_path / "out", 10).exists()
    get(transport, order(old, tmp_path / "out", any_round=True))
    assert sorted(held.manifest.round for held in held_checkpoints(tmp_path / "out").values()) == [10, 20]


def test_a_newer_round_joins_an_older_one(tmp_path: Path) -> None:
    old, new = (small_checkpoint(tmp_path / f"c{number}", round_number=number) for number in (10, 20))
    transport = serving(tmp_path, old, new)
    get(transport, order(old, tmp_path / "out"))
    get(transport, order(new, tmp_path / "out"))
    assert len(held_checkpoints(tmp_path / "out")) == 2


def test_a_target_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    mine, other = small_checkpoint(tmp_path / "1"), small_checkpoint(tmp_path / "2", name="other")
    transport = serving(tmp_path, mine, other)
    get(transport, order(other, tmp_path / "out"))
    with pytest.raises(ConfigError, match="another run"):
        get(transport, order(mine, tmp_path / "out"))


def test_folders_that_are_no_checkpoints_are_passed_over(made: SignedCheckpoint, tmp_path: Path) -> None:
    for name in ("round-000099", "photos"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "round-000099" / "swarm-run-spec.sig").write_bytes(b"\xff")
    assert same(made, get(serving(tmp_path, made), order(made, tmp_path / "out")))
    assert (tmp_path / "out" / "photos").is_dir()


def test_a_forged_manifest_or_spec_writes_nothing(made: SignedCheckpoint, tmp_path: Path) -> None:
    wanted = order(made, tmp_path / "out")
    forged = publication_of(made.signed_manifest.payload, made.run_id, publisher=ORGANIZER)
    unwitnessed = publication_of(made.signed_manifest.payload, made.run_id, signers=())
    for bad in (
        replace(wanted, publication=forged),
        replace(wanted, publication=unwitnessed),
        replace(wanted, run_id=b"x" * 20),
    ):
        with pytest.raises((SignatureError, VerificationError)):
            get(serving(tmp_path, made), bad)
    assert not (tmp_path / "out").exists()


def test_links_that_lie_in_the_way_are_not_followed(made: SignedCheckpoint, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_bytes(b"precious")
    partial = tmp_path / "out" / ".partial-10"
    partial.mkdir(parents=True)
    (partial / "config.json").symlink_to(outside / "config.json")
    with pytest.raises(ConfigError, match="symbolic link"):
        get(serving(tmp_path, made), order(made, tmp_path / "out"))
    downloads.shutil.rmtree(partial)
    partial.symlink_to(outside)
    with pytest.raises(ConfigError, match="no folder"):
        get(serving(tmp_path, made), order(made, tmp_path / "out"))
    assert [path.read_bytes() for path in outside.iterdir()] == [b"precious"]


def test_a_folder_or_pipe_in_place_of_a_file_is_refused(made: SignedCheckpoint, tmp_path: Path) -> None:
    partial = tmp_path / "out" / ".partial-10"
    (partial / "config.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no regular file"):
        get(serving(tmp_path, made), order(made, tmp_path / "out"))
    (partial / "config.json").rmdir()
    os.mkfifo(partial / "config.json")
    with pytest.raises(ConfigError, match="no regular file"):
        get(serving(tmp_path, made), order(made, tmp_path / "out"))


def test_too_little_space_is_told_before_anything_is_fetched(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = downloads.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    transport = serving(tmp_path, made)
    with pytest.raises(DiskFull, match=r"needs [0-9,]+ more bytes"):
        get(transport, order(made, tmp_path / "out"))
    assert transport.calls == []


def test_a_disk_that_fills_up_midway_is_a_named_error_and_the_download_can_go_on(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    room = iter([True] * 3)

    def full_after_three(descriptor: int, data: bytes, offset: int) -> int:
        if next(room, False):
            return real(descriptor, data, offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads.os, "pwrite", full_after_three)
    with pytest.raises(DiskFull, match="no space left"):
        get(serving(tmp_path, made), order(made, tmp_path / "out"))
    monkeypatch.undo()
    assert same(made, get(serving(tmp_path, made), order(made, tmp_path / "out")))


def test_two_downloads_into_one_target_exclude_each_other(made: SignedCheckpoint, tmp_path: Path) -> None:
    transport = serving(tmp_path, made)

    async def both() -> list[Report | BaseException]:
        wanted = order(made, tmp_path / "out")
        return await asyncio.gather(
            download(wanted, fetching(transport)),
            download(wanted, fetching(transport)),
            return_exceptions=True,
        )

    one, other = sorted(asyncio.run(both()), key=lambda result: isinstance(result, AlreadyRunning))
    assert isinstance(one, Report) and one.ok
    assert isinstance(other, AlreadyRunning), "whichever came second"


def test_an_extra_file_of_the_persons_own_is_named_and_kept(made: SignedCheckpoint, tmp_path: Path) -> None:
    folder = get(serving(tmp_path, made), order(made, tmp_path / "out"))
    (folder / "mine.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"mine\.json is not part of the checkpoint"):
        get(serving(tmp_path, made), order(made, tmp_path / "out"))
    assert (tmp_path / "out" / ".partial-10" / "mine.json").exists()


NOW_UNIX_S = 1_000_000.0
RUN_ID = b"r" * 20


def signed_status(identity: Identity, checkpoint_round: int, admitted: bool = True, age_s: float = 0) -> bytes:
    admission = Admission(peer_key=identity.public_key, expires_unix_s=2_000_000).SerializeToString()
    signer = PUBLISHER if admitted else identity
    status = Status(
        round=1,
        log_digest=b"l" * 32,
        state_digest=b"s" * 32,
        sent_unix_ms=int((NOW_UNIX_S - age_s) * 1000),
        admission=signer.sign("admission", RUN_ID, admission),
        addresses=["/ip4/127.0.0.1/tcp/1"],
        checkpoint_round=checkpoint_round,
    )
    return sign_status(identity, RUN_ID, status)


def test_holders_are_the_seed_peers_and_reachable_admitted_peers_with_the_round() -> None:
    peers = {name: Identity(name.encode() * 32) for name in "0123456"}
    keys = {name: peer.public_key for name, peer in peers.items()}
    statuses = {
        "1": signed_status(peers["1"], 10),
        "2": signed_status(peers["2"], 20),
        "3": signed_status(peers["3"], 9),
        "4": signed_status(peers["4"], 10, admitted=False),
        "5": signed_status(peers["5"], 10, age_s=10_000),
        "6": signed_status(peers["6"], 10),
    }
    transport = FakeTransport({keys[name]: lambda caller, request: None for name in "12345"})  # type: ignore[dict-item]
    transport.directory = {"status-0": {keys[name]: raw for name, raw in statuses.items()}}
    rules = StatusRules(run_id=RUN_ID, publication_key=PUBLISHER.public_key, founders=(keys["0"],), lifetime_s=600)
    assert asyncio.run(find_holders(transport, rules, 10, NOW_UNIX_S)) == [keys["0"], keys["1"], keys["2"]]


def test_without_a_directory_the_seed_peers_are_the_holders() -> None:
    rules = StatusRules(run_id=RUN_ID, publication_key=PUBLISHER.public_key, founders=(A,), lifetime_s=600)
    transport = FakeTransport()
    transport.directory = None
    assert asyncio.run(find_holders(transport, rules, 10, NOW_UNIX_S)) == [A]
