"""A peer's (or a researcher's) side of the coordinator's gRPC service. The door to grpc on this side.

Decides that nothing the coordinator sends is used before it is verified: its TLS key against the invite's pin
(`peer.coordinator_connection`), the run's parts against the run id, admissions and checkpoints against the publication
key, checkpoints against their witnesses too. Leaves when to call, and what
to do while the coordinator is away, to the caller: every call ends within its deadline, and a call after an outage
connects anew.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from peer.coordinator_connection import ADVICE, MAX_REQUEST_BYTES, Connection, open_connection
from swarm import __version__, data_manifest, digest, log, run_spec, witness
from swarm.errors import (
    ConfigError,
    DeadlineExceeded,
    NetworkError,
    ProtocolError,
    SwarmError,
    Unreachable,
    VerificationError,
)
from swarm.identity import Identity, public_key_of, verify
from swarm.invite import Invite
from swarm.manifest import MAX_SHARDS
from swarm.proto import coordinator_pb2 as pb
from swarm.proto.checkpoint_pb2 import Attestation
from swarm.proto.common_pb2 import Admission, Genesis, Signed
from swarm.proto.round_pb2 import Commit
from swarm.publication import Publication
from swarm.run_spec import RunSpec

CALL_TIMEOUT_S = 20.0
CHUNK_TIMEOUT_S = 60.0  # for half a megabyte
TRANSFER_TIMEOUT_S = 300.0  # for replies and requests of many megabytes
MAX_COMMITS_PER_CALL = 1024
MAX_EVALUATIONS_SHOWN = 256
_BATCH_BYTES = 15 << 20
_MAX_SEED_ADDRESSES = 16
_MAX_DETAIL_CHARACTERS = 8192
_Reply = TypeVar("_Reply", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """A run, verified against the invite.

    ``clock_offset_s``: add it to this machine's clock to get the coordinator's.
    """

    spec: RunSpec
    signed_spec: Signed
    genesis: Genesis
    signed_genesis: Signed
    seed_addresses: tuple[str, ...]
    manifest_bytes: bytes
    tokenizer_bytes: bytes
    clock_offset_s: float


class CoordinatorClient:
    """Calls to the coordinator of one run. Make it with `connect`; `close` it in the end.

    Every method raises `Unreachable` or `DeadlineExceeded` while there is no answer, `PinError` where another key
    answers, `VerificationError` for an answer that is not what it claims, and the error that the coordinator named.
    """

    def __init__(self, invite: Invite, identity: Identity | None, clock: Callable[[], float] = time.time) -> None:
        self._invite = invite
        self._identity = identity
        self._clock = clock
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._closed = False
        self._run: RunInfo | None = None
        self.seed_addresses: tuple[str, ...] = ()
        """where the run's seed peers are, as told last"""

    @classmethod
    async def connect(cls, invite: Invite, identity: Identity | None = None) -> CoordinatorClient:
        """Connect to the first of the invite's addresses that answers with the pinned key.

        ``identity`` signs `admit`, `report` and `publish`; a researcher needs none.
        """
        client = cls(invite, identity)
        await client._connected()
        return client

    async def close(self) -> None:
        """End the connection, and with it calls that are still under way."""
        self._closed = True
        if self._connection is not None:
            await self._connection.channel.close()

    async def get_run(self) -> RunInfo:
        """The run's rules, genesis, data manifest and tokenizer, all verified."""
        round_trip_s = await self._round_trip_s()
        sent_unix_s, started = self._clock(), time.monotonic()
        reply = await self._call("GetRun", pb.GetRunRequest(), pb.GetRunReply, TRANSFER_TIMEOUT_S)
        # The reply is large: half its round trip would count the transfer as clock difference.
        middle_s = min(round_trip_s, time.monotonic() - started) / 2
        offset_s = reply.server_time_unix_ms / 1000 - (sent_unix_s + middle_s)
        self._run = _verified_run(reply, self._invite.run_id, offset_s)
        self.seed_addresses = self._run.seed_addresses
        return self._run

    async def admit(self, token: str | None = None, seed_addresses: Sequence[str] = (), name: str = "") -> Signed:
        """Ask to take part; the admission, signed by the publication key and good for days.

        ``token``: by default the invite's. ``seed_addresses``: from a seed peer, its own multiaddrs.
        ``name``: what the volunteer wants to be called on model cards.
        """
        run = await self._known_run()
        payload = pb.AdmitPayload(
            token=self._invite.token if token is None else token,
            sent_unix_ms=self._server_time_unix_ms(run),
            agent=f"swarmtrain/{__version__}",
            seed_addresses=seed_addresses,
            name=name,
        )
        reply = await self._call("Admit", pb.AdmitRequest(request=self._sign("admit", payload)), pb.AdmitReply)
        self._check_admission(reply.admission, run)
        return reply.admission

    async def report(self, report: pb.ReportPayload) -> tuple[int, ...]:
        """Tell how this peer is doing; ``sent_unix_ms`` is filled in.

        Returns the first round whose commit the coordinator lacks, of every shard.
        """
        payload = pb.ReportPayload()
        payload.CopyFrom(report)
        payload.sent_unix_ms = self._server_time_unix_ms(await self._known_run())
        reply = await self._call("Report", pb.ReportRequest(report=self._sign("report", payload)), pb.ReportReply)
        self.seed_addresses = _seed_addresses(reply.seed_addresses)
        return (reply.next_round_wanted, *reply.of_other_shards[: MAX_SHARDS - 1])

    async def record_commits(self, commits: Sequence[Commit]) -> int:
        """Hand over consecutive commits of one shard, in as many calls as they need.

        Returns the first round whose commit the coordinator lacks; without commits it just asks.
        """
        wanted = 0
        for batch in _batches(commits):
            request = pb.RecordCommitsRequest(commits=batch)
            reply = await self._call("RecordCommits", request, pb.RecordCommitsReply, TRANSFER_TIMEOUT_S)
            wanted = reply.next_round_wanted
        return wanted

    async def progress(self) -> pb.GetProgressReply:
        """How far the run is, by the coordinator's record."""
        return await self._call("GetProgress", pb.GetProgressRequest(), pb.GetProgressReply)

    async def attest(self, attestation: Attestation) -> None:
        """Sign what this replica holds after a checkpoint round; `NotFound` while the round is not recorded."""
        signed = self._sign(witness.ATTESTATION_CONTEXT, attestation)
        await self._call("Attest", pb.AttestRequest(attestation=signed), pb.AttestReply)

    async def publish(self, manifest_bytes: bytes) -> Publication:
        """Have a checkpoint published (seed peers only); `NotFound` while it lacks witnesses."""
        run = await self._known_run()
        request = pb.PublishRequest(request=self._sign("publish", manifest_bytes))
        reply = await self._call("Publish", request, pb.PublishReply, TRANSFER_TIMEOUT_S)
        publication = _publication(reply)
        publication.verified(self._invite.run_id, run.spec)
        if reply.manifest.payload != manifest_bytes:
            raise ProtocolError("the coordinator signed another manifest than the one sent")
        return publication

    async def checkpoints(self) -> list[pb.CheckpointInfo]:
        """Published checkpoints, newest first."""
        reply = await self._call("ListCheckpoints", pb.ListCheckpointsRequest(), pb.ListCheckpointsReply)
        return list(reply.checkpoints)

    async def checkpoint(self, round_number: int = 0) -> Publication:
        """What is published of a round, 0 meaning the newest, verified. `NotFound` where there is none."""
        run = await self._known_run()
        request = pb.GetCheckpointRequest(round=round_number)
        reply = await self._call("GetCheckpoint", request, pb.GetCheckpointReply, TRANSFER_TIMEOUT_S)
        publication = _publication(reply)
        found = publication.verified(self._invite.run_id, run.spec)
        if round_number not in (0, found.round):
            raise ProtocolError(f"asked for the checkpoint of round {round_number}, got that of {found.round}")
        return publication

    async def chunk(self, digest: bytes, offset: int, length: int) -> bytes:
        """At most ``length`` bytes of a published chunk from ``offset`` on, not verified."""
        request = pb.GetChunkRequest(digest=digest, offset=offset, length=length)
        reply = await self._call("GetChunk", request, pb.GetChunkReply, CHUNK_TIMEOUT_S)
        return reply.data

    async def mirrors(self) -> tuple[str, ...]:
        """Where published checkpoints lie too, as the coordinator says: hints."""
        return tuple((await self._call("ListMirrors", pb.ListMirrorsRequest(), pb.ListMirrorsReply)).urls)

    async def metadata(self) -> dict[str, bytes]:
        """The run's TUF metadata by name, not verified: that is `peer.checkpoints.trusted`'s."""
        reply = await self._call("GetMetadata", pb.GetMetadataRequest(), pb.GetMetadataReply, TRANSFER_TIMEOUT_S)
        return {file.name: file.content for file in reply.files}

    async def run_record(self, round_number: int) -> bytes:
        """What the coordinator writes on the card of a round's checkpoint. `NotFound` while it lacks the round."""
        reply = await self._call("GetRecord", pb.GetRecordRequest(round=round_number), pb.GetRecordReply)
        return reply.record

    async def tell_evaluation(self, signed: Signed) -> None:
        """Hand over what somebody measured on a published checkpoint; the invite's token goes with it."""
        request = pb.TellEvaluationRequest(evaluation=signed, token=self._invite.token)
        await self._call("TellEvaluation", request, pb.TellEvaluationReply)

    async def evaluations(self, round_number: int) -> list[Signed]:
        """What was told of a round's checkpoint, not verified: that is `swarm.evaluation`'s."""
        request = pb.ListEvaluationsRequest(round=round_number)
        reply = await self._call("ListEvaluations", request, pb.ListEvaluationsReply, TRANSFER_TIMEOUT_S)
        return list(reply.evaluations)[:MAX_EVALUATIONS_SHOWN]

    async def signed_removals(self) -> Signed | None:
        """The organizer's list of documents that are read no more, to be verified; None where there is none."""
        reply = await self._call("GetRemovals", pb.GetRemovalsRequest(), pb.GetRemovalsReply)
        return reply.removals if reply.HasField("removals") else None

    async def _known_run(self) -> RunInfo:
        return self._run or await self.get_run()

    async def _round_trip_s(self) -> float:
        started = time.monotonic()
        await self.checkpoints()
        return time.monotonic() - started

    def _server_time_unix_ms(self, run: RunInfo) -> int:
        return int((self._clock() + run.clock_offset_s) * 1000)

    def _sign(self, context: str, payload: Message | bytes) -> Signed:
        if self._identity is None:
            raise ConfigError(f"{context}: this client was connected without an identity")
        raw = payload if isinstance(payload, bytes) else payload.SerializeToString()
        return self._identity.sign(context, self._invite.run_id, raw)

    def _check_admission(self, signed: Signed, run: RunInfo) -> None:
        raw = verify(signed, "admission", self._invite.run_id, bytes.fromhex(run.spec.publication_key))
        try:
            admission = Admission.FromString(raw)
        except DecodeError as error:
            raise ProtocolError("the admission cannot be read") from error
        if self._identity is None or admission.peer_key != self._identity.public_key:
            raise ProtocolError("the admission is for another peer")
        if admission.expires_unix_s * 1000 <= self._server_time_unix_ms(run):
            raise ProtocolError("the admission has expired already")

    async def _call(
        self, method: str, request: Message, reply_type: type[_Reply], timeout_s: float = CALL_TIMEOUT_S
    ) -> _Reply:
        if request.ByteSize() > MAX_REQUEST_BYTES:
            raise ProtocolError(f"{method}: {request.ByteSize()} bytes are more than {MAX_REQUEST_BYTES}")
        connection = await self._connected()
        call = connection.channel.unary_unary(
            f"/swarm.v1.Coordinator/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply_type.FromString,
        )
        connection.calls += 1
        try:
            reply: _Reply = await call(request, timeout=timeout_s)
            return reply
        except grpc.aio.AioRpcError as error:
            named = _named_error(method, error.code(), error.details() or "")
            if isinstance(named, Unreachable | DeadlineExceeded):
                connection.retired = True  # the next call tries every address again, and checks the pin again
            raise named from error
        finally:
            connection.calls -= 1
            if connection.retired and connection.calls == 0:
                await connection.channel.close()

    async def _connected(self) -> Connection:
        async with self._connecting:
            if self._closed:
                raise Unreachable("the connection to the coordinator was closed")
            if self._connection is None or self._connection.retired:
                self._connection = await open_connection(self._invite)
            return self._connection


