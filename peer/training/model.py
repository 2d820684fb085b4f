"""The model: from a run spec to a PyTorch module, whole or of a span. The one door to transformers.

Decides which config keys of each family a spec may set, what is fixed for every run (no dropout; special tokens only
where the spec names them; embedding and head untied where there is more than one shard), and what a checkpoint's
``config.json`` holds. Leaves cutting to `peer.training.span`, families to `swarm.families`, parameters as a
vector to `peer.training.layout`, training to `peer.training.fp32_replica`, files to `peer.checkpoints.checkpoint` and
`peer.training.pretrained`. Code from outside is never loaded.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peer.rounds.codec import Float32
from peer.training.layout import Layout
from swarm.errors import DataError, SpecError, SwarmError
from swarm.families import family_of
from swarm.memory_plan import ModelNumbers
from swarm.run_file import RunFile
from swarm.run_spec import RunSpec
from swarm.sharding import Span, whole

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Set by the run itself, by the family or by transformers: nothing that a spec could choose.
RESERVED_KEYS = frozenset({"vocab_size", "use_cache", "problem_type", "is_decoder", "pretraining_tp", "slow_but_exact"})
DEFAULT_ROPE = "default"
TRIAL_TOKENS = 4


def build_config(spec: RunSpec | RunFile, vocab_size: int) -> Any:
    """The family's config (a transformers ``PreTrainedConfig``) for this run, proven by a trial run without memory.

    ``vocab_size``: of the data; the embedding has more rows where the checkpoint that the run starts from does.
    Raises `SpecError` for an unknown family or key (with the near name), values that do not fit together, and a
    sequence that is longer than the model's positions.
    """
    family, values = spec.model.family, dict(spec.model.config)
    if isinstance(spec, RunSpec) and spec.base is not None:
        vocab_size = max(vocab_size, spec.base.vocab_size)
    config_class = _config_class(family)
    _check_keys(config_class, family, values)
    _fill_in(config_class, values)
    if spec.num_shards > 1:
        values["tie_word_embeddings"] = False
    for token in SPECIAL_TOKENS:
        _check_token(token, values.setdefault(token, None), vocab_size)
    try:
        config = config_class(vocab_size=vocab_size, **values)
        trial_run(config)
    except Exception as error:  # transformers checks values wherever they are first used, with any exception
        raise SpecError(
            f"model.config: {family} refuses these values: {_first_lines(error)}", "correct [model.config]"
        ) from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and spec.data.sequence_length > positions:
        raise SpecError(
            f"data.sequence_length {spec.data.sequence_length} exceeds the model's {positions} positions",
            "raise model.config.max_position_embeddings (n_positions for gptj) or shorten the sequences",
        )
    return config


def build_model(config: Any, seed: int) -> torch.nn.Module:
    """The whole model, fp32 on the CPU, with random weights that depend on ``seed`` alone (for one torch version)."""
    from peer.training import span as spans

    model = build_span(config, whole(config.num_hidden_layers))
    spans.materialise(model, spans.initial_values(model, seed))
    return model


def build_span(config: Any, span: Span, device: torch.device | None = None) -> torch.nn.Module:
    """The module of ``span``, its parameters on the meta device (no memory), its buffers on ``device``.

    Parameters have the names of the whole model, and its order. Call it by `peer.training.span.forward`; give it
    weights by `peer.training.span.materialise`, from `peer.training.span.initial_values` or `stored_values`. Raises
    `SwarmError` where ``span`` is not of this model, and where a part of a tied model would be cut out.
    """
    from peer.training import span as spans

    model = _cut(config, span)
    spans.own_buffers(model, device or spans.CPU)
    return model


def stored_values(config: Any, model: torch.nn.Module, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of ``model`` (a span of ``config``) out of the local checkpoint in ``folder``, in order.

    Raises `DataError` where the checkpoint is of another model, or not in safetensors files.
    """
    from peer.training.pretrained import read_values

    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return read_values(folder, family_of(config.model_type), shapes)


