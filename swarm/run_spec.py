"""The run spec: the signed rules of a run.

Decides which settings exist, their ranges and their canonical bytes. Leaves presets to `swarm.presets`, the file that
an organizer edits to `swarm.run_file`, and what the settings do to the modules that read them.

Canonical bytes are JSON (RFC 8259) with sorted keys and no white space; floats are written as Python's ``repr`` does,
the shortest text that reads back to the same IEEE double.
"""

from __future__ import annotations

import difflib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
    model_validator,
)

from swarm.digest import sha256
from swarm.errors import SpecError
from swarm.families import FAMILIES, family_of
from swarm.identity import verify
from swarm.invite import RUN_ID_BYTES
from swarm.proto.common_pb2 import Signed

CONTEXT = "run-spec"
MAX_SPEC_BYTES = 256 * 1024
MAX_CONFIG_KEYS = 256
MAX_CONFIG_DEPTH = 4
MAX_PROBLEMS_TOLD = 5
# As in `peer.rounds.codec`, densest first.
CODECS = ("int8", "int4", "int2", "topk")
SPARSE_CODECS = ("topk",)

Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

SequenceLength = Annotated[int, Field(ge=8, le=65536, description="tokens that the model reads at once")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _plain_values(values: Any) -> Any:
    """Config keys hold what canonical JSON can hold, a bounded number of values deep and wide."""
    if not isinstance(values, dict) or len(values) > MAX_CONFIG_KEYS:
        raise ValueError(f"must be a table of at most {MAX_CONFIG_KEYS} keys")
    for key, value in values.items():
        if not isinstance(key, str) or not _is_plain(value, MAX_CONFIG_DEPTH):
            raise ValueError(f"{str(key)[:60]!r} must hold a finite number, text, a boolean, or a list of these")
    return values


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _known_family(name: str) -> str:
    try:
        family_of(name)
    except SpecError as error:
        raise ValueError(f"{error}; {error.advice}") from error
    return name


FamilyName = Annotated[str, AfterValidator(_known_family)]
ModelConfig = Annotated[dict[str, bool | int | float | str | list[Any] | None], PlainValidator(_plain_values)]


class Model(Section):
    family: FamilyName = Field(description=", ".join(FAMILIES))
    config: ModelConfig = Field(
        default_factory=dict, description="keys of the family's Hugging Face config; vocab_size comes from the data"
    )


class Data(Section):
    manifest_digest: Hex32
    tokenizer_digest: Hex32
    sequence_length: SequenceLength = 128


class Inner(Section):
    """The local optimizer: AdamW, learning rate warming up linearly and then falling as a cosine."""

    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw8bit", description="adamw8bit (moments in 8 bits) or adamw (moments in 32 bits)"
    )
    weights: Literal["int8", "fp32"] = Field(
        "int8", description="what a replica keeps of its weights: int8 (block-wise, 1 byte a value) or fp32 (4 bytes)"
    )
    checkpoint_activations: bool = Field(
        False, description="compute activations twice instead of keeping them: less memory, a third more time"
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="highest learning rate, reached after the warm-up")
    min_learning_rate_fraction: float = Field(
        0.1, ge=0, le=1, description="where the cosine ends, as a fraction of learning_rate"
    )
    warmup_tokens: int = Field(0, ge=0, description="committed tokens over which the learning rate rises")
    weight_decay: float = Field(0.1, ge=0, le=1, description="decoupled weight decay of matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment, per inner step")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of AdamW's second moment, per inner step")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of a gradient; longer ones are scaled down")
    microbatch_sequences: int = Field(8, ge=1, le=4096, description="sequences in one inner step of one peer")


class Outer(Section):
    """Nesterov momentum over rounds; momentum warms up linearly from 0 over the first rounds (design 5.2)."""

    learning_rate: float = Field(0.8, gt=0, le=2, description="how far a round moves the anchor (1: all the way)")
    momentum: float = Field(0.8, ge=0, lt=1, description="Nesterov momentum over rounds; 0 is plain averaging")
    momentum_warmup_rounds: int = Field(15, ge=0, description="rounds over which the momentum rises from 0")


