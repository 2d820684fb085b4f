"""What benchmarks of an inner step share: the model, the rivals, and the 8-bit replica, each as a function that steps.

Decides shapes and settings, the same for all sides. Leaves what is measured to the scripts beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from peer.training.inner_optimizer import build_optimizer
from peer.training.int8_replica import Int8Replica
from peer.training.model import layout_of
from swarm.run_spec import Inner

LEARNING_RATE = 1e-4
SIDES = ("int8 replica", "fp32 AdamW", "bf16 AdamW8bit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A LLaMA model; embedding and head are untied unless ``tied``."""

    hidden: int = 768
    inner: int = 2048
    layers: int = 12
    heads: int = 12
    vocab: int = 32000
    positions: int = 1024
    tied: bool = False


QUICK = Shape(hidden=256, inner=640, layers=2, heads=4, vocab=4096)
# 42 M parameters: a curve over batch sizes in minutes on two cores.
MIDDLE = Shape(hidden=512, inner=1408, layers=8, heads=8, vocab=16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to train: ``step`` makes an inner step on tokens [B, L+1]; ``kept`` lists what stays in memory."""

    name: str
    step: Callable[[np.ndarray], float]
    kept: Callable[[], list[torch.Tensor]]
    num_matrix_values: int


def build_model(shape: Shape) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    built: torch.nn.Module = LlamaForCausalLM(config)
    return built


def build_side(name: str, shape: Shape, device: torch.device) -> Side:
    model = build_model(shape)
    num_matrix_values = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    if name == "int8 replica":
        replica = Int8Replica(model, layout_of(model), Inner(), device)
        return Side(
            name=name,
            step=lambda tokens: replica.step(tokens, LEARNING_RATE).loss,
            kept=replica.persistent_tensors,
            num_matrix_values=num_matrix_values,
        )
    return _rival(name, model, device, num_matrix_values)


def _rival(name: str, model: Any, device: torch.device, num_matrix_values: int) -> Side:
    """Plain transformers: logits at once, backward, clip, one optimizer step."""
    in_bf16 = name == "bf16 AdamW8bit"
    model = model.to(device, torch.bfloat16 if in_bf16 else torch.float32).train()
    parameters = list(model.parameters())
    inner = Inner(optimizer="adamw8bit" if in_bf16 else "adamw")
    optimizer = build_optimizer(parameters, inner, device)
    compute_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()

    def step(tokens: np.ndarray) -> float:
        batch = torch.from_numpy(tokens).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute_bf16 and not in_bf16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, inner.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def kept() -> list[torch.Tensor]:
        state = [value for values in optimizer.state.values() for value in values.values()]
        return [*parameters, *(value for value in state if isinstance(value, torch.Tensor))]

    return Side(name=name, step=step, kept=kept, num_matrix_values=num_matrix_values)


def random_tokens(shape: Shape, sequences: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape.vocab, (sequences, length + 1))


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Of their memory, shared memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
