"""Modules whose weight is an 8-bit matrix: linear and embedding layers, and the loss at the head.

Decides how the gradient of a matrix that exists only in 8 bits is made during the backward pass: weights are
dequantised, used and dropped, once in the forward and once in the backward pass. Leaves what happens to a gradient to
`peer.training.int8_matrix`, and which modules of a model these stand in for to `peer.training.int8_replica`.

Shapes: N tokens (all leading dimensions together), I inputs, O outputs, V words.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peer.training.int8_matrix import Int8Matrix
from peer.training.movement import BLOCK_VALUES

# Values of logits that exist at once (fp32), by device: 64 MiB; 256 MiB where a kernel wants more to be busy.
LOGIT_VALUES = {"cpu": 1 << 24}
LOGIT_VALUES_ELSEWHERE = 1 << 26


class Int8Linear(nn.Module):
    """In place of `nn.Linear`: weight in 8 bits, bias (if any) an fp32 parameter."""

    def __init__(self, matrix: Int8Matrix, bias: nn.Parameter | None, compute: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.bias, self.compute = matrix, bias, compute
        self.in_features, self.out_features = matrix.columns, matrix.rows
        matrix.num_uses += 1

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute)
        result: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            hidden.to(self.compute), bias, self.matrix.pulse, self.matrix
        )
        return result


class Int8Embedding(nn.Module):
    """In place of `nn.Embedding`."""

    def __init__(self, matrix: Int8Matrix, padding_id: int | None) -> None:
        super().__init__()
        self.matrix, self.padding_id = matrix, padding_id
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.columns
        matrix.num_uses += 1

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _Embedding.apply(  # type: ignore[no-untyped-call]
            ids, self.matrix.pulse, self.matrix, self.padding_id
        )
        return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, bias: torch.Tensor | None, pulse: torch.Tensor, matrix: Int8Matrix
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.matrix, ctx.has_bias = matrix, bias is not None
        tiles = list(matrix.row_tiles())
        if len(tiles) == 1:
            return F.linear(hidden, matrix.weights(0, matrix.rows, hidden.dtype), bias)
        result = hidden.new_empty((*hidden.shape[:-1], matrix.rows))
        for first, last in tiles:
            part = None if bias is None else bias[first:last]
            result[..., first:last] = F.linear(hidden, matrix.weights(first, last, hidden.dtype), part)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        matrix: Int8Matrix = ctx.matrix
        gradient_NO = gradients[0].reshape(-1, matrix.rows)
        hidden_NI = hidden.reshape(-1, matrix.columns)
        for_hidden = None
        if ctx.needs_input_grad[0]:
            for_hidden = _times_weights(gradient_NO, matrix).view(hidden.shape)
        for_bias = gradient_NO.sum(0) if ctx.has_bias else None
        # Last, as it may change the weights.
        if matrix.is_expecting:
            _give_product(matrix, gradient_NO, hidden_NI)
        return for_hidden, for_bias, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, pulse: torch.Tensor, matrix: Int8Matrix, padding_id: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.matrix, ctx.padding_id = matrix, padding_id
        return lookup(matrix, ids)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        matrix: Int8Matrix = ctx.matrix
        if matrix.is_expecting:
            rows, places = torch.unique(ids, return_inverse=True)
            gradient = gradients[0].reshape(-1, matrix.columns)
            # Sums the gradients of equal words in a fixed order, on every device.
            summed = torch.ops.aten.embedding_dense_backward(gradient, places.view(-1), len(rows), -1, False)
            if ctx.padding_id is not None:
                summed[rows == ctx.padding_id] = 0
            matrix.add_rows(rows, summed)
        return None, None, None, None


def lookup(matrix: Int8Matrix, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` of ``matrix`` in fp32, [..., columns]; only these are dequantised."""
    if matrix.held is not None:
        return matrix.held[ids.to("cpu")].to(matrix.device)
    rows = matrix.codes.view(matrix.rows, matrix.columns)[ids].float()
    places = ids.unsqueeze(-1) * matrix.columns + torch.arange(matrix.columns, device=ids.device)
    return rows.mul_(matrix.scales[places.div_(BLOCK_VALUES, rounding_mode="floor")])


