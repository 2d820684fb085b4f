"""The house as `docs/architecture.md` draws it: arrows, doors, sizes, refused code and refused words.

Read from the sources by ast; nothing of the project is imported.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6

# Who may import whom: layer -> layers. A layer is the longest of these prefixes that a module has.
ARROWS = {
    "swarm.proto": {"swarm.proto"},
    "swarm": {"swarm", "swarm.proto"},
    "peer": {"peer", "swarm", "swarm.proto"},
    "coordinator": {"coordinator", "swarm", "swarm.proto"},
    "swarm.cli": {"swarm.cli", "swarm", "swarm.proto", "peer", "coordinator"},
}

# The modules in which each foreign library may be imported. A library that is not here has no door: add one, or do
# without. `google` is protobuf's own package: decoding errors are caught where messages are decoded.
DOORS = {
    "aiohttp": ("peer/checkpoints/mirrors.py",),
    "alembic": ("coordinator/store.py", "coordinator/migrations/*"),
    "base58": ("swarm/identity.py", "swarm/invite.py"),
    "bitsandbytes": ("peer/training/inner_optimizer.py",),
    # The client reads the public key out of the certificate to compare it with the invite's pin.
    "cryptography": (
        "swarm/identity.py",
        "coordinator/tls.py",
        "peer/coordinator_connection.py",
        "peer/checkpoints/model_signature.py",
    ),
    "fsspec": ("swarm/storage.py",),
    "google": ("swarm/*.py", "peer/*.py", "coordinator/*.py"),
    "gguf": ("peer/checkpoints/export_gguf.py",),
    "grpc": (
        "peer/coordinator_client.py",
        "peer/coordinator_connection.py",
        "coordinator/server.py",
        "coordinator/service.py",
    ),
    "hivemind": ("peer/p2p/hivemind_door.py",),
    "huggingface_hub": ("peer/checkpoints/card.py", "peer/checkpoints/hub.py", "swarm/storage.py"),
    "lm_eval": ("peer/checkpoints/harness.py", "peer/checkpoints/harness_model.py"),
    "matplotlib": ("peer/checkpoints/leaderboard.py",),
    "numpy": ("peer/*.py", "coordinator/token_shards.py", "swarm/derived.py"),
    "pyarrow": ("coordinator/data_sources.py",),
    "pydantic": (
        "swarm/run_spec.py",
        "swarm/run_file.py",
        "swarm/manifest.py",
        "swarm/data_manifest.py",
        "swarm/evaluation.py",
        "swarm/removals.py",
        "swarm/run_record.py",
    ),
    "rich": ("swarm/cli/output.py",),
    "safetensors": (
        "peer/checkpoints/checkpoint.py",
        "peer/checkpoints/export_hf.py",
        "peer/checkpoints/weights.py",
        "peer/training/pretrained.py",
    ),
    "sqlalchemy": (
        "coordinator/store.py",
        "coordinator/published.py",
        "coordinator/tables.py",
        "coordinator/migrations/*",
    ),
    "tokenizers": ("coordinator/tokenizer.py",),
    "securesystemslib": ("swarm/metadata.py",),
    "tomli": ("swarm/run_file.py",),
    "tuf": ("swarm/metadata.py", "swarm/governance.py", "peer/checkpoints/trusted.py"),
    "torch": (
        "peer/pipeline/hop_codec.py",
        "peer/pipeline/messages.py",
        "peer/pipeline/onward.py",
        "peer/pipeline/place.py",
        "peer/training/device.py",
        "peer/training/dither.py",
        "peer/checkpoints/export_hf.py",
        "peer/checkpoints/generate.py",
        "peer/checkpoints/harness_model.py",
        "peer/training/hosting.py",
        "peer/training/inner_optimizer.py",
        "peer/training/exact_anchor.py",
        "peer/training/int8_matrix.py",
        "peer/training/int8_model.py",
        "peer/training/int8_modules.py",
        "peer/training/int8_replica.py",
        "peer/training/measure.py",
        "peer/training/microbatches.py",
        "peer/training/model.py",
        "peer/training/passes.py",
        "peer/training/pieces.py",
        "peer/training/pretrained.py",
        "peer/training/quantized.py",
        "peer/training/speed.py",
        "peer/training/fp32_replica.py",
        "peer/training/room.py",
        "peer/training/span.py",
        "peer/training/trainer.py",
    ),
    "transformers": ("peer/training/model.py", "peer/checkpoints/generate.py"),
    "typer": ("swarm/cli/*",),
    "zstandard": ("coordinator/data_sources.py",),
}

# What the core may not import: it is told the time, and handed its bytes.
NOT_IN_CORE = {"asyncio", "multiprocessing", "random", "socket", "ssl", "subprocess", "threading", "time"}
CODE_IN_DATA = {"dill", "marshal", "pickle", "shelve"}
REFUSED_CALLS = {"eval", "exec", "breakpoint"}
# The right-hand column of docs/glossary.md, where a word has no other meaning in code.
REFUSED_WORDS = {"epoch", "epochs", "lighthouse", "master", "miner", "miners", "slave", "worker", "workers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    path: str
    name: str
    text: str
    tree: ast.Module

    @property
    def layer(self) -> str:
        return max((layer for layer in ARROWS if f"{self.name}.".startswith(f"{layer}.")), key=len)

    def imports(self) -> Iterator[str]:
        """Dotted names of everything imported, anywhere in the file, but for annotations alone."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        yield from (node for node in ast.walk(self.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _read(path: Path) -> Module:
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    text = path.read_text(encoding="utf-8")
    return Module(path=relative.as_posix(), name=name, text=text, tree=ast.parse(text))


