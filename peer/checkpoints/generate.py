"""Text from a checkpoint: what a researcher, or a curious volunteer, asks of it first.

Decides how the next token is drawn and when text is handed out. Leaves checking the folder to `peer.checkpoints.verify`
and the model itself to ``transformers``, which opens the folder as it would any other, without network and without
foreign code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer.checkpoints.verify import KnownOf, knows_nothing, verify_folder
from peer.training.device import choose
from swarm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 1_000_000
MAX_PROMPT_CHARACTERS = 10_000_000
MAX_HELD_TOKENS = 16  # longest wait for the rest of a character
_UNFINISHED = "�"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How to draw. ``temperature`` 0 always takes the likeliest token; ``seed`` None draws anew each time.

    ``top_k`` 0 draws among all tokens that ``top_p`` leaves.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = None
    device: str = "auto"
    run_id: bytes | None = None
    known_of: KnownOf = knows_nothing
    verify: bool = True

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("max-tokens", self.max_tokens, 1 <= self.max_tokens <= MAX_TOKENS, f"from 1 to {MAX_TOKENS}"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "from 0 to 100"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top-k", self.top_k, 0 <= self.top_k <= MAX_TOKENS, f"from 0 to {MAX_TOKENS}"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        ):
            if not fits or (isinstance(value, float) and math.isnan(value)):
                raise ConfigError(f"{name} must be {wanted}, not {value}")


def generate(folder: Path, prompt: str, options: GenerateOptions) -> Iterator[str]:
    """Text that follows ``prompt``, piece by piece, until the model ends it, or max_tokens or its context is full.

    Raises `VerificationError` before anything is loaded from a damaged folder, `DataError` where the folder holds no
    model that can be opened, `DeviceError`, and `ConfigError` for a prompt longer than the model's context.
    """
    if options.verify:
        verify_folder(folder, options.run_id, known_of=options.known_of).require_ok()
    device = choose(options.device)
    model, tokenizer = open_checkpoint(folder)
    tokens = tokenizer.encode(prompt) or [tokenizer.bos_token_id]
    context_tokens = int(getattr(model.config, "max_position_embeddings", MAX_TOKENS))
    if len(tokens) >= context_tokens:
        raise ConfigError(
            f"the prompt has {len(tokens)} tokens and the model reads {context_tokens}", "shorten the prompt"
        )
    num_new = min(options.max_tokens, context_tokens - len(tokens))
    yield from _decoded(tokenizer, tokens[-MAX_HELD_TOKENS:], draw_tokens(model.to(device), tokens, num_new, options))


def open_checkpoint(folder: Path) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer) from local files only. Raises `DataError`."""
    import transformers

    # Loading bars belong to transformers, not to a command whose output is text.
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{folder} holds no model that can be opened: {reason}", "name the folder that swarm download printed"
        ) from error
    return model.eval(), tokenizer


def draw_tokens(model: Any, tokens: list[int], num_new: int, options: GenerateOptions) -> Iterator[int]:
    """Up to ``num_new`` token ids; ends with the model's end-of-text, which is not among them."""
    import torch

    generator = torch.Generator()
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    end_of_text = model.generation_config.eos_token_id
    ends = set(end_of_text) if isinstance(end_of_text, list) else {end_of_text}
    cache = None
    ids_BT = torch.tensor([tokens], device=model.device)
    for _ in range(num_new):
        with torch.inference_mode():
            output = model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # The draw is made on the CPU so that one seed gives one text on every device with equal logits.
        token = draw(output.logits[0, -1].float().cpu(), options, generator)
        if token in ends:
            return
        yield token
        ids_BT = torch.tensor([[token]], device=model.device)


def draw(logits_V: torch.Tensor, options: GenerateOptions, generator: torch.Generator) -> int:
    """A token id from the smallest set of likeliest tokens whose probability reaches ``top_p`` (arXiv 1904.09751).

    Where ``top_k`` is above 0, from its ``top_k`` likeliest.
    """
    import torch

    if options.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V, order_V = torch.softmax(logits_V / options.temperature, dim=-1).sort(descending=True, stable=True)
    if options.top_k:
        probabilities_V[options.top_k :] = 0
        probabilities_V = probabilities_V / probabilities_V.sum()
    before_V = probabilities_V.cumsum(-1) - probabilities_V
    kept_V = probabilities_V * (before_V < options.top_p)
    if not torch.isfinite(kept_V).all():
        raise DataError("the model's output is not finite", "the checkpoint is unusable; try another round")
    return int(order_V[torch.multinomial(kept_V, 1, generator=generator)])


def _decoded(tokenizer: Any, before: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """Text as soon as its characters are whole: a character may be spread over several byte-level tokens.

    Each piece is decoded behind the piece before it, because some tokenizers drop the space that starts a text.
    """
    held: list[int] = []
    for token in tokens:
        held.append(token)
        piece = _text_behind(tokenizer, before, held)
        if not piece.endswith(_UNFINISHED) or len(held) >= MAX_HELD_TOKENS:
            before, held = held, []
            yield piece
    if held:
        yield _text_behind(tokenizer, before, held)


def _text_behind(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    known = tokenizer.decode(before, skip_special_tokens=True)
    return str(tokenizer.decode([*before, *tokens], skip_special_tokens=True)[len(known) :])
