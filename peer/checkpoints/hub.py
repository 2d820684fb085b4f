"""Uploading a checkpoint folder to a model repository of the Hugging Face Hub: a door to ``huggingface_hub``.

Decides which folders are uploaded (a published checkpoint, or a set derived from one, each checked against its own list
first), that nothing but what was checked is, and what a failure means. Leaves credentials to the library: ``HF_TOKEN``,
or what ``hf auth login`` stored.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from peer.checkpoints.export_hf import ORIGIN_NAME
from peer.checkpoints.facts import read_evaluations
from peer.checkpoints.model_signature import SIGNATURE_NAME
from peer.checkpoints.verify import KnownOf, Report, knows_nothing, verify_folder
from swarm.digest import sha256
from swarm.errors import ConfigError, DataError, DigestError, NetworkError
from swarm.evaluation import FOLDER as EVALUATIONS
from swarm.evaluation import Evaluation
from swarm.files import file_sha256
from swarm.manifest import MANIFEST_FILE, SIGNED_FILES

MAX_ORIGIN_BYTES = 1 << 20
_TARGET = re.compile(r"hf://([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})")
# The library reads names as patterns: no wildcard, no separator, and no dot file may be among them.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """``summary``: one line on it. ``names``: the files that were checked, and no other, go out."""

    summary: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """``repository``: ORG/NAME. ``endpoint``: None for the Hub itself."""

    repository: str
    private: bool = False
    revision: str | None = None
    endpoint: str | None = None


def parse_target(text: str) -> str:
    """ORG/NAME of ``hf://ORG/NAME``. Raises `ConfigError`."""
    found = _TARGET.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text[:100]!r} is no model repository", "write hf://ORGANIZATION/NAME")
    return found[1]


def describe_folder(folder: Path, run_id: bytes | None, known_of: KnownOf = knows_nothing) -> Pushed:
    """What is pushed, once every byte that its list names is right.

    Raises `DataError` where the folder is neither a checkpoint nor a derived set, `VerificationError`.
    """
    if (folder / MANIFEST_FILE).exists():
        report = verify_folder(folder, run_id, known_of=known_of)
        report.require_ok()
        listed = report.provenance
        digest = sha256(listed.publication.manifest.payload).hex()
        return Pushed(
            summary=f"{listed.manifest.run_name}, round {listed.manifest.round}, {report.files.dtype} "
            f"(manifest {digest[:16]})",
            names=_names(folder, report),
        )
    origin, files = _origin(folder)
    for name, wanted in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or file_sha256(path) != wanted:
            raise DigestError(f"{path} is not what {ORIGIN_NAME} lists", "export the set again")
    return Pushed(
        summary=f"{origin['run_name']}, round {origin['round']}, {origin['dtype']} (from manifest "
        f"{origin['manifest_digest'][:16]})",
        names=(*files, ORIGIN_NAME),
    )


def push(folder: Path, pushed: Pushed, options: PushOptions) -> str:
    """Upload; the address of the commit. Raises `ConfigError` without the right to, `NetworkError` otherwise."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(endpoint=options.endpoint)
    try:
        api.create_repo(options.repository, private=options.private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=options.repository,
            folder_path=folder,
            allow_patterns=list(pushed.names),
            commit_message=f"Add {pushed.summary}",
            revision=options.revision,
        )
    except LocalTokenNotFoundError as error:
        raise ConfigError("the Hub wants to know who you are", "set HF_TOKEN, or run: hf auth login") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = " ".join(str(error).split())[:200]
        if status in (401, 403):
            raise ConfigError(f"the Hub refuses: {reason}", "set HF_TOKEN to a token that may write there") from error
        raise NetworkError(f"the Hub did not take it: {reason}", "try again; what is there already is kept") from error
    except (OSError, ValueError) as error:
        raise NetworkError(f"the upload failed: {' '.join(str(error).split())[:200]}", "try again") from error
    return str(done.commit_url)


def _names(folder: Path, report: Report) -> tuple[str, ...]:
    """The listed files, those that sign them, and the evaluations whose signatures are right."""
    names = [file.name for file in report.files.files]
    names += [name for name in sorted({*SIGNED_FILES, SIGNATURE_NAME}) if _is_plain_file(folder / name)]
    found, _ = read_evaluations(folder, report.provenance)
    for item in found:
        table = folder / EVALUATIONS / f"{item.name}.json"
        if _PLAIN_NAME.fullmatch(item.name) and _holds(table, item.evaluation):
            names += [f"{EVALUATIONS}/{item.name}.json", f"{EVALUATIONS}/{item.name}.sig"]
    return tuple(names)


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _holds(path: Path, evaluation: Evaluation) -> bool:
    """Whether the file is the evaluation that was signed, and nothing besides."""
    wanted = evaluation.canonical_bytes()
    return _is_plain_file(path) and path.stat().st_size == len(wanted) and path.read_bytes() == wanted


def _origin(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What a derived set says of itself, and the digests of its files by name."""
    path = folder / ORIGIN_NAME
    try:
        raw = path.read_bytes()[: MAX_ORIGIN_BYTES + 1]
        origin = json.loads(raw)
        files = {str(name): str(digest) for name, digest in origin["files"].items()}
        plain = {key: str(origin[key]) for key in ("run_name", "round", "dtype", "manifest_digest")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{folder} is neither a checkpoint nor a set that `swarm export` made", "name such a folder"
        ) from error
    if not all(_PLAIN_NAME.fullmatch(name) for name in files):
        raise DataError(f"{path} names what is no plain file of its folder", "export the set again")
    return plain, files
