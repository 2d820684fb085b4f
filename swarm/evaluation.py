"""An evaluation: what a harness measured on a checkpoint, in a form that can be signed, compared and put on a card.

Decides the form, its limits, and where it lies: ``DIR/evaluations/NAME.json`` with ``NAME.sig`` beside it. Says nothing
about whether it is true: it is the word of whoever signed. Leaves the measuring to `peer.checkpoints.harness`.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from google.protobuf.message import DecodeError
from pydantic import Field, StringConstraints

from swarm.digest import sha256
from swarm.errors import SpecError, VerificationError
from swarm.identity import verify
from swarm.manifest import RunIdHex
from swarm.proto.common_pb2 import Signed
from swarm.run_spec import Hex32, Section, parse_section

CONTEXT = "evaluation"
FOLDER = "evaluations"
MAX_EVALUATION_BYTES = 4 << 20
MAX_TOLD_BYTES = 128 << 10  # of what is sent to the coordinator
MAX_RESULTS = 20_000

Label = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f|`<>]{1,128}$")]


class Result(Section):
    """One metric of one task."""

    task: Label
    metric: Label
    value: float
    stderr: float | None = None
    num_fewshot: int = Field(0, ge=0, le=1000)
    num_samples: int = Field(ge=0)
    task_version: Label = "0"


class Evaluation(Section):
    """``limit``: documents of a task at most (None: all). ``versions``: software that measured, and under ``weights``
    the set that it measured where that is not the fp32 one."""

    format: Literal[1] = 1
    run_id: RunIdHex
    round: int = Field(ge=1)
    manifest_digest: Hex32
    asked: tuple[Label, ...] = Field(max_length=1000)
    results: tuple[Result, ...] = Field(min_length=1, max_length=MAX_RESULTS)
    versions: dict[Label, Label] = Field(max_length=64)
    seed: int = Field(ge=0)
    limit: int | None = Field(None, ge=1)
    batch_size: int = Field(ge=1)
    device: Label

    def metric(self, result: Result) -> str:
        """The metric's name; with the set of weights where it is not fp32: it must not pass for the score of that."""
        weights = self.versions.get("weights")
        return result.metric if weights is None else f"{result.metric}, {weights}"

    def canonical_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()

    @property
    def name(self) -> str:
        """The file's name without its ending: what was asked for, and a digest that keeps two apart."""
        asked = re.sub(r"[^a-z0-9]+", "-", "-".join(self.asked).lower()).strip("-")[:40] or "tasks"
        return f"{asked}-{sha256(self.canonical_bytes()).hex()[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedEvaluation:
    """``name``: of its two files, without their endings. ``signer``: the public key of whoever measured."""

    name: str
    evaluation: Evaluation
    signer: bytes


def parse(raw: bytes) -> Evaluation:
    """Raises `VerificationError`."""
    if len(raw) > MAX_EVALUATION_BYTES:
        raise VerificationError(f"an evaluation is larger than {MAX_EVALUATION_BYTES} bytes")
    try:
        evaluation: Evaluation = parse_section(Evaluation, json.loads(raw), "evaluation")
    except (ValueError, RecursionError, SpecError) as error:
        raise VerificationError(f"an evaluation cannot be read: {error}") from error
    return evaluation


def parse_signed(signed: Signed, run_id: bytes) -> Evaluation:
    """The evaluation inside ``signed``, once the signer's signature is right and it is of this run."""
    evaluation = parse(verify(signed, CONTEXT, run_id))
    if evaluation.run_id != run_id.hex():
        raise VerificationError("the evaluation belongs to another run")
    return evaluation


def open_signed(signed: Signed, run_id: bytes) -> SignedEvaluation:
    """What `parse_signed` proves, under the name that its files would have."""
    parsed = parse_signed(signed, run_id)
    return SignedEvaluation(name=parsed.name, evaluation=parsed, signer=signed.signer)


def encode(signed: Signed) -> str:
    """A signed evaluation as text, for JSON."""
    return base64.b64encode(signed.SerializeToString(deterministic=True)).decode()


def decode(text: str, run_id: bytes) -> SignedEvaluation:
    """The evaluation in ``text``, once its signature is right. Raises `VerificationError`."""
    try:
        signed = Signed.FromString(base64.b64decode(text, validate=True))
    except (ValueError, DecodeError) as error:
        raise VerificationError("a signed evaluation cannot be read") from error
    return open_signed(signed, run_id)
