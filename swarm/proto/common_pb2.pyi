from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Signed(_message.Message):
    __slots__ = ("signer", "payload", "signature")
    SIGNER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    signer: bytes
    payload: bytes
    signature: bytes
    def __init__(self, signer: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Genesis(_message.Message):
    __slots__ = ("run_id", "voters", "shards", "created_unix_s")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    VOTERS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    voters: _containers.RepeatedScalarFieldContainer[bytes]
    shards: _containers.RepeatedCompositeFieldContainer[ShardGenesis]
    created_unix_s: int
    def __init__(self, run_id: _Optional[bytes] = ..., voters: _Optional[_Iterable[bytes]] = ..., shards: _Optional[_Iterable[_Union[ShardGenesis, _Mapping]]] = ..., created_unix_s: _Optional[int] = ...) -> None: ...

class ShardGenesis(_message.Message):
    __slots__ = ("state_digest", "num_values")
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_VALUES_FIELD_NUMBER: _ClassVar[int]
    state_digest: bytes
    num_values: int
    def __init__(self, state_digest: _Optional[bytes] = ..., num_values: _Optional[int] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("peer_key", "expires_unix_s")
    PEER_KEY_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    peer_key: bytes
    expires_unix_s: int
    def __init__(self, peer_key: _Optional[bytes] = ..., expires_unix_s: _Optional[int] = ...) -> None: ...

class Invite(_message.Message):
    __slots__ = ("run_id", "tls_pin", "addresses", "token")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TLS_PIN_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    tls_pin: bytes
    addresses: _containers.RepeatedScalarFieldContainer[str]
    token: str
    def __init__(self, run_id: _Optional[bytes] = ..., tls_pin: _Optional[bytes] = ..., addresses: _Optional[_Iterable[str]] = ..., token: _Optional[str] = ...) -> None: ...
