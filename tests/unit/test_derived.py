"""The bf16 set: the same bytes whoever derives them, equal to what torch and safetensors make of the same weights."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from peer.checkpoints.checkpoint import assemble
from swarm import manifest as manifests
from swarm.checkpoint_chunks import FileChunks
from swarm.derived import derive, describe_derived, rounded
from swarm.digest import sha256
from swarm.errors import DataError, RefusedCheckpoint
from swarm.manifest import BF16, FP32, CheckpointManifest
from tests.checkpoint_samples import make_parts, small_checkpoint, with_tensors

GOLDEN = "05e85ca3e819252c6ccda63dac900bbc78fe4eb67eb168819873a24d0f85767c"
HEADER_BYTES = 168
SPECIAL = (0x00000000, 0x80000000, 0x00000001, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000)


def assembled(folder: Path, max_file_bytes: int = 10**9) -> CheckpointManifest:
    """A model of several tensors, odd sizes and names beyond ASCII, with weights in one file or more."""
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"ü.weight": (3, 5), "a.bias": (7,), "b.weight": (40, 11), "c": (1,)}
    tensors = {name: rng.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    return assemble(folder, replace(with_tensors(make_parts(), tensors), max_file_bytes=max_file_bytes))


def test_values_are_rounded_to_nearest_ties_to_even_as_torch_does() -> None:
    bits = np.concatenate(
        [np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32), np.array(SPECIAL, np.uint32)]
    )
    values = bits.view(np.float32)
    values = values[~np.isnan(values)].copy()
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert rounded(values.astype("<f4").tobytes()) == wanted


def test_every_nan_becomes_the_same_quiet_one() -> None:
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], "<u4").tobytes()
    assert rounded(nans) == bytes.fromhex("c07f") * 4


def test_a_derived_file_is_what_safetensors_would_write(tmp_path: Path) -> None:
    tensors = {"ü.weight": torch.randn(3, 5), "a.bias": torch.randn(7), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    in_bf16 = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(in_bf16, tmp_path / "b.safetensors", metadata={"format": "pt"})
    assert b"".join(derive(tmp_path / "a.safetensors").chunks()) == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("seed", range(3))
def test_any_range_of_a_derived_file_is_that_of_the_whole(tmp_path: Path, seed: int) -> None:
    assembled(tmp_path / "c")
    rng = random.Random(seed)
    for path in sorted((tmp_path / "c").glob("*.safetensors")):
        file = derive(path)
        whole = b"".join(file.chunks())
        assert len(whole) == file.size_bytes
        for _ in range(200):
            offset, length = rng.randrange(len(whole)), rng.randrange(1, len(whole))
            assert file.read(offset, length) == whole[offset : offset + length]


def test_several_files_keep_their_index_and_halve_its_size(tmp_path: Path) -> None:
    made = assembled(tmp_path / "c", max_file_bytes=1000)
    names = [file.name for file in made.bf16]
    assert "model.safetensors.index.json" in names and len(names) >= 4
    index = derive(tmp_path / "c" / "model.safetensors.index.json").read(0, 1 << 20) or b""
    values = sum(parameter.size_bytes for parameter in made.anchor.parameters) // 4
    assert f'"total_size": {2 * values}'.encode() in index


def test_every_process_derives_the_same_bytes_and_so_does_every_machine(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_derived import assembled\n"
        "sys.stdout.write(assembled(Path(sys.argv[1])).canonical_bytes().decode())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    other = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=120).stdout
    mine = assembled(tmp_path / "mine")
    assert mine.canonical_bytes() == other
    weights = next(file for file in mine.bf16 if file.name == "model.safetensors")
    assert weights.sha256 == GOLDEN


def test_whoever_has_the_fp32_files_serves_every_chunk_of_the_bf16_set(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    chunks = FileChunks(made.folder, made.manifest)
    for file in made.manifest.bf16:
        for chunk in file.chunks:
            data = chunks(bytes.fromhex(chunk))
            assert data is not None and sha256(data).hex() == chunk
            assert chunks.part(bytes.fromhex(chunk), 3, 10) == data[3:13]
            assert chunks.part(bytes.fromhex(chunk), len(data), 1) is None
    assert not (made.folder / BF16).exists()


def test_a_chunk_whose_origin_is_gone_is_not_here(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    chunks = FileChunks(made.folder, made.manifest)
    weights = bytes.fromhex(made.manifest.bf16[-1].chunks[0])
    os.truncate(made.folder / "model.safetensors", 200)
    assert chunks(weights) is None
    (made.folder / "model.safetensors").unlink()
    assert FileChunks(made.folder, made.manifest)(weights) is None


def test_the_bf16_set_has_half_the_weights_and_shares_the_rest(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c").manifest
    whole, half = made.file_set(FP32), made.file_set(BF16)
    assert [file.name for file in whole.files] == [file.name for file in half.files]
    assert half.derived == {"config.json", "model.safetensors"}
    assert [half.place(name) for name in ("config.json", "README.md")] == ["bf16/config.json", "README.md"]
    weights = [next(file for file in files if file.name == "model.safetensors") for files in (whole.files, half.files)]
    assert weights[1].size_bytes == 8 + HEADER_BYTES + 2 * 1007 < 0.6 * weights[0].size_bytes


def test_a_manifest_of_before_is_as_it_was_and_has_no_bf16_set(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c").manifest.model_copy(update={"bf16": ()})
    assert b"bf16" not in made.canonical_bytes()
    old = manifests.parse(made.canonical_bytes())
    with pytest.raises(DataError, match="round 10 has no bf16 set") as caught:
        old.file_set(BF16)
    assert "swarm export" in caught.value.advice


def test_a_bf16_set_of_other_names_is_refused(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c").manifest
    for wrong in (made.bf16[:1], made.bf16[::-1], (*made.bf16, made.files[-1])):
        with pytest.raises(RefusedCheckpoint, match="bf16"):
            manifests.parse(made.model_copy(update={"bf16": wrong}).canonical_bytes())


DAMAGES = {
    "no header": b"\xff" * 8,
    "not JSON": b"\x02\x00\x00\x00\x00\x00\x00\x00[]",
    "not fp32": b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F64","shape":[0],"data_offsets":[0,0]}}          ',
    "empty": b"",
}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES.keys())
def test_nothing_is_derived_of_what_is_no_fp32_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    listed = manifests.list_file("model.safetensors", [content] if content else [])
    with pytest.raises(DataError):
        describe_derived(tmp_path, (listed,))
