"""Checkpoints that are refused whoever signed them: by name, with exit code 65, and nothing written anywhere else."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peer.checkpoints.checkpoint import describe_file
from peer.checkpoints.download import Order, download
from peer.checkpoints.filling import Fetching
from swarm.cli import main
from swarm.errors import RefusedCheckpoint
from swarm.manifest import CONTEXT, MANIFEST_FILE
from tests.checkpoint_samples import PUBLISHER, SignedCheckpoint, publication_of, small_checkpoint, write_signed

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    return small_checkpoint(tmp_path / "made")


def weights(header: str, data: bytes = bytes(8), claimed: int | None = None) -> Callable[[Path], None]:
    """A safetensors file with this header; ``claimed``: another length than it has."""
    raw = header.encode()

    def write(folder: Path) -> None:
        length = len(raw) if claimed is None else claimed
        (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + raw + data)

    return write


def written(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle under a safetensors name": (
        written("model.safetensors", pickle.dumps({"a": [1.0] * 100})),
        "header is longer",
    ),
    "overlapping tensors": (weights(json.dumps({"a": TENSOR, "b": TENSOR})), "overlap"),
    "duplicate names": (weights(f'{{"a": {json.dumps(TENSOR)}, "a": {json.dumps(TENSOR)}}}'), "twice"),
    "a header of 100 MB": (weights("{}", claimed=100_000_001), "header is longer"),
    "a header longer than the file": (weights("{}", claimed=1000), "header is longer"),
    "out of bounds": (weights(json.dumps({"a": TENSOR | {"data_offsets": [8, 16]}})), "overlap or leave holes"),
    "cut short, with the whole size claimed": (weights(json.dumps({"a": TENSOR}), data=bytes(4)), "do not fill"),
    "remote code": (written("config.json", b'{"auto_map": {"AutoModel": "x.Y"}}'), "auto_map"),
    "an index that leaves the folder": (
        written("config.json", b'{"weight_map": {"w": "../x.safetensors"}}'),
        "outside",
    ),
}


def signed_anew(made: SignedCheckpoint, **changes: Any) -> None:
    """Let the organizer's own key sign what lies in the folder now."""
    files = tuple(describe_file(made.folder / file.name) for file in made.manifest.files)
    manifest = made.manifest.model_copy(update={"files": files, **changes})
    write_signed(made.folder, publication_of(manifest.canonical_bytes(), made.run_id), made.signed_spec)


def exit_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("case", FILES)
def test_a_signed_file_of_a_refused_form_is_named_with_exit_code_65(
    case: str, made: SignedCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = FILES[case]
    spoil(made.folder)
    signed_anew(made)
    assert exit_of("verify", made.folder) == 65
    told = capsys.readouterr()
    assert said in told.err and ("config.json" in told.err or "model.safetensors" in told.err)
    assert "right" not in told.out


def test_a_link_in_place_of_a_file_is_refused_even_where_its_bytes_are_right(
    made: SignedCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made.folder / "config.json").rename(tmp_path / "elsewhere")
    (made.folder / "config.json").symlink_to(tmp_path / "elsewhere")
    assert exit_of("verify", made.folder) == 65
    assert "symbolic link" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.PT", "modeling.py", "Config.JSON"])
def test_an_unsigned_file_that_a_loader_might_pick_up_is_refused(name: str, made: SignedCheckpoint) -> None:
    (made.folder / name).write_bytes(b"x")
    assert exit_of("verify", made.folder) == 65


def test_a_checkpoint_of_another_run_is_refused(made: SignedCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("verify", made.folder, "--run", "00" * 20) == 65
    assert "another run" in capsys.readouterr().err


NAMES = {
    "traversal": ["../config.json"],
    "absolute": ["/tmp/config.json"],
    "a folder": ["a/config.json"],
    "backslashes": ["..\\config.json"],
    "differ only by case": ["README.md", "readme.md"],
    "one name twice": ["config.json", "config.json"],
    "capitals": ["Config.json"],
    "a pickle": ["pytorch_model.bin"],
    "code": ["modeling.py"],
    "the manifest's own": [MANIFEST_FILE],
    "zero byte": ["a\0.json"],
}


@pytest.mark.parametrize("case", NAMES)
def test_a_signed_manifest_with_refused_names_is_refused_before_anything_is_written(
    case: str, made: SignedCheckpoint, tmp_path: Path
) -> None:
    values = json.loads(made.manifest.canonical_bytes())
    template = values["files"][0]
    values["files"] = [*values["files"], *({**template, "name": name} for name in NAMES[case])]
    payload = json.dumps(values).encode()
    before = {path for path in tmp_path.rglob("*")}
    honest = made.publication
    publication = type(honest)(manifest=PUBLISHER.sign(CONTEXT, made.run_id, payload), witnesses=honest.witnesses)
    order = Order(
        run_id=made.run_id, signed_spec=made.signed_spec, publication=publication, target=tmp_path / "out" / "here"
    )
    with pytest.raises(RefusedCheckpoint):
        asyncio.run(download(order, Fetching(sources=())))
    assert {path for path in tmp_path.rglob("*")} == before
    assert not os.path.lexists("/tmp/config.json")
