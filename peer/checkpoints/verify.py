"""Checking a checkpoint folder offline, by somebody who trusts nobody but the run id.

The chain: run id -> run spec (it contains the organizer's key and rules, and the organizer signed it) -> publication
key -> manifest -> every byte of every file. And besides it: the weights recompute to the anchor digest that a quorum of
the run's replicas signed (`swarm.witness`), and to the bf16 set that the manifest lists. That set by itself is checked
against the manifest alone. Decides what is an error and what a warning. Leaves opening the model to
`peer.checkpoints.generate`, and where the right run id comes from to the person: the invite, the organizer's page.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from peer.checkpoints.anchor import anchor_problem
from peer.checkpoints.forms import form_problems
from peer.checkpoints.sets import held_set, set_beside
from swarm import manifest as manifests
from swarm import run_spec, witness
from swarm.data_manifest import TOKENIZER_NAME
from swarm.derived import describe_derived
from swarm.digest import sha256
from swarm.errors import DataError, DigestError, RefusedCheckpoint, SignatureError, SpecError, VerificationError
from swarm.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, peer_id_of
from swarm.manifest import (
    BF16,
    FILE_CHUNK_BYTES,
    FP32,
    MANIFEST_FILE,
    ROOTS_FILE,
    SIGNATURE_FILE,
    SIGNED_FILES,
    SPEC_FILE,
    WITNESSES_FILE,
    CheckpointFile,
    CheckpointManifest,
    FileSet,
    derived_names,
)
from swarm.proto.checkpoint_pb2 import Witnesses
from swarm.proto.common_pb2 import Signed
from swarm.publication import MAX_ROOTS_BYTES, NOTHING_KNOWN, Known, Publication
from swarm.run_spec import RunSpec

MAX_FOLDER_ENTRIES = 100_000
MAX_PROBLEMS = 100
_SIGNED_OVERHEAD_BYTES = 256
# Kinds of file that a loader may pick up by itself, beside the listed ones.
_LOADED_SUFFIXES = frozenset(
    {".safetensors", ".json", ".jinja", ".py", ".model", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5"}
    | {".msgpack", ".gguf", ".npz", ".onnx"}
)
_ADDED_LATER = ("evaluations", "model.sig")

OnBytes = Callable[[int], object]
KnownOf = Callable[[bytes, RunSpec], Known]
"""(run id, spec) -> what this machine trusts of the run, as `peer.checkpoints.trusted` keeps them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Who made a checkpoint, by verified signatures; says nothing about the files yet."""

    run_id: bytes
    spec: RunSpec
    manifest: CheckpointManifest
    signed_spec: Signed
    publication: Publication

    @property
    def witnesses(self) -> tuple[str, ...]:
        """Peer ids of the replicas that signed this state."""
        return tuple(dict.fromkeys(peer_id_of(signed.signer) for signed in self._quorum.attestations))

    @property
    def num_live(self) -> int:
        """How many replicas lived when the checkpoint was published."""
        return len(self._quorum.replicas)

    @property
    def _quorum(self) -> Witnesses:
        return Witnesses.FromString(self.publication.witnesses.payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `verify_folder` found; the signatures are right, or there would be no report."""

    folder: Path
    provenance: Provenance
    files: FileSet
    """those that lie in the folder"""
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    is_refused: bool = False
    """a problem is one that no download mends: what was signed, or lies beside it, is not fit to be used"""
    bad_evaluations: tuple[str, ...] = ()
    """that lie beside the checkpoint, where somebody looked: `peer.checkpoints.facts.read_evaluations`"""

    @property
    def ok(self) -> bool:
        return not self.problems and not self.bad_evaluations

    @property
    def bf16_set(self) -> str | None:
        """What is known of it, where nothing is wrong with the checkpoint; None otherwise, and where there is none."""
        if self.problems or not self.provenance.manifest.bf16:
            return None
        return "listed" if self.files.dtype == BF16 else "recomputed"

    def require_ok(self) -> None:
        """Raise `RefusedCheckpoint` or `DigestError` with the first problem."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            if self.is_refused:
                raise RefusedCheckpoint(f"{self.folder}: {self.problems[0]}{more}")
            raise DigestError(
                f"{self.folder}: {self.problems[0]}{more}",
                "do not use this checkpoint; download it again, only what is damaged will be fetched",
            )
        if self.bad_evaluations:
            raise DigestError(
                f"{self.folder}: evaluations/{self.bad_evaluations[0]}",
                "the checkpoint itself is right: move the evaluation away, or measure again",
            )

    def as_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        manifest = self.provenance.manifest
        return {
            "folder": str(self.folder),
            "ok": self.ok,
            "run_id": self.provenance.run_id.hex(),
            "run_name": manifest.run_name,
            "organizer_key": self.provenance.spec.organizer_key,
            "publication_key": self.provenance.spec.publication_key,
            "round": manifest.round,
            "total_tokens": manifest.total_tokens,
            "state_digest": manifest.state_digest,
            "log_digest": manifest.log_digest,
            "shards": [state.model_dump() for state in manifest.states],
            "anchor_digest": manifest.anchor.digest,
            "manifest_digest": sha256(self.provenance.publication.manifest.payload).hex(),
            "witnesses": list(self.provenance.witnesses),
            "live_replicas": self.provenance.num_live,
            "dtype": self.files.dtype,
            "bf16_set": self.bf16_set,
            "num_files": len(self.files.files),
            "size_bytes": self.files.size_bytes,
            "problems": list(self.problems),
            "bad_evaluations": list(self.bad_evaluations),
            "warnings": list(self.warnings),
        }


def knows_nothing(_run_id: bytes, _spec: RunSpec) -> Known:
    """For who has never heard of the run."""
    return NOTHING_KNOWN


def verify_folder(
    folder: Path, run_id: bytes | None, on_bytes: OnBytes = lambda _: None, known_of: KnownOf = knows_nothing
) -> Report:
    """Check signatures and every byte of ``folder``; ``on_bytes`` hears how many bytes were read.

    ``known_of``: what this machine trusts of a run already. Where that is a newer publication key than the one that
    signed, the newer one must list the checkpoint.

    Where ``run_id`` is None, the folder's own run id is reported, and the person has to compare it.
    Raises `DataError` where this is no checkpoint, `VerificationError` where a signature file is wrong.
    """
    provenance = read_provenance(folder, run_id, known_of)
    held = held_set(folder, provenance.manifest)
    refused, damaged = [*_mismatches(provenance)], list[str]()
    own = set_beside(folder, held, provenance.manifest)
    beside = [file.model_copy(update={"name": f"{BF16}/{file.name}"}) for file in own.files] if own else []
    for file in (*held.files, *beside):
        try:
            problems = _file_problems(folder / file.name, file, on_bytes)
            damaged += problems
            if not problems:
                with open_regular(folder / file.name) as opened:
                    refused += form_problems(opened, file)
        except DataError as error:
            refused.append(f"{file.name} cannot be read: {error}")
    problems = refused + damaged
    if not problems and held.dtype == FP32:
        problem = anchor_problem(folder, provenance.manifest, open_regular)
        problem = problem or _derived_problem(folder, provenance.manifest)
        problems += [problem] if problem else []
    unlisted, warnings = _unlisted(folder, held.files, bool(beside))
    return Report(
        folder=folder,
        provenance=provenance,
        files=held,
        problems=tuple((problems + unlisted)[:MAX_PROBLEMS]),
        warnings=tuple(warnings[:MAX_PROBLEMS]),
        is_refused=bool(refused or unlisted),
    )


def read_provenance(folder: Path, run_id: bytes | None, known_of: KnownOf = knows_nothing) -> Provenance:
    """The signed run spec and manifest in ``folder``, verified; no other file is read."""
    signed_spec = _read_signed(folder / SPEC_FILE, run_spec.MAX_SPEC_BYTES)
    signed_manifest = _read_signed(folder / SIGNATURE_FILE, manifests.MAX_MANIFEST_BYTES)
    witnesses = _read_signed(folder / WITNESSES_FILE, witness.MAX_WITNESSES_BYTES)
    has_roots = os.path.lexists(folder / ROOTS_FILE)
    roots = _read_signed(folder / ROOTS_FILE, MAX_ROOTS_BYTES) if has_roots else None
    publication = Publication(manifest=signed_manifest, witnesses=witnesses, roots=roots)
    provenance = check_provenance(signed_spec, publication, run_id, known_of)
    if _read_bounded(folder / MANIFEST_FILE, manifests.MAX_MANIFEST_BYTES) != signed_manifest.payload:
        raise SignatureError(f"{MANIFEST_FILE} is not what {SIGNATURE_FILE} signs", "download the checkpoint again")
    return provenance


def check_provenance(
    signed_spec: Signed, publication: Publication, run_id: bytes | None, known_of: KnownOf = knows_nothing
) -> Provenance:
    """Spec, manifest and witnesses, once every signature is right and all belong to the run."""
    if run_id is None:
        run_id = run_spec.run_id_of(signed_spec.signer, signed_spec.payload)
    try:
        spec = run_spec.parse_signed(signed_spec, run_id)
    except SpecError as error:
        raise RefusedCheckpoint(str(error), "this checkpoint belongs to another run, or was changed") from error
    return Provenance(
        run_id=run_id,
        spec=spec,
        manifest=publication.verified(run_id, spec, known_of(run_id, spec)),
        signed_spec=signed_spec,
        publication=publication,
    )


def _mismatches(provenance: Provenance) -> list[str]:
    """Where the manifest and the run spec contradict each other."""
    spec, manifest, problems = provenance.spec, provenance.manifest, list[str]()
    if manifest.run_name != spec.name:
        problems.append(f"the manifest calls the run {manifest.run_name!r}, the run spec {spec.name!r}")
    if manifest.data_manifest_digest != spec.data.manifest_digest:
        problems.append("the manifest names other data than the run spec")
    data = [file for file in manifest.files if file.name == manifests.DATA_FILE]
    if data and data[0].sha256 != spec.data.manifest_digest:
        problems.append(f"{manifests.DATA_FILE} is not the data manifest that the run spec names")
    if len(manifest.states) != spec.num_shards:
        problems.append(f"the manifest names {len(manifest.states)} shards, the run spec {spec.num_shards}")
    tokenizers = [file for file in manifest.files if file.name == TOKENIZER_NAME]
    if not tokenizers or tokenizers[0].sha256 != spec.data.tokenizer_digest:
        problems.append(f"{TOKENIZER_NAME} is not the tokenizer that the run spec names")
    return problems


def _derived_problem(folder: Path, manifest: CheckpointManifest) -> str | None:
    """Why these weights, whose bytes are right, do not make the bf16 set that the manifest lists."""
    try:
        made = describe_derived(folder, manifest.files) if manifest.bf16 else ()
    except (OSError, DataError) as error:
        return f"no bf16 set can be made of the weights: {error}"
    wrong = [listed.name for listed, own in zip(manifest.bf16, made, strict=True) if listed != own]
    return f"the manifest lists another {wrong[0]} of the bf16 set than these weights make" if wrong else None


def _file_problems(path: Path, listed: CheckpointFile, on_bytes: OnBytes) -> list[str]:
    try:
        with open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes != listed.size_bytes:
                return [f"{listed.name} has {size_bytes} bytes instead of {listed.size_bytes}"]
            return _content_problems(file, listed, on_bytes)
    except FileNotFoundError:
        return [f"{listed.name} is missing"]
    except OSError as error:
        if path.is_symlink():
            raise DataError(f"{path.name} is a symbolic link") from error
        return [f"{listed.name} cannot be read: {error}"]


def _content_problems(file: BinaryIO, listed: CheckpointFile, on_bytes: OnBytes) -> list[str]:
    whole = hashlib.sha256()
    problems: list[str] = []
    for index, digest in enumerate(listed.chunks):
        chunk = file.read(FILE_CHUNK_BYTES)
        whole.update(chunk)
        on_bytes(len(chunk))
        if sha256(chunk).hex() != digest and len(problems) < MAX_PROBLEMS:
            problems.append(f"{listed.name} is damaged in chunk {index} (from byte {index * FILE_CHUNK_BYTES})")
    if not problems and whole.hexdigest() != listed.sha256:
        problems.append(f"{listed.name} does not match its SHA-256")
    return problems


def _unlisted(folder: Path, files: Sequence[CheckpointFile], with_bf16: bool) -> tuple[list[str], list[str]]:
    """(errors, warnings) about what lies in the folder and is in no list."""
    errors, warnings = _unknown(folder, {file.name for file in files} | SIGNED_FILES | ({BF16} if with_bf16 else set()))
    if with_bf16:
        more = _unknown(folder / BF16, set(derived_names(file.name for file in files)))
        errors, warnings = errors + more[0], warnings + more[1]
    return errors, warnings


def _unknown(folder: Path, known: set[str]) -> tuple[list[str], list[str]]:
    # Added later by whoever evaluated or signed the folder; nothing loads them.
    known |= {name for name in _ADDED_LATER if not (folder / name).is_symlink()}
    errors: list[str] = []
    warnings: list[str] = []
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= MAX_FOLDER_ENTRIES:
                return [*errors, f"the folder has more than {MAX_FOLDER_ENTRIES} entries"], warnings
            if entry.name in known:
                continue
            loaded = Path(entry.name).suffix.lower() in _LOADED_SUFFIXES
            if entry.is_symlink() or (loaded and not entry.is_dir(follow_symlinks=False)):
                errors.append(f"{entry.name} is not part of the checkpoint; move it away")
            else:
                warnings.append(f"{entry.name} is not part of the checkpoint")
    return sorted(errors), sorted(warnings)


def _read_signed(path: Path, max_payload_bytes: int) -> Signed:
    raw = _read_bounded(path, max_payload_bytes + _SIGNED_OVERHEAD_BYTES)
    try:
        signed = Signed.FromString(raw)
    except DecodeError as error:
        raise SignatureError(f"{path.name} cannot be read", "download the checkpoint again") from error
    # One way to write it: nothing unsigned can ride along in unknown or repeated fields.
    signed.DiscardUnknownFields()
    if signed.SerializeToString(deterministic=True) != raw:
        raise SignatureError(f"{path.name} holds more than a signature", "download the checkpoint again")
    if len(signed.signer) != PUBLIC_KEY_BYTES or len(signed.signature) != SIGNATURE_BYTES:
        raise SignatureError(f"{path.name} holds no key or no signature", "download the checkpoint again")
    return signed


def _read_bounded(path: Path, max_bytes: int) -> bytes:
    try:
        with open_regular(path) as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(
            f"{path.parent} is no checkpoint: {path.name} cannot be read ({error.strerror})",
            "name the folder that swarm download printed",
        ) from error
    if len(raw) > max_bytes:
        raise VerificationError(f"{path.name} is larger than {max_bytes} bytes")
    return raw


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; symbolic links, pipes and devices are refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise DataError(f"{path.name} is no regular file")
    return file
