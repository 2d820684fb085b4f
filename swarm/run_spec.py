"""The run spec: the signed rules of a run.

Decides which settings exist, their ranges and their canonical bytes. Leaves presets to `swarm.presets`, the file that
an organizer edits to `swarm.run_file`, and what the settings do to the modules that read them.

Canonical bytes are JSON (RFC 8259) with sorted keys and no white space; floats are written as Python's ``repr`` does,
the shortest text that reads back to the same IEEE double.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from swarm.digest import sha256
from swarm.errors import SpecError
from swarm.identity import verify
from swarm.invite import RUN_ID_BYTES
from swarm.proto.common_pb2 import Signed

CONTEXT = "run-spec"
MAX_SPEC_BYTES = 256 * 1024
FAMILIES = ("gpt_neo", "gptj", "gpt_neox", "bloom", "llama", "mistral")

Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    family: Literal["gpt_neo", "gptj", "gpt_neox", "bloom", "llama", "mistral"]
    config: dict[str, bool | int | float | str | list[Any] | None] = Field(
        default_factory=dict, description="keys of the family's Hugging Face config; vocab_size comes from the data"
    )


class Data(Section):
    manifest_digest: Hex32
    tokenizer_digest: Hex32
    sequence_length: int = Field(128, ge=8, le=65536)


class Inner(Section):
    """The local optimizer: AdamW, learning rate warming up linearly and then falling as a cosine."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw8bit"
    learning_rate: float = Field(1e-3, gt=0, le=1)
    min_learning_rate_fraction: float = Field(0.1, ge=0, le=1)
    warmup_tokens: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0, le=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    microbatch_sequences: int = Field(8, ge=1, le=4096)


class Outer(Section):
    """Nesterov momentum over rounds; momentum warms up linearly from 0 over the first rounds (design 5.2)."""

    learning_rate: float = Field(0.8, gt=0, le=2)
    momentum: float = Field(0.8, ge=0, lt=1)
    momentum_warmup_rounds: int = Field(15, ge=0)


class Rounds(Section):
    tokens_per_round: int = Field(262144, ge=1)
    first_tokens_per_round: int | None = Field(
        None, ge=1, description="rounds start this short and grow to tokens_per_round"
    )
    growth_rounds: int = Field(0, ge=0, description="rounds over which the length grows")
    wire_codec: Literal["int8"] = "int8"
    reduce_timeout_s: float = Field(30.0, gt=0, le=3600)
    takeover_timeout_s: float = Field(20.0, gt=0, le=3600)
    status_interval_s: float = Field(5.0, gt=0, le=120)
    max_members: int = Field(64, ge=1, le=64)

    @model_validator(mode="after")
    def _growth(self) -> Rounds:
        if self.first_tokens_per_round is not None and self.first_tokens_per_round > self.tokens_per_round:
            raise ValueError("first_tokens_per_round must not exceed tokens_per_round")
        return self


class Checkpoints(Section):
    every_rounds: int = Field(10, ge=1)


class Admission(Section):
    mode: Literal["open", "token", "allow"] = "open"
    token_sha256: Hex32 | None = None
    allow: tuple[str, ...] = Field((), max_length=10_000, description="peer ids")

    @model_validator(mode="after")
    def _complete(self) -> Admission:
        if self.mode == "token" and self.token_sha256 is None:
            raise ValueError("mode 'token' needs token_sha256")
        if self.mode == "allow" and not self.allow:
            raise ValueError("mode 'allow' needs a list of peer ids in allow")
        return self


class RunSpec(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(0, ge=0, lt=2**63)
    num_shards: int = Field(1, ge=1, le=1024)
    total_tokens: int = Field(ge=1)
    organizer_key: Hex32
    publication_key: Hex32
    model: Model
    data: Data
    inner: Inner = Inner()
    outer: Outer = Outer()
    rounds: Rounds = Rounds()
    checkpoints: Checkpoints = Checkpoints()
    admission: Admission = Admission()

    @model_validator(mode="after")
    def _shards(self) -> RunSpec:
        if self.num_shards != 1:
            raise ValueError("num_shards: this version trains a run as one shard; set it to 1")
        return self

    def canonical_bytes(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @property
    def run_id(self) -> bytes:
        """20 bytes that bind the organizer's key and every rule."""
        return sha256(b"swarm.v1 run" + bytes.fromhex(self.organizer_key) + self.canonical_bytes())[:RUN_ID_BYTES]


def parse_section(model: type[BaseModel], values: Any, where: str) -> Any:
    """Validate ``values`` as ``model``; a `SpecError` names bad fields, their values and near names."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors(include_url=False)]
        raise SpecError(f"{where}: " + "; ".join(lines), "correct the file and try again") from error


def parse_signed(signed: Signed, run_id: bytes) -> RunSpec:
    """The spec inside ``signed``, once it is the spec of this run and its own organizer signed it."""
    if len(signed.payload) > MAX_SPEC_BYTES:
        raise SpecError(f"the run spec is larger than {MAX_SPEC_BYTES} bytes")
    key = signed.signer
    if sha256(b"swarm.v1 run" + key + signed.payload)[:RUN_ID_BYTES] != run_id:
        raise SpecError(
            "the run spec is not the one that the invite names (changed, or signed by another key)",
            "ask the organizer for a fresh invite; do not join this one",
        )
    payload = verify(signed, CONTEXT, run_id)
    try:
        values = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise SpecError("the run spec is not JSON") from error
    spec: RunSpec = parse_section(RunSpec, values, "run spec")
    if spec.organizer_key != key.hex():
        raise SpecError("the run spec names another organizer than the one who signed it")
    return spec


def _explain(model: type[BaseModel], problem: Any) -> str:
    path = [str(item) for item in problem["loc"]]
    name = ".".join(path) or "run spec"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _known_fields(model, path[:-1]), n=1)
        return f"unknown key {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    if problem["type"] == "missing":
        return f"{name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    value = repr(problem["input"])
    return f"{name}: {message}" + ("" if problem["type"] == "value_error" else f", not {value[:60]}")


def _known_fields(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)
