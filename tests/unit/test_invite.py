"""Invites: one string there and back, and a named error for every way of spoiling it."""

from __future__ import annotations

import base58
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import invite
from swarm.digest import sha256
from swarm.errors import InviteError
from swarm.invite import Invite
from swarm.proto import common_pb2

INVITE = Invite(run_id=b"r" * 20, tls_pin=b"p" * 32, addresses=("swarm.example.org:4443", "[2001:db8::1]:4443"))
TEXT = INVITE.encode()


def _text_of(raw: bytes) -> str:
    return invite.PREFIX + base58.b58encode(raw + sha256(raw)[:4]).decode()


def _with(**changes: object) -> str:
    values: dict[str, object] = {"run_id": b"r" * 20, "tls_pin": b"p" * 32, "addresses": ["host:1"]}
    return _text_of(common_pb2.Invite(**(values | changes)).SerializeToString())  # type: ignore[arg-type]


def test_an_invite_reads_back() -> None:
    """What is encoded is what is parsed, with and without a token."""
    assert invite.parse(TEXT) == INVITE
    with_token = Invite(run_id=INVITE.run_id, tls_pin=INVITE.tls_pin, addresses=("h:1",), token="let me in")
    assert invite.parse(with_token.encode()) == with_token


def test_line_breaks_of_a_mail_program_do_no_harm() -> None:
    """White space anywhere is dropped: no invite holds any."""
    lines = [TEXT[start : start + 30] for start in range(0, len(TEXT), 30)]
    assert invite.parse("  " + "\r\n".join(lines) + "\n") == INVITE


@settings(deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.sampled_from("123ABCxyz0OIl!é "))
def test_one_wrong_character_is_noticed(position: int, character: str) -> None:
    """A typing mistake anywhere is an error, never another coordinator."""
    typed = TEXT[:position] + character + TEXT[position + 1 :]
    if typed != TEXT:
        with pytest.raises(InviteError):
            invite.parse(typed)


@settings(deadline=None)
@given(st.integers(0, len(TEXT) - 1))
def test_a_truncated_invite_is_noticed(length: int) -> None:
    """No beginning of an invite is an invite."""
    with pytest.raises(InviteError):
        invite.parse(TEXT[:length])


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_an_invite_or_a_named_error(text: str) -> None:
    """Nothing that a person can paste raises anything else."""
    for candidate in (text, invite.PREFIX + text):
        with pytest.raises(InviteError):
            invite.parse(candidate)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_with_a_right_checksum_are_an_invite_or_a_named_error(raw: bytes) -> None:
    """A checksum is no proof: the content is checked all the same."""
    try:
        parsed = invite.parse(_text_of(raw))
    except InviteError:
        return
    assert len(parsed.run_id) == 20 and parsed.addresses


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("empty", "", "starts with"),
        ("another version", "swarm2" + TEXT[6:], "starts with"),
        ("a web address", "https://example.org/", "starts with"),
        ("prefix alone", invite.PREFIX, "cut short"),
        ("not base58", TEXT[:-1] + "0", "characters that no invite has"),
        ("two pasted together", TEXT + TEXT, "characters|cut short"),
        ("huge", TEXT + "1" * 10_000_000, "too long"),
        ("a long one", TEXT + "1" * 2048, "too long"),
        ("not a message", _text_of(b"\xff\xff"), "cannot be read"),
        ("no run", _with(run_id=b""), "no run"),
        ("run id too long", _with(run_id=b"r" * 21), "no run"),
        ("no pin", _with(tls_pin=b""), "no key"),
        ("no address", _with(addresses=[]), "no coordinator"),
        ("five addresses", _with(addresses=["h:1"] * 5), "no coordinator"),
        ("address without port", _with(addresses=["host"]), "not an address"),
        ("address without host", _with(addresses=[":1"]), "not an address"),
        ("port zero", _with(addresses=["h:0"]), "not an address"),
        ("port too large", _with(addresses=["h:65536"]), "not an address"),
        ("port of digits that are no number", _with(addresses=["h:²"]), "not an address"),
        ("port with a sign", _with(addresses=["h:+1"]), "not an address"),
        ("address too long", _with(addresses=["h" * 254 + ":1"]), "not an address"),
        ("token too long", _with(token="t" * 129), "token"),
    ],
)
def test_a_bad_invite_is_refused_with_advice(name: str, text: str, match: str) -> None:
    """The error says what is wrong, and what to do about it."""
    with pytest.raises(InviteError, match=match) as caught:
        invite.parse(text)
    assert caught.value.advice
