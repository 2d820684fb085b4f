from swarm.proto import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("shard", "round", "log_digest", "state_digest", "tokens", "tokens_per_s", "upload_bps", "trains", "leaving", "sent_unix_ms", "admission", "addresses", "checkpoint_round", "committed_tokens", "service_tokens_per_s")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    LOG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BPS_FIELD_NUMBER: _ClassVar[int]
    TRAINS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ROUND_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SERVICE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    shard: int
    round: int
    log_digest: bytes
    state_digest: bytes
    tokens: int
    tokens_per_s: float
    upload_bps: int
    trains: bool
    leaving: bool
    sent_unix_ms: int
    admission: _common_pb2.Signed
    addresses: _containers.RepeatedScalarFieldContainer[str]
    checkpoint_round: int
    committed_tokens: int
    service_tokens_per_s: float
    def __init__(self, shard: _Optional[int] = ..., round: _Optional[int] = ..., log_digest: _Optional[bytes] = ..., state_digest: _Optional[bytes] = ..., tokens: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., upload_bps: _Optional[int] = ..., trains: _Optional[bool] = ..., leaving: _Optional[bool] = ..., sent_unix_ms: _Optional[int] = ..., admission: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., addresses: _Optional[_Iterable[str]] = ..., checkpoint_round: _Optional[int] = ..., committed_tokens: _Optional[int] = ..., service_tokens_per_s: _Optional[float] = ...) -> None: ...

