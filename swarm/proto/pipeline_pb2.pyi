from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class TrainRequest(_message.Message):
    __slots__ = ("microbatch_id", "first_shard", "time_left_ms", "sequences", "tokens", "hidden")
    MICROBATCH_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_SHARD_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    microbatch_id: bytes
    first_shard: int
    time_left_ms: int
    sequences: int
    tokens: bytes
    hidden: bytes
    def __init__(self, microbatch_id: _Optional[bytes] = ..., first_shard: _Optional[int] = ..., time_left_ms: _Optional[int] = ..., sequences: _Optional[int] = ..., tokens: _Optional[bytes] = ..., hidden: _Optional[bytes] = ...) -> None: ...

class TrainReply(_message.Message):
    __slots__ = ("loss", "gradient")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    loss: float
    gradient: bytes
    def __init__(self, loss: _Optional[float] = ..., gradient: _Optional[bytes] = ...) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("round", "first_shard", "time_left_ms", "sequences", "tokens", "hidden")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    FIRST_SHARD_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    round: int
    first_shard: int
    time_left_ms: int
    sequences: int
    tokens: bytes
    hidden: bytes
    def __init__(self, round: _Optional[int] = ..., first_shard: _Optional[int] = ..., time_left_ms: _Optional[int] = ..., sequences: _Optional[int] = ..., tokens: _Optional[bytes] = ..., hidden: _Optional[bytes] = ...) -> None: ...

class EvaluateReply(_message.Message):
    __slots__ = ("loss",)
    LOSS_FIELD_NUMBER: _ClassVar[int]
    loss: float
    def __init__(self, loss: _Optional[float] = ...) -> None: ...
