from swarm.proto import common_pb2 as _common_pb2
from swarm.proto import round_pb2 as _round_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetRunRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRunReply(_message.Message):
    __slots__ = ("run_spec", "genesis", "seed_addresses", "server_time_unix_ms", "data_manifest", "tokenizer")
    RUN_SPEC_FIELD_NUMBER: _ClassVar[int]
    GENESIS_FIELD_NUMBER: _ClassVar[int]
    SEED_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    DATA_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    run_spec: _common_pb2.Signed
    genesis: _common_pb2.Signed
    seed_addresses: _containers.RepeatedScalarFieldContainer[str]
    server_time_unix_ms: int
    data_manifest: bytes
    tokenizer: bytes
    def __init__(self, run_spec: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., genesis: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., seed_addresses: _Optional[_Iterable[str]] = ..., server_time_unix_ms: _Optional[int] = ..., data_manifest: _Optional[bytes] = ..., tokenizer: _Optional[bytes] = ...) -> None: ...

class AdmitRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: _common_pb2.Signed
    def __init__(self, request: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class AdmitPayload(_message.Message):
    __slots__ = ("token", "sent_unix_ms", "agent", "seed_addresses", "name")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    SEED_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    token: str
    sent_unix_ms: int
    agent: str
    seed_addresses: _containers.RepeatedScalarFieldContainer[str]
    name: str
    def __init__(self, token: _Optional[str] = ..., sent_unix_ms: _Optional[int] = ..., agent: _Optional[str] = ..., seed_addresses: _Optional[_Iterable[str]] = ..., name: _Optional[str] = ...) -> None: ...

class AdmitReply(_message.Message):
    __slots__ = ("admission",)
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    admission: _common_pb2.Signed
    def __init__(self, admission: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: _common_pb2.Signed
    def __init__(self, report: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class ReportPayload(_message.Message):
    __slots__ = ("round", "train_loss", "validation_loss", "tokens_per_s", "bytes_sent", "bytes_received", "sent_unix_ms", "state_digest", "log_digest", "leaving", "seed_addresses", "device", "incident", "first_shard", "num_shards", "service_tokens_per_s", "shard_tokens_per_s")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LOG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    SEED_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INCIDENT_FIELD_NUMBER: _ClassVar[int]
    FIRST_SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    SERVICE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SHARD_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    round: int
    train_loss: float
    validation_loss: float
    tokens_per_s: float
    bytes_sent: int
    bytes_received: int
    sent_unix_ms: int
    state_digest: bytes
    log_digest: bytes
    leaving: bool
    seed_addresses: _containers.RepeatedScalarFieldContainer[str]
    device: str
    incident: str
    first_shard: int
    num_shards: int
    service_tokens_per_s: float
    shard_tokens_per_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, round: _Optional[int] = ..., train_loss: _Optional[float] = ..., validation_loss: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., sent_unix_ms: _Optional[int] = ..., state_digest: _Optional[bytes] = ..., log_digest: _Optional[bytes] = ..., leaving: _Optional[bool] = ..., seed_addresses: _Optional[_Iterable[str]] = ..., device: _Optional[str] = ..., incident: _Optional[str] = ..., first_shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., service_tokens_per_s: _Optional[float] = ..., shard_tokens_per_s: _Optional[_Iterable[float]] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("next_round_wanted", "of_other_shards", "seed_addresses")
    NEXT_ROUND_WANTED_FIELD_NUMBER: _ClassVar[int]
    OF_OTHER_SHARDS_FIELD_NUMBER: _ClassVar[int]
    SEED_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    next_round_wanted: int
    of_other_shards: _containers.RepeatedScalarFieldContainer[int]
    seed_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, next_round_wanted: _Optional[int] = ..., of_other_shards: _Optional[_Iterable[int]] = ..., seed_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class RecordCommitsRequest(_message.Message):
    __slots__ = ("commits",)
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    commits: _containers.RepeatedCompositeFieldContainer[_round_pb2.Commit]
    def __init__(self, commits: _Optional[_Iterable[_Union[_round_pb2.Commit, _Mapping]]] = ...) -> None: ...

class RecordCommitsReply(_message.Message):
    __slots__ = ("next_round_wanted",)
    NEXT_ROUND_WANTED_FIELD_NUMBER: _ClassVar[int]
    next_round_wanted: int
    def __init__(self, next_round_wanted: _Optional[int] = ...) -> None: ...

class GetProgressRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RoundProgress(_message.Message):
    __slots__ = ("round", "total_tokens", "validation_loss", "train_loss", "shares", "absent_parts", "recorded_unix_ms", "state_digest")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    ABSENT_PARTS_FIELD_NUMBER: _ClassVar[int]
    RECORDED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    round: int
    total_tokens: int
    validation_loss: float
    train_loss: float
    shares: _containers.RepeatedCompositeFieldContainer[_round_pb2.Share]
    absent_parts: int
    recorded_unix_ms: int
    state_digest: bytes
    def __init__(self, round: _Optional[int] = ..., total_tokens: _Optional[int] = ..., validation_loss: _Optional[float] = ..., train_loss: _Optional[float] = ..., shares: _Optional[_Iterable[_Union[_round_pb2.Share, _Mapping]]] = ..., absent_parts: _Optional[int] = ..., recorded_unix_ms: _Optional[int] = ..., state_digest: _Optional[bytes] = ...) -> None: ...

class PeerProgress(_message.Message):
    __slots__ = ("peer_key", "round", "state_digest", "tokens", "bytes_sent", "bytes_received", "tokens_per_s", "last_seen_unix_ms", "leaving", "device", "log_digest", "first_shard", "num_shards", "service_tokens_per_s")
    PEER_KEY_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LOG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    SERVICE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    peer_key: bytes
    round: int
    state_digest: bytes
    tokens: int
    bytes_sent: int
    bytes_received: int
    tokens_per_s: float
    last_seen_unix_ms: int
    leaving: bool
    device: str
    log_digest: bytes
    first_shard: int
    num_shards: int
    service_tokens_per_s: float
    def __init__(self, peer_key: _Optional[bytes] = ..., round: _Optional[int] = ..., state_digest: _Optional[bytes] = ..., tokens: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., last_seen_unix_ms: _Optional[int] = ..., leaving: _Optional[bool] = ..., device: _Optional[str] = ..., log_digest: _Optional[bytes] = ..., first_shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., service_tokens_per_s: _Optional[float] = ...) -> None: ...

class GetProgressReply(_message.Message):
    __slots__ = ("name", "round", "total_tokens", "target_tokens", "rounds", "peers", "initial_validation_loss", "incidents", "shards", "tokens_per_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    INCIDENTS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    round: int
    total_tokens: int
    target_tokens: int
    rounds: _containers.RepeatedCompositeFieldContainer[RoundProgress]
    peers: _containers.RepeatedCompositeFieldContainer[PeerProgress]
    initial_validation_loss: float
    incidents: _containers.RepeatedCompositeFieldContainer[Incident]
    shards: _containers.RepeatedCompositeFieldContainer[ShardProgress]
    tokens_per_s: float
    def __init__(self, name: _Optional[str] = ..., round: _Optional[int] = ..., total_tokens: _Optional[int] = ..., target_tokens: _Optional[int] = ..., rounds: _Optional[_Iterable[_Union[RoundProgress, _Mapping]]] = ..., peers: _Optional[_Iterable[_Union[PeerProgress, _Mapping]]] = ..., initial_validation_loss: _Optional[float] = ..., incidents: _Optional[_Iterable[_Union[Incident, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[ShardProgress, _Mapping]]] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class ShardProgress(_message.Message):
    __slots__ = ("round", "total_tokens", "replicas", "tokens_per_s", "service_tokens_per_s")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SERVICE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    round: int
    total_tokens: int
    replicas: int
    tokens_per_s: float
    service_tokens_per_s: float
    def __init__(self, round: _Optional[int] = ..., total_tokens: _Optional[int] = ..., replicas: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., service_tokens_per_s: _Optional[float] = ...) -> None: ...

class Incident(_message.Message):
    __slots__ = ("told_unix_ms", "text", "attestations")
    TOLD_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ATTESTATIONS_FIELD_NUMBER: _ClassVar[int]
    told_unix_ms: int
    text: str
    attestations: _containers.RepeatedCompositeFieldContainer[_common_pb2.Signed]
    def __init__(self, told_unix_ms: _Optional[int] = ..., text: _Optional[str] = ..., attestations: _Optional[_Iterable[_Union[_common_pb2.Signed, _Mapping]]] = ...) -> None: ...

class AttestRequest(_message.Message):
    __slots__ = ("attestation",)
    ATTESTATION_FIELD_NUMBER: _ClassVar[int]
    attestation: _common_pb2.Signed
    def __init__(self, attestation: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class AttestReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: _common_pb2.Signed
    def __init__(self, request: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class PublishReply(_message.Message):
    __slots__ = ("manifest", "witnesses", "roots")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    WITNESSES_FIELD_NUMBER: _ClassVar[int]
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    manifest: _common_pb2.Signed
    witnesses: _common_pb2.Signed
    roots: _common_pb2.Signed
    def __init__(self, manifest: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., witnesses: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., roots: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointInfo(_message.Message):
    __slots__ = ("round", "total_tokens", "size_bytes", "manifest_digest", "validation_loss", "published_unix_ms", "num_evaluations")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    round: int
    total_tokens: int
    size_bytes: int
    manifest_digest: bytes
    validation_loss: float
    published_unix_ms: int
    num_evaluations: int
    def __init__(self, round: _Optional[int] = ..., total_tokens: _Optional[int] = ..., size_bytes: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., validation_loss: _Optional[float] = ..., published_unix_ms: _Optional[int] = ..., num_evaluations: _Optional[int] = ...) -> None: ...

class ListCheckpointsReply(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointInfo]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[CheckpointInfo, _Mapping]]] = ...) -> None: ...

class GetCheckpointRequest(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class GetCheckpointReply(_message.Message):
    __slots__ = ("manifest", "witnesses", "roots")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    WITNESSES_FIELD_NUMBER: _ClassVar[int]
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    manifest: _common_pb2.Signed
    witnesses: _common_pb2.Signed
    roots: _common_pb2.Signed
    def __init__(self, manifest: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., witnesses: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., roots: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class GetMetadataRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetadataFile(_message.Message):
    __slots__ = ("name", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content: bytes
    def __init__(self, name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class GetMetadataReply(_message.Message):
    __slots__ = ("files",)
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[MetadataFile]
    def __init__(self, files: _Optional[_Iterable[_Union[MetadataFile, _Mapping]]] = ...) -> None: ...

class GetRemovalsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRemovalsReply(_message.Message):
    __slots__ = ("removals",)
    REMOVALS_FIELD_NUMBER: _ClassVar[int]
    removals: _common_pb2.Signed
    def __init__(self, removals: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class GetChunkRequest(_message.Message):
    __slots__ = ("digest", "offset", "length")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    length: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class GetChunkReply(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ListMirrorsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListMirrorsReply(_message.Message):
    __slots__ = ("urls",)
    URLS_FIELD_NUMBER: _ClassVar[int]
    urls: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, urls: _Optional[_Iterable[str]] = ...) -> None: ...

class GetRecordRequest(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class GetRecordReply(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    def __init__(self, record: _Optional[bytes] = ...) -> None: ...

class TellEvaluationRequest(_message.Message):
    __slots__ = ("evaluation", "token")
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    evaluation: _common_pb2.Signed
    token: str
    def __init__(self, evaluation: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., token: _Optional[str] = ...) -> None: ...

class TellEvaluationReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListEvaluationsRequest(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class ListEvaluationsReply(_message.Message):
    __slots__ = ("evaluations",)
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    evaluations: _containers.RepeatedCompositeFieldContainer[_common_pb2.Signed]
    def __init__(self, evaluations: _Optional[_Iterable[_Union[_common_pb2.Signed, _Mapping]]] = ...) -> None: ...
