"""The checkpoint manifest: which files a checkpoint may hold, and who must have signed the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swarm import manifest as manifests
from swarm.digest import over_shards, sha256
from swarm.errors import SignatureError, VerificationError
from tests.checkpoint_samples import ORGANIZER, PUBLISHER, small_checkpoint

DIGEST = sha256(b"").hex()


def listed(name: str, size_bytes: int = 0, num_chunks: int | None = None) -> dict[str, Any]:
    count = -(-size_bytes // manifests.FILE_CHUNK_BYTES) if num_chunks is None else num_chunks
    return {"name": name, "size_bytes": size_bytes, "sha256": DIGEST, "chunks": [DIGEST] * count}


def values(**changes: Any) -> dict[str, Any]:
    digests = dict.fromkeys(("state_digest", "log_digest", "data_manifest_digest"), DIGEST)
    base = {"run_id": "ab" * 20, "run_name": "r", "round": 1, "total_tokens": 0, "files": [listed("config.json")]}
    return {**base, **digests, "anchor": anchor_of(), **changes}


def anchor_of(**changes: str) -> dict[str, Any]:
    parameters = [{"name": "a", "shape": [2, 3]}]
    return {"digest": DIGEST, "momentum_digest": DIGEST, "parameters": parameters, **changes}


def test_a_manifest_reads_back_from_its_own_bytes() -> None:
    manifest = manifests.parse(json.dumps(values()).encode())
    assert manifests.parse(manifest.canonical_bytes()) == manifest


def sharded(*digests: str, **changes: Any) -> dict[str, Any]:
    """A manifest of shards of three values each that have one of these as all of their digests."""
    over = over_shards([bytes.fromhex(each) for each in digests]).hex()
    names = ("state_digest", "log_digest", "anchor_digest", "momentum_digest")
    shards = [{**dict.fromkeys(names, each), "num_values": 3} for each in digests]
    anchor = anchor_of(digest=over, momentum_digest=over)
    return values(**{"shards": shards, "state_digest": over, "log_digest": over, "anchor": anchor, **changes})


def resized(*sizes: int) -> dict[str, Any]:
    manifest = sharded("01" * 32, "02" * 32)
    shards = [{**shard, "num_values": size} for shard, size in zip(manifest["shards"], sizes, strict=True)]
    return {**manifest, "shards": shards}


def test_a_manifest_of_several_shards_names_each_and_reads_back() -> None:
    manifest = manifests.parse(json.dumps(sharded("01" * 32, "02" * 32)).encode())
    assert [state.state_digest for state in manifest.states] == ["01" * 32, "02" * 32]
    assert manifests.parse(manifest.canonical_bytes()) == manifest


def test_the_manifest_of_one_shard_has_the_bytes_that_it_always_had() -> None:
    manifest = manifests.parse(json.dumps(values()).encode())
    assert b"shards" not in manifest.canonical_bytes()
    assert [state.state_digest for state in manifest.states] == [DIGEST]


GOOD_NAMES = ["config.json", "README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "a.txt"]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_names_of_the_hugging_face_layout_are_accepted(name: str) -> None:
    assert manifests.parse(json.dumps(values(files=[listed(name)])).encode()).files[0].name == name


BAD = {
    "one shard in a list": sharded("01" * 32),
    "another state than the shards'": sharded("01" * 32, "02" * 32, state_digest=DIGEST),
    "another log than the shards'": sharded("01" * 32, "02" * 32, log_digest=DIGEST),
    "another anchor than the shards'": sharded(
        "01" * 32, "02" * 32, anchor=anchor_of(momentum_digest=over_shards([b"\1" * 32, b"\2" * 32]).hex())
    ),
    "another momentum than the shards'": sharded(
        "01" * 32, "02" * 32, anchor=anchor_of(digest=over_shards([b"\1" * 32, b"\2" * 32]).hex())
    ),
    "shards of more values than the anchor": resized(3, 4),
    "shards of fewer values than the anchor": resized(3, 2),
    "shards in another order": {**sharded("02" * 32, "01" * 32), "shards": sharded("01" * 32, "02" * 32)["shards"]},
    "parent folder": values(files=[listed("../config.json")]),
    "absolute": values(files=[listed("/etc/x.json")]),
    "folder": values(files=[listed("a/b.json")]),
    "backslash": values(files=[listed("a\\b.json")]),
    "dot file": values(files=[listed(".a.json")]),
    "capitals": values(files=[listed("Config.json")]),
    "line break": values(files=[listed("a.json\n")]),
    "zero byte": values(files=[listed("a\0.json")]),
    "too long": values(files=[listed("a" * 200 + ".json")]),
    "pickle": values(files=[listed("pytorch_model.bin")]),
    "code": values(files=[listed("modeling.py")]),
    "template": values(files=[listed("chat_template.jinja")]),
    "one name twice": values(files=[listed("a.json"), listed("a.json")]),
    "name of the manifest": values(files=[listed(manifests.MANIFEST_FILE)]),
    "no files": values(files=[]),
    "too few chunks": values(files=[listed("a.json", 1, 0)]),
    "too many chunks": values(files=[listed("a.json", 1, 2)]),
    "negative size": values(files=[listed("a.json", -1, 0)]),
    "round 0": values(round=0),
    "short digest": values(state_digest="ab"),
    "unknown key": values(extra=1),
    "another format": values(format=1),
    "a list": [1],
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_manifest_is_a_verification_error(bad: Any) -> None:
    with pytest.raises(VerificationError):
        manifests.parse(json.dumps(bad).encode())


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "no text", "deep"])
def test_what_is_no_json_is_a_verification_error(raw: bytes) -> None:
    with pytest.raises(VerificationError):
        manifests.parse(raw)


def test_a_huge_manifest_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "MAX_MANIFEST_BYTES", 10)
    with pytest.raises(VerificationError, match="larger than 10 bytes"):
        manifests.parse(json.dumps(values()).encode())


def test_only_the_publication_key_of_the_run_signs_manifests(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    key = PUBLISHER.public_key
    assert manifests.parse_signed(made.signed_manifest, made.run_id, key) == made.manifest
    payload = made.manifest.canonical_bytes()
    for forged in (
        ORGANIZER.sign(manifests.CONTEXT, made.run_id, payload),
        PUBLISHER.sign("other context", made.run_id, payload),
        PUBLISHER.sign(manifests.CONTEXT, b"x" * 20, payload),
    ):
        with pytest.raises(SignatureError):
            manifests.parse_signed(forged, made.run_id, key)


def test_a_manifest_of_another_run_is_refused_though_the_same_key_signed_it(tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "c")
    other = PUBLISHER.sign(manifests.CONTEXT, b"x" * 20, made.manifest.canonical_bytes())
    with pytest.raises(VerificationError, match="another run"):
        manifests.parse_signed(other, b"x" * 20, PUBLISHER.public_key)
