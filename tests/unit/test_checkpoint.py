"""Assembly: the Hugging Face layout, the same bytes everywhere, all or nothing."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from peer.checkpoints import checkpoint
from peer.checkpoints.checkpoint import CheckpointParts, assemble, describe_file
from peer.checkpoints.verify import verify_folder
from swarm.digest import sha256
from swarm.errors import DataError, DiskFull
from tests.checkpoint_samples import make_parts, small_checkpoint, with_tensors


def small_parts(**tensors: np.ndarray) -> CheckpointParts:
    return with_tensors(make_parts(num_values=2), tensors or {"w": np.arange(6, dtype=np.float32).reshape(2, 3)})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_holds_the_hugging_face_layout_and_the_manifest_lists_it(tmp_path: Path) -> None:
    parts = small_parts()
    manifest = assemble(tmp_path / "c", parts)
    assert sorted(contents(tmp_path / "c")) == [
        "README.md",
        "config.json",
        "data-manifest.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert {file.name: file.sha256 for file in manifest.files} == {
        name: sha256(data).hex() for name, data in contents(tmp_path / "c").items()
    }
    assert (manifest.round, manifest.total_tokens, manifest.run_id) == (10, 500, parts.run_id.hex())
    assert manifest.state_digest == parts.states[0].state_digest.hex()
    assert np.array_equal(load_file(tmp_path / "c" / "model.safetensors")["w"], parts.tensors["w"])


def test_the_same_parts_make_the_same_files_whatever_the_order_of_tensors(tmp_path: Path) -> None:
    """The order is the anchor's, and stands in the manifest alone."""
    one, two = np.ones(3, np.float32), np.zeros((2, 2), np.float32)
    parts = small_parts(a=one, b=two)
    first = assemble(tmp_path / "1", parts)
    second = assemble(tmp_path / "2", replace(parts, tensors={"b": two, "a": one}))
    assert first.files == second.files
    assert [parameter.name for parameter in second.anchor.parameters] == ["b", "a"]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_arrays_that_are_views_are_written_as_they_read(tmp_path: Path) -> None:
    view = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assemble(tmp_path / "c", small_parts(v=view))
    assert np.array_equal(load_file(tmp_path / "c" / "model.safetensors")["v"], view)


def test_weights_beyond_the_limit_are_split_with_an_index(tmp_path: Path) -> None:
    tensors = {f"layer{number}": np.full(10, number, np.float32) for number in range(5)}
    manifest = assemble(tmp_path / "c", replace(small_parts(**tensors), max_file_bytes=80))
    weights = [file.name for file in manifest.files if file.name.endswith(".safetensors")]
    assert weights == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"total_parameters": 50, "total_size": 200}
    for name, file in index["weight_map"].items():
        assert np.array_equal(load_file(tmp_path / "c" / file)[name], tensors[name])
    assert sorted(index["weight_map"]) == sorted(tensors)


def test_chunk_digests_are_of_4_mib_each(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # 10.24 MB
    (tmp_path / "a.txt").write_bytes(data)
    described = describe_file(tmp_path / "a.txt")
    size = 4 << 20
    assert described.chunks == tuple(sha256(data[start : start + size]).hex() for start in (0, size, 2 * size))
    assert (described.size_bytes, described.sha256) == (len(data), sha256(data).hex())


def test_an_older_assembly_is_replaced_and_leftovers_of_a_crash_are_cleared(tmp_path: Path) -> None:
    for leftover in ("c", ".c.building", ".c.replaced"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stale.json").write_text("{}")
    assemble(tmp_path / "c", small_parts())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert not (tmp_path / "c" / "stale.json").exists()


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        assemble(tmp_path / "c", small_parts())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_under_the_weights_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that writes them tells what the system said in words alone."""

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DiskFull):
        assemble(tmp_path / "c", small_parts())
    assert list(tmp_path.iterdir()) == []


BAD_PARTS = {
    "another tokenizer": {"tokenizer_json": b"{}"},
    "another data manifest": {"data_json": b"{}"},
    "half precision": {"tensors": {"w": np.zeros(3, np.float16)}},
    "no tensors": {"tensors": {}},
    "config with code": {"config_json": json.dumps({"auto_map": {"AutoModelForCausalLM": "evil.Model"}})},
}


@pytest.mark.parametrize("change", BAD_PARTS.values(), ids=BAD_PARTS.keys())
def test_parts_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(DataError):
        replace(make_parts(num_values=2), **change)  # type: ignore[arg-type]


def test_a_tokenizer_without_the_end_of_text_token_is_refused(tmp_path: Path) -> None:
    parts = small_parts()
    with pytest.raises(DataError, match="end-of-text id 9"):
        assemble(tmp_path / "c", replace(parts, data=parts.data.model_copy(update={"end_of_text_id": 9})))


def test_the_model_card_names_what_made_the_model_and_its_text_cannot_break_out(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    card = (made.folder / "README.md").read_text()
    for fact in (made.run_id.hex(), made.manifest.state_digest, made.manifest.log_digest, "CC0", "sample, round 10"):
        assert fact in card
    assert "\n# *book*" not in card
    assert "| a\\|b # \\*book\\* | CC0 | 2 | 9 |" in card
    assert sha256(parts_data := (made.folder / "data-manifest.json").read_bytes()).hex() in card
    assert b"*book*" in parts_data


def test_a_signed_checkpoint_verifies(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    assert verify_folder(made.folder, made.run_id).ok
