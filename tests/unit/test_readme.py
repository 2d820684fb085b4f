"""The README: short, and what it shows is what the program and the tree are."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shlex
from pathlib import Path

import pytest

from swarm.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LICENCE_SHA256 = (
    "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # apache.org/licenses/LICENSE-2.0.txt
)

HELP_BLOCKS = re.findall(r"```console\n\$ (swarm[^\n]* --help)\n(.*?)```", README, flags=re.DOTALL)
# What the tree shows as a folder: generated code, and one file for each version of the database.
FOLDERS = ("swarm/proto/", "coordinator/migrations/")


def test_the_readme_is_short() -> None:
    """Under 200 lines, none of them wider than a screen."""
    lines = README.splitlines()
    assert len(lines) < 200
    assert max(len(line) for line in lines) <= 140


def test_the_readme_shows_the_help() -> None:
    """At least the first thing that a volunteer asks for."""
    assert "swarm join --help" in [command for command, _ in HELP_BLOCKS]


@pytest.mark.parametrize(("command", "shown"), HELP_BLOCKS, ids=[command for command, _ in HELP_BLOCKS])
def test_the_help_shown_is_the_programs(command: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendered for 80 columns without colour, letter by letter."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as caught:
        main.main(shlex.split(command)[1:])
    assert caught.value.code == 0
    assert shown == printed.getvalue()


def _tree(page: str) -> dict[str, str]:
    """path -> comment of a page's file tree: two blanks of indentation per folder."""
    block = re.search(r"# Files\n.*?```\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert block is not None
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        indent, name, comment = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()  # type: ignore[union-attr]
        folders[len(indent) // 2 :] = [name]
        found["".join(folders)] = comment
    return found


def test_the_file_tree_is_the_real_one() -> None:
    """Every module is in the tree, and the tree holds nothing that is not there."""
    shown = {path for path in _tree("docs/files.md") if path.endswith(".py")}
    modules = [path for package in ("swarm", "peer", "coordinator") for path in (ROOT / package).rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in modules if path.name != "__init__.py"}
    real = {name for name in names if not name.startswith(FOLDERS)}
    assert (sorted(real - shown), sorted(shown - real)) == ([], [])


@pytest.mark.parametrize("page", ["README.md", "docs/files.md"])
def test_trees_show_what_is_there_with_a_comment_each(page: str) -> None:
    """Nothing is shown that is gone, and a name alone tells a newcomer little."""
    tree = _tree(page)
    assert [path for path in tree if not (ROOT / path).exists()] == []
    assert [path for path, comment in tree.items() if not comment] == []


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        ".github/CONTRIBUTING.md",
        ".github/SECURITY.md",
        "docs/architecture.md",
        "docs/files.md",
        "docs/security.md",
    ],
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    """A relative link names a file or folder that is there."""
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_licence_is_the_apache_text() -> None:
    """Byte for byte the text that the Apache Software Foundation publishes."""
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == LICENCE_SHA256
