"""The gRPC service, thin: limit, decode, call a plain function, turn its error into a status.

Decides nothing about the run. Everything that writes runs on one thread, in order, so that the event loop never waits
for a disk and the functions behind need no locks; what only reads runs beside it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from coordinator import (
    contributions,
    evaluations,
    incidents,
    membership,
    publication,
    records,
    seed_list,
    vouching,
    witnesses,
)
from coordinator.checkpoint_files import CheckpointFiles
from coordinator.contributions import Ledger
from coordinator.run import Run
from coordinator.store import Store
from swarm import errors, evaluation, removals
from swarm.errors import DataError, ProtocolError, SwarmError
from swarm.identity import peer_id_of
from swarm.proto import coordinator_pb2 as pb
from swarm.proto.common_pb2 import Signed

SERVICE_NAME = "swarm.v1.Coordinator"
MAX_REQUEST_BYTES = 16 << 20
_SMALL_REQUEST_BYTES = 64 << 10
_EVALUATION_BYTES = evaluation.MAX_TOLD_BYTES + 1024
_MAX_DETAIL_CHARACTERS = 1000
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """Where published checkpoints can be had beside the peers: a folder on this disk, and mirrors to tell of."""

    checkpoints: Path | None = None
    mirrors: tuple[str, ...] = ()


class Service:
    """The calls of protos/coordinator.proto, each from request message to reply message."""

    def __init__(
        self,
        run: Run,
        store: Store,
        clock: Callable[[], float],
        outlets: Outlets | None = None,
        state_dir: Path | None = None,
    ) -> None:
        """``clock`` tells Unix time in seconds; ``state_dir`` holds the organizer's lists.

        Blocks while the log head is rebuilt from ``store``.
        """
        outlets = outlets or Outlets()
        self._files = CheckpointFiles(outlets.checkpoints, run.run_id, run.spec)
        self._mirrors = outlets.mirrors
        self._run = run
        self._store = store
        self._clock = clock
        self._removals_path = state_dir / removals.FILE_NAME if state_dir is not None else None
        self._seed_list_path = state_dir / seed_list.FILE_NAME if state_dir is not None else None
        self._started_unix_ms = self._now_unix_ms()
        self._ledgers = [Ledger(run, store, shard) for shard in range(run.spec.num_shards)]
        vouching.open_metadata(run, store, self._started_unix_ms)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="coordinator-writer")

    @property
    def signed_spec(self) -> Signed:
        return self._run.source.spec

    def close(self) -> None:
        """Finish the write that is under way, forget those that wait, close the store. Blocks."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._store.close()

    async def get_run(self, _request: pb.GetRunRequest) -> pb.GetRunReply:
        server_time_unix_ms = self._now_unix_ms()  # on arrival: the client takes the middle of its round trip
        source = self._run.source
        addresses = await self._seed_addresses()
        return pb.GetRunReply(
            run_spec=source.spec,
            genesis=source.genesis,
            seed_addresses=addresses,
            server_time_unix_ms=server_time_unix_ms,
            data_manifest=source.data_manifest,
            tokenizer=source.tokenizer,
        )

    async def _seed_addresses(self) -> list[str]:
        """Where the seed peers are, of those that are on the list now."""
        told = await asyncio.to_thread(self._store.seed_addresses, membership.MAX_TOLD_ADDRESSES)
        now = {peer_id_of(key) for key in (*self._run.seed_peers, *self._listed_seeds())}
        listed = [address for address in told if address.rpartition("/p2p/")[2] in now]
        return listed[: membership.MAX_SEED_ADDRESSES]

    def _listed_seeds(self) -> tuple[bytes, ...]:
        return seed_list.read(self._seed_list_path)

    async def admit(self, request: pb.AdmitRequest) -> pb.AdmitReply:
        now = self._now_unix_ms()
        run, store = self._run, self._store
        admission = await self._write(lambda: membership.admit(run, store, request.request, now, self._listed_seeds()))
        return pb.AdmitReply(admission=admission)

    async def report(self, request: pb.ReportRequest) -> pb.ReportReply:
        now = self._now_unix_ms()
        run, store = self._run, self._store
        await self._write(lambda: membership.report(run, store, request.report, now, self._listed_seeds()))
        first, *others = [ledger.next_round_wanted for ledger in self._ledgers]
        return pb.ReportReply(
            next_round_wanted=first, of_other_shards=others, seed_addresses=await self._seed_addresses()
        )

    async def record_commits(self, request: pb.RecordCommitsRequest) -> pb.RecordCommitsReply:
        now = self._now_unix_ms()
        ledger = contributions.ledger_of(self._ledgers, request.commits)
        wanted = await self._write(lambda: ledger.record(request.commits, now))
        return pb.RecordCommitsReply(next_round_wanted=wanted)

    async def get_progress(self, _request: pb.GetProgressRequest) -> pb.GetProgressReply:
        heads = [ledger.head for ledger in self._ledgers]
        now = self._now_unix_ms()
        reply = await asyncio.to_thread(contributions.progress, self._run, heads, self._store, now)
        reply.incidents.extend(await asyncio.to_thread(incidents.newest, self._store))
        return reply

    async def attest(self, request: pb.AttestRequest) -> pb.AttestReply:
        now = self._now_unix_ms()
        await self._write(lambda: witnesses.attest(self._run, self._store, request.attestation, now))
        return pb.AttestReply()

    async def publish(self, request: pb.PublishRequest) -> pb.PublishReply:
        now = self._now_unix_ms()
        # A coordinator that has just started heard nobody yet: until then it waits for all that may live.
        silent_before = now - witnesses.SILENT_AFTER_MS if self._has_listened(now) else 0
        hearing = witnesses.Hearing(now_unix_ms=now, silent_before_unix_ms=silent_before)
        published = await self._write(lambda: publication.publish(self._run, self._store, request.request, hearing))
        return pb.PublishReply(manifest=published.manifest, witnesses=published.witnesses, roots=published.roots)

    async def list_checkpoints(self, _request: pb.ListCheckpointsRequest) -> pb.ListCheckpointsReply:
        return await asyncio.to_thread(publication.list_checkpoints, self._store)

    async def get_checkpoint(self, request: pb.GetCheckpointRequest) -> pb.GetCheckpointReply:
        found = await asyncio.to_thread(publication.get_checkpoint, self._run, self._store, request.round)
        return pb.GetCheckpointReply(manifest=found.manifest, witnesses=found.witnesses, roots=found.roots)

    async def metadata_files(self) -> dict[str, bytes]:
        """The run's metadata by name, in the order in which a mirror writes it."""
        now = self._now_unix_ms()
        return await self._write(lambda: vouching.current_files(self._run, self._store, now))

    async def get_metadata(self, _request: pb.GetMetadataRequest) -> pb.GetMetadataReply:
        files = await self.metadata_files()
        return pb.GetMetadataReply(files=[pb.MetadataFile(name=name, content=raw) for name, raw in files.items()])

    def _has_listened(self, now_unix_ms: int) -> bool:
        return now_unix_ms - self._started_unix_ms >= witnesses.SILENT_AFTER_MS

    async def get_chunk(self, request: pb.GetChunkRequest) -> pb.GetChunkReply:
        data = await asyncio.to_thread(self._files.piece, request.digest, request.offset, request.length)
        return pb.GetChunkReply(data=data)

    async def list_mirrors(self, _request: pb.ListMirrorsRequest) -> pb.ListMirrorsReply:
        return pb.ListMirrorsReply(urls=self._mirrors)

    async def get_record(self, request: pb.GetRecordRequest) -> pb.GetRecordReply:
        return pb.GetRecordReply(record=await self._write(lambda: records.get(self._run, self._store, request.round)))

    async def get_removals(self, _request: pb.GetRemovalsRequest) -> pb.GetRemovalsReply:
        return await asyncio.to_thread(_removals, self._run, self._removals_path)

    async def tell_evaluation(self, request: pb.TellEvaluationRequest) -> pb.TellEvaluationReply:
        now = self._now_unix_ms()
        await self._write(lambda: evaluations.tell(self._run, self._store, request, now))
        return pb.TellEvaluationReply()

    async def list_evaluations(self, request: pb.ListEvaluationsRequest) -> pb.ListEvaluationsReply:
        return await asyncio.to_thread(evaluations.of_round, self._store, request.round)

    async def _write(self, job: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, job)

    def _now_unix_ms(self) -> int:
        return int(self._clock() * 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One call: its request type, the most bytes that a request may have, and who answers."""

    request: type[Message]
    max_request_bytes: int
    answer: Callable[[Service, Any], Awaitable[Message]]


METHODS = {
    "GetRun": Method(request=pb.GetRunRequest, max_request_bytes=0, answer=Service.get_run),
    "Admit": Method(request=pb.AdmitRequest, max_request_bytes=_SMALL_REQUEST_BYTES, answer=Service.admit),
    "Report": Method(request=pb.ReportRequest, max_request_bytes=_SMALL_REQUEST_BYTES, answer=Service.report),
    "RecordCommits": Method(
        request=pb.RecordCommitsRequest, max_request_bytes=MAX_REQUEST_BYTES, answer=Service.record_commits
    ),
    "GetProgress": Method(request=pb.GetProgressRequest, max_request_bytes=0, answer=Service.get_progress),
    "Attest": Method(request=pb.AttestRequest, max_request_bytes=_SMALL_REQUEST_BYTES, answer=Service.attest),
    "Publish": Method(request=pb.PublishRequest, max_request_bytes=MAX_REQUEST_BYTES, answer=Service.publish),
    "ListCheckpoints": Method(request=pb.ListCheckpointsRequest, max_request_bytes=0, answer=Service.list_checkpoints),
    "GetRecord": Method(request=pb.GetRecordRequest, max_request_bytes=_SMALL_REQUEST_BYTES, answer=Service.get_record),
    "GetRemovals": Method(request=pb.GetRemovalsRequest, max_request_bytes=0, answer=Service.get_removals),
    "GetCheckpoint": Method(
        request=pb.GetCheckpointRequest, max_request_bytes=_SMALL_REQUEST_BYTES, answer=Service.get_checkpoint
    ),
    "GetChunk": Method(request=pb.GetChunkRequest, max_request_bytes=_SMALL_REQUEST_BYTES, answer=Service.get_chunk),
    "ListMirrors": Method(request=pb.ListMirrorsRequest, max_request_bytes=0, answer=Service.list_mirrors),
    "GetMetadata": Method(request=pb.GetMetadataRequest, max_request_bytes=0, answer=Service.get_metadata),
    "TellEvaluation": Method(
        request=pb.TellEvaluationRequest, max_request_bytes=_EVALUATION_BYTES, answer=Service.tell_evaluation
    ),
    "ListEvaluations": Method(
        request=pb.ListEvaluationsRequest, max_request_bytes=_SMALL_REQUEST_BYTES, answer=Service.list_evaluations
    ),
}


def _removals(run: Run, path: Path | None) -> pb.GetRemovalsReply:
    """The organizer's newest list, as its file holds it; a file that does not verify is not passed on."""
    try:
        signed = Signed.FromString(path.read_bytes()) if path is not None else None
    except FileNotFoundError:
        signed = None
    except (OSError, DecodeError) as error:
        raise DataError("the removal list cannot be read") from error
    if signed is not None:
        removals.parse_signed(signed, run.run_id, bytes.fromhex(run.spec.organizer_key))
    return pb.GetRemovalsReply(removals=signed)


# The first class that fits decides; the client raises the named class whatever the status.
_STATUS: tuple[tuple[type[SwarmError], grpc.StatusCode], ...] = (
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.ConfigError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.DataError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.SignatureError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.VerificationError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ResourceError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.SwarmError, grpc.StatusCode.INTERNAL),
)


