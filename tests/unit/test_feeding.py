"""Feeding a replica: training waits for its token shard, fetches that fail are tried again, and no reading is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.training import feeding
from peer.training.data import ReaderOptions, TokenReader
from peer.training.feeding import Training
from peer.training.trainer import Limits, Trainer
from swarm import assignment
from swarm.errors import DataError, DeadlineExceeded, DiskFull, NotFound, Unreachable
from swarm.log import LogHead
from swarm.removals import Removal, left_to_read
from tests.unit.small_models import LENGTH, small_spec
from tests.unit.test_data_reader import LARGE, Data
from tests.unit.test_trainer import FakeReplica, Result

SPEC = small_spec("llama")
ME = b"m" * 32
ANCHOR = np.zeros(3, np.float32)
WITHIN_S = 20.0
SEQUENCES = 400
"""of each token shard: fifty batches"""


def head_after(round_number: int) -> LogHead:
    return LogHead(
        run_id=b"r" * 20, shard=0, round=round_number, log_digest=b"l" * 32, voters=(ME,), total_tokens=round_number
    )


class Recording(FakeReplica):
    """Remembers what it was given to train on, and how it was put back."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[np.ndarray] = []
        self.resets = 0

    def step(self, tokens: np.ndarray, learning_rate: float) -> Result:
        self.batches.append(tokens)
        time.sleep(0.001)
        return super().step(tokens, learning_rate)

    def reset(self, anchor: np.ndarray, values: slice | None = None) -> None:
        self.resets += 1
        super().reset(anchor)


class Source:
    """Token shards that come as ``answers`` say, one per fetch; when these are used up, as they should."""

    def __init__(self, folder: Path, answers: list[Exception | bytes]) -> None:
        self.data = Data([SEQUENCES * LENGTH + 1] * 6, [LENGTH + 1])
        self.answers = answers
        self.asked: list[bytes] = []
        self.open = asyncio.Event()
        self.open.set()
        options = ReaderOptions(sequence_length=LENGTH, cache=folder / "tokens", max_cache_bytes=LARGE)
        self.reader = TokenReader(self.data.manifest, options, self.fetch)

    async def fetch(self, digest: bytes, size: int) -> bytes:
        self.asked.append(digest)
        await self.open.wait()
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        return await self.data.fetch(digest, size)

    def batch(self, round_number: int, step: int) -> np.ndarray:
        """What a step of a round must read."""
        sequences = self.reader.sequences_per_shard()
        batch = SPEC.inner.microbatch_sequences
        chosen = assignment.reading(SPEC.seed, ME, round_number, step, sequences, batch)
        tokens = self.data.tokens[self.data.manifest.train[chosen.token_shard].file]
        return np.stack([tokens[i * LENGTH : i * LENGTH + LENGTH + 1] for i in chosen.sequences])


