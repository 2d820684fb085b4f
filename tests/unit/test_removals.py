"""Removals: documents are found by digest, and from their round on nobody reads a sequence that holds any of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coordinator import document_index, removal_list
from coordinator.data_folder import verify
from coordinator.data_prepare import PrepareOptions, document_hash, is_validation, prepare
from coordinator.service import _removals
from peer import removing
from peer.removing import RemovalWatch
from swarm import removals, run_spec
from swarm.cli.data import app
from swarm.data_manifest import DataManifest, TokenShard
from swarm.digest import sha256
from swarm.errors import ConfigError, DataError, DigestError, NotFound, Unreachable, VerificationError
from swarm.identity import Identity
from swarm.proto.common_pb2 import Signed
from swarm.removals import Removal, RemovalList, left_to_read
from tests.checkpoint_samples import ORGANIZER, data_manifest, make_spec

TEXTS = [f"document {index}: naïve café, the {index}th of its kind" for index in range(60)]
REPEATED = next(text for text in TEXTS if not is_validation(document_hash(text), 0.2))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataManifest]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, REPEATED]))
    options = PrepareOptions(
        sources=(folder / "x.jsonl",),
        out=folder / "out",
        vocab_size=300,
        validation_fraction=0.2,
        token_shard_tokens=64,
    )
    return folder / "out", prepare(options, lambda progress: None)


def tokens_of(folder: Path, manifest: DataManifest, place: document_index.Place) -> list[int]:
    shards = manifest.train if place.split == "train" else manifest.validation
    raw = b"".join((folder / shard.file).read_bytes() for shard in shards)
    stream = [int.from_bytes(raw[at : at + 2], "little") for at in range(0, len(raw), 2)]
    return stream[place.start : place.start + place.num_tokens]


def test_every_document_is_found_where_its_tokens_lie(prepared: tuple[Path, DataManifest]) -> None:
    from coordinator import tokenizer

    folder, manifest = prepared
    chosen = tokenizer.load(folder / "tokenizer.json")
    for text in TEXTS:
        places = document_index.find(folder, document_hash(text))
        assert len(places) == (2 if text == REPEATED else 1)
        for place in places:
            assert tokens_of(folder, manifest, place) == [*chosen.encode([text])[0], manifest.end_of_text_id]
    assert document_index.find(folder, b"n" * 32) == []


def test_the_manifest_binds_the_index(prepared: tuple[Path, DataManifest], tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(prepared[0], tmp_path / "c"))
    verify(copy, prepared[1], lambda name: None)
    raw = bytearray((copy / "documents.idx").read_bytes())
    raw[5] ^= 1
    (copy / "documents.idx").write_bytes(raw)
    with pytest.raises(DigestError, match=r"documents\.idx"):
        verify(copy, prepared[1], lambda name: None)
    (copy / "documents.idx").write_bytes(raw[:-1])
    with pytest.raises(DataError, match="cut short"):
        document_index.find(copy, b"n" * 32)


def shards_of(sizes: list[int]) -> DataManifest:
    train = tuple(
        TokenShard(file=f"train-{index:05d}.bin", digest=sha256(b"x").hex(), num_tokens=size)
        for index, size in enumerate(sizes)
    )
    return data_manifest().model_copy(update={"train": train})


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.integers(2, 9),
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40), st.integers(1, 3)), max_size=4),
    st.integers(1, 3),
)
def test_a_sequence_is_left_exactly_if_it_holds_no_removed_token(
    sizes: list[int], length: int, spans: list[tuple[int, int, int]], round_number: int
) -> None:
    listed = [
        Removal(document="d" * 64, reason="r", from_round=start_round, start=start, num_tokens=count)
        for start, count, start_round in spans
    ]
    left = left_to_read(shards_of(sizes), length, listed, round_number)
    gone = {place for start, count, first in spans if first <= round_number for place in range(start, start + count)}
    first = 0
    for shard, size in enumerate(sizes):
        wanted = [
            index
            for index in range(max(0, (size - 1) // length))
            if not gone & set(range(first + index * length, first + index * length + length + 1))
        ]
        assert [left.sequence(shard, index) for index in range(left.counts[shard])] == wanted
        first += size


def removal(letter: str = "a", start: int = 0, from_round: int = 5) -> Removal:
    return Removal(document=letter * 64, reason="asked for", from_round=from_round, start=start, num_tokens=3)


def test_a_newer_list_only_adds() -> None:
    first = RemovalList(version=1, removals=(removal(),))
    second = RemovalList(version=2, removals=(removal(), removal("b")))
    assert removals.supersedes(first, None) and removals.supersedes(second, first)
    assert not removals.supersedes(first, second) and not removals.supersedes(first, first)
    for changed in (removal("b"), removal(from_round=6)):
        with pytest.raises(VerificationError, match="takes a removal back"):
            removals.supersedes(RemovalList(version=3, removals=(changed,)), first)


def signed(made: RemovalList, run_id: bytes, by: Identity = ORGANIZER) -> Signed:
    return by.sign(removals.CONTEXT, run_id, made.canonical_bytes())


def test_only_the_organizer_of_the_run_removes() -> None:
    made, run_id = RemovalList(version=1, removals=(removal(),)), b"r" * 20
    assert removals.parse_signed(signed(made, run_id), run_id, ORGANIZER.public_key) == made
    for bad in (signed(made, run_id, Identity.generate()), signed(made, b"x" * 20)):
        with pytest.raises(VerificationError):
            removals.parse_signed(bad, run_id, ORGANIZER.public_key)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    spec = make_spec(data_manifest())
    folder = tmp_path / "state"
    folder.mkdir()
    spec_signed = ORGANIZER.sign(run_spec.CONTEXT, spec.run_id, spec.canonical_bytes())
    (folder / "spec.sig").write_bytes(spec_signed.SerializeToString())
    return folder


def split_of(prepared: tuple[Path, DataManifest], split: str) -> list[bytes]:
    digests = [document_hash(text) for text in TEXTS]
    return [digest for digest in digests if document_index.find(prepared[0], digest)[0].split == split]


def test_the_organizers_list_grows_and_repeats_are_removed_everywhere(
    prepared: tuple[Path, DataManifest], state: Path
) -> None:
    repeated = document_hash(REPEATED)
    other = next(digest for digest in split_of(prepared, "train") if digest != repeated)
    first = removal_list.add(prepared[0], state, ORGANIZER, [repeated], ("rights", 7))
    assert [item.from_round for item in first.removals] == [7, 7]
    second = removal_list.add(prepared[0], state, ORGANIZER, [repeated, other], ("private", 9))
    assert (second.version, len(second.removals)) == (2, 3)
    assert removals.supersedes(second, first)
    assert removal_list.read_list(state, removal_list.read_spec(state)) == second
    with pytest.raises(ConfigError, match="removed already"):
        removal_list.add(prepared[0], state, ORGANIZER, [other], ("again", 10))


def test_what_cannot_be_removed_is_told(prepared: tuple[Path, DataManifest], state: Path) -> None:
    with pytest.raises(DataError, match="holds no document"):
        removal_list.add(prepared[0], state, ORGANIZER, [b"n" * 32], ("x", 1))
    with pytest.raises(DataError, match="held out"):
        removal_list.add(prepared[0], state, ORGANIZER, split_of(prepared, "validation")[:1], ("x", 1))
    with pytest.raises(ConfigError, match="not the key"):
        removal_list.add(prepared[0], state, Identity.generate(), [document_hash(REPEATED)], ("x", 1))
    assert not (state / "removals.sig").exists()


def test_a_document_is_named_by_its_digest_or_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one text\n")
    assert removal_list.digests_of("AB" * 32) == [b"\xab" * 32]
    assert len(removal_list.digests_of(str(tmp_path / "one.txt"))) == 1
    with pytest.raises(DataError, match="neither"):
        removal_list.digests_of("ab" * 31)


def test_a_file_with_a_damaged_document_is_refused_as_it_would_not_be_removed(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match=r"some\.jsonl:2"):
        removal_list.digests_of(str(tmp_path / "some.jsonl"))


def test_the_command_finds_a_document_and_says_where_it_is_not(prepared: tuple[Path, DataManifest]) -> None:
    digest = document_hash(TEXTS[3]).hex()
    done = CliRunner().invoke(app, ["find", str(prepared[0]), digest, "--json"], catch_exceptions=False)
    (place,) = json.loads(done.stdout)["places"]
    assert place["document"] == digest and len(place["files"]) >= 1
    missing = CliRunner().invoke(app, ["find", str(prepared[0]), "0" * 64])
    assert isinstance(missing.exception, NotFound)


def test_the_coordinator_serves_the_list_of_its_own_organizer_alone(tmp_path: Path) -> None:
    from types import SimpleNamespace

    spec = make_spec(data_manifest())
    run: Any = SimpleNamespace(run_id=spec.run_id, spec=spec)
    path = tmp_path / removals.FILE_NAME
    assert not _removals(run, path).HasField("removals") and not _removals(run, None).HasField("removals")
    made = signed(RemovalList(version=1, removals=(removal(),)), spec.run_id)
    path.write_bytes(made.SerializeToString())
    assert _removals(run, path).removals == made
    path.write_bytes(signed(RemovalList(version=1, removals=(removal(),)), b"x" * 20).SerializeToString())
    with pytest.raises(VerificationError):
        _removals(run, path)


class FakeCoordinator:
    def __init__(self, *answers: Signed | Exception | None) -> None:
        self.answers = list(answers)

    async def signed_removals(self) -> Signed | None:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeReader:
    def __init__(self) -> None:
        self.lists: list[tuple[Removal, ...]] = []

    def remove(self, found: Any) -> None:
        self.lists.append(tuple(found))


def test_a_peer_follows_newer_lists_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = b"r" * 20
    first = RemovalList(version=1, removals=(removal(),))
    second = RemovalList(version=2, removals=(removal(), removal("b")))
    back = RemovalList(version=3, removals=(removal("b"),))
    forged = signed(RemovalList(version=9, removals=(removal("c"),)), run_id, Identity.generate())
    told = [None, signed(first, run_id), Unreachable("away"), signed(second, run_id), signed(first, run_id), forged]
    coordinator, reader = FakeCoordinator(*told, signed(back, run_id)), FakeReader()
    watch = RemovalWatch(coordinator, reader, run_id, ORGANIZER.public_key, tmp_path)
    monkeypatch.setattr(removing, "INTERVAL_S", 0.001)

    async def follow() -> None:
        for _ in range(len(told) + 1):
            await watch.look()

    asyncio.run(follow())
    assert reader.lists == [first.removals, second.removals]


def test_a_peer_follows_its_list_again_after_a_restart_and_no_older_one(tmp_path: Path) -> None:
    run_id = b"r" * 20
    older = signed(RemovalList(version=1, removals=(removal(),)), run_id)
    newer = RemovalList(version=2, removals=(removal(), removal("b")))

    def restarted(answer: Signed | None) -> FakeReader:
        reader = FakeReader()
        watch = RemovalWatch(FakeCoordinator(answer), reader, run_id, ORGANIZER.public_key, tmp_path)
        watch.resume()
        asyncio.run(watch.look())
        return reader

    assert restarted(signed(newer, run_id)).lists == [newer.removals]
    assert restarted(older).lists == [newer.removals]
    (tmp_path / removals.FILE_NAME).write_bytes(b"damaged")
    assert restarted(None).lists == []
