"""The error tree: what is drawn at the top of `swarm/errors.py` is what the code has."""

from __future__ import annotations

import re

import pytest

from swarm import errors
from swarm.errors import SwarmError

CLASSES = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
DRAWN = re.findall(r"^( *[│├└─ ]*)([A-Z]\w+) *(\d+)? ", (errors.__doc__ or "").partition("\n")[2], flags=re.MULTILINE)


def test_the_drawing_names_every_error_class() -> None:
    """A reader of the drawing sees the whole tree."""
    assert {name for _, name, _ in DRAWN if name != "Exit"} == set(CLASSES)


@pytest.mark.parametrize(("indent", "name", "code"), [row for row in DRAWN if row[1] in CLASSES])
def test_the_drawing_is_true(indent: str, name: str, code: str) -> None:
    """Each drawn class has the drawn exit code, or its parent's where none is drawn."""
    assert issubclass(CLASSES[name], SwarmError)
    if code:
        assert CLASSES[name].exit_code == int(code)
    else:
        assert CLASSES[name].exit_code == CLASSES[name].__mro__[1].exit_code  # type: ignore[attr-defined]


def test_an_error_carries_its_advice() -> None:
    """Message and advice arrive apart, so that the command line can print them apart."""
    error = errors.DiskFull("no space left", "free some")
    assert (str(error), error.advice) == ("no space left", "free some")


def test_advice_is_optional() -> None:
    """An error without advice has the empty string."""
    assert errors.NotFound("no such chunk").advice == ""