def _verified_run(reply: pb.GetRunReply, run_id: bytes, clock_offset_s: float) -> RunInfo:
    spec = run_spec.parse_signed(reply.run_spec, run_id)
    genesis = log.parse_genesis(reply.genesis, run_id, bytes.fromhex(spec.organizer_key), spec.num_shards)
    data_manifest.parse(reply.data_manifest, spec.data.manifest_digest)
    digest.check(reply.tokenizer, bytes.fromhex(spec.data.tokenizer_digest), "the tokenizer")
    return RunInfo(
        spec=spec,
        signed_spec=reply.run_spec,
        genesis=genesis,
        signed_genesis=reply.genesis,
        seed_addresses=_seed_addresses(reply.seed_addresses),
        manifest_bytes=reply.data_manifest,
        tokenizer_bytes=reply.tokenizer,
        clock_offset_s=clock_offset_s,
    )


def _seed_addresses(told: Sequence[str]) -> tuple[str, ...]:
    """Checked: each is short and ends with the id of a peer."""
    if len(told) > _MAX_SEED_ADDRESSES or any(len(item) > 256 for item in told):
        raise ProtocolError("the coordinator names too many or too long seed addresses")
    for address in told:
        public_key_of(address.rpartition("/p2p/")[2])
    return tuple(told)


