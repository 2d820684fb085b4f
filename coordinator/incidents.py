"""Incidents: what replicas disagreed about, published with the run's progress.

Decides how many are kept and how long they are; leaves what is one to `coordinator.witnesses`, `contributions` and
`membership`.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.published import IncidentRow
from coordinator.store import Store
from swarm.proto import coordinator_pb2 as pb
from swarm.proto.common_pb2 import Signed

MAX_INCIDENTS = 100
MAX_CHARACTERS = 4096


def tell(store: Store, name: str, text: str, now_unix_ms: int, attestations: Sequence[Signed] = ()) -> None:
    """Publish an incident; one of the same name takes its place. On the writer's thread."""
    evidence = pb.Incident(attestations=attestations).SerializeToString()
    row = IncidentRow(name=name, told_unix_ms=now_unix_ms, text=text[:MAX_CHARACTERS], attestations=evidence)
    store.published.tell_incident(row, MAX_INCIDENTS)


def newest(store: Store) -> list[pb.Incident]:
    """What was told, newest first."""
    told = []
    for row in store.published.newest_incidents(MAX_INCIDENTS):
        incident = pb.Incident.FromString(row.attestations)
        incident.told_unix_ms, incident.text = row.told_unix_ms, row.text
        told.append(incident)
    return told
