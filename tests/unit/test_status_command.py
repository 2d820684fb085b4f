"""`swarm status` of a split run: shard by shard, who is the bottleneck, what the run waits for, and the right total."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peer.coordinator_client import CoordinatorClient
from swarm.cli import run
from swarm.invite import Invite
from swarm.proto import coordinator_pb2 as pb

NAN = float("nan")


def reply(*shards: pb.ShardProgress, total_tokens: int = 500, peers: tuple[pb.PeerProgress, ...] = ()) -> Any:
    return pb.GetProgressReply(
        name="split",
        round=3,
        total_tokens=total_tokens,
        target_tokens=1000,
        initial_validation_loss=NAN,
        shards=shards,
        peers=peers,
        tokens_per_s=shards[0].tokens_per_s,
    )


def shard(replicas: int, tokens_per_s: float, could: float) -> pb.ShardProgress:
    return pb.ShardProgress(
        round=3, total_tokens=500, replicas=replicas, tokens_per_s=tokens_per_s, service_tokens_per_s=could
    )


class Client:
    def __init__(self, answer: pb.GetProgressReply) -> None:
        self._answer = answer

    async def progress(self) -> pb.GetProgressReply:
        return self._answer

    async def close(self) -> None:
        pass


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What `swarm status` prints of a reply: its lines, or with ``as_json`` its object."""
    monkeypatch.setattr(run, "_parse", lambda text: None)

    def status(answer: pb.GetProgressReply, *, as_json: bool = False) -> Any:
        async def connect(invite: Invite) -> Client:
            return Client(answer)

        monkeypatch.setattr(CoordinatorClient, "connect", connect)
        run.status("", as_json)
        printed = capsys.readouterr().out
        return json.loads(printed) if as_json else [line.split() for line in printed.splitlines()]

    return status


ANNA = pb.PeerProgress(peer_key=b"a" * 32, tokens_per_s=130, first_shard=0, num_shards=2, service_tokens_per_s=200)
BORIS = pb.PeerProgress(peer_key=b"b" * 32, tokens_per_s=50, first_shard=1, num_shards=1, service_tokens_per_s=60)


def test_each_shard_has_its_speed_and_the_slowest_is_named(said: Any) -> None:
    answer = reply(shard(1, 130, 200), shard(2, 130, 260), peers=(ANNA, BORIS))
    lines = said(answer)
    assert lines[0][-2:] == ["130", "tokens/s"], "each token once"
    assert [line for line in lines if line[:1] in (["0"], ["1"])] == [
        ["0", "3", "500", "1", "130", "200", "bottleneck"],
        ["1", "3", "500", "2", "130", "260", "trains"],
    ]
    told = said(answer, as_json=True)
    assert (told["tokens/s"], told["waits for"]) == (130, "")
    assert [(each["could tokens/s"], each["bottleneck"]) for each in told["shards"]] == [(200, True), (260, False)]
    assert [(each["hosts"], each["could tokens/s"]) for each in told["peers"]] == [("0 to 1", 200), ("1", 60)]


def test_a_run_that_waits_for_a_replica_says_so_and_no_more_once_one_is_back_or_the_run_has_ended(said: Any) -> None:
    lines = said(reply(shard(1, 0, 200), shard(0, 0, 0)))
    assert lines[1] == ["training", "waits", "for", "a", "replica", "of", "shard", "1"]
    assert ["1", "3", "500", "0", "0", "0", "waits", "for", "a", "replica"] in lines
    for answer in (reply(shard(1, 9, 200), shard(1, 9, 300)), reply(shard(0, 0, 0), shard(0, 0, 0), total_tokens=1000)):
        assert not any("waits" in line for line in said(answer))
        assert said(answer, as_json=True)["waits for"] == ""


def test_a_run_of_one_shard_has_no_table_of_shards(said: Any) -> None:
    lines = said(reply(shard(1, 130, 130), peers=(pb.PeerProgress(peer_key=b"a" * 32, tokens_per_s=130),)))
    assert ["Shards"] not in lines and not any("hosts" in line for line in lines)
