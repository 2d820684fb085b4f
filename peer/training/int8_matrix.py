"""One matrix of an 8-bit replica: int8 weights, AdamW moments, and its gradient while there is one.

Decides when a matrix is updated (the moment that its last gradient of an inner step is there, so that full gradients
never exist together), how its gradient is clipped, and the row tiles that bound what exists in fp32. Leaves arithmetic
to `peer.training.quantized` and `peer.training.inner_optimizer`, and where gradients come from to
`peer.training.int8_modules`.

Clipping goes by the norm of the gradient as far as it is known (`peer.training.clipping`), so that nobody waits for the
whole. A gradient that is not finite changes nothing but the step's verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from peer.training import quantized
from peer.training.clipping import NormSoFar, scale
from peer.training.dither import Dither
from peer.training.inner_optimizer import Moments, Update
from peer.training.movement import BLOCK_VALUES
from swarm.run_spec import Inner

# A matrix up to this size is worked on as a whole, a larger one in row tiles.
WHOLE_VALUES = 1 << 22
# What is in fp32 at once in a row tile, and in an update. On the CPU an update is 70 small operations: with fewer
# values starting them costs more than the work (2**14: 19 ns per value, 2**17: 6.5), with more they leave the cache.
TILE_VALUES = 1 << 19
UPDATE_VALUES = {"cpu": 1 << 17}
UPDATE_VALUES_ELSEWHERE = 1 << 20

_GradientOf = Callable[[int, int], torch.Tensor]
"""(first row, last row) -> that part of the gradient, fp32"""


@dataclass(slots=True)
class InnerStep:
    """One inner step as all matrices see it, and what they report."""

    learning_rate: float
    inner: Inner
    num_microbatches: int
    dither: Dither
    norm: NormSoFar = field(default_factory=NormSoFar)
    squared_norms: list[float] = field(default_factory=list)
    num_skipped: int = 0
    """matrices whose gradient was not finite"""


class Int8Matrix:
    def __init__(self, shape: tuple[int, ...], inner: Inner, device: torch.device) -> None:
        """Zeros. Dimensions after the first are columns."""
        self.shape = shape
        self.rows, self.columns = shape[0], math.prod(shape[1:])
        self.num_values = self.rows * self.columns
        self.codes = torch.zeros(self.num_values, dtype=torch.int8, device=device)
        self.scales = torch.zeros(quantized.num_blocks(self.num_values), device=device)
        self.moments = Moments(self.num_values, inner, device)
        self.usual_share = 1.0
        """of the whole gradient's squared norm"""
        self.squared_norm = 0.0
        """of the last gradient, before clipping"""
        self.num_uses = 0
        """modules that hold it: as many gradients come from each microbatch"""
        self.held: torch.Tensor | None = None
        """exact weights on the host [rows, columns] that stand in for the codes during an evaluation"""
        self.is_muted = False
        """gradients that come are those of no step"""
        # For an operation whose only input with a gradient would be this matrix.
        self.pulse = torch.zeros(0, device=device, requires_grad=True)
        self._step: InnerStep | None = None
        self._gradients_left = 0
        self._gradient: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def tensors(self) -> list[torch.Tensor]:
        """All that is kept on the device between steps."""
        return [self.codes, self.scales, *self.moments.tensors()]

    def tiles(self, max_values: int) -> Iterator[tuple[int, int]]:
        """Row ranges of about ``max_values`` values, each beginning at the beginning of a block."""
        step = BLOCK_VALUES // math.gcd(self.columns, BLOCK_VALUES)
        rows = max(step, max_values // self.columns // step * step)
        for first in range(0, self.rows, rows):
            yield first, min(first + rows, self.rows)

    @property
    def tile_values(self) -> int:
        """Of a row tile: where starting a kernel costs more than its work on a small tile, tiles are larger."""
        return TILE_VALUES if self.device.type == "cpu" else 4 * TILE_VALUES

    def row_tiles(self) -> Iterator[tuple[int, int]]:
        """The whole matrix, or tiles of it where it is large."""
        return self.tiles(self.tile_values) if self.num_values > WHOLE_VALUES else iter([(0, self.rows)])

    def weights(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows [first, last) as a fresh matrix; ``first`` comes from `tiles`."""
        if self.held is not None:
            return self.held[first:last].to(self.device, dtype)
        values = slice(first * self.columns, last * self.columns)
        return quantized.dequantise(self.codes[values], self.scales[self._blocks(values)], dtype).view(-1, self.columns)

    def write(self, first: int, weights: torch.Tensor, noise: torch.Tensor | None) -> None:
        """Quantise ``weights`` (fp32 [rows, columns], contiguous, destroyed) into the rows from ``first`` on."""
        values = slice(first * self.columns, first * self.columns + weights.numel())
        quantized.quantise_(weights.view(-1), self.codes[values], self.scales[self._blocks(values)], noise)

    def begin(self, step: InnerStep) -> None:
        """Expect the gradients of ``step``; what an unfinished step left behind is dropped."""
        self._step, self._gradient = step, None
        self._gradients_left = self.num_uses * step.num_microbatches

    def end(self) -> None:
        self._step, self._gradient, self._gradients_left = None, None, 0

    @property
    def is_expecting(self) -> bool:
        """Whether the step in progress still wants gradients. Not after an update: a repeated backward is ignored."""
        return self._gradients_left > 0 and not self.is_muted

    def buffer(self) -> torch.Tensor:
        """The gradient so far, bf16 [rows, columns]: for those who add to it tile by tile; then `added`."""
        if self._gradient is None:
            self._gradient = torch.zeros((self.rows, self.columns), dtype=torch.bfloat16, device=self.device)
        return self._gradient

    def add(self, gradient: torch.Tensor) -> None:
        """One whole gradient [rows, columns]; where it is the only one, the update follows without a copy."""
        if self._gradients_left == 1 and self._gradient is None:
            self._gradient = gradient
        elif self._gradient is None:
            self._gradient = gradient.to(torch.bfloat16)
        else:
            self._gradient.add_(gradient)
        self.added()

    def added(self) -> None:
        """One gradient is complete; after the last of the step the matrix is updated and the gradient forgotten."""
        self._gradients_left -= 1
        if self._gradients_left == 0 and self._gradient is not None:
            gradient, self._gradient = self._gradient, None
            self._update(float(_norm(gradient)), lambda first, last: gradient[first:last].float())

    def finish(self, share: float) -> None:
        """Update with ``share`` times the gradients that came, though more were expected; not where none did."""
        if self._gradient is not None:
            gradient, self._gradient, self._gradients_left = self._gradient, None, 0
            self._update(share * float(_norm(gradient)), lambda first, last: gradient[first:last].float() * share)

    def add_rows(self, row_ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """One gradient that is zero but for the rows ``row_ids`` (ascending, each once)."""
        if self._gradients_left > 1 or self._gradient is not None:
            self.buffer().index_add_(0, row_ids, gradient.to(torch.bfloat16))
            self.added()
            return
        self._gradients_left = 0

        def dense(first: int, last: int) -> torch.Tensor:
            tile = torch.zeros((last - first, self.columns), device=self.device)
            low, high = torch.searchsorted(row_ids, torch.tensor([first, last], device=row_ids.device)).tolist()
            tile[row_ids[low:high] - first] = gradient[low:high].float()
            return tile

        self._update(float(_norm(gradient)), dense)

    def _update(self, norm: float, gradient_of: _GradientOf) -> None:
        step = self._step
        if step is None:
            return
        self.squared_norm = norm * norm
        step.squared_norms.append(self.squared_norm)
        if not math.isfinite(norm):
            step.num_skipped += 1
            return
        self.moments.step += 1
        update = Update(
            inner=step.inner,
            learning_rate=step.learning_rate,
            step=self.moments.step,
            gradient_scale=scale(step.norm.with_tensor(self.squared_norm, self.usual_share), step.inner.clip_norm),
        )
        for first, last in self.tiles(UPDATE_VALUES.get(self.device.type, UPDATE_VALUES_ELSEWHERE)):
            weights, gradient = self.weights(first, last), gradient_of(first, last)
            self.moments.update_(weights.view(-1), gradient.reshape(-1), first * self.columns, update)
            self.write(first, weights, step.dither.noise(weights.numel(), self.moments.step))

    def _blocks(self, values: slice) -> slice:
        return slice(values.start // BLOCK_VALUES, quantized.num_blocks(values.stop))


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """Frobenius norm in fp32; a gradient in bf16 is never in fp32 as a whole."""
    flat = gradient.reshape(-1)
    pieces = [flat] if gradient.dtype == torch.float32 else [flat[a : a + TILE_VALUES] for a in _starts(len(flat))]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.float()) for p in pieces]))
    return norm


def _starts(num_values: int) -> range:
    return range(0, num_values, TILE_VALUES)