async def until(condition: Callable[[], Any], what: str) -> None:
    for _ in range(int(WITHIN_S / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {WITHIN_S:.0f} s: {what}")


def with_training(source: Source, test: Callable[[Training, Recording], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        training, replica = Training(SPEC, ME, source.reader, Limits()), Recording()
        await training.start(replica, [ANCHOR], head_after(0), lambda count: None, Trainer)
        try:
            await test(training, replica)
        finally:
            await training.stop(WITHIN_S)

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "RETRY_S", 0.05)


FAILURES: dict[str, list[Exception | bytes]] = {
    "nobody has it": [NotFound("nobody has it")] * 3,
    "nobody is there": [Unreachable("away")] * 3,
    "other bytes": [b"\0" * 2 * (SEQUENCES * LENGTH + 1)] * 3,
    "a mixture": [NotFound("nobody has it"), b"short", Unreachable("away")],
}


def test_an_evaluation_makes_up_for_its_time_before_the_next_may_be_made(tmp_path: Path) -> None:
    async def test(training: Training, replica: Recording) -> None:
        assert training.evaluating.is_free
        assert await training.evaluate(ANCHOR) > 0
        assert not training.evaluating.is_free

    with_training(Source(tmp_path, []), test)


def test_an_evaluation_that_fails_makes_up_for_its_time_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(training: Training, replica: Recording) -> None:
        async def fail(*given: Any) -> float:
            raise DeadlineExceeded("the trainer did not answer")

        monkeypatch.setattr(training.trainer, "evaluate", fail)
        with pytest.raises(DeadlineExceeded):
            await training.evaluate(ANCHOR)
        assert not training.evaluating.is_free

    with_training(Source(tmp_path, []), test)


@pytest.mark.parametrize("case", FAILURES)
def test_training_waits_while_a_token_shard_cannot_be_had_and_then_reads_from_its_beginning(
    case: str, tmp_path: Path
) -> None:
    source = Source(tmp_path, list(FAILURES[case]))

    async def test(training: Training, replica: Recording) -> None:
        await until(lambda: len(source.asked) >= 2, "it was asked for again")
        assert not replica.batches or not source.answers
        await until(lambda: len(replica.batches) >= 3, "steps")
        for step in range(3):
            np.testing.assert_array_equal(replica.batches[step], source.batch(1, step))
        assert not training.failed.is_set()

    with_training(source, test)


def test_no_step_is_made_before_the_token_shard_of_its_round_is_here(tmp_path: Path) -> None:
    source = Source(tmp_path, [NotFound("not yet")] * 5)

    async def test(training: Training, replica: Recording) -> None:
        await until(lambda: len(source.asked) == 5, "five fetches failed")
        assert replica.batches == [] and training.tokens == 0
        await until(lambda: bool(replica.batches), "a step")

    with_training(source, test)


def another_round(source: Source) -> int:
    """A round whose token shard is neither the first's nor the one that is fetched along with it."""
    counts = source.reader.sequences_per_shard()
    shards = [assignment.token_shard_of(SPEC.seed, ME, number, counts) for number in range(1, 100)]
    return next(number for number in range(3, 99) if shards[number - 1] not in shards[:2])


def position(source: Source, round_number: int, batch: np.ndarray) -> int | None:
    """Which reading of the round's token shard a batch is; None where it is none."""
    return next((step for step in range(50) if np.array_equal(source.batch(round_number, step), batch)), None)


def test_a_new_round_whose_token_shard_fails_for_a_while_begins_with_its_first_readings(tmp_path: Path) -> None:
    """Training waits, or ends the step that is under way, and then reads on in order."""
    source = Source(tmp_path, [])
    later = another_round(source)

    async def test(training: Training, replica: Recording) -> None:
        await until(lambda: len(replica.batches) > 3, "steps of round 1")
        source.answers = [NotFound("not yet")] * 3
        training.follow(head_after(later - 1))
        await until(lambda: not source.answers, "the fetch was tried again")
        await until(lambda: position(source, later, replica.batches[-1]) is not None, "a step of the later round")
        await until(lambda: len([b for b in replica.batches if position(source, later, b) is not None]) > 2, "more")
        read = [place for batch in replica.batches if (place := position(source, later, batch)) is not None]
        assert read[:3] in ([0, 1, 2], [1, 2, 3]), "the step under way when the round began has a number, too"

    with_training(source, test)


@pytest.mark.parametrize("answers", [[], [NotFound("not yet")] * 4])
def test_the_round_that_began_during_a_slow_fetch_gets_its_token_shard(
    answers: list[Exception | bytes], tmp_path: Path
) -> None:
    source = Source(tmp_path, list(answers))
    source.open.clear()
    later = another_round(source)

    async def test(training: Training, replica: Recording) -> None:
        await until(lambda: bool(source.asked), "the first fetch is under way")
        training.follow(head_after(later - 1))
        source.open.set()
        await until(lambda: bool(replica.batches), "a step")
        assert position(source, later, replica.batches[0]) in (0, 1)

    with_training(source, test)


def test_a_full_disk_ends_training_by_name(tmp_path: Path) -> None:
    source = Source(tmp_path, [DiskFull("no space left")])

    async def test(training: Training, replica: Recording) -> None:
        await asyncio.wait_for(training.failed.wait(), WITHIN_S)
        assert isinstance(training.failure, DiskFull) and replica.batches == []

    with_training(source, test)


def test_landing_without_a_snapshot_puts_the_replica_onto_the_anchor(tmp_path: Path) -> None:
    """As after repeated bad steps: nothing of what it did before is left."""
    source = Source(tmp_path, [])
    anchor = np.full(3, 7, np.float32)

    async def test(training: Training, replica: Recording) -> None:
        await until(lambda: len(replica.batches) >= 2, "steps")
        training.trainer.pause()
        movement, tokens = await training.snapshot()
        assert tokens == training.tokens > 0 and movement[:].max() >= 2
        await training.land(anchor, None, 2)
        assert replica.resets == 1
        np.testing.assert_array_equal(replica.weights, anchor)
        assert (await training.snapshot())[0][:].max() == 0

    with_training(source, test)


def test_a_removed_document_is_read_no_more_from_its_round_on(tmp_path: Path) -> None:
    """Steps draw from what is left, as anybody computes it; the round before its first still reads it."""
    source = Source(tmp_path, [])
    sequences = [Removal(document="d" * 64, reason="r", from_round=2, start=0, num_tokens=SEQUENCES * LENGTH // 2)]

    async def test(training: Training, replica: Recording) -> None:
        training.remove([sequences[0], *_removed_everywhere(source)])
        await until(lambda: len(replica.batches) >= 2, "steps of round 1")
        assert np.array_equal(replica.batches[0], source.batch(1, 0))
        training.follow(head_after(1))
        before = len(replica.batches)
        await until(lambda: len(replica.batches) >= before + 20, "steps of round 2")
        manifest = source.data.manifest
        left = left_to_read(manifest, LENGTH, [sequences[0], *_removed_everywhere(source)], 2)
        shard = assignment.token_shard_of(SPEC.seed, ME, 2, left.counts)
        tokens = source.data.tokens[manifest.train[shard].file]
        allowed = {tokens[i * LENGTH : i * LENGTH + LENGTH + 1].tobytes() for i in left.kept[shard]}
        rows = [row for batch in replica.batches[before + 2 :] for row in batch]
        assert {np.asarray(row, tokens.dtype).tobytes() for row in rows} <= allowed

    with_training(source, test)


def removed_from(document: int, start: int, from_round: int = 1, num_tokens: int = LENGTH * 3) -> Removal:
    return Removal(document=f"{document:064x}", reason="r", from_round=from_round, start=start, num_tokens=num_tokens)


def list_that_moves_round_1(source: Source, readable: set[int]) -> list[Removal]:
    """A list by which the first round's token shard is none of ``readable``."""
    for start in range(0, 6 * SEQUENCES * LENGTH, LENGTH * 40):
        found = [removed_from(1, start)]
        left = left_to_read(source.data.manifest, LENGTH, found, 1)
        if assignment.token_shard_of(SPEC.seed, ME, 1, left.counts) not in readable:
            return found
    raise AssertionError("no list moves it")


def first_shards(source: Source) -> set[int]:
    """The token shards that are fetched at the beginning, while nothing is removed."""
    counts = source.reader.sequences_per_shard()
    return {assignment.token_shard_of(SPEC.seed, ME, number, counts) for number in (1, 2)}


def test_a_list_that_arrives_while_a_token_shard_is_fetched_does_not_stop_training(tmp_path: Path) -> None:
    source = Source(tmp_path, [])
    source.open.clear()

    async def test(training: Training, replica: Recording) -> None:
        await until(lambda: bool(source.asked), "the first fetch is under way")
        training.remove(list_that_moves_round_1(source, first_shards(source)))
        source.open.set()
        await until(lambda: bool(replica.batches), "a step")

    with_training(source, test)


def test_a_list_that_arrives_between_a_steps_check_and_its_draw_counts_from_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(tmp_path, [])
    shard_of, arrive = assignment.token_shard_of, threading.Event()

    async def test(training: Training, replica: Recording) -> None:
        await until(lambda: len(replica.batches) > 1 and len(source.asked) == len(first_shards(source)), "steps")
        loop, moved = asyncio.get_running_loop(), list_that_moves_round_1(source, first_shards(source))

        def racing(*arguments: Any) -> int:
            found = shard_of(*arguments)
            if threading.current_thread() is not threading.main_thread() and not arrive.is_set():
                done = threading.Event()
                loop.call_soon_threadsafe(lambda: (training.remove(moved), done.set()))
                done.wait(WITHIN_S)
                arrive.set()
            return found

        monkeypatch.setattr(assignment, "token_shard_of", racing)
        await until(arrive.is_set, "the list arrived during a step")
        before = len(replica.batches)
        await until(lambda: len(replica.batches) > before + 2 or training.failed.is_set(), "more steps")
        assert not training.failed.is_set()

    with_training(source, test)


def test_what_an_older_list_leaves_is_not_kept_for_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer list arrives while it is counted what the older one leaves."""
    source = Source(tmp_path, [])
    source.open.clear()
    size = SEQUENCES * LENGTH + 1
    newer = [removed_from(index, index * size, 1, size // 2) for index in range(6)]
    arrived: list[int] = []

    async def test(training: Training, replica: Recording) -> None:
        def counting(*arguments: Any) -> Any:
            found = left_to_read(*arguments)
            if not arrived:
                arrived.append(1)
                training.remove(newer)
            return found

        await until(lambda: bool(source.asked), "the first fetch is under way")
        monkeypatch.setattr(feeding, "left_to_read", counting)
        training.remove([removed_from(99, 0)])
        source.open.set()
        await until(lambda: len(replica.batches) >= 20, "steps")
        left = left_to_read(source.data.manifest, LENGTH, newer, 1)
        shard = assignment.token_shard_of(SPEC.seed, ME, 1, left.counts)
        tokens = source.data.tokens[source.data.manifest.train[shard].file]
        allowed = {tokens[i * LENGTH : i * LENGTH + LENGTH + 1].tobytes() for i in left.kept[shard]}
        rows = {np.asarray(row, tokens.dtype).tobytes() for batch in replica.batches[2:] for row in batch}
        assert rows <= allowed

    with_training(source, test)


def test_a_list_that_leaves_nothing_to_read_ends_training_by_name(tmp_path: Path) -> None:
    source = Source(tmp_path, [])

    async def test(training: Training, replica: Recording) -> None:
        await until(lambda: bool(replica.batches), "a step")
        training.remove([removed_from(1, 0, 2, 1 << 30)])  # the next round: no step fails by it
        await asyncio.wait_for(training.failed.wait(), WITHIN_S)
        assert isinstance(training.failure, DataError)

    with_training(source, test)


def _removed_everywhere(source: Source) -> list[Removal]:
    """The first half of every token shard."""
    size = SEQUENCES * LENGTH + 1
    return [
        Removal(document="e" * 64, reason="r", from_round=2, start=index * size, num_tokens=size // 2)
        for index in range(len(source.data.manifest.train))
    ]
