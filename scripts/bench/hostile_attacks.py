"""What hostile peers send: attacks on a round's average, as functions of what honest peers send.

Hostile peers know every honest contribution of the round, collude, and claim the highest weight that is admitted.
Decides the attacks alone; `hostile` decides who attacks when, and measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from peer.rounds.codec import Float32

Craft = Callable[["Known"], Float32 | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a hostile peer builds its contribution from."""

    honest_HN: Float32
    """pseudo-gradients of the H honest peers"""
    index: int
    """which of the hostile peers it is"""
    random: np.random.Generator

    @property
    def own_N(self) -> Float32:
        """As if it had trained: what one of the honest peers learned."""
        own: Float32 = self.honest_HN[self.index % len(self.honest_HN)]
        return own


def scaled(factor: float) -> Craft:
    return lambda known: known.own_N * np.float32(factor)


def random_values(known: Known) -> Float32:
    """White noise, ten times as long as what an honest peer sends."""
    noise = known.random.standard_normal(known.honest_HN.shape[1]).astype(np.float32)
    length = 10 * np.linalg.norm(known.own_N) / np.linalg.norm(noise)
    return noise * np.float32(length)


def inner_product(known: Known) -> Float32:
    """Against the honest mean, and as long as an honest contribution (Xie et al., arXiv 1903.03936)."""
    mean_N = known.honest_HN.mean(axis=0)
    length = np.linalg.norm(known.own_N) / np.linalg.norm(mean_N)
    return mean_N * np.float32(-length)


def a_little_is_enough(known: Known) -> Float32:
    """Off the honest mean by 1.5 standard deviations in every coordinate (Baruch et al., arXiv 1902.06156).

    1.5 is what they use; for ten peers their formula allows less than 0.5, which costs less.
    """
    return known.honest_HN.mean(axis=0) - np.float32(1.5) * known.honest_HN.std(axis=0)


ATTACKS: dict[str, Craft] = {
    "nan": lambda known: None,
    "x1000": scaled(1000),
    "flip": scaled(-1),
    "flip x10": scaled(-10),
    "one flip, colluding": lambda known: -known.honest_HN[0],
    "random": random_values,
    "inner product": inner_product,
    "a little is enough": a_little_is_enough,
}
"""Attacks by name; None stands for bytes that are no numbers."""
