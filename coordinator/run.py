"""The run that a coordinator serves: its signed rules, checked once at the start.

Decides whether the parts of a run belong together; leaves the changing record of it to `coordinator.store`.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm import data_manifest, digest, governance, log, run_spec
from swarm.errors import ConfigError
from swarm.governance import Offline
from swarm.identity import Identity
from swarm.proto.common_pb2 import Genesis, Signed
from swarm.run_spec import RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSource:
    """What the organizer starts a coordinator with.

    ``publication``: the online key that the spec names, which admits. ``offline``: what the organizers signed about
    keys. ``publisher``: the online key that this names, which publishes; the same until the organizers change it.
    """

    spec: Signed
    genesis: Signed
    data_manifest: bytes
    tokenizer: bytes
    publication: Identity
    offline: Offline
    publisher: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A verified `RunSource`."""

    source: RunSource
    run_id: bytes
    spec: RunSpec
    genesis: Genesis

    @property
    def seed_peers(self) -> tuple[bytes, ...]:
        """Public keys of the genesis voters: always admitted, name the seed addresses, publish."""
        return tuple(self.genesis.voters)

    def sign(self, context: str, payload: bytes) -> Signed:
        """Sign an admission, with the key that the spec names."""
        return self.source.publication.sign(context, self.run_id, payload)

    def publish(self, context: str, payload: bytes) -> Signed:
        """Sign something about a checkpoint, with the publication key that the organizers' newest root names."""
        return self.source.publisher.sign(context, self.run_id, payload)


def open_run(source: RunSource) -> Run:
    """Verify every part of ``source`` against the spec.

    Raises `SpecError`, `VerificationError` or `DataError` for a part that is not what it claims, `ConfigError` for a
    publication key that the spec does not name.
    """
    run_id = run_spec.run_id_of(source.spec.signer, source.spec.payload)
    spec = run_spec.parse_signed(source.spec, run_id)
    genesis = log.parse_genesis(source.genesis, run_id, bytes.fromhex(spec.organizer_key), spec.num_shards)
    data_manifest.parse(source.data_manifest, spec.data.manifest_digest)
    digest.check(source.tokenizer, bytes.fromhex(spec.data.tokenizer_digest), "the tokenizer")
    if source.publication.public_key.hex() != spec.publication_key:
        raise ConfigError(
            "the publication key is not the one that the run spec names",
            "start with the publication key that the run was made with",
        )
    if governance.check(run_id, spec, source.offline) != source.publisher.public_key:
        raise ConfigError(
            "this machine does not have the publication key that the organizers' newest root names",
            "bring that key's file into the run's state folder; see: swarm keys show",
        )
    return Run(source=source, run_id=run_id, spec=spec, genesis=genesis)
