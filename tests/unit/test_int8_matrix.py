"""8-bit matrices of any shape: no seams between tiles, values come back, what is not finite is an error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.training import int8_matrix
from peer.training.int8_matrix import Int8Matrix
from peer.training.movement import BLOCK_VALUES
from swarm.errors import SwarmError
from swarm.run_spec import Inner

CPU = torch.device("cpu")
shapes = st.tuples(st.integers(1, 70), st.integers(1, 300))


def written(shape: tuple[int, int], values: np.ndarray) -> Int8Matrix:
    """A matrix that was given ``values`` in row tiles of about a thousand values, rounded to the nearest."""
    matrix = Int8Matrix(shape, Inner(), CPU)
    for first, last in matrix.tiles(1024):
        matrix.write(first, torch.from_numpy(values[first:last].copy()), None)
    return matrix


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), st.integers(1, 5000))
def test_tiles_cover_a_matrix_of_any_shape_without_a_seam(shape: tuple[int, int], seed: int, size: int) -> None:
    """Written tile by tile and read by other tiles, it is the matrix that was written and read at once."""
    spread = np.random.default_rng(seed)
    values = (spread.standard_normal(shape) * 10.0 ** spread.integers(-30, 30, (shape[0], 1))).astype(np.float32)
    matrix, whole = written(shape, values), Int8Matrix(shape, Inner(), CPU)
    whole.write(0, torch.from_numpy(values.copy()), None)
    assert torch.equal(matrix.codes, whole.codes) and torch.equal(matrix.scales, whole.scales)
    tiles = list(matrix.tiles(size))
    assert [first for first, _ in tiles] == [0, *(last for _, last in tiles[:-1])] and tiles[-1][1] == shape[0]
    assert torch.equal(torch.cat([matrix.weights(*tile) for tile in tiles]), whole.weights(0, shape[0]))
    flat = np.abs(values.reshape(-1))
    blocks = np.maximum.reduceat(flat, np.arange(0, len(flat), BLOCK_VALUES))
    allowed = np.repeat(blocks, BLOCK_VALUES)[: len(flat)] * (0.5 / 127 + 1e-6) + 1e-36
    assert (np.abs(matrix.weights(0, shape[0]).numpy().reshape(-1) - values.reshape(-1)) <= allowed).all()


@settings(max_examples=40, deadline=None)
@given(shapes, st.data(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_value_that_is_not_finite_is_an_error_in_any_place(
    shape: tuple[int, int], data: st.DataObject, wrong: float
) -> None:
    values = np.ones(shape, np.float32)
    place = data.draw(st.integers(0, values.size - 1))
    values.reshape(-1)[place] = wrong
    with pytest.raises(SwarmError, match="not finite"):
        written(shape, values)


@pytest.mark.parametrize("shape", [(72, 24), (61, 16), (7, 300), (1, 1)])
def test_a_matrix_of_moderate_size_is_worked_on_as_a_whole(shape: tuple[int, int]) -> None:
    """Also where its rows are no multiple of those that begin with a block: its gradient is never rounded to bf16."""
    assert list(Int8Matrix(shape, Inner(), CPU).row_tiles()) == [(0, shape[0])]


def test_a_large_matrix_is_worked_on_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_matrix, "WHOLE_VALUES", 1000)
    monkeypatch.setattr(int8_matrix, "TILE_VALUES", 512)
    assert list(Int8Matrix((40, 26), Inner(), CPU).row_tiles()) == [(0, 40)]  # blocks begin with every 128th row
    assert list(Int8Matrix((40, 32), Inner(), CPU).row_tiles()) == [(0, 16), (16, 32), (32, 40)]