class Ballot(_message.Message):
    __slots__ = ("number", "leader")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    number: int
    leader: bytes
    def __init__(self, number: _Optional[int] = ..., leader: _Optional[bytes] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("peer_key", "contributes", "tokens")
    PEER_KEY_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    peer_key: bytes
    contributes: bool
    tokens: int
    def __init__(self, peer_key: _Optional[bytes] = ..., contributes: _Optional[bool] = ..., tokens: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("first_slice", "num_slices", "reducer")
    FIRST_SLICE_FIELD_NUMBER: _ClassVar[int]
    NUM_SLICES_FIELD_NUMBER: _ClassVar[int]
    REDUCER_FIELD_NUMBER: _ClassVar[int]
    first_slice: int
    num_slices: int
    reducer: int
    def __init__(self, first_slice: _Optional[int] = ..., num_slices: _Optional[int] = ..., reducer: _Optional[int] = ...) -> None: ...

class OpenRound(_message.Message):
    __slots__ = ("log_digest", "state_digest", "members", "parts")
    LOG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    log_digest: bytes
    state_digest: bytes
    members: _containers.RepeatedCompositeFieldContainer[Member]
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, log_digest: _Optional[bytes] = ..., state_digest: _Optional[bytes] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

class HandedOver(_message.Message):
    __slots__ = ("slices", "encoded")
    SLICES_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    slices: _containers.RepeatedScalarFieldContainer[int]
    encoded: bytes
    def __init__(self, slices: _Optional[_Iterable[int]] = ..., encoded: _Optional[bytes] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("part", "weight_tokens", "encoded", "state_digest", "codec", "handed_over")
    PART_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    part: int
    weight_tokens: int
    encoded: bytes
    state_digest: bytes
    codec: str
    handed_over: HandedOver
    def __init__(self, part: _Optional[int] = ..., weight_tokens: _Optional[int] = ..., encoded: _Optional[bytes] = ..., state_digest: _Optional[bytes] = ..., codec: _Optional[str] = ..., handed_over: _Optional[_Union[HandedOver, _Mapping]] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("peer_key", "weight_tokens", "clipped_to", "norm")
    PEER_KEY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_TO_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    peer_key: bytes
    weight_tokens: int
    clipped_to: float
    norm: float
    def __init__(self, peer_key: _Optional[bytes] = ..., weight_tokens: _Optional[int] = ..., clipped_to: _Optional[float] = ..., norm: _Optional[float] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("peer_key", "cosine", "min_cosine", "norm", "weight_tokens")
    PEER_KEY_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    MIN_COSINE_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    peer_key: bytes
    cosine: float
    min_cosine: float
    norm: float
    weight_tokens: int
    def __init__(self, peer_key: _Optional[bytes] = ..., cosine: _Optional[float] = ..., min_cosine: _Optional[float] = ..., norm: _Optional[float] = ..., weight_tokens: _Optional[int] = ...) -> None: ...

class Average(_message.Message):
    __slots__ = ("part", "shares", "encoded", "rejections", "handed_over_by", "signature")
    PART_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_BY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    part: int
    shares: _containers.RepeatedCompositeFieldContainer[Share]
    encoded: bytes
    rejections: _containers.RepeatedCompositeFieldContainer[Rejection]
    handed_over_by: _containers.RepeatedScalarFieldContainer[bytes]
    signature: bytes
    def __init__(self, part: _Optional[int] = ..., shares: _Optional[_Iterable[_Union[Share, _Mapping]]] = ..., encoded: _Optional[bytes] = ..., rejections: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ..., handed_over_by: _Optional[_Iterable[bytes]] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("log_digest", "gone")
    LOG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    log_digest: bytes
    gone: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, log_digest: _Optional[bytes] = ..., gone: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Promise(_message.Message):
    __slots__ = ("accepted_ballot", "accepted_record")
    ACCEPTED_BALLOT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_RECORD_FIELD_NUMBER: _ClassVar[int]
    accepted_ballot: Ballot
    accepted_record: bytes
    def __init__(self, accepted_ballot: _Optional[_Union[Ballot, _Mapping]] = ..., accepted_record: _Optional[bytes] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ("record", "holders", "gone")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    holders: _containers.RepeatedScalarFieldContainer[bytes]
    gone: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, record: _Optional[bytes] = ..., holders: _Optional[_Iterable[bytes]] = ..., gone: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("shard", "round", "ballot", "record_digest", "gone")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    RECORD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    shard: int
    round: int
    ballot: Ballot
    record_digest: bytes
    gone: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, shard: _Optional[int] = ..., round: _Optional[int] = ..., ballot: _Optional[_Union[Ballot, _Mapping]] = ..., record_digest: _Optional[bytes] = ..., gone: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("promised", "reason")
    PROMISED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    promised: Ballot
    reason: str
    def __init__(self, promised: _Optional[_Union[Ballot, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class PartResult(_message.Message):
    __slots__ = ("first_slice", "num_slices", "digest", "size_bytes", "shares", "rejections", "reducer", "handed_over_by", "signature")
    FIRST_SLICE_FIELD_NUMBER: _ClassVar[int]
    NUM_SLICES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    REDUCER_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_BY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    first_slice: int
    num_slices: int
    digest: bytes
    size_bytes: int
    shares: _containers.RepeatedCompositeFieldContainer[Share]
    rejections: _containers.RepeatedCompositeFieldContainer[Rejection]
    reducer: bytes
    handed_over_by: _containers.RepeatedScalarFieldContainer[bytes]
    signature: bytes
    def __init__(self, first_slice: _Optional[int] = ..., num_slices: _Optional[int] = ..., digest: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., shares: _Optional[_Iterable[_Union[Share, _Mapping]]] = ..., rejections: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ..., reducer: _Optional[bytes] = ..., handed_over_by: _Optional[_Iterable[bytes]] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("shard", "round", "log_digest", "state_digest", "parts", "next_voters", "total_tokens", "codec", "opened_by")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    LOG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_VOTERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    OPENED_BY_FIELD_NUMBER: _ClassVar[int]
    shard: int
    round: int
    log_digest: bytes
    state_digest: bytes
    parts: _containers.RepeatedCompositeFieldContainer[PartResult]
    next_voters: _containers.RepeatedScalarFieldContainer[bytes]
    total_tokens: int
    codec: str
    opened_by: Ballot
    def __init__(self, shard: _Optional[int] = ..., round: _Optional[int] = ..., log_digest: _Optional[bytes] = ..., state_digest: _Optional[bytes] = ..., parts: _Optional[_Iterable[_Union[PartResult, _Mapping]]] = ..., next_voters: _Optional[_Iterable[bytes]] = ..., total_tokens: _Optional[int] = ..., codec: _Optional[str] = ..., opened_by: _Optional[_Union[Ballot, _Mapping]] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("record", "votes", "holders")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    VOTES_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    votes: _containers.RepeatedCompositeFieldContainer[_common_pb2.Signed]
    holders: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, record: _Optional[bytes] = ..., votes: _Optional[_Iterable[_Union[_common_pb2.Signed, _Mapping]]] = ..., holders: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RoundMessage(_message.Message):
    __slots__ = ("shard", "round", "ballot", "open", "contribution", "average", "prepare", "promise", "accept", "vote", "commit", "refusal")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    PROMISE_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    VOTE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    shard: int
    round: int
    ballot: Ballot
    open: OpenRound
    contribution: Contribution
    average: Average
    prepare: Prepare
    promise: Promise
    accept: Accept
    vote: _common_pb2.Signed
    commit: Commit
    refusal: Refusal
    def __init__(self, shard: _Optional[int] = ..., round: _Optional[int] = ..., ballot: _Optional[_Union[Ballot, _Mapping]] = ..., open: _Optional[_Union[OpenRound, _Mapping]] = ..., contribution: _Optional[_Union[Contribution, _Mapping]] = ..., average: _Optional[_Union[Average, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., promise: _Optional[_Union[Promise, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., vote: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ("leaving", "shard")
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    leaving: bool
    shard: int
    def __init__(self, leaving: _Optional[bool] = ..., shard: _Optional[int] = ...) -> None: ...

class PingReply(_message.Message):
    __slots__ = ("round", "alive_ms")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ALIVE_MS_FIELD_NUMBER: _ClassVar[int]
    round: int
    alive_ms: int
    def __init__(self, round: _Optional[int] = ..., alive_ms: _Optional[int] = ...) -> None: ...

class LogRequest(_message.Message):
    __slots__ = ("shard", "first_round", "max_commits")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROUND_FIELD_NUMBER: _ClassVar[int]
    MAX_COMMITS_FIELD_NUMBER: _ClassVar[int]
    shard: int
    first_round: int
    max_commits: int
    def __init__(self, shard: _Optional[int] = ..., first_round: _Optional[int] = ..., max_commits: _Optional[int] = ...) -> None: ...

class LogReply(_message.Message):
    __slots__ = ("commits",)
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    commits: _containers.RepeatedCompositeFieldContainer[Commit]
    def __init__(self, commits: _Optional[_Iterable[_Union[Commit, _Mapping]]] = ...) -> None: ...

class StateRequest(_message.Message):
    __slots__ = ("shard", "after_round", "first", "momentum")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    AFTER_ROUND_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    shard: int
    after_round: int
    first: bool
    momentum: bool
    def __init__(self, shard: _Optional[int] = ..., after_round: _Optional[int] = ..., first: _Optional[bool] = ..., momentum: _Optional[bool] = ...) -> None: ...

class StateReply(_message.Message):
    __slots__ = ("round", "anchor_chunks", "momentum_chunks")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    round: int
    anchor_chunks: _containers.RepeatedScalarFieldContainer[bytes]
    momentum_chunks: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, round: _Optional[int] = ..., anchor_chunks: _Optional[_Iterable[bytes]] = ..., momentum_chunks: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ChunkRequest(_message.Message):
    __slots__ = ("digest", "offset", "length")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    length: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ChunkReply(_message.Message):
    __slots__ = ("found", "data")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    found: bool
    data: bytes
    def __init__(self, found: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...