class Rounds(Section):
    tokens_per_round: int = Field(262144, ge=1, description="tokens, over all peers, after which a round opens")
    first_tokens_per_round: int | None = Field(
        None, ge=1, description="tokens of the first round; rounds grow from here to tokens_per_round"
    )
    growth_rounds: int = Field(0, ge=0, description="rounds over which their length grows")
    wire_codec: Literal["int8", "int4", "int2"] = Field(
        "int8", description="how averages travel, block-wise: int8 (8.1 bits a value), int4 (4.3) or int2 (2.3)"
    )
    contribution_codecs: tuple[Literal["int8", "int4", "int2", "topk"], ...] | None = Field(
        None,
        description="how contributions may travel, densest first; slow uplinks thinner (int8, int4, int2, topk)",
    )
    reduce_timeout_s: float = Field(
        30.0, gt=0, le=3600, description="seconds that a reducer waits for contributions of a round"
    )
    takeover_timeout_s: float = Field(
        20.0, gt=0, le=3600, description="seconds of silence after which the next peer leads the round"
    )
    status_interval_s: float = Field(5.0, gt=0, le=100, description="seconds between a peer's words about itself")
    lease_s: float = Field(
        300.0, gt=0, le=86400, description="seconds of silence after which the others may go on without a majority"
    )
    max_members: int = Field(64, ge=1, le=64, description="peers that take part in one round at most")

    @model_validator(mode="after")
    def _growth(self) -> Rounds:
        if self.first_tokens_per_round is not None and self.first_tokens_per_round > self.tokens_per_round:
            raise ValueError("first_tokens_per_round must not exceed tokens_per_round")
        return self

    @model_validator(mode="after")
    def _leases(self) -> Rounds:
        if self.lease_s < self.reduce_timeout_s + 2 * self.takeover_timeout_s:
            raise ValueError("lease_s must be at least reduce_timeout_s and two takeover_timeout_s: one round's faults")
        return self

    @model_validator(mode="after")
    def _ladder(self) -> Rounds:
        places = [CODECS.index(codec) for codec in self.ladder]
        if not places or places != sorted(set(places)):
            raise ValueError(f"contribution_codecs must be some of {', '.join(CODECS)}, in this order")
        return self

    @property
    def ladder(self) -> tuple[str, ...]:
        """The codecs in which contributions may come, densest first."""
        if self.contribution_codecs is not None:
            return self.contribution_codecs
        return tuple(c for c in CODECS[CODECS.index(self.wire_codec) :] if c not in SPARSE_CODECS)


class Robust(Section):
    """What a reducer does with contributions before it averages them (docs/protocol.md, decision 0012)."""

    rule: Literal["clip_and_drop", "none"] = Field(
        "clip_and_drop", description="clip_and_drop (to the median norm; what points elsewhere) or none"
    )
    min_cosine_ratio: float = Field(
        0.5, ge=0, lt=1, description="a cosine below this fraction of the median cosine is dropped"
    )
    max_weight_ratio: float = Field(
        4.0,
        ge=1,
        le=64,
        description="most times the median weight that one counts for; 1.25 suits open runs of peers alike",
    )


class Pipeline(Section):
    """How microbatches go over the spans of several peers; of no effect in a run of one shard."""

    hop_codec: Literal["fp32", "bf16", "int8", "int4"] = Field(
        "int8", description="how hidden states and gradients travel between spans: fp32, bf16, int8 or int4"
    )
    step_microbatches: int = Field(
        4, ge=1, le=1024, description="microbatches (of inner.microbatch_sequences) in one inner step, num_shards > 1"
    )


class Checkpoints(Section):
    every_rounds: int = Field(10, ge=1, description="rounds between published checkpoints; the last round has one too")
    licence: str = Field(
        "unknown",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="licence of the published weights, as the Hugging Face Hub calls it: apache-2.0, mit, ...",
    )
    witness_share: float = Field(
        0.5, ge=0, lt=1, description="published once more than this share of live replicas signed the same state"
    )
    min_witnesses: int = Field(2, ge=1, le=64, description="and at least so many, where so many live")


class Admission(Section):
    mode: Literal["open", "token", "allow"] = Field(
        "open", description="who may join: open (anybody), token (who has the invite's token), allow (the list below)"
    )
    token_sha256: Hex32 | None = Field(None, description='SHA-256 of the token, in hex, for mode "token"')
    allow: tuple[str, ...] = Field((), max_length=10_000, description='peer ids, for mode "allow"')

    @model_validator(mode="after")
    def _complete(self) -> Admission:
        if self.mode == "token" and self.token_sha256 is None:
            raise ValueError("mode 'token' needs token_sha256")
        if self.mode == "allow" and not self.allow:
            raise ValueError("mode 'allow' needs a list of peer ids in allow")
        return self


