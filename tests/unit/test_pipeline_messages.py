"""`train_microbatch` and `evaluate_microbatch` as bytes: read back as written, refused where it is none of the run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from peer.pipeline.hop_codec import HOP_CODECS
from peer.pipeline.messages import (
    MAX_TIME_LEFT_S,
    Answer,
    Entering,
    HopRules,
    read_evaluation,
    read_loss,
    read_reply,
    read_request,
    time_for,
    with_time,
    write_loss,
    write_reply,
    write_request,
)
from swarm.errors import DataError, ProtocolError
from swarm.proto.pipeline_pb2 import EvaluateReply, EvaluateRequest, TrainReply, TrainRequest

RULES = HopRules(sequence_length=5, max_sequences=3, width=8, vocab_size=70_000, codec="int8")
TOKENS = np.arange(69_988, 70_000).reshape(2, 6)
HIDDEN = torch.randn((2, 5, 8), generator=torch.Generator().manual_seed(0))
ENTERING = Entering(microbatch_id=b"i" * 16, tokens=TOKENS, time_left_s=9.0)
SHARD = 2


def good() -> TrainRequest:
    hidden = HOP_CODECS["int8"].encode(HIDDEN)
    return TrainRequest.FromString(with_time(write_request(ENTERING, SHARD, hidden), 1.5))


@pytest.mark.parametrize("codec", HOP_CODECS)
def test_what_is_written_is_read_back(codec: str) -> None:
    rules = HopRules(sequence_length=5, max_sequences=3, width=8, vocab_size=70_000, codec=codec)
    data = with_time(write_request(ENTERING, SHARD, HOP_CODECS[codec].encode(HIDDEN)), 1.5)
    assert len(data) <= rules.max_request_bytes
    entering = read_request(data, (SHARD,), rules)
    assert entering.microbatch_id == ENTERING.microbatch_id and entering.time_left_s == 1.5
    assert np.array_equal(entering.tokens, TOKENS) and entering.tokens.dtype == np.int64
    assert entering.hidden_BLH is not None and entering.hidden_BLH.shape == HIDDEN.shape
    reply = write_reply(Answer(loss=1.25, gradient_BLH=HIDDEN), rules)
    assert len(reply) <= rules.max_answer_bytes(2)
    answer = read_reply(reply, 2, rules)
    assert answer.loss == 1.25 and answer.gradient_BLH is not None
    if codec == "int4":  # gradients are rounded up or down at random
        assert torch.allclose(answer.gradient_BLH, HIDDEN, rtol=0, atol=float(HIDDEN.abs().max()) / 6)
    else:
        assert torch.equal(answer.gradient_BLH, entering.hidden_BLH)


def test_a_loss_that_is_not_finite_travels_without_a_gradient() -> None:
    answer = read_reply(write_reply(Answer(loss=math.nan, gradient_BLH=None), RULES), 2, RULES)
    assert math.isnan(answer.loss) and answer.gradient_BLH is None


def test_a_gradient_that_is_not_finite_is_not_sent() -> None:
    with pytest.raises(DataError, match="not finite"):
        write_reply(Answer(loss=1.0, gradient_BLH=torch.full((2, 5, 8), math.inf)), RULES)


def test_more_time_than_a_call_can_have_is_cut() -> None:
    request = good()
    request.time_left_ms = (1 << 32) - 1
    assert read_request(request.SerializeToString(), (SHARD,), RULES).time_left_s == MAX_TIME_LEFT_S


def tokens(*, token: int = 0, sequences: int = 2) -> bytes:
    return np.full((sequences, 6), token, "<u4").tobytes()


# (name, what is changed in a good request, part of the refusal)
REQUESTS: list[tuple[str, dict[str, Any], str]] = [
    ("no id", {"microbatch_id": b""}, "id of 0 bytes"),
    ("a long id", {"microbatch_id": b"i" * 17}, "id of 17 bytes"),
    ("another shard", {"first_shard": 1}, "for shard 1, which cannot be entered here"),
    ("no sequences", {"sequences": 0}, "0 sequences"),
    ("too many sequences", {"sequences": 4}, "4 sequences"),
    ("more sequences than it holds", {"sequences": 3}, "bytes of tokens for 3 sequences"),
    ("no time", {"time_left_ms": 0}, "without time"),
    ("no tokens", {"tokens": b""}, "0 bytes of tokens"),
    ("tokens cut short", {"tokens": tokens()[:-1]}, "bytes of tokens"),
    ("a token outside the vocabulary", {"tokens": tokens(token=70_000)}, "outside the vocabulary"),
    ("the largest token", {"tokens": tokens(token=2**32 - 1)}, "outside the vocabulary"),
    ("no hidden states", {"hidden": b""}, "0 bytes where"),
    ("hidden states of another width", {"hidden": bytes(2 * 5 * (4 + 9))}, "bytes where"),
    ("a scale that is not finite", {"hidden": b"\xff" * (2 * 5 * (4 + 8))}, "no encoder writes"),
    ("more than any microbatch has", {"hidden": bytes(4096)}, "exceeds"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), REQUESTS, ids=[case[0] for case in REQUESTS])
def test_a_request_that_is_no_microbatch_of_the_run_is_refused(name: str, changes: dict[str, Any], reason: str) -> None:
    request = good()
    for field, value in changes.items():
        setattr(request, field, value)
    with pytest.raises(ProtocolError, match=reason):
        read_request(request.SerializeToString(), (SHARD,), RULES)


REPLIES: list[tuple[str, bytes, str]] = [
    ("not a message", b"\xff\xff", "cannot be read"),
    ("nothing", b"", "0 bytes where"),
    ("a loss without a gradient", TrainReply(loss=1.0).SerializeToString(), "0 bytes where"),
    ("a gradient without a loss", TrainReply(loss=math.nan, gradient=b"g").SerializeToString(), "a loss of nan"),
    ("an infinite loss", TrainReply(loss=math.inf).SerializeToString(), "a loss of inf"),
    ("a negative loss", TrainReply(loss=-1.0).SerializeToString(), "a loss of -1"),
    ("the gradient of one sequence", TrainReply(loss=1.0, gradient=bytes(60)).SerializeToString(), "60 bytes where"),
]


@pytest.mark.parametrize(("name", "data", "reason"), REPLIES, ids=[case[0] for case in REPLIES])
def test_an_answer_that_is_none_is_refused(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        read_reply(data, 2, RULES)


@pytest.mark.parametrize("read", [read_request, read_evaluation])
def test_bytes_that_are_no_message_are_refused(read: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        read(b"\xff" * 40, (SHARD,), RULES)


def evaluation(number: int = 7) -> bytes:
    entering = replace(ENTERING, microbatch_id=b"", round=number)
    return with_time(write_request(entering, SHARD, HOP_CODECS["int8"].encode(HIDDEN)), 1.5)


@pytest.mark.parametrize("number", [0, 7, 2**64 - 1])
def test_an_evaluation_is_read_back_with_its_round(number: int) -> None:
    data = evaluation(number)
    assert len(data) <= RULES.max_request_bytes
    entering = read_evaluation(data, (SHARD,), RULES)
    assert (entering.round, entering.microbatch_id, entering.time_left_s) == (number, b"", 1.5)
    assert np.array_equal(entering.tokens, TOKENS) and entering.hidden_BLH is not None


def test_what_is_to_be_evaluated_is_never_trained_on() -> None:
    """Whoever reads it as a microbatch to learn from, as a peer that knows nothing else would, refuses it."""
    with pytest.raises(ProtocolError):
        read_request(evaluation(), (SHARD,), RULES)


@pytest.mark.parametrize(("name", "changes", "reason"), REQUESTS[2:], ids=[case[0] for case in REQUESTS[2:]])
def test_an_evaluation_that_is_no_microbatch_of_the_run_is_refused(
    name: str, changes: dict[str, Any], reason: str
) -> None:
    request = EvaluateRequest.FromString(evaluation())
    for field, value in changes.items():
        setattr(request, field, value)
    with pytest.raises(ProtocolError, match=reason):
        read_evaluation(request.SerializeToString(), (SHARD,), RULES)


def test_a_loss_is_read_back_and_one_that_cannot_be_is_refused() -> None:
    assert read_loss(write_loss(Answer(loss=1.25, gradient_BLH=None))) == Answer(loss=1.25, gradient_BLH=None)
    assert math.isnan(read_loss(write_loss(Answer(loss=math.nan, gradient_BLH=None))).loss)
    for data in (b"\xff", *(EvaluateReply(loss=loss).SerializeToString() for loss in (-1.0, math.inf, -math.inf))):
        with pytest.raises(ProtocolError):
            read_loss(data)


def test_deeper_pipelines_have_more_time_up_to_what_a_call_can_have() -> None:
    assert [time_for(shards) for shards in (1, 2, 7, 80)] == [120.0, 240.0, 840.0, MAX_TIME_LEFT_S]
