"""Who measures a round's loss over spans, and when; and that anchors are lent only as those of the round asked for."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from peer.hosted import HostedShards
from peer.rounds.pace import Standing
from peer.rounds.planning import evaluator
from peer.span_evaluation import SpanEvaluation
from swarm.errors import Busy, NetworkError, NotFound
from tests.unit.small_models import small_spec

ME, OTHER, WHOLE = b"me", b"other", b"whole"
SPEC = small_spec("llama").model_copy(update={"num_shards": 2})
SPEC = SPEC.model_copy(update={"rounds": SPEC.rounds.model_copy(update={"status_interval_s": 0.02})})
ROUNDS = [number for number in range(3, 30) if number % SPEC.checkpoints.every_rounds]
MINE = next(
    number for number in ROUNDS if evaluator(number, {ME, OTHER, WHOLE}) == evaluator(number, {ME, OTHER}) == ME
)
NOT_MINE = next(number for number in ROUNDS if evaluator(number, {ME, OTHER}) == OTHER)


class Exchange:
    """One hosted shard."""

    def __init__(self, index: int, number: int) -> None:
        self.head, self.round = SimpleNamespace(round=number, log_digest=b"l", total_tokens=1, shard=index), number + 1
        digests = {"state_digest": b"s", "momentum_digest": b"m"}
        self.shard = SimpleNamespace(
            index=index, anchor=np.full(3, number, np.float32), num_values=3, momentum=None, **digests
        )
        self.lock = asyncio.Lock()

    def at_rest(self) -> asyncio.Lock:
        return self.lock


class Surroundings:
    def __init__(self, round_elsewhere: int, hosts_all: set[bytes]) -> None:
        self.elsewhere, self.number, self._hosts_all = [1], round_elsewhere, hosts_all
        self.lacking: list[int] = []

    def everywhere(self) -> list[dict[bytes, None]]:
        return [dict.fromkeys({OTHER} | self._hosts_all), dict.fromkeys(self._hosts_all)]

    def standing(self, shard: int) -> Standing:
        return Standing(round=self.number + 1, tokens=0)


class Training:
    """What was asked to be measured, and answered."""

    def __init__(self, *, is_free: bool = True) -> None:
        self.evaluating = SimpleNamespace(is_free=is_free)
        self.asked: list[tuple[list[float], int]] = []

    async def evaluate_round(self, anchor: Any, number: int) -> float:
        self.asked.append((anchor.tolist(), number))
        return 2.5


async def measured(
    folder: Path,
    number: int,
    *,
    elsewhere: tuple[int, ...] = (),
    whole: bool = False,
    is_free: bool = True,
    meanwhile: Callable[[Surroundings], Coroutine[Any, Any, None]] | None = None,
) -> dict[int, float]:
    """What is reported after a commit of the first shard; shards elsewhere come to rounds one after the other."""
    exchange, told = Exchange(0, number), dict[int, float]()
    surroundings = Surroundings(next(iter(elsewhere), number), {WHOLE} if whole else set())
    hosted: Any = SimpleNamespace(
        exchanges=[exchange], exchange_of=lambda shard: exchange, surroundings=surroundings, shards=[0]
    )
    joined: Any = SimpleNamespace(
        run=SimpleNamespace(spec=SPEC), identity=SimpleNamespace(public_key=ME), folder=folder
    )
    jobs: list[asyncio.Task[None]] = []

    def do_beside(job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        jobs.append(asyncio.ensure_future(job))
        return jobs[-1]

    reporter: Any = SimpleNamespace(measured=told.__setitem__)
    training: Any = Training(is_free=is_free)
    evaluation = SpanEvaluation(joined, hosted, reporter, do_beside)
    contributors = {ME, OTHER, WHOLE} if whole else {ME, OTHER}
    await evaluation.committed(0, contributors, training)
    for surroundings.number in elsewhere:
        await asyncio.sleep(0.05)
    if meanwhile is not None:
        await meanwhile(surroundings)
    await asyncio.wait_for(asyncio.gather(*jobs), 10)
    assert all(anchor == [number] * 3 for anchor, number in training.asked)
    return told


def test_one_of_those_that_were_counted_measures_unless_one_of_them_has_the_whole_model(tmp_path: Path) -> None:
    assert asyncio.run(measured(tmp_path, MINE)) == {MINE: 2.5}
    assert asyncio.run(measured(tmp_path, NOT_MINE)) == {}
    assert asyncio.run(measured(tmp_path, MINE, whole=True)) == {}


def test_not_before_earlier_evaluations_are_made_up_for_but_for_a_checkpoint(tmp_path: Path) -> None:
    every = SPEC.checkpoints.every_rounds
    checkpoint = next(every * n for n in range(1, 99) if evaluator(every * n, {ME, OTHER}) == ME)
    assert asyncio.run(measured(tmp_path, MINE, is_free=False)) == {}
    assert asyncio.run(measured(tmp_path, checkpoint, is_free=False)) == {checkpoint: 2.5}


def test_it_waits_until_all_shards_stand_there_and_gives_up_once_one_is_further_on(tmp_path: Path) -> None:
    assert asyncio.run(measured(tmp_path, MINE, elsewhere=(MINE - 1, MINE))) == {MINE: 2.5}
    assert asyncio.run(measured(tmp_path, MINE, elsewhere=(MINE - 1, MINE + 1))) == {}


def test_it_gives_up_once_a_shard_elsewhere_has_no_replica_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers left as the run ended: who asks for the last loss would go on asking until its time was over."""

    async def nobody_answers(self: Training, anchor: Any, number: int) -> float:
        asked.set()
        await asyncio.Event().wait()
        return 0.0

    async def leave(surroundings: Surroundings) -> None:
        await asked.wait()
        surroundings.lacking = [1]

    asked = asyncio.Event()
    monkeypatch.setattr(Training, "evaluate_round", nobody_answers)
    assert asyncio.run(measured(tmp_path, MINE, meanwhile=leave)) == {}
    assert asked.is_set()


def test_a_disk_without_room_for_the_copy_costs_that_rounds_loss_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr("os.pwrite", full)
        assert asyncio.run(measured(tmp_path, MINE)) == {}
    assert asyncio.run(measured(tmp_path, MINE)) == {MINE: 2.5}


def test_anchors_are_lent_of_the_round_asked_for_only_and_do_not_change_meanwhile() -> None:
    async def main() -> None:
        hosted = HostedShards.__new__(HostedShards)
        exchanges = [Exchange(1, 4), Exchange(2, 4)]
        hosted.members = tuple(SimpleNamespace(parts=SimpleNamespace(exchange=it)) for it in exchanges)  # type: ignore[misc]

        async def lent(shard: int, number: int) -> list[float]:
            async with hosted.anchors_after(shard, number) as anchors:
                inside = [it for it in exchanges if it.shard.index >= shard]
                assert all(it.lock.locked() for it in inside)
                return [float(anchor[0]) for anchor in anchors]

        assert await lent(1, 4) == [4.0, 4.0] and await lent(2, 4) == [4.0]
        cases: list[tuple[int, type[NetworkError]]] = [(5, Busy), (3, NotFound)]
        for number, error in cases:
            with pytest.raises(error):
                await lent(1, number)
        exchanges[1].head.round = 5
        assert await lent(2, 5) == [4.0]
        for number in (4, 5):
            with pytest.raises(NetworkError):
                await lent(1, number)
        async with exchanges[1].lock:
            with pytest.raises(Busy, match="about to change"):
                await lent(2, 5)
        assert not any(it.lock.locked() for it in exchanges)

    asyncio.run(main())
