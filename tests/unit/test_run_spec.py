"""The run spec: canonical bytes, a run id that binds them and the organizer, and readable errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from swarm.errors import SignatureError, SpecError
from swarm.identity import Identity
from swarm.proto.common_pb2 import Signed
from swarm.run_spec import CONTEXT, MAX_SPEC_BYTES, RunSpec, parse_section, parse_signed

ORGANIZER = Identity(b"\x01" * 32)
STRANGER = Identity(b"\x02" * 32)


def _values(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "test",
        "total_tokens": 1000,
        "organizer_key": ORGANIZER.public_key.hex(),
        "publication_key": "aa" * 32,
        "model": {"family": "llama", "config": {"hidden_size": 64, "attention_types": [[["global"], 6]]}},
        "data": {"manifest_digest": "bb" * 32, "tokenizer_digest": "cc" * 32},
    }
    return values | changes


def _spec(**changes: Any) -> RunSpec:
    spec: RunSpec = parse_section(RunSpec, _values(**changes), "spec")
    return spec


SPEC = _spec()


def _signed(payload: bytes = SPEC.canonical_bytes(), signer: Identity = ORGANIZER) -> Signed:
    return signer.sign(CONTEXT, SPEC.run_id, payload)


def test_canonical_bytes_read_back_to_the_same_spec() -> None:
    """Bytes, spec, bytes: nothing is lost, and the bytes are the same again."""
    again = RunSpec.model_validate(json.loads(SPEC.canonical_bytes()))
    assert again == SPEC
    assert again.canonical_bytes() == SPEC.canonical_bytes()


def test_the_order_of_keys_does_not_matter() -> None:
    """Two writers of one spec get one run id."""
    turned = dict(reversed(_values().items()))
    assert RunSpec.model_validate(turned).run_id == SPEC.run_id


def test_canonical_bytes_are_sorted_json_without_white_space() -> None:
    """The form that another implementation has to write."""
    raw = SPEC.canonical_bytes()
    values = json.loads(raw)
    assert raw == json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    assert values["inner"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"name": "other"},
        {"total_tokens": 1001},
        {"organizer_key": STRANGER.public_key.hex()},
        {"publication_key": "ab" * 32},
        {"inner": {"learning_rate": 2e-3}},
        {"pipeline": {"hop_codec": "int4"}},
        {"model": {"family": "llama", "config": {"hidden_size": 65}}},
    ],
)
def test_the_run_id_binds_every_rule(changes: dict[str, Any]) -> None:
    """Any other rule, or another organizer, is another run."""
    assert _spec(**changes).run_id != SPEC.run_id


def test_a_signed_spec_of_the_right_run_is_accepted() -> None:
    """What the organizer signed is what the volunteer reads."""
    assert parse_signed(_signed(), SPEC.run_id) == SPEC


def _flip(raw: bytes, position: int) -> bytes:
    return raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]


@pytest.mark.parametrize("position", [0, 10, len(SPEC.canonical_bytes()) // 2, len(SPEC.canonical_bytes()) - 1])
def test_a_spec_with_a_flipped_byte_is_refused(position: int) -> None:
    """One flipped byte anywhere is another spec than the invite names."""
    signed = _signed()
    signed.payload = _flip(signed.payload, position)
    with pytest.raises(SpecError, match="not the one that the invite names") as caught:
        parse_signed(signed, SPEC.run_id)
    assert "do not join" in caught.value.advice


def test_a_flipped_spec_that_is_signed_again_is_refused() -> None:
    """Even the organizer cannot change the rules of a run under the same invite."""
    with pytest.raises(SpecError, match="not the one"):
        parse_signed(_signed(_flip(SPEC.canonical_bytes(), 10)), SPEC.run_id)


def test_a_spec_signed_by_another_key_is_refused() -> None:
    """A stranger's valid signature under the same bytes is not the organizer's."""
    with pytest.raises(SpecError, match="signed by another key"):
        parse_signed(_signed(signer=STRANGER), SPEC.run_id)


def test_a_strangers_signature_under_the_organizers_name_is_refused() -> None:
    """Naming the organizer as the signer does not make it so."""
    signed = _signed(signer=STRANGER)
    signed.signer = ORGANIZER.public_key
    with pytest.raises(SignatureError):
        parse_signed(signed, SPEC.run_id)


def test_another_runs_signature_is_refused() -> None:
    """The invite decides which run it is."""
    with pytest.raises(SpecError):
        parse_signed(_signed(), b"x" * 20)


def test_a_spec_that_names_another_organizer_is_refused() -> None:
    """The signer is the organizer whom the spec itself names."""
    from swarm.digest import sha256

    payload = _spec(organizer_key=STRANGER.public_key.hex()).canonical_bytes()
    run_id = sha256(b"swarm.v1 run" + ORGANIZER.public_key + payload)[:20]
    with pytest.raises(SpecError, match="another organizer"):
        parse_signed(ORGANIZER.sign(CONTEXT, run_id, payload), run_id)


@pytest.mark.parametrize(
    ("name", "payload", "match"),
    [
        ("not json", b"not json", "not JSON"),
        ("not text", b"\xff\xfe", "not JSON"),
        ("deeply nested", b"[" * 100_000, "not JSON"),
        ("a list", b"[]", "run spec"),
        ("too large", b" " * (MAX_SPEC_BYTES + 1), "larger"),
        ("not a number", json.dumps(_values(inner={"learning_rate": float("nan")})).encode(), "learning_rate"),
        ("infinite config", json.dumps(_values(model={"family": "llama", "config": {"x": [1e999]}})).encode(), "'x'"),
    ],
)
def test_a_payload_that_is_no_spec_is_refused(name: str, payload: bytes, match: str) -> None:
    """Even with a right signature and run id: hostile bytes get a named error."""
    from swarm.digest import sha256

    run_id = sha256(b"swarm.v1 run" + ORGANIZER.public_key + payload)[:20]
    with pytest.raises(SpecError, match=match):
        parse_signed(ORGANIZER.sign(CONTEXT, run_id, payload), run_id)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "unknown key 'sead' (did you mean 'seed'?)"),
        ({"zebra": 1}, "unknown key 'zebra'"),
        (
            {"rounds": {"token_per_round": 1}},
            "unknown key 'rounds.token_per_round' (did you mean 'tokens_per_round'?)",
        ),
        ({"total_tokens": 0}, "total_tokens: Input should be greater than or equal to 1, not 0"),
        ({"name": "a/b"}, "name: String should match pattern"),
        ({"seed": 2**63}, "seed: Input should be less than"),
        ({"rounds": {"tokens_per_round": 5, "first_tokens_per_round": 6}}, "first_tokens_per_round must not exceed"),
        ({"admission": {"mode": "token"}}, "mode 'token' needs token_sha256"),
        ({"admission": {"mode": "allow"}}, "mode 'allow' needs a list"),
        ({"rounds": {"wire_codec": "fp32"}}, "rounds.wire_codec: Input should be 'int8', 'int4' or 'int2', not 'fp32'"),
        ({"rounds": {"contribution_codecs": ["int4", "topk"]}}, "outer.momentum must be 0 where"),
        ({"model": {"family": "opt"}}, "model.family: unknown model family 'opt'; known families: gpt_neo"),
        ({"model": {"family": "llama", "config": {"f": {"a": 1}}}}, "model.config: 'f' must hold a finite number"),
        ({"model": {"family": "llama", "config": {"f": [[[[[1]]]]]}}}, "model.config: 'f' must hold a finite number"),
        ({"model": {"family": "llama", "config": {str(i): 1 for i in range(257)}}}, "at most 256 keys"),
        ({"organizer_key": "AA" * 32}, "organizer_key"),
        ({"organizer_key": "aa" * 32 + "\n"}, "organizer_key"),
    ],
)
def test_a_bad_setting_is_named(changes: dict[str, Any], message: str) -> None:
    """The error names the field, what it wants and what it got; a near name is suggested."""
    with pytest.raises(SpecError) as caught:
        _spec(**changes)
    assert message in str(caught.value)


def test_missing_settings_are_named() -> None:
    """Every missing field is told at once."""
    with pytest.raises(SpecError, match=r"spec: total_tokens is missing; model is missing"):
        parse_section(RunSpec, {"name": "x", **{key: _values()[key] for key in ("organizer_key", "data")}}, "spec")


def test_an_error_about_many_keys_stays_short() -> None:
    """A hostile file with a thousand bad keys does not make a message of a thousand lines."""
    with pytest.raises(SpecError, match="and 995 more") as caught:
        _spec(**{f"bad{index}": 1 for index in range(1000)})
    assert len(str(caught.value)) < 1000