ALL = [_read(path) for package in ("swarm", "peer", "coordinator") for path in sorted((ROOT / package).rglob("*.py"))]
WRITTEN = [module for module in ALL if not module.path.startswith("swarm/proto/")]
every_module = pytest.mark.parametrize("module", WRITTEN, ids=lambda module: module.path)


def _layer_of(imported: str) -> str | None:
    fitting = [layer for layer in ARROWS if f"{imported}.".startswith(f"{layer}.")]
    return max(fitting, key=len) if fitting else None


def test_the_sources_are_found() -> None:
    """The other tests here read something."""
    assert {module.layer for module in ALL} == set(ARROWS)
    assert len(WRITTEN) > 20


@pytest.mark.parametrize("module", ALL, ids=lambda module: module.path)
def test_imports_follow_the_arrows(module: Module) -> None:
    """swarm.proto <- swarm <- peer | coordinator <- swarm.cli; peer and coordinator never meet."""
    layers = {name: _layer_of(name) for name in module.imports()}
    assert [name for name, layer in layers.items() if layer and layer not in ARROWS[module.layer]] == []


@every_module
def test_imports_are_absolute(module: Module) -> None:
    """A relative import would hide from the arrows."""
    relative = [node for node in ast.walk(module.tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == []


@every_module
def test_foreign_libraries_come_in_by_their_doors(module: Module) -> None:
    """Each foreign library is imported in the modules that DOORS names, and nowhere else."""
    foreign = {name.partition(".")[0] for name in module.imports()} - sys.stdlib_module_names
    foreign -= {"swarm", "peer", "coordinator"}
    strayed = [name for name in foreign if not any(fnmatch(module.path, door) for door in DOORS.get(name, ()))]
    # tomllib is in the standard library from 3.11 on, tomli stands in for it before.
    assert [name for name in strayed if name != "tomllib"] == []


@pytest.mark.parametrize("library", DOORS)
def test_every_door_is_in_use(library: str) -> None:
    """The table says what is so: no door to a library that its module no longer needs."""
    users = [module.path for module in WRITTEN if library in {name.partition(".")[0] for name in module.imports()}]
    assert [door for door in DOORS[library] if not any(fnmatch(path, door) for path in users)] == []


@pytest.mark.parametrize(
    "module", [module for module in WRITTEN if module.layer == "swarm"], ids=lambda module: module.path
)
def test_the_core_has_no_clock_and_no_sockets(module: Module) -> None:
    """What `swarm` decides, it decides from its arguments."""
    assert {name.partition(".")[0] for name in module.imports()} & NOT_IN_CORE == set()


@every_module
def test_no_data_is_code(module: Module) -> None:
    """No pickle and its kin, no eval, no exec."""
    assert {name.partition(".")[0] for name in module.imports()} & CODE_IN_DATA == set()
    calls = [node.func for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    assert [call.id for call in calls if isinstance(call, ast.Name) and call.id in REFUSED_CALLS] == []


@every_module
def test_input_is_not_checked_by_assert(module: Module) -> None:
    """`python -O` removes asserts; errors have names here."""
    assert [node.lineno for node in ast.walk(module.tree) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize(
    "module", [module for module in WRITTEN if module.layer != "swarm.cli"], ids=lambda module: module.path
)
def test_only_the_command_line_prints(module: Module) -> None:
    """Everything else logs, or returns what it has to say."""
    calls = [node.func for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"] == []


@every_module
def test_every_module_says_what_it_decides(module: Module) -> None:
    """A docstring opens each file."""
    assert ast.get_docstring(module.tree)


@every_module
def test_files_stay_small(module: Module) -> None:
    """A file is read in one sitting."""
    assert len(module.text.splitlines()) <= MAX_FILE_LINES


@every_module
def test_functions_stay_small(module: Module) -> None:
    """A function fits a screen."""
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in module.functions()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


@every_module
def test_functions_take_few_parameters(module: Module) -> None:
    """Beyond six, a frozen dataclass; commands are exempt, as their parameters are what a person types."""
    too_many = {node.name: _num_parameters(node) for node in module.functions() if not _is_command(module, node)}
    assert {name: count for name, count in too_many.items() if count > MAX_PARAMETERS} == {}


def _num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _is_command(module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return module.layer == "swarm.cli" and not node.name.startswith("_")


@every_module
def test_nothing_is_left_for_later(module: Module) -> None:
    """What is open stands in an issue, not in the code."""
    assert re.findall(r"\b(?:TODO|FIXME|XXX)\b", module.text) == []


@every_module
def test_names_are_the_glossarys(module: Module) -> None:
    """One word per idea: what docs/glossary.md refuses is the name of nothing that we define."""
    words = {word for name in _defined(module.tree) for word in _words(name)}
    assert words & REFUSED_WORDS == set()


def test_refused_words_are_in_the_glossary() -> None:
    """The list above and the page agree."""
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").lower()
    assert [word for word in REFUSED_WORDS if word.removesuffix("s") not in glossary] == []


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