def initial_anchor(config: Any, seed: int, span: Span | None = None, folder: Path | None = None) -> Float32:
    """The state of round 0 as one flat vector: of ``span``, or of the whole model.

    Random weights from ``seed``, those of `build_model`; or those of the local checkpoint in ``folder``, to go on
    training from it. Takes the memory of the vector and of one parameter.
    """
    from peer.training import span as spans

    model = _cut(config, span or whole(config.num_hidden_layers))
    layout = layout_of(model)
    flat = np.empty(layout.num_values, np.float32)
    views = layout.views(flat)
    values = spans.initial_values(model, seed) if folder is None else stored_values(config, model, folder)
    for name, value in values:
        views[name][...] = value.numpy()
    return flat


def build_layout(config: Any, span: Span | None = None) -> Layout:
    """Names and shapes of the parameters of ``span`` or the whole model, tied ones once; takes no memory for them."""
    return layout_of(_cut(config, span or whole(config.num_hidden_layers)))


def measure(config: Any, *, batch: int, sequence: int, in_bf16: bool) -> ModelNumbers:
    """Figures of the whole model for `swarm.memory_plan`, at B sequences of L tokens; takes no memory for weights."""
    import torch

    from peer.training.measure import measure as measure_model

    model = build_span(config, whole(config.num_hidden_layers))
    compute = torch.bfloat16 if in_bf16 else torch.float32
    return measure_model(model, family_of(config.model_type), batch, sequence, compute)


def layout_of(model: torch.nn.Module) -> Layout:
    """The layout of ``model``: ``named_parameters()`` in its order, tied parameters once."""
    return Layout.of((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())


def trial_run(config: Any) -> None:
    """Build the model on the meta device and pass a few tokens through it: shapes are checked, nothing is computed."""
    import torch

    with torch.device("meta"):
        model = _new_model(config)
        if sum(parameter.numel() for parameter in model.parameters()) < 1 or config.num_hidden_layers < 1:
            raise ValueError("the model has no layers")
        # A ready-made mask, so that nothing looks at values: there are none. BLOOM (ALiBi) makes its own.
        mask = None if config.model_type == "bloom" else torch.zeros((1, 1, TRIAL_TOKENS, TRIAL_TOKENS))
        model(input_ids=torch.zeros((1, TRIAL_TOKENS), dtype=torch.long), attention_mask=mask, use_cache=False)


def config_json(config: Any) -> str:
    """``config.json`` of a checkpoint: complete, sorted, and the same whichever version of transformers writes it."""
    values = {**config.to_dict(), "architectures": [_model_class(config).__name__], "dtype": "float32"}
    for key in ("transformers_version", "_name_or_path"):
        values.pop(key, None)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def stored_config(family: str, values: dict[str, Any]) -> Any:
    """The config that a checkpoint's ``config.json`` means. Raises `DataError`."""
    try:
        return _config_class(family).from_dict(values)
    except Exception as error:  # transformers checks values wherever they are first used, with any exception
        raise DataError(f"the checkpoint's config is none of {family}: {_first_lines(error)}") from error


def differences(config: Any, stored: Any) -> list[tuple[str, Any, Any]]:
    """(key, value, stored value) of everything by which ``stored`` describes another model than ``config``.

    Special tokens, dropout and the spread of initial weights are the run's own choice; a tied head may be untied, as
    it then starts as the embedding.
    """
    own = {key for key in _known_keys(type(config)) if key not in config.attribute_map}
    own -= {*SPECIAL_TOKENS, "initializer_range", "tie_word_embeddings", "rope_theta"}
    found = [(key, getattr(config, key, None), getattr(stored, key, None)) for key in sorted(own)]
    if config.tie_word_embeddings and not stored.tie_word_embeddings:
        found.append(("tie_word_embeddings", True, False))
    ours, theirs = (getattr(each, "rope_parameters", None) or {} for each in (config, stored))
    found += [
        ("rope_theta" if key == "rope_theta" else f"rope_parameters.{key}", ours.get(key), theirs.get(key))
        for key in sorted({*ours, *theirs})
    ]
    return [(key, mine, other) for key, mine, other in found if mine != other]


def known_keys(family: str) -> tuple[str, ...]:
    """The keys that ``[model.config]`` may set for ``family``. Raises `SpecError` for an unknown family."""
    return tuple(sorted(_known_keys(_config_class(family))))


@functools.cache
def _transformers() -> Any:
    import transformers

    _import_less(transformers)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _import_less(transformers: Any) -> None:
    """Spare a peer's start what language models do without.

    Unless told that there is no scipy, transformers imports it for the losses of object detection; and before the first
    model it reads the sources of all others for the names in them, where nobody asks for a model by such a name.
    """
    transformers.utils.is_scipy_available = lambda: False
    models = importlib.util.find_spec("transformers.models")
    if models is not None and models.name not in sys.modules:
        sys.modules[models.name] = importlib.util.module_from_spec(models)


def _config_class(family: str) -> Any:
    family_of(family)
    return _transformers().CONFIG_MAPPING[family]


def _model_class(config: Any) -> Any:
    return _transformers().MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _new_model(config: Any) -> Any:
    import torch

    # Attention is left to transformers: fused (sdpa) where the family has it, eager elsewhere.
    return _transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _cut(config: Any, span: Span) -> torch.nn.Module:
    """The module of ``span``, all of it on the meta device."""
    import torch

    from peer.training import span as spans

    if config.tie_word_embeddings and not span.is_whole:
        raise SwarmError("a model of more than one shard has embedding and head untied")
    with torch.device("meta"):
        model: torch.nn.Module = _new_model(config)
    spans.cut(model, family_of(config.model_type), span)
    return model


def _known_keys(config_class: Any) -> set[str]:
    # Keyword-only parameters are the family's own; the others belong to every transformers config.
    parameters = inspect.signature(config_class.__init__).parameters.values()
    own = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} | {*SPECIAL_TOKENS}
    own |= set(config_class.attribute_map)
    if "rope_parameters" in own:
        own = own - {"rope_parameters"} | {"rope_theta"}
    return {key for key in own - RESERVED_KEYS if "dropout" not in key and not key.endswith("_pdrop")}


