"""The door to `tokenizers`: train a byte-level BPE or load an existing ``tokenizer.json``, and encode text.

Decides the kind of tokenizer that a run trains (GPT-2's byte-level BPE, so every text has tokens and decodes to
itself) and which token ends a document. Leaves which documents it sees to `coordinator.data_prepare`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.errors import DataError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and end-of-text
MAX_TOKENIZER_BYTES = 64 << 20
# What the families that a run can train call the end of a document.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """``raw``: the bytes of ``tokenizer.json``. ``vocab_size``: one more than the highest id."""

    raw: bytes
    vocab_size: int
    end_of_text_id: int
    _library: Any

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, computed on all cores. Text never becomes a special token."""
        return [found.ids for found in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        return str(self._library.decode(list(ids), skip_special_tokens=False))


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with at most ``vocab_size`` tokens (fewer where the text is small); same texts, same bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return parse(str(library.to_str(pretty=True)).encode(), "the trained tokenizer")


def load(path: Path) -> Tokenizer:
    """The tokenizer in the file ``path``. Raises `DataError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}", "name a tokenizer.json") from error
    return parse(raw, str(path))


def parse(raw: bytes, where: str) -> Tokenizer:
    """The tokenizer in the bytes of a ``tokenizer.json``; ``where`` names them in errors. Raises `DataError`."""
    import tokenizers

    advice = "name the tokenizer.json of a Hugging Face tokenizer"
    if len(raw) > MAX_TOKENIZER_BYTES:
        raise DataError(f"{where} is larger than {MAX_TOKENIZER_BYTES} bytes", advice)
    try:
        library = tokenizers.Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{where} is not a tokenizer.json: {str(error)[:200]}", advice) from error
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
    for name in _END_OF_TEXT_NAMES:
        if name in vocabulary:
            return Tokenizer(raw, max(vocabulary.values()) + 1, vocabulary[name], library)
    raise DataError(f"{where} has no end-of-text token (one of {', '.join(_END_OF_TEXT_NAMES)})", advice)
