"""A published checkpoint is downloaded, verified, and opened by a clean process that has none of our code."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peer.checkpoints.download import Order, download
from peer.checkpoints.filling import Fetching
from peer.checkpoints.generate import GenerateOptions, draw, generate, open_checkpoint
from peer.checkpoints.sources import PeerSource, Tally
from peer.checkpoints.verify import Report, verify_folder
from peer.coordinator_client import CoordinatorClient, RunInfo
from peer.p2p.chunk_store import CHUNK_METHOD, ChunkStore
from peer.p2p.network import NetworkConfig, open_network
from peer.p2p.transport import Transport
from swarm.checkpoint_chunks import FileChunks
from swarm.cli import download as download_command
from swarm.cli import reaching
from swarm.errors import ConfigError, DataError, DeviceError, DigestError, NotFound, VerificationError
from swarm.identity import Identity
from swarm.invite import Invite
from swarm.proto.common_pb2 import Genesis
from swarm.publication import Publication
from tests.checkpoint_samples import ORGANIZER, PUBLISHER, FakeTransport, SignedCheckpoint
from tests.metadata_samples import Repository
from tests.published_samples import CONFIGS, TEXT, Published, publish

HOLDER = b"h" * 32


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("published") / "c", "llama")


@pytest.fixture(scope="module")
def folder(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The downloaded checkpoint."""
    base = tmp_path_factory.mktemp("downloaded")
    made = published.made
    store = ChunkStore(base / "store", 0)
    store.add_source(FileChunks(made.folder, made.manifest))
    order = Order(
        run_id=made.run_id,
        signed_spec=made.signed_spec,
        publication=made.publication,
        target=base / "out",
    )
    source = PeerSource(FakeTransport({HOLDER: store.handle_chunk}), HOLDER)
    return asyncio.run(download(order, Fetching(sources=[source]))).folder


def logits_of(model: Any, ids: list[int]) -> list[list[float]]:
    import torch

    with torch.inference_mode():
        logits: list[list[float]] = model(input_ids=torch.tensor([ids])).logits[0].tolist()
    return logits


CLEAN_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(text)["input_ids"]
with torch.inference_mode():
    logits = model(input_ids=torch.tensor([ids])).logits[0].tolist()
    more = model.generate(torch.tensor([ids[:5]]), attention_mask=torch.ones(1, 5), max_new_tokens=8, do_sample=False)
ours = [name for name in sys.modules if name.split(".")[0] in ("swarm", "peer", "coordinator")]
result = {
    "ids": ids, "logits": logits, "more": more[0].tolist(), "ours": ours, "dtype": str(model.dtype),
    "eos": tokenizer.eos_token, "eos_id": tokenizer.eos_token_id, "text": tokenizer.decode(ids),
}
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def opened_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with transformers alone makes of the folder: no environment, no path, no code of ours."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, str(folder), TEXT],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={"HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_clean_process_computes_the_logits_of_the_model_that_was_published(
    published: Published, opened_elsewhere: dict[str, Any]
) -> None:
    assert opened_elsewhere["logits"] == logits_of(published.model, opened_elsewhere["ids"])
    assert opened_elsewhere["dtype"] == "torch.float32"
    assert opened_elsewhere["ours"] == []


def test_a_clean_process_reads_text_as_the_runs_tokenizer_does(
    published: Published, opened_elsewhere: dict[str, Any]
) -> None:
    assert opened_elsewhere["ids"] == published.tokenizer.encode(TEXT).ids
    assert opened_elsewhere["text"] == TEXT
    assert (opened_elsewhere["eos"], opened_elsewhere["eos_id"]) == ("<|endoftext|>", 0)


def test_the_downloaded_folder_verifies_offline(published: Published, folder: Path) -> None:
    report = verify_folder(folder, published.made.run_id)
    assert report.ok
    assert len([file for file in report.provenance.manifest.files if file.name.endswith(".safetensors")]) > 1


def test_generate_streams_the_text_that_transformers_generates(
    folder: Path, published: Published, opened_elsewhere: dict[str, Any]
) -> None:
    prompt = published.tokenizer.decode(opened_elsewhere["ids"][:5])
    pieces = list(generate(folder, prompt, GenerateOptions(max_tokens=8, temperature=0, device="cpu")))
    assert "".join(pieces) == published.tokenizer.decode(opened_elsewhere["more"][5:])
    assert len(pieces) > 1


def text_of(folder: Path, **options: Any) -> str:
    return "".join(generate(folder, "The fox", GenerateOptions(max_tokens=20, device="cpu", **options)))


def test_one_seed_gives_one_text_and_another_seed_another(folder: Path) -> None:
    assert text_of(folder, seed=1) == text_of(folder, seed=1) != text_of(folder, seed=2)


def test_generation_ends_where_the_models_context_is_full(folder: Path, published: Published) -> None:
    room = 64 - len(published.tokenizer.encode("The fox").ids)
    most, full, less = (
        "".join(generate(folder, "The fox", GenerateOptions(max_tokens=count, temperature=0, device="cpu")))
        for count in (1000, room, room - 1)
    )
    assert most == full != less


def test_an_empty_prompt_starts_from_the_beginning_of_a_text(folder: Path) -> None:
    assert "".join(generate(folder, "", GenerateOptions(max_tokens=5, device="cpu", seed=1)))


def test_a_prompt_longer_than_the_context_is_a_config_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the model reads 64"):
        next(generate(folder, TEXT * 20, GenerateOptions(device="cpu")))


