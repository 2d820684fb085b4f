from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CircuitHop(_message.Message):
    __slots__ = ("type", "peer", "status")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    type: int
    peer: CircuitPeer
    status: int
    def __init__(self, type: _Optional[int] = ..., peer: _Optional[_Union[CircuitPeer, _Mapping]] = ..., status: _Optional[int] = ...) -> None: ...

class CircuitStop(_message.Message):
    __slots__ = ("type", "peer", "status")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    type: int
    peer: CircuitPeer
    status: int
    def __init__(self, type: _Optional[int] = ..., peer: _Optional[_Union[CircuitPeer, _Mapping]] = ..., status: _Optional[int] = ...) -> None: ...

class CircuitPeer(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    def __init__(self, id: _Optional[bytes] = ...) -> None: ...
