"""The wheel: what is in it, and that it works outside the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("swarm", "peer", "coordinator")

pytestmark = pytest.mark.slow


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; pip fetches hatchling where it is not installed."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    _pip("wheel", "--no-deps", *isolation, "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    _pip("install", "--no-deps", "--target", str(folder), str(wheel))
    return folder


def _outside(installed: Path, *command: str) -> str:
    """What ``command`` prints with the installed packages first, run from outside the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, *command], cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_three_packages_and_nothing_else(wheel: Path) -> None:
    """No tests, no scripts, no stray top-level name that could collide with another distribution's."""
    assert wheel.name.startswith("swarmtrain-") and wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_holds_every_module_and_migration(wheel: Path) -> None:
    """What the checkout has, the wheel has: generated code and migrations too."""
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    written = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert held == written
    assert any(name.startswith("coordinator/migrations/versions/") for name in held)


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    """The Apache-2.0 text lies in the distribution's own folder."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_installed_program_runs_outside_the_checkout(installed: Path) -> None:
    """`swarm --help` answers from the installed files, not from the checkout."""
    assert _outside(installed, str(installed / "bin" / "swarm"), "--help").startswith("Usage: swarm")
    where = "import swarm, peer, coordinator; print(*(m.__file__ for m in (swarm, peer, coordinator)))"
    assert all(path.startswith(str(installed)) for path in _outside(installed, "-c", where).split())


def test_import_names_belong_to_one_distribution(installed: Path) -> None:
    """Nobody else installs `swarm`, `peer` or `coordinator` here: pip would let them overwrite each other."""
    code = "import json, importlib.metadata as m; print(json.dumps(m.packages_distributions()))"
    owners = json.loads(_outside(installed, "-c", code))
    assert {package: set(owners[package]) for package in PACKAGES} == {package: {"swarmtrain"} for package in PACKAGES}
