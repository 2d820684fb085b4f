"""The messages of `train_microbatch` and `evaluate_microbatch`: written, and read as bytes of somebody hostile.

Decides what a request and an answer must look like under the run's rules before anything of them is used. Leaves the
bytes of hidden states to `peer.pipeline.hop_codec`, and calls to `peer.pipeline.onward` and `peer.pipeline.serving`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from peer.pipeline.hop_codec import HOP_CODECS, draw
from swarm.errors import ProtocolError
from swarm.proto.pipeline_pb2 import EvaluateReply, EvaluateRequest, TrainReply, TrainRequest

if TYPE_CHECKING:
    import torch

    from peer.training.microbatches import Tokens

R = TypeVar("R", TrainRequest, EvaluateRequest)

TRAIN_METHOD = "train_microbatch"
EVALUATE_METHOD = "evaluate_microbatch"
ID_BYTES = 16
TOKEN_BYTES = 4
# What a message is beside hidden states and tokens.
OVERHEAD_BYTES = 256
MAX_TIME_LEFT_S = 900.0
SHARD_TIME_S = 120.0


def time_for(num_shards: int) -> float:
    """Seconds for a microbatch through so many shards and back; after it, the source asks again."""
    return min(MAX_TIME_LEFT_S, SHARD_TIME_S * num_shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class HopRules:
    """What every microbatch of a run has in common."""

    sequence_length: int
    max_sequences: int
    width: int
    """values of a token's hidden state"""
    vocab_size: int
    codec: str = "int8"
    """one of `HOP_CODECS`"""

    def max_answer_bytes(self, num_sequences: int) -> int:
        num_tokens = num_sequences * self.sequence_length
        return HOP_CODECS[self.codec].encoded_size(num_tokens, self.width) + OVERHEAD_BYTES

    @property
    def max_request_bytes(self) -> int:
        tokens = self.max_sequences * (self.sequence_length + 1) * TOKEN_BYTES
        return tokens + self.max_answer_bytes(self.max_sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entering:
    """A microbatch at the beginning of a span."""

    microbatch_id: bytes
    tokens: Tokens
    """[B, L+1]"""
    time_left_s: float
    """for everything up to the answer"""
    hidden_BLH: torch.Tensor | None = None
    """None where it enters the first span"""
    first_shard: int = 0
    """whose first layer it enters"""
    round: int | None = None
    """only the loss is wanted, of the anchors after this round; None: it is trained on"""

    @property
    def method(self) -> str:
        return TRAIN_METHOD if self.round is None else EVALUATE_METHOD


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back. Where ``loss`` (nats, mean per token) is NaN there is no gradient, and nothing was learned.

    Nor is there one where only the loss was wanted.
    """

    loss: float
    gradient_BLH: torch.Tensor | None


def write_request(entering: Entering, first_shard: int, hidden: bytes) -> bytes:
    """Without the time that is left: put that of each attempt before it, see `with_time`."""
    sequences, tokens = len(entering.tokens), np.ascontiguousarray(entering.tokens, "<u4").tobytes()
    if entering.round is not None:
        return EvaluateRequest(
            round=entering.round, first_shard=first_shard, sequences=sequences, tokens=tokens, hidden=hidden
        ).SerializeToString()
    return TrainRequest(
        microbatch_id=entering.microbatch_id,
        first_shard=first_shard,
        sequences=sequences,
        tokens=tokens,
        hidden=hidden,
    ).SerializeToString()


def with_time(request: bytes, time_left_s: float) -> bytes:
    """Serialised messages one after the other are one message: the large one is written once.

    Both requests have the time in the same place.
    """
    return TrainRequest(time_left_ms=max(1, int(time_left_s * 1000))).SerializeToString() + request


def read_request(data: bytes, entrances: Collection[int], rules: HopRules) -> Entering:
    """Raises `ProtocolError` for all that is no microbatch of this run that enters at one of these shards."""
    request = _read(TrainRequest, data, rules)
    if len(request.microbatch_id) != ID_BYTES:
        raise ProtocolError(f"a microbatch's id of {len(request.microbatch_id)} bytes")
    return replace(_entering(request, entrances, rules), microbatch_id=request.microbatch_id)


def read_evaluation(data: bytes, entrances: Collection[int], rules: HopRules) -> Entering:
    """As `read_request`, of one whose loss alone is wanted."""
    request = _read(EvaluateRequest, data, rules)
    return replace(_entering(request, entrances, rules), round=request.round)


def _read(kind: type[R], data: bytes, rules: HopRules) -> R:
    if len(data) > rules.max_request_bytes:
        raise ProtocolError(f"a microbatch of {len(data)} bytes exceeds {rules.max_request_bytes}")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError("a microbatch cannot be read") from error


def _entering(request: TrainRequest | EvaluateRequest, entrances: Collection[int], rules: HopRules) -> Entering:
    """What both kinds of request have; an id or a round is to come."""
    if request.first_shard not in entrances:
        raise ProtocolError(f"a microbatch for shard {request.first_shard}, which cannot be entered here")
    if not 1 <= request.sequences <= rules.max_sequences:
        raise ProtocolError(f"a microbatch of {request.sequences} sequences, where 1 to {rules.max_sequences} may come")
    if request.time_left_ms < 1:
        raise ProtocolError("a microbatch without time")
    shape = (request.sequences, rules.sequence_length, rules.width)
    return Entering(
        microbatch_id=b"",
        tokens=_tokens(request.tokens, request.sequences, rules),
        time_left_s=min(request.time_left_ms / 1000, MAX_TIME_LEFT_S),
        hidden_BLH=HOP_CODECS[rules.codec].decode(request.hidden, shape),
        first_shard=request.first_shard,
    )


def write_reply(answer: Answer, rules: HopRules) -> bytes:
    """Raises `DataError` where the gradient cannot travel. Of an evaluation see `write_loss`."""
    if answer.gradient_BLH is None:
        return TrainReply(loss=math.nan).SerializeToString()
    gradient = HOP_CODECS[rules.codec].encode(answer.gradient_BLH, draw)
    return TrainReply(loss=answer.loss, gradient=gradient).SerializeToString()


def write_loss(answer: Answer) -> bytes:
    """What answers an `EvaluateRequest`."""
    return EvaluateReply(loss=answer.loss).SerializeToString()


def read_loss(data: bytes) -> Answer:
    """Raises `ProtocolError` for all that is no answer to an `EvaluateRequest`."""
    try:
        loss = EvaluateReply.FromString(data).loss
    except DecodeError as error:
        raise ProtocolError("an answer to an evaluation cannot be read") from error
    if math.isinf(loss) or loss < 0:
        raise ProtocolError(f"a loss of {loss}")
    return Answer(loss=loss, gradient_BLH=None)


def read_reply(data: bytes, num_sequences: int, rules: HopRules) -> Answer:
    """Raises `ProtocolError` for all that is no answer to a microbatch of ``num_sequences``."""
    try:
        reply = TrainReply.FromString(data)
    except DecodeError as error:
        raise ProtocolError("an answer to a microbatch cannot be read") from error
    if math.isnan(reply.loss) and not reply.gradient:
        return Answer(loss=math.nan, gradient_BLH=None)
    if not math.isfinite(reply.loss) or reply.loss < 0:
        raise ProtocolError(f"a loss of {reply.loss}")
    shape = (num_sequences, rules.sequence_length, rules.width)
    return Answer(loss=reply.loss, gradient_BLH=HOP_CODECS[rules.codec].decode(reply.gradient, shape))


def _tokens(data: bytes, num_sequences: int, rules: HopRules) -> Tokens:
    columns = rules.sequence_length + 1
    if len(data) != num_sequences * columns * TOKEN_BYTES:
        raise ProtocolError(f"{len(data)} bytes of tokens for {num_sequences} sequences of {columns}")
    tokens = np.frombuffer(data, "<u4").astype(np.int64).reshape(num_sequences, columns)
    if tokens.max() >= rules.vocab_size:
        raise ProtocolError(f"a token outside the vocabulary of {rules.vocab_size}")
    return tokens
