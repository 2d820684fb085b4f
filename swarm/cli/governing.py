"""Where an organizer's machine keeps what the organizers of a run signed: ``state/keys``, beside the publication keys.

    1.root.json, 1.targets.json, 2.root.json, ...   what is in force: targets are written before their root
    change.json                                     the first keys, while too few have signed them

Leaves what may be in them to `swarm.governance`.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from swarm import governance, keyfiles
from swarm.errors import ConfigError, DigestError, VerificationError
from swarm.files import write_durably
from swarm.governance import Change, Offline
from swarm.identity import Identity
from swarm.run_spec import RunSpec

CHANGE_FILE = "change.json"


def begin(state: Path, spec: RunSpec, organizer: Identity) -> Offline:
    """The run's roots and targets; a run that begins gets its first ones, signed by ``organizer``.

    Raises `ConfigError` while other organizers must sign too.
    """
    kept = load(state, spec)
    if kept is not None:
        return kept
    path = folder(state) / CHANGE_FILE
    change = _read_change(path, spec) or governance.propose(spec.run_id, governance.governance_of(spec), 1, _now())
    change = governance.sign(change, organizer)
    missing = governance.missing_signatures(change, None)[1]
    if missing:
        write_durably(path, change.to_json(spec.run_id))
        raise ConfigError(
            f"{missing} more of the run's organizers must sign its first keys",
            f"have them run: swarm keys sign {path} (on a copy; bring it back), then start again",
        )
    offline = governance.first(spec.run_id, spec, change)
    save(state, offline)
    path.unlink(missing_ok=True)
    return offline


def load(state: Path, spec: RunSpec) -> Offline | None:
    """What an earlier start or change left; None before the first."""
    where = folder(state)
    roots: list[bytes] = []
    while (path := _path(where, len(roots) + 1, "root")).exists():
        roots.append(path.read_bytes())
    if not roots:
        return None
    try:
        offline = Offline(roots=tuple(roots), targets=_path(where, len(roots), "targets").read_bytes())
        governance.check(spec.run_id, spec, offline)
    except (OSError, VerificationError) as error:
        raise DigestError(f"{where} is damaged: {error}", "bring it back from a copy of the run's folder") from error
    return offline


def save(state: Path, offline: Offline) -> None:
    """The newest root and its targets, in force once the root is there; those before are kept already."""
    where, version = folder(state), len(offline.roots)
    write_durably(_path(where, version, "targets"), offline.targets)
    write_durably(_path(where, version, "root"), offline.roots[-1])


def _path(where: Path, version: int, role: str) -> Path:
    return where / f"{version}.{role}.json"


def folder(state: Path) -> Path:
    where = state / "keys"
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    return where


def publisher(state: Path, key: bytes) -> Identity:
    """The publication key ``key`` among those in the state folder; `ConfigError` where it is not there."""
    for path in sorted(state.glob("publication*.key")):
        identity = keyfiles.load(path)
        if identity.public_key == key:
            return identity
    raise ConfigError(
        f"the publication key {key.hex()[:16]} is not in {state}",
        "bring its file (publication*.key) there from where it was made",
    )


def new_publisher(state: Path, version: int) -> Identity:
    """A publication key for root ``version``; asked again, the same: a change may be begun twice."""
    return keyfiles.load_or_create(state / f"publication-{version}.key")


def _read_change(path: Path, spec: RunSpec) -> Change | None:
    if not path.exists():
        return None
    run_id, change = Change.from_json(path.read_bytes())
    return change if run_id == spec.run_id else None


def _now() -> datetime:
    return datetime.now(timezone.utc)