def cross_entropy(
    head: Int8Linear, hidden_NI: torch.Tensor, targets_N: torch.Tensor, weight: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of the cross entropies in nats, and, with ``weight``, the gradient of ``weight`` * sum for ``hidden_NI``.

    With a weight the head's matrix and bias receive their gradients too, so nothing else of the head needs a backward
    pass. Logits exist for a few tokens at a time and are made in vocabulary tiles: never all together, and never
    beside the whole matrix. At the first loss that is not finite it ends; there is no gradient then, unless some of the
    head's was taken in before.
    """
    hidden_NI = hidden_NI.to(head.compute)
    total = torch.zeros((), device=hidden_NI.device)
    for_hidden = None if weight is None else torch.empty_like(hidden_NI)
    rows = max(1, LOGIT_VALUES.get(hidden_NI.device.type, LOGIT_VALUES_ELSEWHERE) // head.out_features)
    for first in range(0, len(hidden_NI), rows):
        span = slice(first, first + rows)
        logits_NV = _logits(head, hidden_NI[span])
        total += _exponentials_(logits_NV, targets_N[span])
        if weight is not None and for_hidden is not None:
            if not math.isfinite(total.item() * weight):
                return total, for_hidden if first else None
            _to_gradient_(logits_NV, targets_N[span], weight)
            for_hidden[span] = _head_backward(head, logits_NV, hidden_NI[span])
    if weight is not None and head.matrix.is_expecting:
        head.matrix.added()
    return total, for_hidden


def _logits(head: Int8Linear, hidden_NI: torch.Tensor) -> torch.Tensor:
    logits_NV = torch.empty((len(hidden_NI), head.out_features), device=hidden_NI.device)
    for first, last in head.matrix.tiles(head.matrix.tile_values):
        bias = None if head.bias is None else head.bias[first:last].to(head.compute)
        logits_NV[:, first:last] = F.linear(hidden_NI, head.matrix.weights(first, last, head.compute), bias)
    return logits_NV


def _exponentials_(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Turn logits into exp(logit - largest), in place, and give the sum of the cross entropies."""
    logits_NV.sub_(logits_NV.amax(1, keepdim=True))
    chosen_N = logits_NV.gather(1, targets_N[:, None]).squeeze(1)
    return (logits_NV.exp_().sum(1).log_() - chosen_N).sum()


def _to_gradient_(exponentials_NV: torch.Tensor, targets_N: torch.Tensor, weight: float) -> None:
    """Turn exponentials into the gradient of ``weight`` * cross entropy for the logits, in place."""
    exponentials_NV.mul_(weight / exponentials_NV.sum(1, keepdim=True))
    minus = torch.full((len(targets_N), 1), -weight, device=targets_N.device)
    exponentials_NV.scatter_add_(1, targets_N[:, None], minus)


def _head_backward(head: Int8Linear, gradient_NV: torch.Tensor, hidden_NI: torch.Tensor) -> torch.Tensor:
    matrix = head.matrix
    if head.bias is not None:
        summed = gradient_NV.sum(0)
        head.bias.grad = summed if head.bias.grad is None else head.bias.grad.add_(summed)
    for_hidden = torch.zeros(hidden_NI.shape, device=hidden_NI.device)
    for first, last in matrix.tiles(matrix.tile_values):
        part_NO = gradient_NV[:, first:last].to(head.compute)
        for_hidden += part_NO @ matrix.weights(first, last, head.compute)
        if matrix.is_expecting:
            matrix.buffer()[first:last] += (part_NO.t() @ hidden_NI).to(torch.bfloat16)
    return for_hidden


def _times_weights(gradient_NO: torch.Tensor, matrix: Int8Matrix) -> torch.Tensor:
    """``gradient @ weights``, [N, I]."""
    tiles = list(matrix.row_tiles())
    if len(tiles) == 1:
        return gradient_NO @ matrix.weights(0, matrix.rows, gradient_NO.dtype)
    result = gradient_NO.new_zeros((len(gradient_NO), matrix.columns), dtype=torch.float32)
    for first, last in tiles:
        result += gradient_NO[:, first:last] @ matrix.weights(first, last, gradient_NO.dtype)
    return result.to(gradient_NO.dtype)


def _give_product(matrix: Int8Matrix, gradient_NO: torch.Tensor, hidden_NI: torch.Tensor) -> None:
    """Hand ``gradient.T @ hidden`` to the matrix; where it is large, tile by tile."""
    tiles = list(matrix.row_tiles())
    if len(tiles) == 1:
        matrix.add(gradient_NO.t() @ hidden_NI)
        return
    for first, last in tiles:
        matrix.buffer()[first:last] += (gradient_NO[:, first:last].t() @ hidden_NI).to(torch.bfloat16)
    matrix.added()
