"""What goes into an average: honest contributions untouched in direction, hostile ones bounded or dropped."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from peer.rounds.codec import CODECS
from peer.rounds.planning import SLICE_VALUES
from peer.rounds.robust import (
    MAX_SPARSE_NORM_RATIO,
    SLICES_AT_ONCE,
    Offer,
    Verdict,
    judge,
    largest_mean,
    robust_mean,
    squared_norm,
)
from swarm.errors import SwarmError
from swarm.proto.round_pb2 import PartResult
from swarm.run_spec import Robust

RULE = Robust()
N = SLICE_VALUES + 500
TOKENS = 1000


def offer(values: np.ndarray, tokens: int = TOKENS, rung: str = "int8", sparse: bool = False) -> Offer:
    return Offer(
        decode=lambda first, last: values[first:last].astype(np.float32), tokens=tokens, rung=rung, is_sparse=sparse
    )


def honest(count: int, seed: int = 0, noise: float = 2.0) -> list[np.ndarray]:
    """What replicas that read different text learn: something in common, and twice as much noise."""
    random = np.random.default_rng(seed)
    common = random.standard_normal(N)
    return [(common + noise * random.standard_normal(N)).astype(np.float32) for _ in range(count)]


def sparsified(values: np.ndarray, kept: int = 64) -> np.ndarray:
    """Only the largest 64 of each 4096 values."""
    result = np.zeros_like(values)
    for first in range(0, len(values), 4096):
        chunk = values[first : first + 4096]
        places = np.argsort(-np.abs(chunk))[:kept]
        result[first + places] = chunk[places]
    return result


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


Attack = Callable[[list[np.ndarray], np.random.Generator], np.ndarray]
DROPPED: dict[str, Attack] = {
    "sign flip": lambda h, _: -h[0],
    "sign flip x10": lambda h, _: -10 * h[0],
    "against the mean, small": lambda h, _: -0.1 * np.mean(h, axis=0),
    "against the mean, large": lambda h, _: -100 * np.mean(h, axis=0),
    "noise of any length": lambda _, random: (1e6 * random.standard_normal(N)).astype(np.float32),
    "near the largest numbers": lambda h, _: np.sign(-h[0]) * np.float32(1e38),
    "nothing at all": lambda h, _: np.zeros(N, np.float32),
}


@pytest.mark.parametrize("tokens", [1, TOKENS, 10**9])
@pytest.mark.parametrize("num_hostile", [1, 3, 4])
@pytest.mark.parametrize("attack", DROPPED)
def test_what_points_elsewhere_is_dropped_and_no_honest_contribution_is(
    attack: str, num_hostile: int, tokens: int
) -> None:
    """Of ten, up to four hostile ones that claim any weight, and few or many tokens."""
    good, random = honest(10 - num_hostile), np.random.default_rng(1)
    bad = [DROPPED[attack](good, random) for _ in range(num_hostile)]
    verdicts = judge([*map(offer, good), *(offer(b, tokens) for b in bad)], N, RULE)
    assert not any(v.is_dropped for v in verdicts[: len(good)])
    assert all(v.factor > 0.9 for v in verdicts[: len(good)])
    # As few tokens tell little, they are not dropped for pointing nowhere; but nor do they count for anything.
    assert all(v.is_dropped or v.weight <= TOKENS / 1000 for v in verdicts[len(good) :])


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_colluders_that_turn_one_peers_contribution_around_neither_get_it_dropped_nor_stay(noise: float) -> None:
    """However little replicas agree: a median over coordinates would be pulled towards what is sent three times."""
    good = honest(7, noise=noise)
    verdicts = judge([*map(offer, good), *[offer(-good[0])] * 3], N, RULE)
    assert [v.is_dropped for v in verdicts] == [False] * 7 + [True] * 3


@pytest.mark.parametrize("num_honest", [3, 4, 5, 6])
def test_one_hostile_contribution_short_of_half_is_not_enough(num_honest: int) -> None:
    good = honest(num_honest, noise=1.0)
    verdicts = judge([*map(offer, good), *[offer(-good[0])] * (num_honest - 1)], N, RULE)
    assert [v.is_dropped for v in verdicts] == [False] * num_honest + [True] * (num_honest - 1)


@pytest.mark.parametrize("num_hostile", [1, 4])
def test_a_huge_contribution_in_the_right_direction_counts_like_any_other(num_hostile: int) -> None:
    good = honest(10)
    offers = [*map(offer, good[num_hostile:]), *(offer(1000 * g) for g in good[:num_hostile])]
    mean = robust_mean(offers, judge(offers, N, RULE), N)
    expected = np.mean(good, axis=0)
    assert np.linalg.norm(mean - expected) < 0.05 * np.linalg.norm(expected)


def test_a_claimed_weight_counts_for_at_most_the_ratio_times_the_median_and_raises_its_limit_by_the_root() -> None:
    offers = [*map(offer, honest(4)), offer(10 * honest(5)[4], tokens=10**12)]
    verdicts = judge(offers, N, Robust(max_weight_ratio=3.0))
    assert [v.weight for v in verdicts] == [TOKENS] * 4 + [3 * TOKENS]
    assert verdicts[4].factor == pytest.approx(0.1 * 3**0.5, rel=0.05)


def test_a_contribution_of_few_tokens_and_a_short_one_are_not_dropped_nor_clip_the_others() -> None:
    """A late joiner: a quarter of the tokens, half of the norm, and noisier."""
    good = honest(6)
    late = (0.25 * good[0] + 0.5 * np.random.default_rng(9).standard_normal(N)).astype(np.float32)
    verdicts = judge([*map(offer, good[1:]), offer(late, tokens=TOKENS // 4)], N, RULE)
    assert not any(v.is_dropped for v in verdicts)
    assert all(v.factor > 0.9 for v in verdicts)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_than_four_contributions_are_clipped_and_never_dropped(count: int) -> None:
    good = honest(3)
    offers = [offer(good[0]), offer(-1000 * good[1]), offer(good[2])][:count]
    verdicts = judge(offers, N, RULE)
    assert not any(v.is_dropped for v in verdicts)
    norms = [v.factor * np.linalg.norm(o.decode(0, N)) for v, o in zip(verdicts, offers, strict=True)]
    assert max(norms) <= 1.05 * np.linalg.norm(good[0])


@pytest.mark.parametrize("count", [1, 5])
def test_zeros_from_everybody_are_averaged_to_zeros(count: int) -> None:
    offers = [offer(np.zeros(N, np.float32))] * count
    verdicts = judge(offers, N, RULE)
    assert not any(v.is_dropped for v in verdicts)
    assert not robust_mean(offers, verdicts, N).any()


def test_replicas_that_touched_different_values_are_all_kept() -> None:
    """Rows of an embedding: nobody agrees with anybody, and that is no reason to drop one."""
    offers = []
    for index in range(5):
        values = np.zeros(N, np.float32)
        values[index * 100 : (index + 1) * 100] = 1.0
        offers.append(offer(values))
    assert [v.is_dropped for v in judge(offers, N, RULE)] == [False] * 5


def test_colluders_that_send_the_same_bytes_do_not_get_honest_contributions_dropped() -> None:
    """Off the mean by a little, four of ten alike: nearer to the median than anybody."""
    good = honest(6)
    little = (np.mean(good, axis=0) - 0.3 * np.std(good, axis=0)).astype(np.float32)
    verdicts = judge([*map(offer, good), *[offer(little)] * 4], N, RULE)
    assert not any(v.is_dropped for v in verdicts[:6])


@pytest.mark.parametrize("num_dense", [0, 3])
def test_sparse_contributions_that_point_elsewhere_are_dropped(num_dense: int) -> None:
    good, bad = honest(7), [-5 * values for values in honest(9)[7:]]
    offers = [offer(sparsified(g), rung="topk", sparse=True) for g in good[num_dense:]]
    offers += [offer(g) for g in good[:num_dense]]
    offers += [offer(sparsified(b), rung="topk", sparse=True) for b in bad]
    verdicts = judge(offers, N, RULE)
    assert [v.is_dropped for v in verdicts] == [False] * 7 + [True] * 2


def test_colluders_with_a_sparse_rung_of_their_own_are_dropped() -> None:
    """They are a majority of those that they are compared with, but not of the round: the worst excuse nobody."""
    good, random = honest(6, noise=1.0), np.random.default_rng(3)
    clearly = sparsified(-100 * good[0])
    a_little = sparsified((-good[0] + 4 * random.standard_normal(N)).astype(np.float32))
    bad = [offer(values, rung="topk", sparse=True) for values in (clearly, clearly, a_little, a_little)]
    verdicts = judge([*map(offer, good), *bad], N, RULE)
    assert verdicts[-1].cosine > verdicts[6].cosine / 2, "else it would be dropped beside the others anyway"
    assert [v.is_dropped for v in verdicts] == [False] * 6 + [True] * 4
    assert all(v.factor > 0.9 for v in verdicts[:6])


def test_norms_of_a_sparse_rung_are_its_own_per_token_but_bounded_by_the_rounds() -> None:
    """What error feedback gathered is long, and is not clipped to the dense norm; a rung cannot set any limit."""
    good, sparse = honest(10), [sparsified(values) for values in honest(14)[10:]]
    length = np.linalg.norm(good[0])

    def clipped(norm: float) -> list[float]:
        scaled = [values * np.float32(norm * length / np.linalg.norm(values)) for values in sparse]
        offers = [*map(offer, good), *(offer(values, rung="topk", sparse=True) for values in scaled)]
        return [verdict.factor * norm for verdict in judge(offers, N, RULE)[10:]]

    assert clipped(4.0) == pytest.approx([4.0] * 4, rel=0.05)
    assert clipped(100.0) == pytest.approx([MAX_SPARSE_NORM_RATIO] * 4, rel=0.05)


def test_without_a_rule_it_is_the_mean_by_tokens() -> None:
    good = honest(5)
    offers = [offer(values, tokens=index + 1) for index, values in enumerate(good)]
    verdicts = judge(offers, N, Robust(rule="none"))
    assert verdicts == [Verdict(weight=index + 1) for index in range(5)]
    np.testing.assert_allclose(
        robust_mean(offers, verdicts, N), np.average(good, axis=0, weights=[1, 2, 3, 4, 5]), rtol=1e-4, atol=1e-5
    )


def test_one_contribution_alone_is_its_own_mean_to_the_bit() -> None:
    values = honest(1)[0]
    offers = [offer(values, tokens=7)]
    assert robust_mean(offers, judge(offers, N, RULE), N).tobytes() == values.tobytes()


def test_the_same_offers_in_the_same_order_give_the_same_bits() -> None:
    offers = [offer(values, tokens=index + 1) for index, values in enumerate(honest(7))]
    first, second = judge(offers, N, RULE), judge(offers, N, RULE)
    assert first == second
    assert robust_mean(offers, first, N).tobytes() == robust_mean(offers, second, N).tobytes()


@pytest.mark.parametrize(("name", "weights"), [("nobody", []), ("no weight", [0.0, 0.0])])
def test_an_average_of_nothing_is_refused(name: str, weights: list[float]) -> None:
    offers = [offer(values) for values in honest(len(weights))]
    with pytest.raises(SwarmError, match="an average needs"):
        robust_mean(offers, [Verdict(weight=weight) for weight in weights], N)


def test_the_mean_weighs_and_sums_in_the_order_given() -> None:
    values = (1e8, 1.0, -1e8)
    offers = [offer(np.array([value], np.float32)) for value in values]
    verdicts = [Verdict(weight=weight) for weight in (1, 2, 3)]
    expected = np.float32(0)
    for value, weight in zip(values, (1, 2, 3), strict=True):
        expected = np.float32(expected + np.float32(np.float32(weight / 6) * np.float32(value)))
    assert robust_mean(offers, verdicts, 1)[0] == expected


def test_no_more_than_a_megabyte_of_all_contributions_is_in_fp32_at_once() -> None:
    """And as much again for decoding it; a slice of each where there are many."""
    codec, count, num_values = CODECS["int8"], 12, 16 * SLICE_VALUES
    random = np.random.default_rng(0)
    encoded = [codec.encode(random.standard_normal(num_values).astype(np.float32)) for _ in range(count)]

    def offered(data: bytes) -> Offer:
        def decode(first: int, last: int) -> np.ndarray:
            return codec.decode(codec.cut(data, num_values, first, last), last - first)

        return Offer(decode=decode, tokens=1, rung="int8")

    offers = [offered(data) for data in encoded]
    tracemalloc.start()
    robust_mean(offers, judge(offers, num_values, RULE), num_values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * (num_values + 2 * SLICES_AT_ONCE * SLICE_VALUES)


def test_a_rejected_cosine_is_a_possible_one() -> None:
    """Of exact opposites, whatever rounding makes of their products: members refuse a cosine below -1."""
    for seed in range(20):
        values = np.random.default_rng(seed).standard_normal(1000).astype(np.float32)
        offers = [
            Offer(decode=lambda first, last, v=v: v[first:last].copy(), tokens=1, rung="int8")
            for v in [values, values, values, values, values * np.float32(-0.7)]
        ]
        verdicts = judge(offers, len(values), RULE)
        assert verdicts[-1].is_dropped and min(verdict.cosine for verdict in verdicts) >= -1


def told_of(offers: list[Offer], verdicts: list[Verdict]) -> PartResult:
    """What a reducer says of its verdicts."""
    part = PartResult()
    for index, (offer, verdict) in enumerate(zip(offers, verdicts, strict=True)):
        told = {"peer_key": bytes([index]) * 32, "weight_tokens": offer.tokens, "norm": verdict.norm}
        if verdict.is_dropped:
            part.rejections.add(cosine=verdict.cosine, min_cosine=verdict.min_cosine, **told)
        else:
            part.shares.add(clipped_to=verdict.factor if verdict.factor < 1 else 0.0, **told)
    return part


@pytest.mark.parametrize("seed", range(12))
def test_no_honest_mean_is_longer_than_what_its_reducer_says_of_the_contributions_allows(seed: int) -> None:
    """Whatever they weigh, on whichever rungs, hostile ones among them, of any length."""
    rng = np.random.default_rng(seed)
    offers = []
    for values in honest(int(rng.integers(1, 9)), seed):
        is_sparse = seed % 2 == 1 and rng.random() < 0.5
        sent = sparsified(values) if is_sparse else values
        scale = np.float32(rng.choice([1.0, 1.0, 1.0, 1e-3, 1e6, 1e34]))
        offers.append(
            offer(sent * scale, int(rng.choice([1, 900, TOKENS, 10**6])), "topk" if is_sparse else "int8", is_sparse)
        )
    verdicts = judge(offers, N, RULE)
    if all(verdict.is_dropped for verdict in verdicts):
        return
    norm = float(np.sqrt(squared_norm(robust_mean(offers, verdicts, N))))
    assert norm <= largest_mean(told_of(offers, verdicts), RULE, has_sparse_rungs=seed % 2 == 1)


@pytest.mark.parametrize("raised", [1, 2, 3, 4, 5])
def test_a_longer_mean_needs_false_norms_of_half_of_the_contributions(raised: int) -> None:
    """Of five that are told longer than they were: the median of what is told says how long a mean may be."""
    part = PartResult()
    for index in range(5):
        part.shares.add(peer_key=bytes([index]) * 32, weight_tokens=TOKENS, norm=100.0 if index < raised else 1.0)
    told = largest_mean(part, RULE, has_sparse_rungs=False)
    assert told == pytest.approx(0 if raised < 3 else 100, rel=1e-2), "0: not clipped as the rule says"
    for share in part.shares:
        share.clipped_to = 0.01 if share.norm > 1 else 0.0
    assert largest_mean(part, RULE, has_sparse_rungs=False) == pytest.approx(1 if raised < 3 else 100, rel=1e-2)


def test_a_squared_norm_is_exact_and_the_same_in_any_number_of_slices() -> None:
    values = np.random.default_rng(0).standard_normal(2 * SLICE_VALUES + 77).astype(np.float32)
    assert squared_norm(values) == pytest.approx(float(np.dot(values.astype(np.float64), values.astype(np.float64))))
    assert squared_norm(np.full(3, 3e38, np.float32)) > 1e76
    assert squared_norm(np.zeros(0, np.float32)) == 0
