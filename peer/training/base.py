"""The checkpoint that a run starts from: does it fit the run's rules and data, and what are its weights?

Decides what must agree before an organizer signs: family, config, tokenizer and vocabulary, weights in safetensors
files, and no code. Leaves reading weights to `peer.training.pretrained`, configs to `peer.training.model`, signing and
the genesis to the command line.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peer.rounds.codec import Float32
from peer.rounds.shard import state_bytes
from peer.training import model
from swarm.data_manifest import TOKENIZER_NAME, DataManifest
from swarm.digest import chunk_digests, merkle_root, sha256
from swarm.errors import DataError
from swarm.run_spec import Base, RunSpec

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_TOLD = 8


def read_base(folder: Path, spec: RunSpec, data: DataManifest) -> tuple[Base, Float32]:
    """What a run of ``spec`` (without a base yet) says of the checkpoint in ``folder``, and its weights.

    Raises `DataError` where the checkpoint is not of this run's model and tokenizer, or cannot be read safely.
    """
    values = _read_config(folder)
    family = spec.model.family
    if values.get("model_type") != family:
        raise DataError(
            f"{folder} is a model of family {str(values.get('model_type'))[:60]!r}, and the run's is {family!r}",
            "set model.family to that of the checkpoint",
        )
    _check_tokenizer(folder, spec)
    stored = model.stored_config(family, values)
    if stored.vocab_size < data.vocab_size:
        raise DataError(
            f"{folder} knows {stored.vocab_size} tokens, and the run's data has {data.vocab_size}",
            f"prepare the data with: swarm data prepare ... --tokenizer {folder / TOKENIZER_NAME}",
        )
    base = Base(name=_name(folder), anchor_digest="0" * 64, vocab_size=stored.vocab_size)
    config = model.build_config(spec.model_copy(update={"base": base}), data.vocab_size)
    _check_config(folder, model.differences(config, stored), model.known_keys(family))
    anchor = model.initial_anchor(config, spec.seed, folder=folder)
    root = merkle_root(chunk_digests(state_bytes(anchor)))
    return base.model_copy(update={"anchor_digest": root.hex()}), anchor


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(MAX_CONFIG_BYTES))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", "name a folder in Hugging Face layout, as swarm download makes"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON", "fetch the checkpoint again") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a config", "fetch the checkpoint again")
    if "auto_map" in values:
        raise DataError(
            f"{path} asks for code of its own (auto_map)", "code from outside is never run; use another one"
        )
    if "quantization_config" in values:
        raise DataError(f"the checkpoint in {folder} is quantised", "use the one that it was made from")
    return values


def _check_config(folder: Path, differing: list[tuple[str, Any, Any]], settable: tuple[str, ...]) -> None:
    if not differing:
        return
    told = ", ".join(f"{key} is {theirs!r}, not {ours!r}" for key, ours, theirs in differing[:MAX_TOLD])
    fixed = [key for key, _, _ in differing if key not in settable]
    wanted = ", ".join(f"{key} = {json.dumps(theirs)}" for key, _, theirs in differing[:MAX_TOLD])
    raise DataError(
        f"{folder} has another config than the run: {told}",
        f"no run can set {fixed[0]}: use another checkpoint" if fixed else f"set in [model.config]: {wanted}",
    )


def _check_tokenizer(folder: Path, spec: RunSpec) -> None:
    """Tokens must mean the same to the checkpoint and in the data: the same tokenizer, byte for byte."""
    path = folder / TOKENIZER_NAME
    advice = f"prepare the data with: swarm data prepare ... --tokenizer {path}"
    try:
        found = sha256(path.read_bytes()).hex()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "put the checkpoint's tokenizer there") from error
    if found != spec.data.tokenizer_digest:
        raise DataError(f"the run's data was made with another tokenizer than {path}", advice)


def _name(folder: Path) -> str:
    """The folder's own name, with nothing that could break out of a table."""
    return re.sub(r"[\x00-\x1f\x7f|`<>]", "-", folder.resolve().name)[:128] or "checkpoint"
