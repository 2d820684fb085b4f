"""The thin service: limits, decoding, and how an error becomes a status."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from coordinator.service import MAX_REQUEST_BYTES, METHODS, SERVICE_NAME, Service, answer, details_of, status_of
from coordinator.store import Store
from swarm import errors
from swarm.errors import ProtocolError, SwarmError
from swarm.proto import coordinator_pb2 as pb
from tests.coordinator_world import NOW_UNIX_MS, NOW_UNIX_S, World


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(World().run, Store(f"sqlite:///{tmp_path / 'db.sqlite'}"), lambda: NOW_UNIX_S)
    yield made
    made.close()


def test_every_call_of_the_contract_is_answered() -> None:
    declared = pb.DESCRIPTOR.services_by_name["Coordinator"]
    assert declared.full_name == SERVICE_NAME
    assert {method.name: method.input_type.full_name for method in declared.methods} == {
        name: method.request.DESCRIPTOR.full_name for name, method in METHODS.items()
    }


def test_get_run_tells_the_run_and_the_time(service: Service) -> None:
    reply = pb.GetRunReply.FromString(asyncio.run(answer(METHODS["GetRun"], service, b"")))
    assert (reply.server_time_unix_ms, reply.tokenizer) == (NOW_UNIX_MS, b'{"a": "tokenizer"}')


@pytest.mark.parametrize("name", METHODS)
def test_a_request_larger_than_its_method_allows_is_refused_undecoded(service: Service, name: str) -> None:
    raw = b"\xff" * (METHODS[name].max_request_bytes + 1)
    assert METHODS[name].max_request_bytes <= MAX_REQUEST_BYTES
    with pytest.raises(ProtocolError, match="bytes; at most"):
        asyncio.run(answer(METHODS[name], service, raw))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.max_request_bytes])
def test_a_request_that_is_no_message_is_refused(service: Service, name: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        asyncio.run(answer(METHODS[name], service, b"\xff\xff\xff"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("x"), grpc.StatusCode.NOT_FOUND),
        (errors.ConfigError("x"), grpc.StatusCode.PERMISSION_DENIED),
        (errors.SignatureError("x"), grpc.StatusCode.UNAUTHENTICATED),
        (errors.ProtocolError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.VerificationError("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.DiskFull("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.SwarmError("x"), grpc.StatusCode.INTERNAL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SwarmError) else "",
)
def test_each_kind_of_error_has_its_status(error: SwarmError, code: grpc.StatusCode) -> None:
    assert status_of(error) == code


def test_details_name_the_error_and_are_bounded() -> None:
    details = details_of(errors.DigestError("é" * 10_000, "do this"))
    texts = json.loads(details)
    assert (texts["error"], texts["advice"]) == ("DigestError", "do this")
    assert len(details) < 8000