class Governance(Section):
    """Who may change the run's keys: so many of the organizer who starts it and these others (docs/decisions/0014)."""

    organizers: tuple[Hex32, ...] = Field(
        (), max_length=31, description="public keys of further organizers, in hex, as `swarm keys id` prints them"
    )
    threshold: int = Field(1, ge=1, le=32, description="how many organizers must sign a change of keys")

    @model_validator(mode="after")
    def _enough(self) -> Governance:
        if len(set(self.organizers)) != len(self.organizers):
            raise ValueError("organizers must be different keys")
        if self.threshold > 1 + len(self.organizers):
            raise ValueError("threshold must not exceed the number of organizers, with the one who starts the run")
        return self


class Rules(Section):
    """What the organizer decides; `RunSpec` adds keys and digests, `swarm.run_file.RunFile` a data folder."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="what people call the run: letters, digits, . _ -"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="where all randomness starts: weights, and who reads what")
    num_shards: int = Field(1, ge=1, le=1024, description="pieces that the model is cut into, with rounds of their own")
    total_tokens: int = Field(ge=1, description="tokens after which the run ends and the last checkpoint is published")
    model: Model
    inner: Inner = Inner()
    outer: Outer = Outer()
    rounds: Rounds = Rounds()
    robust: Robust = Robust()
    pipeline: Pipeline = Pipeline()
    checkpoints: Checkpoints = Checkpoints()
    admission: Admission = Admission()
    governance: Governance = Governance()

    @model_validator(mode="after")
    def _momentum(self) -> Rules:
        sparse = [codec for codec in self.rounds.ladder if codec in SPARSE_CODECS]
        if sparse and self.outer.momentum:
            raise ValueError(
                f"outer.momentum must be 0 where rounds.contribution_codecs has {sparse[0]}: what a sparse contribution"
                " leaves owed comes rounds later, and momentum would repeat it"
            )
        return self


class Base(Section):
    """The checkpoint whose weights the run started from."""

    name: str = Field(pattern=r"^[^\x00-\x1f\x7f|`<>]{1,128}$", description="what the organizer's folder was called")
    anchor_digest: Hex32
    """Merkle root over the chunks of its weights, as they are in the state of round 0"""
    vocab_size: int = Field(ge=2, le=2**31 - 1)
    """rows of its embedding: at least the data's vocabulary, which publishers like to pad"""


class RunSpec(Rules):
    organizer_key: Hex32
    publication_key: Hex32
    data: Data
    base: Base | None = None
    """None: random weights, from `seed`"""

    @model_validator(mode="after")
    def _different_keys(self) -> RunSpec:
        if self.organizer_key in self.governance.organizers:
            raise ValueError(
                "governance.organizers must not name the organizer who starts the run: that one is in already"
            )
        if self.publication_key in self.organizers:
            raise ValueError("the publication key must not be an organizer's: it lies on a machine that is online")
        return self

    @property
    def organizers(self) -> tuple[str, ...]:
        """Public keys of all who govern the run, in hex."""
        return (self.organizer_key, *self.governance.organizers)

    def canonical_bytes(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @property
    def run_id(self) -> bytes:
        """20 bytes that bind the organizer's key and every rule."""
        return run_id_of(bytes.fromhex(self.organizer_key), self.canonical_bytes())


def parse_section(model: type[BaseModel], values: Any, where: str) -> Any:
    """Validate ``values`` as ``model``; a `SpecError` names bad fields, their values and near names."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [_explain(model, problem) for problem in problems[:MAX_PROBLEMS_TOLD]]
        lines += [f"and {len(problems) - len(lines)} more"] * (len(problems) > len(lines))
        raise SpecError(f"{where}: " + "; ".join(lines), "correct the file and try again") from error


def run_id_of(organizer_key: bytes, spec_bytes: bytes) -> bytes:
    """The run id of a spec as it was signed; `parse_signed` says whether the spec holds together."""
    return sha256(b"swarm.v1 run" + organizer_key + spec_bytes)[:RUN_ID_BYTES]


def parse_signed(signed: Signed, run_id: bytes) -> RunSpec:
    """The spec inside ``signed``, once it is the spec of this run and its own organizer signed it."""
    if len(signed.payload) > MAX_SPEC_BYTES:
        raise SpecError(f"the run spec is larger than {MAX_SPEC_BYTES} bytes")
    key = signed.signer
    if run_id_of(key, signed.payload) != run_id:
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