def _check_keys(config_class: Any, family: str, values: dict[str, Any]) -> None:
    known = _known_keys(config_class)
    problems = []
    for key in sorted(set(values) - known):
        near = difflib.get_close_matches(key, known, n=1)
        problems.append(f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if problems:
        raise SpecError(f"model.config: {'; '.join(problems)} for {family}", "known keys: " + ", ".join(sorted(known)))


def _fill_in(config_class: Any, values: dict[str, Any]) -> None:
    """Complete what transformers wants to be told twice, and switch dropout off."""
    own = inspect.signature(config_class.__init__).parameters
    values.update({key: 0.0 for key in own if "dropout" in key or key.endswith("_pdrop")})
    if "rope_theta" in values:
        values["rope_parameters"] = {"rope_type": DEFAULT_ROPE, "rope_theta": float(values.pop("rope_theta"))}
    num_layers = values.get("num_layers", values.get("num_hidden_layers"))
    if "attention_types" in own and isinstance(num_layers, int) and "attention_types" not in values:
        # GPT-Neo alternates global and local attention; its config wants the pattern to sum up to its layers.
        pairs = [[["global", "local"], num_layers // 2]] if num_layers > 1 else []
        values["attention_types"] = pairs + ([[["global"], 1]] if num_layers % 2 else [])


def _check_token(name: str, value: Any, vocab_size: int) -> None:
    if value is not None and not (type(value) is int and 0 <= value < vocab_size):
        raise SpecError(f"model.config.{name}: {value!r} is no token of a vocabulary of {vocab_size}")


def _first_lines(error: Exception) -> str:
    """What an exception says, short enough for one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
