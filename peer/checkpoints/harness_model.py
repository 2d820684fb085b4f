"""A checkpoint as lm-evaluation-harness asks a model: likelihoods of continuations, and text until a stop.

Decides batches and windows; a door to ``lm_eval``, whose `TemplateLM` is made to be subclassed, and to ``torch``. The
harness's own wrapper of transformers is not used: it wants accelerate, and places the model itself. Leaves tasks and
metrics to the harness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from peer.checkpoints.generate import GenerateOptions, draw_tokens
from swarm.errors import DataError

MAX_GENERATED_TOKENS = 256  # the harness's own default

Scored = tuple[tuple[str, str], list[int], list[int]]
"""((context, continuation), token ids of the context, of the continuation)"""
OnProgress = Callable[[int, str, str], AbstractContextManager[Callable[[int], object]]]
"""(total, unit, what) -> a context whose function is called as work is done"""


class CheckpointModel(TemplateLM):  # type: ignore[misc]  # the library is untyped
    def __init__(self, model: Any, tokenizer: Any, batch_size: int, on_progress: OnProgress) -> None:
        super().__init__()
        self._model, self.tokenizer, self._batch_size, self._on_progress = model, tokenizer, batch_size, on_progress
        self._device = model.device
        self.max_length = int(getattr(model.config, "max_position_embeddings", 2048))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        # The run's tokenizers add nothing by themselves; training never saw anything but end-of-text between texts.
        return cast(list[int], self.tokenizer.encode(string, add_special_tokens=False))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted once, with as much context as the model reads."""
        scored: list[Scored] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, windows):
                scored.append((("", ""), context, continuation))
                owners.append(place)
        sums = [0.0] * len(requests)
        for place, (value, _) in zip(owners, self._loglikelihood_tokens(scored), strict=True):
            sums[place] += value
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **_: Any) -> list[tuple[float, bool]]:
        """(sum of log probabilities, whether each token was the likeliest) of every continuation, longest first."""
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place][1]) - len(requests[place][2]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self._on_progress(len(order), "requests", "likelihoods") as advance:
            for start in range(0, len(order), self._batch_size):
                places = order[start : start + self._batch_size]
                for place, score in zip(places, self._score([requests[place] for place in places]), strict=True):
                    found[place] = score
                advance(len(places))
        return found

    def _score(self, batch: Sequence[Scored]) -> Iterator[tuple[float, bool]]:
        # The last token is only predicted; what does not fit is cut off at the front.
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in batch]
        longest = max(len(row) - 1 for row in rows)
        ids_BT = torch.zeros((len(rows), longest), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for place, row in enumerate(rows):
            ids_BT[place, : len(row) - 1] = torch.tensor(row[:-1])
            mask_BT[place, : len(row) - 1] = 1
        with torch.inference_mode():
            logits_BTV = self._model(
                input_ids=ids_BT.to(self._device), attention_mask=mask_BT.to(self._device), use_cache=False
            ).logits
            for place, (row, (_, _, continuation)) in enumerate(zip(rows, batch, strict=True)):
                count = min(len(continuation), len(row) - 1)
                end = len(row) - 1
                log_NV = torch.log_softmax(logits_BTV[place, end - count : end].float(), dim=-1)
                targets_N = torch.tensor(row[len(row) - count :], device=log_NV.device)
                total = log_NV.gather(1, targets_N[:, None]).double().sum()
                yield float(total), bool((log_NV.argmax(-1) == targets_N).all())

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text that follows each context, up to the first stop of the request.

        Raises `DataError` before anything is drawn where a task wants as many tokens as the model reads, or more.
        """
        for request in requests:
            self._refuse_without_prompt(request)
        texts = []
        with self._on_progress(len(requests), "requests", "texts") as advance:
            for request in requests:
                context, wishes = request.args
                texts.append(self._until(context, dict(wishes)))
                advance(1)
        return texts

    def _refuse_without_prompt(self, request: Any) -> None:
        # No room is left for the question then: what would be scored is no answer to it.
        most = _max_generated(request.args[1])
        if most >= self.max_length:
            raise DataError(
                f"the task {request.task_name} wants up to {most} tokens (max_gen_toks) of a model that reads "
                f"{self.max_length} in all",
                "leave the task out, or copy its file and lower max_gen_toks there",
            )

    def _until(self, context: str, wishes: dict[str, Any]) -> str:
        stops = wishes.get("until") or []
        stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
        most = _max_generated(wishes)
        sampled = bool(wishes.get("do_sample"))
        options = GenerateOptions(
            temperature=float(wishes.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(wishes.get("top_p", 1.0)),
            seed=torch.initial_seed() % 2**63,
        )
        prompt = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        drawn: list[int] = []
        text = ""
        for token in draw_tokens(self._model, prompt, most, options):
            drawn.append(token)
            text = str(self.tokenizer.decode(drawn, skip_special_tokens=True))
            if any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.split(stop)[0]
        return text


def _max_generated(wishes: Mapping[str, Any]) -> int:
    return int(wishes.get("max_gen_toks", MAX_GENERATED_TOKENS))
