"""Checkpoints that are refused whoever signed them: by name, with exit code 65, and nothing written anywhere else."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from peer.checkpoints.checkpoint import describe_file
from peer.coordinator_client import CoordinatorClient
from swarm.cli import main
from swarm.digest import sha256
from swarm.errors import Unreachable
from swarm.invite import Invite
from swarm.manifest import CONTEXT, MANIFEST_FILE, mirror_folder
from swarm.publication import Publication
from swarm.witness import WITNESSES_CONTEXT
from tests.checkpoint_samples import (
    PUBLISHER,
    SignedCheckpoint,
    invite_to,
    make_parts,
    publication_of,
    small_checkpoint,
    write_signed,
)
from tests.metadata_samples import mirror_metadata

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SignedCheckpoint:
    """On a mirror, whose run's coordinator is away."""

    async def connect(_invite: Invite) -> CoordinatorClient:
        raise Unreachable("no coordinator answers")

    monkeypatch.setattr(CoordinatorClient, "connect", connect)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return small_checkpoint(tmp_path / "www" / mirror_folder(10))


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
    "remote code of a pipeline": (written("config.json", b'{"custom_pipelines": {"a": {}}}'), "custom_pipelines"),
    "a config that is no table": (written("config.json", b"[]"), "no table"),
    "an index that leaves the folder": (
        written("config.json", b'{"weight_map": {"w": "../x.safetensors"}}'),
        "outside",
    ),
}


def signed_anew(made: SignedCheckpoint, **changes: Any) -> SignedCheckpoint:
    """Let the run's own key sign what lies in the folder now."""
    files = tuple(describe_file(made.folder / file.name) for file in made.manifest.files)
    manifest = made.manifest.model_copy(update={"files": files, **changes})
    changed = replace(made, manifest=manifest, publication=publication_of(manifest.canonical_bytes(), made.run_id))
    write_signed(made.folder, changed.publication, made.signed_spec)
    return changed


def exit_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@dataclass
class Fetched:
    """What came of a download from the mirror: ``made_elsewhere``: paths that it made or changed outside its target,
    what is trusted of the run left out."""

    code: int
    in_target: set[str]
    made_elsewhere: set[Path]


def download(made: SignedCheckpoint) -> Fetched:
    www, root = made.folder.parent, made.folder.parent.parent
    mirror_metadata(www, make_parts().spec, {10: made})
    before = contents(root)
    target = root / "got"
    code = exit_of("download", invite_to(made.run_id), "--out", target, "--mirror", f"file://{www}")
    outside = {path for path in contents(root).items() - before.items()}
    places = (target, root / "data")
    elsewhere = {path for path, _ in outside if not any(path.is_relative_to(place) for place in places)}
    return Fetched(code, {path.name for path in target.iterdir()} if target.exists() else set(), elsewhere)


def contents(root: Path) -> dict[Path, bytes]:
    return {path: sha256(path.read_bytes()) for path in root.rglob("*") if path.is_file() and not path.is_symlink()}


@pytest.mark.parametrize("case", FILES)
def test_a_signed_file_of_a_refused_form_is_named_with_exit_code_65(
    case: str, made: SignedCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder, and on its way from a mirror: what was fetched of it is never called a checkpoint."""
    spoil, said = FILES[case]
    spoil(made.folder)
    changed = signed_anew(made)
    fetched = download(changed)
    assert (fetched.code, fetched.made_elsewhere) == (65, set())
    assert fetched.in_target <= {".partial-10"}
    assert said in capsys.readouterr().err
    assert exit_of("verify", made.folder) == 65
    told = capsys.readouterr()
    assert said in told.err and ("config.json" in told.err or "model.safetensors" in told.err)
    assert "right" not in told.out


def test_an_honest_checkpoint_is_fetched_in_the_same_way(made: SignedCheckpoint) -> None:
    """So that the refusals here are those of the cases."""
    fetched = download(signed_anew(made))
    assert (fetched.code, fetched.in_target, fetched.made_elsewhere) == (0, {"round-000010"}, set())


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
    case: str, made: SignedCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(made.manifest.canonical_bytes())
    template = values["files"][0]
    values["files"] = [*values["files"], *({**template, "name": name} for name in NAMES[case])]
    spoiled = manifest_of(made, json.dumps(values).encode())
    fetched = download(replace(made, publication=spoiled))
    assert (fetched.code, fetched.in_target, fetched.made_elsewhere) == (65, set(), set())
    assert "manifest" in capsys.readouterr().err
    write_signed(made.folder, spoiled, made.signed_spec)
    assert exit_of("verify", made.folder) == 65
    assert not os.path.lexists("/tmp/config.json")


def manifest_of(made: SignedCheckpoint, payload: bytes) -> Publication:
    """``payload`` in the place of the manifest, whatever it says; its signatures lie on the mirror."""
    spoiled = replace(made.publication, manifest=PUBLISHER.sign(CONTEXT, made.run_id, payload))
    write_signed(made.folder, spoiled, made.signed_spec)
    return spoiled


@pytest.mark.parametrize("key", ["of the other run", "of this run"])
def test_a_manifest_of_another_run_is_refused_by_name(
    key: str, made: SignedCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small_checkpoint(tmp_path / "other", name="other")
    run_id = other.run_id if key == "of the other run" else made.run_id
    payload, quorum = other.signed_manifest.payload, other.publication.witnesses.payload
    mixed = Publication(
        manifest=PUBLISHER.sign(CONTEXT, run_id, payload), witnesses=PUBLISHER.sign(WITNESSES_CONTEXT, run_id, quorum)
    )
    write_signed(made.folder, mixed, made.signed_spec)
    assert exit_of("verify", made.folder) == 65
    assert "the manifest belongs to another run" in capsys.readouterr().err
    fetched = download(replace(made, publication=mixed))
    assert (fetched.code, fetched.in_target, fetched.made_elsewhere) == (65, set(), set())
    assert "the manifest belongs to another run" in capsys.readouterr().err


def test_files_that_are_shorter_than_the_manifest_says_are_damage_and_never_called_a_checkpoint(
    made: SignedCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signed size is right and the mirror's file is not: another source may mend that, so it is no refusal."""
    path = made.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    fetched = download(made)
    assert (fetched.code, fetched.in_target, fetched.made_elsewhere) == (69, {".partial-10"}, set())
    assert exit_of("verify", made.folder) == 76
    assert "model.safetensors has" in capsys.readouterr().err
