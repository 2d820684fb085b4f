"""One chunk from one of many sources: in pieces, resumed, paced; liars, the slow and the dead cost little."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from peer.checkpoints import sources
from peer.checkpoints.download import Order, download
from peer.checkpoints.filling import PIECES_FOLDER, Fetching
from peer.checkpoints.pieces import Pieces
from peer.checkpoints.sources import PIECE_BYTES, Chunk, Intake, Pace, Source, Tally
from peer.p2p.fetch import FetchLimits, HolderBook, Wanted
from swarm.checkpoint_chunks import FileChunks
from swarm.errors import DiskFull, NetworkError, NotFound, ResourceError, Unreachable
from tests.checkpoint_samples import SignedCheckpoint, make_parts, signed_checkpoint, small_checkpoint

QUICK = FetchLimits(per_holder=2, total=8, retry_pause_s=0)


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    """Weights of three chunks."""
    return signed_checkpoint(tmp_path / "made", make_parts())


@dataclass
class Made:
    """A source that serves a checkpoint as ``behave`` says: each piece, or what it raises."""

    made: SignedCheckpoint
    name: str = "good"
    kind: str = "mirrors"
    behave: Callable[[bytes], bytes] = lambda piece: piece
    pause_s: float = 0.0
    asked: list[Chunk] = field(default_factory=list)

    async def read(self, chunk: Chunk, start: int) -> AsyncIterator[bytes]:
        held = FileChunks(self.made.folder, self.made.manifest)
        self.asked.append(chunk)
        for offset in range(start, chunk.length, PIECE_BYTES):
            await asyncio.sleep(self.pause_s)
            piece = held.part(chunk.digest, offset, PIECE_BYTES)
            if piece is None:
                raise NotFound("not here")
            yield self.behave(piece)


def get(
    made: SignedCheckpoint, out: Path, *found: Source, tally: Tally | None = None, rate: float | None = None
) -> Path:
    order = Order(run_id=made.run_id, signed_spec=made.signed_spec, publication=made.publication, target=out)
    fetching = Fetching(
        sources=found,
        tally=tally or Tally(),
        limits=QUICK,
        book=HolderBook(random.Random(1)),
        max_bytes_per_s=rate,
    )
    return asyncio.run(asyncio.wait_for(download(order, fetching), 60)).folder


def raises(error: Exception) -> Callable[[bytes], bytes]:
    def behave(piece: bytes) -> bytes:
        raise error

    return behave


BAD: dict[str, Callable[[bytes], bytes]] = {
    "wrong bytes": lambda piece: bytes(len(piece)),
    "one flipped bit": lambda piece: piece[:-1] + bytes([piece[-1] ^ 1]),
    "too many bytes": lambda piece: piece + bytes(5 << 20),
    "empty pieces": lambda piece: b"",
    "unreachable": raises(Unreachable("gone")),
    "busy": raises(NetworkError("busy")),
    "tells of a full disk": raises(DiskFull("yours, it says")),
    "lacks everything": raises(NotFound("not here")),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_among_good_ones_changes_nothing(case: str, made: SignedCheckpoint, tmp_path: Path) -> None:
    tally = Tally()
    get(made, tmp_path / "out", Made(made, "bad", behave=BAD[case]), Made(made), tally=tally)
    # Per place at the bad source at most one chunk was wasted, before it was known.
    assert tally.received_bytes.get("bad", 0) <= QUICK.per_holder * (10 << 20)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_alone_ends_in_bounded_time_with_nothing_in_place(
    case: str, made: SignedCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match="nobody brought"):
        get(made, tmp_path / "out", Made(made, "bad", behave=BAD[case]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial-10"]


def test_a_source_that_stops_midway_is_relieved_where_it_stopped(made: SignedCheckpoint, tmp_path: Path) -> None:
    pieces = iter(range(100))

    def stops(piece: bytes) -> bytes:
        if next(pieces) >= 3:
            raise Unreachable("gone")
        return piece

    tally = Tally()
    get(made, tmp_path / "out", Made(made, "stops", behave=stops), Made(made), tally=tally)
    assert sum(tally.received_bytes.values()) == made.manifest.size_bytes


def test_a_liar_that_stops_midway_harms_no_honest_source(made: SignedCheckpoint, tmp_path: Path) -> None:
    """Bytes of two sources that do not fit prove nothing: the honest one is asked for all of them, and believed."""
    count = iter(range(1000))

    def lies_then_stops(piece: bytes) -> bytes:
        if next(count) % 3 == 2:
            raise Unreachable("gone")
        return bytes(len(piece))

    book = HolderBook(random.Random(1))
    order = Order(
        run_id=made.run_id, signed_spec=made.signed_spec, publication=made.publication, target=tmp_path / "out"
    )
    found = [Made(made, "bad", behave=lies_then_stops), Made(made)]
    asyncio.run(download(order, Fetching(sources=found, limits=QUICK, book=book)))
    assert book.record(b"good").lies == book.record(b"good").failures == 0


def test_a_slow_source_is_given_up_for_fast_ones_and_keeps_what_it_brought(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PATIENCE_S", 0.3)
    monkeypatch.setattr(sources, "SLOWER_TIMES", 2)
    tally = Tally()
    get(made, tmp_path / "out", Made(made, "slow", pause_s=0.5), Made(made), tally=tally)
    assert 0 < tally.received_bytes["slow"] < 2 << 20
    assert sum(tally.received_bytes.values()) == made.manifest.size_bytes


def test_a_source_that_falls_silent_is_given_up(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_TIMEOUT_S", 0.1)
    get(made, tmp_path / "out", Made(made, "silent", pause_s=3600), Made(made))


def test_dead_sources_do_not_take_the_places_of_the_living(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_TIMEOUT_S", 0.2)
    dead = [Made(made, f"dead-{number}", pause_s=3600) for number in range(4)]
    get(made, tmp_path / "out", *dead, Made(made))
    assert all(len(one.asked) <= 2 * 3 for one in dead)


def test_sources_that_slowly_say_not_here_do_not_take_the_places_of_the_living(
    made: SignedCheckpoint, tmp_path: Path
) -> None:
    lacking = [Made(made, f"lacking-{number}", pause_s=0.2, behave=raises(NotFound("not here"))) for number in range(4)]
    get(made, tmp_path / "out", *lacking, Made(made))
    assert all(len(one.asked) <= 3 + QUICK.per_holder - 1 for one in lacking)


def test_a_source_is_credited_only_with_what_it_brought_itself(made: SignedCheckpoint, tmp_path: Path) -> None:
    """The rest of the chunk lay on disk already, from an earlier attempt."""
    largest = max(made.manifest.files, key=lambda file: file.size_bytes)
    digest = bytes.fromhex(largest.chunks[0])
    whole = FileChunks(made.folder, made.manifest).part(digest, 0, 4 << 20)
    assert whole is not None
    pieces = Pieces(tmp_path / "pieces", [digest])
    pieces.open(digest, len(whole)).append(whole[:-PIECE_BYTES], "earlier")
    source, book = Made(made, pause_s=0.1), HolderBook(random.Random(1))
    chunk = Chunk(digest=digest, file=largest.name, offset=0, length=len(whole))
    intake = Intake(
        sources={b"good": source},
        chunks={digest: chunk},
        pieces=pieces,
        pace=Pace(None),
        tally=Tally(),
        book=book,
    )
    brought = asyncio.run(intake.ask(b"good", Wanted(digest, len(whole))))
    assert brought.data == whole and brought.received_bytes == PIECE_BYTES and brought.seconds >= 0.09


def test_a_cancellation_that_comes_together_with_a_piece_is_kept() -> None:
    async def body() -> None:
        ready = asyncio.Event()

        async def one() -> AsyncIterator[bytes]:
            await ready.wait()
            yield b"x"

        task = asyncio.create_task(sources._next(one()))
        for _ in range(5):  # until the task waits for the piece
            await asyncio.sleep(0)
        ready.set()
        asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(task.cancel))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())


def test_chunks_come_from_all_sources_at_once(made: SignedCheckpoint, tmp_path: Path) -> None:
    found = [Made(made, f"source-{number}", pause_s=0.01) for number in range(3)]
    tally = Tally()
    get(made, tmp_path / "out", *found, tally=tally)
    assert len(tally.received_bytes) == 3
    assert sum(tally.received_bytes.values()) == made.manifest.size_bytes
    assert tally.as_json()["chunks_fetched"] == sum(len(file.chunks) for file in made.manifest.files)


def test_a_rate_limit_holds_over_all_sources(tmp_path: Path) -> None:
    made = signed_checkpoint(tmp_path / "made", make_parts(num_values=500_000))  # 2 MB
    started = time.monotonic()
    get(made, tmp_path / "out", Made(made, "one"), Made(made, "other"), rate=2e6)
    took_s = time.monotonic() - started
    assert took_s >= 0.9 * made.manifest.size_bytes / 2e6


def test_what_lies_in_an_earlier_round_is_copied_and_not_fetched(tmp_path: Path) -> None:
    old, new = (small_checkpoint(tmp_path / f"c{number}", round_number=number) for number in (10, 20))
    get(old, tmp_path / "out", Made(old))
    tally = Tally()
    source = Made(new)
    get(new, tmp_path / "out", source, tally=tally)
    shared = {digest for file in old.manifest.files for digest in file.chunks}
    shared &= {digest for file in new.manifest.files for digest in file.chunks}
    assert shared and not shared & {chunk.digest.hex() for chunk in source.asked}
    assert tally.copied_bytes > 0
    assert tally.copied_bytes + sum(tally.received_bytes.values()) == new.manifest.size_bytes


def test_a_damaged_earlier_round_is_not_copied(tmp_path: Path) -> None:
    old, new = (small_checkpoint(tmp_path / f"c{number}", round_number=number) for number in (10, 20))
    folder = get(old, tmp_path / "out", Made(old))
    for file in old.manifest.files:
        (folder / file.name).write_bytes(bytes(file.size_bytes))
    tally = Tally()
    get(new, tmp_path / "out", Made(new), tally=tally)
    assert tally.copied_bytes == 0


def test_pieces_of_an_earlier_attempt_that_are_wrong_cost_one_chunk(made: SignedCheckpoint, tmp_path: Path) -> None:
    weights = next(file for file in made.manifest.files if file.name == "model.safetensors")
    folder = tmp_path / "out" / ".partial-10" / PIECES_FOLDER
    folder.mkdir(parents=True)
    (folder / weights.chunks[0]).write_bytes(bytes(1 << 20))
    (folder / weights.chunks[1]).write_bytes(bytes(5 << 20))  # longer than a chunk
    (folder / "stranger").symlink_to(tmp_path)
    tally = Tally()
    get(made, tmp_path / "out", Made(made), tally=tally)
    # The rest of the first chunk came, did not fit, and came again with its beginning.
    assert sum(tally.received_bytes.values()) == made.manifest.size_bytes + (3 << 20)


def test_a_full_disk_under_the_pieces_is_ours_and_ends_the_download(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(part: object, piece: bytes, sender: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources.Part, "append", full)
    with pytest.raises(ResourceError, match="no space left"):
        get(made, tmp_path / "out", Made(made))
