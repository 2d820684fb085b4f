from swarm.proto import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Attestation(_message.Message):
    __slots__ = ("shard", "round", "log_digest", "state_digest", "anchor_digest", "momentum_digest", "layout_digest")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    LOG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    shard: int
    round: int
    log_digest: bytes
    state_digest: bytes
    anchor_digest: bytes
    momentum_digest: bytes
    layout_digest: bytes
    def __init__(self, shard: _Optional[int] = ..., round: _Optional[int] = ..., log_digest: _Optional[bytes] = ..., state_digest: _Optional[bytes] = ..., anchor_digest: _Optional[bytes] = ..., momentum_digest: _Optional[bytes] = ..., layout_digest: _Optional[bytes] = ...) -> None: ...

class Witnesses(_message.Message):
    __slots__ = ("round", "manifest_digest", "replicas", "attestations", "shards")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ATTESTATIONS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    round: int
    manifest_digest: bytes
    replicas: _containers.RepeatedScalarFieldContainer[bytes]
    attestations: _containers.RepeatedCompositeFieldContainer[_common_pb2.Signed]
    shards: _containers.RepeatedCompositeFieldContainer[ShardReplicas]
    def __init__(self, round: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., replicas: _Optional[_Iterable[bytes]] = ..., attestations: _Optional[_Iterable[_Union[_common_pb2.Signed, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[ShardReplicas, _Mapping]]] = ...) -> None: ...

class ShardReplicas(_message.Message):
    __slots__ = ("places",)
    PLACES_FIELD_NUMBER: _ClassVar[int]
    places: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, places: _Optional[_Iterable[int]] = ...) -> None: ...

class Roots(_message.Message):
    __slots__ = ("roots",)
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    roots: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, roots: _Optional[_Iterable[bytes]] = ...) -> None: ...