def test_a_device_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(DeviceError):
        next(generate(folder, "x", GenerateOptions(device="cuda:99")))


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "no tokens": {"max_tokens": 0},
    "negative temperature": {"temperature": -1.0},
    "temperature that is no number": {"temperature": float("nan")},
    "top-p 0": {"top_p": 0.0},
    "top-p above 1": {"top_p": 1.5},
    "negative seed": {"seed": -1},
    "negative top-k": {"top_k": -1},
}


@pytest.mark.parametrize("options", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_options_out_of_range_are_config_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        GenerateOptions(**options)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint with one flipped bit in its model card."""
    copy = Path(shutil.copytree(folder, tmp_path / "damaged"))
    data = bytearray((copy / "README.md").read_bytes())
    data[100] ^= 1
    (copy / "README.md").write_bytes(data)
    return copy


def test_a_damaged_folder_is_refused_unless_checking_is_turned_off(damaged: Path) -> None:
    with pytest.raises(DigestError, match=r"README.md is damaged"):
        text_of(damaged)
    assert text_of(damaged, verify=False)


def test_a_checkpoint_of_another_run_is_refused(folder: Path) -> None:
    with pytest.raises(VerificationError):
        text_of(folder, run_id=b"x" * 20)


def test_a_folder_without_a_model_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no model that can be opened"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_opens_with_equal_logits_and_its_tokenizer(family: str, tmp_path: Path) -> None:
    published = publish(tmp_path / "c", family)
    model, tokenizer = open_checkpoint(published.made.folder)
    ids = tokenizer.encode(TEXT)
    assert ids == published.tokenizer.encode(TEXT).ids
    assert logits_of(model, ids) == logits_of(published.model, ids)
    greedy = GenerateOptions(max_tokens=4, temperature=0, device="cpu")
    assert "".join(generate(published.made.folder, "The quick", greedy))


def test_top_p_draws_only_from_the_smallest_likely_set() -> None:
    import torch

    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(1)

    def drawn(temperature: float, top_p: float, top_k: int = 0) -> set[int]:
        options = GenerateOptions(temperature=temperature, top_p=top_p, top_k=top_k)
        return {draw(logits_V, options, generator) for _ in range(300)}

    assert drawn(1.0, 1.0) == {0, 1, 2, 3}
    assert drawn(1.0, 0.79) == {0, 1}
    assert drawn(1.0, 0.01) == {0}
    assert drawn(0.0, 1.0) == {0}
    assert drawn(1.0, 1.0, top_k=3) == {0, 1, 2}
    assert drawn(1.0, 0.52, top_k=2) == {0}


def test_a_model_whose_output_is_not_finite_is_a_data_error() -> None:
    import torch

    with pytest.raises(DataError, match="not finite"):
        draw(torch.tensor([1.0, float("nan")]), GenerateOptions(temperature=1.0, top_p=1.0), torch.Generator())


class Coordinator:
    """The coordinator's answers to a researcher: the run, and its one checkpoint."""

    def __init__(self, made: SignedCheckpoint, seed: Transport) -> None:
        self.made = made
        self.run = RunInfo(
            spec=verify_folder(made.folder, made.run_id).provenance.spec,
            signed_spec=made.signed_spec,
            genesis=Genesis(run_id=made.run_id, voters=[seed.public_key]),
            signed_genesis=made.signed_spec,
            seed_addresses=seed.addresses,
            manifest_bytes=b"",
            tokenizer_bytes=b"",
            clock_offset_s=0.0,
        )

    async def get_run(self) -> RunInfo:
        return self.run

    async def metadata(self) -> dict[str, bytes]:
        repository = Repository(self.run.spec, (ORGANIZER,), PUBLISHER)
        repository.publish(self.made.publication, self.made.manifest.round)
        return repository.files

    async def checkpoint(self, round_number: int) -> Publication:
        assert round_number == self.made.manifest.round, "the metadata names the newest"
        return self.made.publication

    async def mirrors(self) -> tuple[str, ...]:
        return ()

    async def chunk(self, digest: bytes, offset: int, length: int) -> bytes:
        raise NotFound("no checkpoints lie here")

    async def close(self) -> None:
        pass


def test_swarm_download_fetches_over_libp2p_from_the_seed_peer(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    made = published.made
    store = ChunkStore(tmp_path / "store", 0)
    store.add_source(FileChunks(made.folder, made.manifest))
    invite = Invite(run_id=made.run_id, tls_pin=b"t" * 32, addresses=("localhost:1",))

    async def scenario() -> tuple[Report, Tally]:
        config = NetworkConfig(run_id=made.run_id, clock=time.time, directory_keys=("status-0",))
        seed = await open_network(config, Identity.generate())
        try:
            await seed.serve(CHUNK_METHOD, store.handle_chunk)

            async def connect(invite: Invite) -> Coordinator:
                return Coordinator(made, seed)

            monkeypatch.setattr(CoordinatorClient, "connect", connect)
            wanted = download_command.Wanted(round_number=0, dtype="fp32", out=tmp_path / "out", force=False)
            downloading = download_command.download_checkpoint(invite, wanted, download_command.Where())
            return await asyncio.wait_for(downloading, 60)
        finally:
            await seed.close()

    report, tally = asyncio.run(scenario())
    assert report.ok
    assert tally.by_kind() == {"peers": made.manifest.size_bytes}
    assert report.folder == tmp_path / "out" / "round-000010"
    assert (reaching.trusted_folder(made.run_id) / "timestamp.json").is_file()