def _publication(reply: pb.PublishReply | pb.GetCheckpointReply) -> Publication:
    roots = reply.roots if reply.HasField("roots") else None
    return Publication(manifest=reply.manifest, witnesses=reply.witnesses, roots=roots)


def _batches(commits: Sequence[Commit]) -> Iterator[list[Commit]]:
    """Consecutive batches within the limits of a call; one empty batch for no commits."""
    batch: list[Commit] = []
    size_bytes = 0
    for commit in commits:
        if batch and (len(batch) == MAX_COMMITS_PER_CALL or size_bytes + commit.ByteSize() > _BATCH_BYTES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(commit)
        size_bytes += commit.ByteSize()
    yield batch


def _named_error(method: str, code: grpc.StatusCode, details: str) -> SwarmError:
    """The error that the coordinator named, or the one that a status of the transport means."""
    if code == grpc.StatusCode.UNAVAILABLE:
        return Unreachable("the coordinator cannot be reached", ADVICE)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"the coordinator did not answer {method} in time", ADVICE)
    try:
        texts = json.loads(details[:_MAX_DETAIL_CHARACTERS])
        kind, message, advice = (str(texts[name]) for name in ("error", "message", "advice"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return NetworkError(f"the coordinator answered {method} with {code.name}: {_printable(details)}", ADVICE)
    return _error_classes().get(kind, NetworkError)(_printable(message), _printable(advice))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text[:1000])


def _error_classes() -> dict[str, type[SwarmError]]:
    found: dict[str, type[SwarmError]] = {}
    waiting: list[type[SwarmError]] = [VerificationError, NetworkError, SwarmError]
    while waiting:
        kind = waiting.pop()
        found[kind.__name__] = kind
        waiting.extend(kind.__subclasses__())
    return found
