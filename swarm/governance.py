"""Who governs a run: the part of its TUF metadata that k of n organizers sign offline, root by root.

Decides what a first root must say (what the run spec does), which change may follow which, and which key publishes by a
chain of roots. Pure: bytes, keys and the time in, bytes or a named error out. Leaves the files' form and the online
roles to `swarm.metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Role, Root, Targets
from tuf.api.metadata import Signed as TufSigned

from swarm.errors import DataError, SignatureError, VerificationError
from swarm.identity import Identity
from swarm.metadata import (
    CHECKPOINTS,
    RUN_FIELD,
    add_signature,
    check_run,
    key_id_of,
    manifest_path,
    public_key_of,
    read,
    tuf_key,
)
from swarm.run_spec import RunSpec

MAX_ROOTS = 256
MAX_CHANGE_BYTES = 1 << 20
_LIFETIME = timedelta(days=5 * 365)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """What organizers sign: every root from version 1 on, and the newest targets."""

    roots: tuple[bytes, ...]
    targets: bytes

    @property
    def files(self) -> dict[str, bytes]:
        named = {f"{version}.root.json": raw for version, raw in enumerate(self.roots, start=1)}
        return named | {f"{self.targets_version}.targets.json": self.targets}

    @property
    def targets_version(self) -> int:
        return int(read(self.targets, Targets).signed.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A root and the targets under it, on their way from organizer to organizer."""

    root: bytes
    targets: bytes

    def to_json(self, run_id: bytes) -> bytes:
        """A file that people can read before they sign it."""
        values = {"run_id": run_id.hex(), "root": json.loads(self.root), "targets": json.loads(self.targets)}
        return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, raw: bytes) -> tuple[bytes, Change]:
        """(run id, change) of such a file. Raises `DataError`."""
        try:
            values = json.loads(raw[:MAX_CHANGE_BYTES])
            run_id = bytes.fromhex(values["run_id"])
            parts = [json.dumps(values[name]).encode() for name in ("root", "targets")]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            advice = "make one with: swarm keys add, revoke or rotate"
            raise DataError("not a file with a change of keys", advice) from error
        change = cls(root=parts[0], targets=parts[1])
        for part, kind in ((change.root, Root), (change.targets, Targets)):
            read(part, kind)
            check_run(part, run_id)
        return run_id, change


@dataclass(frozen=True, slots=True, kw_only=True)
class Governance:
    """Who governs a run, and which key publishes, by one root. Keys are 32 bytes."""

    version: int
    organizers: tuple[bytes, ...]
    threshold: int
    publication_key: bytes
    expires: datetime


def governance_of(spec: RunSpec) -> Governance:
    """What the run spec says of version 1."""
    return Governance(
        version=1,
        organizers=tuple(bytes.fromhex(key) for key in spec.organizers),
        threshold=spec.governance.threshold,
        publication_key=bytes.fromhex(spec.publication_key),
        expires=datetime.max.replace(tzinfo=timezone.utc),
    )


def propose(run_id: bytes, governance: Governance, targets_version: int, now: datetime) -> Change:
    """Root and targets that say this, for organizers to sign."""
    keys = {key_id_of(key): tuf_key(key) for key in (*governance.organizers, governance.publication_key)}
    offline = Role([key_id_of(key) for key in governance.organizers], governance.threshold)
    online = Role([key_id_of(governance.publication_key)], 1)
    expires, field = now + _LIFETIME, {RUN_FIELD: run_id.hex()}
    root = Root(
        version=governance.version,
        expires=expires,
        keys=keys,
        roles={"root": offline, "targets": offline, "snapshot": online, "timestamp": online},
        consistent_snapshot=True,
        unrecognized_fields=dict(field),
    )
    role = DelegatedRole(CHECKPOINTS, online.keyids, 1, terminating=True, paths=[manifest_path("*")])
    published_by = {key_id: keys[key_id] for key_id in online.keyids}
    delegations = Delegations(published_by, {CHECKPOINTS: role})
    targets = Targets(
        version=targets_version, expires=expires, delegations=delegations, unrecognized_fields=dict(field)
    )
    return Change(root=Metadata(root).to_bytes(), targets=Metadata(targets).to_bytes())


def sign(change: Change, identity: Identity) -> Change:
    """``change`` with the signatures of ``identity`` added."""
    signed = []
    for raw in (change.root, change.targets):
        metadata: Metadata[Any] = read(raw, TufSigned)
        add_signature(metadata, identity)
        signed.append(metadata.to_bytes())
    return Change(root=signed[0], targets=signed[1])


def first(run_id: bytes, spec: RunSpec, change: Change) -> Offline:
    """The start of a run's metadata, once it says what the spec does and enough organizers signed it."""
    root = _checked_first_root(run_id, spec, change.root)
    return _with_targets(run_id, Offline(roots=(root,), targets=change.targets))


