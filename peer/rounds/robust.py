"""What of a round's contributions goes into an average: weights bounded, norms clipped, strangers dropped.

Decides, for one part, what each contribution is multiplied by, which are dropped and why, and makes the mean. Works
a few slices at a time on what `Offer.decode` gives, so that never more than that of each contribution is fp32 at once.
Leaves bytes to the codecs, and what contributors are told to `peer.rounds.shard`. Pure; the same offers in the same
order give the same bits (one reducer averages a part, so other machines need not agree).

1. A weight counts for at most ``max_weight_ratio`` times the median weight: weights are claims.
2. Norms are clipped to the median norm. A contribution's *size* is the square root of its weight over the median
   weight, as that is how far training on more tokens moves at least; norms are compared after division by it, so few
   tokens neither lower the limit for others nor raise their own. Dense contributions are compared with each other,
   those of a sparse rung within their rung; where these are fewer than 4, with the whole round.
3. From 4 contributions on, a contribution's *agreement* is the median of its cosines to all others. It is dropped
   below ``min_cosine_ratio`` times the median agreement of those it is compared with (times its size where that is
   below 1: few tokens are noisier), less what chance explains.

Cosines to others rather than to a median of all: where replicas agree little, hostile peers that send one vector
several times pull a coordinate-wise median towards it (docs/decisions/0012). Of medians of norms and agreements the
lower is taken for even counts, of cosines the higher: then every one of them is an honest value, or between two, while
fewer than half of the contributions are hostile. Contributions of zeros count for no median norm.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peer.rounds.codec import Float32
from peer.rounds.planning import SLICE_VALUES
from swarm.errors import SwarmError
from swarm.proto.round_pb2 import PartResult, Rejection, Share
from swarm.run_spec import Robust

MIN_COMPARED = 4
"""fewer have no majority that could be believed against one of them"""
CHANCE_DEVIATIONS = 3
"""cosines of unrelated vectors of V values scatter by 1 / sqrt(V): small parts cannot tell much"""
SLICES_AT_ONCE = 16
ROUNDING = 1.001
"""norms are told in fp32, and depend on the order in which squares are added"""
MAX_SPARSE_NORM_RATIO = 8
"""What top-k with error feedback sends of a steady drift is sqrt(4096 / 64) times as long as the drift in one round; a
sparse rung that hostile peers have for themselves could otherwise set its own limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One contribution to a part. ``decode(first, last)`` gives these values of it as fp32: whole slices."""

    decode: Callable[[int, int], Float32]
    tokens: int
    rung: str
    is_sparse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of an offer: it goes into the mean with ``weight``, multiplied by ``factor``, unless dropped."""

    weight: float
    factor: float = 1.0
    """below 1: clipped to this share of its norm"""
    cosine: float = 0.0
    """the median of its cosines to the others"""
    min_cosine: float = -1.0
    norm: float = 0.0
    """as it arrived"""

    @property
    def is_dropped(self) -> bool:
        return self.cosine < self.min_cosine


def judge(offers: Sequence[Offer], num_values: int, rule: Robust) -> list[Verdict]:
    """One verdict per offer; ``num_values``: length of the part."""
    if rule.rule == "none":
        return [Verdict(weight=offer.tokens) for offer in offers]
    median_tokens = statistics.median_low(offer.tokens for offer in offers)
    weights = [min(offer.tokens, rule.max_weight_ratio * median_tokens) for offer in offers]
    sizes = [math.sqrt(weight / median_tokens) for weight in weights]
    norms, cosines_NN = _measure(offers, num_values)
    limits = _limits(offers, norms, sizes)
    factors = [min(1.0, limit / norm) if norm else 1.0 for norm, limit in zip(norms, limits, strict=True)]
    if len(offers) < MIN_COMPARED:
        return [Verdict(weight=w, factor=f, norm=n) for w, f, n in zip(weights, factors, norms, strict=True)]
    agreements = [statistics.median_high(np.delete(row_N, i).tolist()) for i, row_N in enumerate(cosines_NN)]
    chance = CHANCE_DEVIATIONS / math.sqrt(num_values)
    least = [
        rule.min_cosine_ratio * usual * min(1.0, size) - chance
        for usual, size in zip(_usual(offers, agreements), sizes, strict=True)
    ]
    return [
        Verdict(weight=w, factor=f, cosine=c, min_cosine=m, norm=n)
        for w, f, c, m, n in zip(weights, factors, agreements, least, norms, strict=True)
    ]


def largest_mean(part: PartResult, rule: Robust, *, has_sparse_rungs: bool) -> float:
    """The norm that a mean of these contributions can have at most, by what its reducer says of them; everybody's bits.

    0 where they were not clipped as the rule says.
    """
    told: list[Share | Rejection] = [*part.shares, *part.rejections]
    median_tokens = max(1, statistics.median_low([one.weight_tokens for one in told] or [0]))
    sizes = [math.sqrt(min(one.weight_tokens, rule.max_weight_ratio * median_tokens) / median_tokens) for one in told]
    of_round = _median_of_positive([one.norm / size if size else 0.0 for one, size in zip(told, sizes, strict=True)])
    limit = ROUNDING * of_round * (MAX_SPARSE_NORM_RATIO if has_sparse_rungs else 1)
    kept = [limit * size if share.clipped_to else share.norm for share, size in zip(part.shares, sizes, strict=False)]
    if any(norm > limit * size for norm, size in zip(kept, sizes, strict=False)):
        return 0.0
    return ROUNDING * max(kept, default=0.0)


