"""The run file: what an organizer edits (``run.toml``), and the run spec that is made from it.

Decides the file's form: the run spec's own sections, with a data folder in place of keys and digests. Leaves ranges
and descriptions to `swarm.run_spec`, example values to `swarm.presets`, signing to the command line.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, model_validator

from swarm.data_manifest import DataManifest, TokenShard
from swarm.errors import SpecError
from swarm.run_spec import MAX_SPEC_BYTES, Data, Model, Rules, RunSpec, Section, SequenceLength, parse_section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "run.toml"
_COMMENT_COLUMN = 44
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length")


class DataFolder(Section):
    path: str = Field(
        "data",
        min_length=1,
        max_length=4096,
        description="folder made by `swarm data prepare`; from this file's folder",
    )
    sequence_length: SequenceLength = 128


MirrorUrl = Annotated[str, StringConstraints(pattern=r"^[a-z0-9+.-]+:[^\s]{1,1000}$")]


class MirrorTargets(Section):
    """Where published checkpoints go besides the peers. No rule of the run: it may change at any start."""

    write: tuple[MirrorUrl, ...] = Field(
        (), max_length=16, description="targets that checkpoints are written to: file:///DIR, s3://BUCKET/DIR, hf://..."
    )
    read: tuple[MirrorUrl, ...] = Field(
        (), max_length=16, description="where researchers find them, if not there: https://HOST/DIR"
    )

    @property
    def told(self) -> tuple[str, ...]:
        """What researchers are told; a folder of the organizer's is nothing to them."""
        return self.read or tuple(url for url in self.write if not url.startswith(("file:", "local:")))


class RunFile(Rules):
    data: DataFolder = DataFolder()
    mirrors: MirrorTargets = MirrorTargets()

    @model_validator(mode="after")
    def _together(self) -> RunFile:
        if "vocab_size" in self.model.config:
            raise ValueError("model.config.vocab_size comes from the data's tokenizer; remove it")
        for key in _CONTEXT_KEYS:
            limit = self.model.config.get(key)
            if isinstance(limit, int) and limit < self.data.sequence_length:
                raise ValueError(f"data.sequence_length must not exceed model.config.{key} ({limit})")
        return self


def parse(text: str, where: str = FILE_NAME) -> RunFile:
    """Read a run file; a `SpecError` names the line of a syntax error, or every unknown and bad key."""
    if len(text) > MAX_SPEC_BYTES:
        raise SpecError(f"{where}: larger than {MAX_SPEC_BYTES} characters")
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SpecError(f"{where}: {error}", "correct that line and try again") from error
    run_file: RunFile = parse_section(RunFile, values, where)
    return run_file


def to_spec(
    run_file: RunFile, *, organizer_key: bytes, publication_key: bytes, manifest: DataManifest, manifest_digest: str
) -> RunSpec:
    """The run spec that the organizer signs. ``manifest_digest``: SHA-256 of the manifest's bytes, in hex.

    The token that ends a text is filled into the model's config. The vocabulary's size is not repeated there: it stays
    in the data manifest, which the spec binds by digest.
    Raises `SpecError` where the data is too small for a single sequence.
    """
    length = run_file.data.sequence_length
    for name, shards in (("train", manifest.train), ("validation", manifest.validation)):
        if not any(_num_sequences(shard, length) for shard in shards):
            raise SpecError(
                f"no {name} file of the data holds a sequence of {length} tokens",
                "prepare more text, or lower data.sequence_length",
            )
    from_data = {
        "bos_token_id": manifest.end_of_text_id,
        "eos_token_id": manifest.end_of_text_id,
    }
    rules = {name: getattr(run_file, name) for name in Rules.model_fields}
    rules["model"] = Model(family=run_file.model.family, config={**run_file.model.config, **from_data})
    data = Data(manifest_digest=manifest_digest, tokenizer_digest=manifest.tokenizer_digest, sequence_length=length)
    return RunSpec(**rules, data=data, organizer_key=organizer_key.hex(), publication_key=publication_key.hex())


def _num_sequences(shard: TokenShard, sequence_length: int) -> int:
    # Sequence i is tokens [i*L, i*L + L + 1): the last token is only predicted.
    return (shard.num_tokens - 1) // sequence_length


def render(run_file: RunFile) -> str:
    """A run file with a comment on every key; ``parse(render(x)) == x``."""
    return "\n".join(_section(run_file, ())) + "\n"


def _section(values: BaseModel, path: tuple[str, ...]) -> Iterator[str]:
    """Lines of one table: its own keys first, as TOML wants, then its tables."""
    nested: list[tuple[str, BaseModel | dict[str, Any]]] = []
    if path:
        yield from ("", f"[{'.'.join(path)}]")
    for name, field in type(values).model_fields.items():
        value = getattr(values, name)
        if isinstance(value, (BaseModel, dict)):
            nested.append((name, value))
            continue
        line = f"# {name} = ..." if value is None else f"{name} = {_value(value)}"
        yield f"{line.ljust(_COMMENT_COLUMN)} # {field.description}" if field.description else line
    for name, value in nested:
        if isinstance(value, BaseModel):
            yield from _section(value, (*path, name))
        else:
            yield from ("", f"# {type(values).model_fields[name].description}", f"[{'.'.join((*path, name))}]")
            yield from (f"{_key(key)} = {_value(item)}" for key, item in value.items())


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: bool | int | float | str | Sequence[Any]) -> str:
    """``value`` in TOML, whose basic strings are JSON's but for one more escaped character."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    return "[" + ", ".join(_value(item) for item in value) + "]"