def adopt(run_id: bytes, offline: Offline, change: Change) -> Offline:
    """``offline`` after a change that enough organizers, of before and after, signed; `VerificationError` else."""
    if len(offline.roots) >= MAX_ROOTS:
        raise VerificationError(f"a run changes its keys at most {MAX_ROOTS} times")
    _next_root(run_id, read(offline.roots[-1], Root).signed, change.root)
    if read(change.targets, Targets).signed.version != offline.targets_version + 1:
        raise VerificationError(f"the change's targets cannot follow targets {offline.targets_version}")
    return _with_targets(run_id, Offline(roots=(*offline.roots, change.root), targets=change.targets))


def check(run_id: bytes, spec: RunSpec, offline: Offline) -> bytes:
    """The key that publishes by ``offline``, once every root and the targets are what they must be."""
    key = publication_key(run_id, spec, offline.roots)
    _with_targets(run_id, offline)
    return key


def missing_signatures(change: Change, before: bytes | None) -> tuple[list[bytes], int]:
    """(organizers who have not signed a change yet and may, how many of them must at least).

    ``before``: the root in force; None for a run that begins.
    """
    new, targets = read(change.root, Root), read(change.targets, Targets)
    results = [new.signed.get_verification_result("root", new.signed_bytes, new.signatures)]
    if before is not None:
        old = read(before, Root).signed
        results.append(old.get_verification_result("root", new.signed_bytes, new.signatures))
    results.append(new.signed.get_verification_result("targets", targets.signed_bytes, targets.signatures))
    waiting = {public_key_of(key) for result in results for key in result.unsigned.values()}
    return sorted(waiting), max(max(0, result.missing) for result in results)


def describe(root: bytes) -> Governance:
    """What a root says. Raises `VerificationError` for one that is not of the form that `propose` gives it."""
    signed = read(root, Root).signed
    roles = {name: (sorted(role.keyids), role.threshold) for name, role in signed.roles.items()}
    (publication, online_threshold), organizers = roles["snapshot"], signed.roles["root"].keyids
    one_key = len(publication) == online_threshold == 1 and roles["timestamp"] == roles["snapshot"]
    if not one_key or roles["targets"] != roles["root"] or not {*organizers, *publication} <= signed.keys.keys():
        raise VerificationError("the run's root shares its roles out in another way than runs do")
    return Governance(
        version=signed.version,
        organizers=tuple(public_key_of(signed.keys[key_id]) for key_id in organizers),
        threshold=signed.roles["root"].threshold,
        publication_key=public_key_of(signed.keys[publication[0]]),
        expires=signed.expires,
    )


def publication_key(run_id: bytes, spec: RunSpec, roots: Sequence[bytes]) -> bytes:
    """The key that signs checkpoints by these roots, each proven by the one before and the first by the spec.

    No roots: the spec's own. Whether a root has expired is for those to say who know the time.
    """
    if not roots:
        return bytes.fromhex(spec.publication_key)
    if len(roots) > MAX_ROOTS:
        raise VerificationError(f"more than {MAX_ROOTS} roots")
    _checked_first_root(run_id, spec, roots[0])
    trusted = read(roots[0], Root).signed
    for raw in roots[1:]:
        trusted = _next_root(run_id, trusted, raw)
    return describe(roots[-1]).publication_key


def _checked_first_root(run_id: bytes, spec: RunSpec, raw: bytes) -> bytes:
    check_run(raw, run_id)
    said, wanted = describe(raw), governance_of(spec)
    same = (said.version, said.threshold, said.publication_key) == (1, wanted.threshold, wanted.publication_key)
    if not same or sorted(said.organizers) != sorted(wanted.organizers):
        raise VerificationError("the first root does not say what the run spec does of keys and organizers")
    root = read(raw, Root)
    _verify(root.signed, "root", root)
    return raw


def _next_root(run_id: bytes, trusted: Root, raw: bytes) -> Root:
    check_run(raw, run_id)
    describe(raw)
    new = read(raw, Root)
    if new.signed.version != trusted.version + 1:
        raise VerificationError(f"root {new.signed.version} cannot follow root {trusted.version}")
    _verify(trusted, "root", new)
    _verify(new.signed, "root", new)
    found: Root = new.signed
    return found


def _with_targets(run_id: bytes, offline: Offline) -> Offline:
    check_run(offline.targets, run_id)
    root, targets = read(offline.roots[-1], Root).signed, read(offline.targets, Targets)
    _verify(root, "targets", targets)
    delegations = targets.signed.delegations
    role = delegations.roles.get(CHECKPOINTS) if delegations and delegations.roles else None
    if targets.signed.targets or role is None or role.keyids != root.roles["snapshot"].keyids:
        raise VerificationError("the run's targets do not hand checkpoints to the publication key alone")
    return offline


def _verify(delegator: Root, role: str, metadata: Any) -> None:
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise SignatureError(f"the run's metadata: {error}", "have more organizers sign it: swarm keys sign") from error