def squared_norm(vector: Float32) -> float:
    """The same bits on every machine, whatever its processor: products are exact, and added in one order."""
    total = np.zeros(min(SLICE_VALUES, len(vector)), np.float64)
    for first in range(0, len(vector), SLICE_VALUES):
        values = vector[first : first + SLICE_VALUES].astype(np.float64)
        total[: len(values)] += np.multiply(values, values, out=values)
    return math.fsum(total)


def robust_mean(offers: Sequence[Offer], verdicts: Sequence[Verdict], num_values: int) -> Float32:
    """The mean of what was not dropped, by the verdicts' weights and factors, summed in the order given."""
    kept = [(o, v) for o, v in zip(offers, verdicts, strict=True) if not v.is_dropped]
    total = sum(verdict.weight for _, verdict in kept)
    if not kept or total <= 0:
        raise SwarmError("an average needs contributions, each with a positive weight")
    mean = np.zeros(num_values, np.float32)
    # Near the largest float32 a sum may overflow: the encoder refuses the result, as it does any infinity.
    with np.errstate(over="ignore", invalid="ignore"):
        for first, last in _steps(num_values, 4):
            for offer, verdict in kept:
                values = offer.decode(first, last)
                np.multiply(values, np.float32(verdict.weight * verdict.factor / total), out=values)
                np.add(mean[first:last], values, out=mean[first:last])
    return mean


def _measure(offers: Sequence[Offer], num_values: int) -> tuple[list[float], npt.NDArray[np.float64]]:
    """(norms, cosines of all pairs [N, N]); a vector of zeros has the cosine 0 to everything."""
    products_NN = np.zeros((len(offers), len(offers)))
    for first, last in _steps(num_values, len(offers)):
        rows_NV = np.empty((len(offers), last - first), np.float32)
        for row_V, offer in zip(rows_NV, offers, strict=True):
            row_V[:] = offer.decode(first, last)
        products_NN += _products(rows_NV)
    norms_N = np.sqrt(np.diagonal(products_NN))
    divisors_N = np.where(norms_N > 0, norms_N, 1.0)
    # Rounded products can make a cosine of parallel vectors a little more than 1, which members would refuse.
    return norms_N.tolist(), np.clip(products_NN / np.outer(divisors_N, divisors_N), -1, 1)


def _products(rows_NV: Float32) -> npt.NDArray[np.float64]:
    """Of all pairs of rows; those of large float32 are no float32, so such rows are scaled (and destroyed)."""
    with np.errstate(over="ignore", invalid="ignore"):
        products_NN = rows_NV @ rows_NV.T
    if np.isfinite(products_NN).all():
        return products_NN.astype(np.float64)
    largest_N = np.abs(rows_NV).max(axis=1)
    largest_N[largest_N == 0] = 1
    rows_NV /= largest_N[:, None]
    scales_N = largest_N.astype(np.float64)
    return np.asarray((rows_NV @ rows_NV.T) * np.outer(scales_N, scales_N), np.float64)


def _limits(offers: Sequence[Offer], norms: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """The largest norm that each offer may keep."""
    by_size = [norm / size for norm, size in zip(norms, sizes, strict=True)]
    of_round = _median_of_positive(by_size)
    limits = []
    for offer, size in zip(offers, sizes, strict=True):
        group = [by_size[i] for i in _compared_with(offer, offers)]
        limit = of_round
        if len(group) >= MIN_COMPARED:
            limit = min(_median_of_positive(group), MAX_SPARSE_NORM_RATIO * of_round)
        limits.append(limit * size)
    return limits


def _usual(offers: Sequence[Offer], agreements: Sequence[float]) -> list[float]:
    """The agreement that is usual for each offer; 0 where too few are alike to say."""
    usual = []
    for offer in offers:
        group = [agreements[i] for i in _compared_with(offer, offers)]
        usual.append(max(0.0, statistics.median_low(group)) if len(group) >= MIN_COMPARED else 0.0)
    return usual


def _compared_with(offer: Offer, offers: Sequence[Offer]) -> list[int]:
    """Those whose norms and cosines say what is usual for this one: the dense ones, or its own sparse rung."""
    if not offer.is_sparse:
        return [i for i, other in enumerate(offers) if not other.is_sparse]
    return [i for i, other in enumerate(offers) if other.is_sparse and other.rung == offer.rung]


def _steps(num_values: int, num_rows: int) -> Iterator[tuple[int, int]]:
    """Whole slices, so many at once that all rows of a step are about a megabyte: more would leave the cache."""
    step = SLICE_VALUES * max(1, SLICES_AT_ONCE // num_rows)
    return itertools.pairwise([*range(0, num_values, step), num_values])


def _median_of_positive(values: Sequence[float]) -> float:
    return statistics.median_low([value for value in values if value > 0] or [0.0])
