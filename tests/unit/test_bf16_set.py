"""The bf16 set on a researcher's disk: fetched, verified, mended and used by itself; what only fp32 can do says so."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator.mirroring import PublishedRun, write_mirror
from peer.checkpoints.checkpoint import write_signed
from peer.checkpoints.compare import compare
from peer.checkpoints.download import Order, download
from peer.checkpoints.facts import read_facts
from peer.checkpoints.filling import Fetching
from peer.checkpoints.generate import open_checkpoint
from peer.checkpoints.hub import describe_folder
from peer.checkpoints.mirrors import open_mirrors
from peer.checkpoints.repair import repair
from peer.checkpoints.sets import held_set
from peer.checkpoints.sources import PeerSource, Tally
from peer.checkpoints.verify import Report, verify_folder
from peer.checkpoints.weights import Weights
from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import FetchLimits
from swarm.checkpoint_chunks import FileChunks
from swarm.cli.download import verified
from swarm.cli.main import app
from swarm.derived import derive
from swarm.errors import DataError, SwarmError
from swarm.invite import Invite
from swarm.manifest import BF16, FP32
from swarm.storage import Storage
from tests.checkpoint_samples import (
    FakeTransport,
    SignedCheckpoint,
    make_parts,
    publication_of,
    signed_checkpoint,
    small_checkpoint,
)
from tests.published_samples import publish

A = b"a" * 32
QUICK = FetchLimits(timeout_s=5, retry_pause_s=0)


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    return small_checkpoint(tmp_path / "made")


def serving(tmp_path: Path, *checkpoints: SignedCheckpoint) -> FakeTransport:
    store = ChunkStore(tmp_path / "store", 0, read_in_thread=False)
    for made in checkpoints:
        store.add_source(FileChunks(made.folder, made.manifest))
    return FakeTransport({A: store.handle_chunk})


def order(made: SignedCheckpoint, target: Path, dtype: str = BF16) -> Order:
    return Order(
        run_id=made.run_id, signed_spec=made.signed_spec, publication=made.publication, target=target, dtype=dtype
    )


def get(transport: FakeTransport, wanted: Order, tally: Tally | None = None) -> Path:
    fetching = Fetching(sources=[PeerSource(transport, A)], limits=QUICK, tally=tally or Tally())
    return asyncio.run(download(wanted, fetching)).folder


def bf16_folder(made: SignedCheckpoint, tmp_path: Path) -> Path:
    return get(serving(tmp_path, made), order(made, tmp_path / "out"))


def test_peers_that_hold_fp32_alone_give_half_of_the_bytes(tmp_path: Path) -> None:
    made, tally = signed_checkpoint(tmp_path / "made", make_parts()), Tally()
    folder = get(serving(tmp_path, made), order(made, tmp_path / "out"), tally)
    assert folder == tmp_path / "out" / "round-000010-bf16"
    assert sum(tally.received_bytes.values()) == made.manifest.file_set(BF16).size_bytes
    assert (folder / "model.safetensors").stat().st_size < 0.51 * (made.folder / "model.safetensors").stat().st_size
    report = verify_folder(folder, made.run_id)
    assert report.ok and report.as_json()["dtype"] == "bf16" and report.bf16_set == "listed"


def test_who_fetches_or_uses_the_bf16_set_alone_hears_whose_word_it_is(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bf16_folder(made, tmp_path)

    async def fetched(*_: object) -> tuple[Report, Tally]:
        return verify_folder(folder, made.run_id), Tally()

    monkeypatch.setattr("swarm.cli.download.download_checkpoint", fetched)
    invite = Invite(run_id=made.run_id, tls_pin=b"t" * 32, addresses=("localhost:1",)).encode()
    for arguments in (["download", invite, "--dtype", "bf16"], ["generate", str(folder), "a", "--max-tokens", "1"]):
        assert "as the publication key signed it" in CliRunner().invoke(app, arguments).stderr, arguments
    verified(folder, made.run_id)
    assert "as the publication key signed it" in capsys.readouterr().err
    verified(made.folder, made.run_id)
    assert not capsys.readouterr().err


def test_the_folder_opens_in_transformers_as_the_rounded_model(tmp_path: Path) -> None:
    published = publish(tmp_path / "made", "llama")
    folder = bf16_folder(published.made, tmp_path)
    model, tokenizer = open_checkpoint(folder)
    assert str(model.dtype) == "torch.bfloat16"
    for name, parameter in published.model.named_parameters():
        assert model.get_parameter(name).equal(parameter.detach().to(model.dtype)), name
    assert tokenizer.encode("fox")


def test_where_the_fp32_set_lies_the_bf16_set_needs_no_network(made: SignedCheckpoint, tmp_path: Path) -> None:
    get(serving(tmp_path, made), order(made, tmp_path / "out", FP32))
    nobody = FakeTransport()
    folder = get(nobody, order(made, tmp_path / "out"))
    assert nobody.calls == [] and verify_folder(folder, made.run_id).ok
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_complete_bf16_folder_is_neither_fetched_again_nor_taken_for_fp32(
    made: SignedCheckpoint, tmp_path: Path
) -> None:
    folder, nobody = bf16_folder(made, tmp_path), FakeTransport()
    assert get(nobody, order(made, tmp_path / "out")) == folder and nobody.calls == []
    assert get(serving(tmp_path, made), order(made, tmp_path / "out", FP32)) == tmp_path / "out" / "round-000010"


def test_any_flipped_bit_in_any_file_of_the_bf16_set_is_noticed(made: SignedCheckpoint, tmp_path: Path) -> None:
    folder, rng = bf16_folder(made, tmp_path), random.Random(1)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for position in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(15))}:
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(SwarmError):
                verify_folder(folder, made.run_id).require_ok()
        path.write_bytes(good)
    assert verify_folder(folder, made.run_id).ok


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_or_missing_file_does_not_make_it_another_set_and_is_mended(
    made: SignedCheckpoint, tmp_path: Path, name: str
) -> None:
    folder = bf16_folder(made, tmp_path)
    for damage in (lambda path: os.truncate(path, 5), Path.unlink):
        damage(folder / name)
        found = verify_folder(folder, made.run_id)
        assert not found.ok and found.files.dtype == BF16
        source = PeerSource(serving(tmp_path, made), A)
        report = asyncio.run(repair(folder, found.provenance, Fetching(sources=[source], limits=QUICK)))
        assert report.ok and report.files.dtype == BF16


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_folder_whose_every_own_file_is_cut_is_mended_as_the_set_that_it_was_downloaded_as(
    made: SignedCheckpoint, tmp_path: Path, dtype: str
) -> None:
    """Sizes tell nothing any more; the other set would be twice the bytes, or half of the weights."""
    folder = get(serving(tmp_path, made), order(made, tmp_path / "out", dtype))
    for name in made.manifest.file_set(BF16).derived:
        os.truncate(folder / name, 5)
    found = verify_folder(folder, made.run_id)
    source = PeerSource(serving(tmp_path, made), A)
    report = asyncio.run(repair(folder, found.provenance, Fetching(sources=[source], limits=QUICK)))
    assert report.ok and report.files.dtype == dtype


def test_a_set_under_another_sets_name_is_what_its_files_are(made: SignedCheckpoint, tmp_path: Path) -> None:
    renamed = made.folder.rename(tmp_path / "mine-bf16")
    assert held_set(renamed, made.manifest).dtype == FP32


def test_fp32_that_makes_another_bf16_set_than_the_manifest_lists_does_not_verify(made: SignedCheckpoint) -> None:
    """So whoever has the fp32 set vouches for the other, which its holders cannot recompute."""
    assert verify_folder(made.folder, made.run_id).bf16_set == "recomputed"
    weights = made.manifest.bf16[-1].model_copy(update={"sha256": "00" * 32})
    forged = made.manifest.model_copy(update={"bf16": (*made.manifest.bf16[:-1], weights)})
    write_signed(made.folder, publication_of(forged.canonical_bytes(), made.run_id), made.signed_spec)
    report = verify_folder(made.folder, made.run_id)
    problem = "the manifest lists another model.safetensors of the bf16 set than these weights make"
    assert report.problems == (problem,)
    assert report.bf16_set is None


def test_of_a_damaged_folder_nothing_is_said_about_the_bf16_set(made: SignedCheckpoint, tmp_path: Path) -> None:
    """Nothing was recomputed there."""
    for folder in (made.folder, bf16_folder(made, tmp_path)):
        os.truncate(folder / "model.safetensors", 5)
        told = verify_folder(folder, made.run_id).as_json()
        assert (told["ok"], told["bf16_set"]) == (False, None)


def test_a_checkpoint_of_before_has_no_set_to_download_and_verifies_as_ever(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "made")
    old = made.manifest.model_copy(update={"bf16": ()})
    publication = publication_of(old.canonical_bytes(), made.run_id)
    write_signed(made.folder, publication, made.signed_spec)
    before = SignedCheckpoint(made.folder, old, made.run_id, made.signed_spec, publication)
    assert verify_folder(made.folder, made.run_id).ok
    with pytest.raises(DataError, match="no bf16 set"):
        get(serving(tmp_path, before), order(before, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def mirror(made: SignedCheckpoint, tmp_path: Path) -> Path:
    """A mirror with the checkpoint, as the coordinator writes it."""
    shutil.copytree(made.folder, tmp_path / "home" / "checkpoint-10")
    run = PublishedRun(folder=tmp_path / "home", run_id=made.run_id, spec=make_parts().spec)
    write_mirror(Storage(f"file://{tmp_path / 'mirror'}"), run.folders()[0])
    assert not list((tmp_path / "home" / "checkpoint-10").glob(".*"))
    return tmp_path / "mirror"


def test_a_mirror_holds_both_sets_and_gives_either(made: SignedCheckpoint, tmp_path: Path) -> None:
    url = f"file://{mirror(made, tmp_path)}"

    async def fetched(dtype: str) -> Path:
        async with open_mirrors([url], (), 10) as sources:
            return (await download(order(made, tmp_path / "out", dtype), Fetching(sources=sources))).folder

    for dtype in (BF16, FP32):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert held_set(asyncio.run(fetched(dtype)), made.manifest).dtype == dtype


def test_a_copy_of_a_mirrors_folder_verifies_with_both_sets(made: SignedCheckpoint, tmp_path: Path) -> None:
    copy = mirror(made, tmp_path) / "checkpoint-10"
    report = verify_folder(copy, made.run_id)
    assert report.ok and report.warnings == ()
    path = copy / BF16 / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    assert "bf16/model.safetensors is damaged" in verify_folder(copy, made.run_id).problems[0]
    (copy / BF16 / "adapter_config.json").write_bytes(b"{}")
    assert "adapter_config.json is not part of the checkpoint; move it away" in verify_folder(copy, None).problems[-1]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(bytes(path.stat().st_size)), Path.unlink])
def test_a_mirrors_folder_is_mended_in_both_sets_and_the_bf16_set_needs_no_network(
    made: SignedCheckpoint, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    copy, tally = mirror(made, tmp_path) / "checkpoint-10", Tally()
    whole = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for path in ("model.safetensors", f"{BF16}/model.safetensors"):
        damage(copy / path)
    found = verify_folder(copy, made.run_id)
    assert not found.ok
    source = PeerSource(serving(tmp_path, made), A)
    fetching = Fetching(sources=[source], limits=QUICK, tally=tally)
    assert asyncio.run(repair(copy, found.provenance, fetching)).ok
    assert {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()} == whole
    assert sum(tally.received_bytes.values()) == (made.folder / "model.safetensors").stat().st_size


def test_bf16_weights_are_read_as_the_fp32_values_that_they_are(made: SignedCheckpoint, tmp_path: Path) -> None:
    folder = bf16_folder(made, tmp_path)
    exact, near = Weights(made.folder, made.manifest), Weights(folder, made.manifest)
    assert exact.shapes == near.shapes
    difference = np.abs(exact.read("b.weight") - near.read("b.weight"))
    assert near.read("b.weight").dtype == np.float32 and 0 < difference.max() < 2**-8
    found = compare(read_facts(made.folder, None), read_facts(folder, None)).as_json()
    assert (found["a"]["dtype"], found["b"]["dtype"]) == (FP32, BF16)


def test_a_push_of_a_bf16_folder_is_its_own_files(made: SignedCheckpoint, tmp_path: Path) -> None:
    pushed = describe_folder(bf16_folder(made, tmp_path), made.run_id)
    assert {"config.json", "model.safetensors", "README.md", "swarm-manifest.sig"} <= set(pushed.names)
    assert "round 10, bf16" in pushed.summary


ONLY_FP32 = {
    "audit": ("audit", "{}", "--archive", "."),
    "export to fp16": ("export", "{}", "--to", "hf", "--dtype", "fp16"),
}


@pytest.mark.parametrize("arguments", ONLY_FP32.values(), ids=ONLY_FP32.keys())
def test_what_needs_the_fp32_set_says_where_to_get_it(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = str(bf16_folder(made, tmp_path))
    done = CliRunner().invoke(app, [word.format(folder) for word in arguments])
    assert isinstance(done.exception, DataError)
    assert "needs the fp32 set" in str(done.exception) and "swarm download" in done.exception.advice


def test_what_is_derived_is_the_files_that_a_download_brings(made: SignedCheckpoint, tmp_path: Path) -> None:
    folder = bf16_folder(made, tmp_path)
    for file in made.manifest.bf16:
        assert b"".join(derive(made.folder / file.name).chunks()) == (folder / file.name).read_bytes()
