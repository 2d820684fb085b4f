"""Noise for stochastic rounding, and noise whose errors cancel from step to step.

Decides what is added to a value before it is rounded to the nearest code: one of 2**15 odd multiples of 2**-16 between
-1/2 and 1/2. Leaves rounding to `peer.training.quantized`.

`random_noise` is drawn afresh: each number as likely as the others. Rounding errors of many steps then add up like a
random walk: after n steps that each move a weight by a fraction f of a code, its error is sqrt(n f (1 - f)) codes.
`Dither` draws one random number per value, once, and moves on by the golden ratio (modulo 1) at every step. A weight's
numbers are as likely as before, so rounding is as right on average; but of n consecutive ones the count within any
interval is right to within a few (the sequence with the lowest discrepancy: Niederreiter 1992, chapter 3). So what one
step rounds too far the next ones take back, and the error stays within about a code however many steps there are.
"""

from __future__ import annotations

import torch

# 2**16 / golden ratio, as twice an odd number: odd numbers stay odd, and each has its turn.
STRIDE = 40502
# Values that share one table; matrices and their tiles all begin at its beginning.
TABLE_VALUES = 1 << 17


def random_noise(num_values: int, generator: torch.Generator) -> torch.Tensor:
    """Odd int16 [n], each of the 2**15 equally likely. One draw of 64 bits makes four: drawing is what costs."""
    draws = torch.empty(-(-num_values // 4), dtype=torch.int64, device=generator.device)
    return draws.random_(-(2**63), None, generator=generator).view(torch.int16)[:num_values].bitwise_or_(1)


class Dither:
    def __init__(self, generator: torch.Generator) -> None:
        """256 KiB on the generator's device."""
        self.table = random_noise(TABLE_VALUES, generator)

    def noise(self, num_values: int, step: int) -> torch.Tensor:
        """Odd int16 [n] for the ``step``-th rounding of these values."""
        repeats = -(-num_values // TABLE_VALUES)
        table = self.table.repeat(repeats) if repeats > 1 else self.table
        moved = STRIDE * step % 2**16
        return table[:num_values] + (moved if moved < 2**15 else moved - 2**16)  # modulo 2**16, as int16 adds
