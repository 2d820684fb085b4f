"""Where an organizer's machine keeps what the organizers of a run signed: ``state/keys``, beside the publication keys.

    1.root.json, 2.root.json, ...   the roots
    targets.json                    the newest targets
    change.json                     a change that too few have signed yet

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
_TARGETS_FILE = "targets.json"


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
    while (path := where / f"{len(roots) + 1}.root.json").exists():
        roots.append(path.read_bytes())
    if not roots:
        return None
    try:
        offline = Offline(roots=tuple(roots), targets=(where / _TARGETS_FILE).read_bytes())
        governance.check(spec.run_id, spec, offline)
    except (OSError, VerificationError) as error:
        raise DigestError(f"{where} is damaged: {error}", "bring it back from a copy of the run's folder") from error
    return offline


def save(state: Path, offline: Offline) -> None:
    """Targets last: until they are there, an older root has targets that it may have."""
    where = folder(state)
    for version, raw in enumerate(offline.roots, start=1):
        path = where / f"{version}.root.json"
        if not path.exists():
            write_durably(path, raw)
    write_durably(where / _TARGETS_FILE, offline.targets)


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


def _read_change(path: Path, spec: RunSpec) -> Change | None:
    if not path.exists():
        return None
    run_id, change = Change.from_json(path.read_bytes())
    return change if run_id == spec.run_id else None


def _now() -> datetime:
    return datetime.now(timezone.utc)