def status_of(error: SwarmError) -> grpc.StatusCode:
    return next(code for kind, code in _STATUS if isinstance(error, kind))


def details_of(error: SwarmError) -> str:
    """The status details from which a client rebuilds ``error``: a JSON object of strings."""
    texts = {"error": type(error).__name__, "message": str(error), "advice": error.advice}
    return json.dumps({name: text[:_MAX_DETAIL_CHARACTERS] for name, text in texts.items()})


async def answer(method: Method, service: Service, raw: bytes) -> bytes:
    """The serialised reply to a serialised request; any `SwarmError`."""
    if len(raw) > method.max_request_bytes:
        raise ProtocolError(f"a request of {len(raw)} bytes; at most {method.max_request_bytes}")
    try:
        request = method.request.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("the request cannot be read") from error
    return (await method.answer(service, request)).SerializeToString()


def handlers(service: Service) -> grpc.GenericRpcHandler:
    """What the gRPC server calls. Requests arrive as bytes, so that their size is checked before they are decoded."""
    return grpc.method_handlers_generic_handler(
        SERVICE_NAME,
        {name: grpc.unary_unary_rpc_method_handler(_handler(method, service)) for name, method in METHODS.items()},
    )


def _handler(method: Method, service: Service) -> Callable[[bytes, Any], Awaitable[Any]]:
    async def handle(raw: bytes, context: Any) -> Any:
        try:
            return await answer(method, service, raw)
        except SwarmError as error:
            code, details = status_of(error), details_of(error)
        except Exception:  # a bug must not take the service down; the person sees it in the log
            _logger.exception("unexpected error in %s", method.request.__name__)
            code, details = grpc.StatusCode.INTERNAL, "unexpected error; see the coordinator's log"
        return await context.abort(code, details)

    return handle
