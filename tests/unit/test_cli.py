"""The command line's frame: exit codes, one line per error, a quick help, two looks of output."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarm import errors, presets, run_file
from swarm.cli import main, output
from swarm.errors import SwarmError

HEAVY = ("torch", "transformers", "hivemind", "grpc", "sqlalchemy", "alembic", "pyarrow", "tokenizers", "bitsandbytes")


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main.main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(preset_name: str, run_name: str) -> None:
        raise error

    monkeypatch.setattr(presets, "preset", fail)


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """What a person can type, and what a script can rely on."""
    assert _run("--help") == 0
    shown = capsys.readouterr().out
    commands = ["join", "init", "data", "start", "seed", "status", "checkpoints", "download", "verify", "generate"]
    assert [name for name in commands if f"\n  {name} " not in shown] == []
    codes = {value.exit_code for value in vars(errors).values() if isinstance(value, type)} | {0, 64, 130, 141}
    assert [code for code in codes if f"\n    {code} " not in shown] == []


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """`swarm` alone is a question, not a mistake."""
    assert _run() == 0
    assert capsys.readouterr().out.startswith("Usage: swarm")


def test_help_imports_nothing_heavy() -> None:
    """No model, network or database library is imported before a command runs."""
    code = (
        "import sys\nfrom swarm.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = {module.partition(".")[0] for module in done.stderr.split()}
    assert "typer" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_help_answers_at_once() -> None:
    """The best of five tries stays far under what an import of torch takes; the aim is 0.4 s on an idle machine."""
    best_s = float("inf")
    for _ in range(5):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "swarm.cli.main", "--help"], capture_output=True, timeout=60, check=True)
        best_s = min(best_s, time.monotonic() - started)
    assert best_s < 1.0


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    """`swarm --version` names distribution and version."""
    from importlib.metadata import version

    assert _run("--version") == 0
    assert capsys.readouterr().out == f"swarmtrain {version('swarmtrain')}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jion"], "No such command 'jion'"),
        (["init"], "Missing argument"),
        (["init", "x", "--colour"], "--colour"),
        (["--debgu"], "--debgu"),
    ],
)
def test_a_usage_error_exits_64(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """EX_USAGE, one line of what, one line of where to look."""
    assert _run(*arguments) == 64
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ") and said in lines[0]
    assert lines[1].startswith("  → see: swarm")


NAMED = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SwarmError)]


@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: str(kind.__name__))
def test_a_named_error_is_two_lines_and_its_exit_code(
    kind: type[SwarmError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What and why, then the advice; never a traceback."""
    _fail_with(monkeypatch, kind("it broke\nbadly", "mend it"))
    assert _run("init", "x") == kind.exit_code
    assert capsys.readouterr().err == "error: it broke badly\n  → mend it\n"


def test_an_error_without_advice_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No empty arrow."""
    _fail_with(monkeypatch, errors.NotFound("no such round"))
    assert _run("init", "x") == 69
    assert capsys.readouterr().err == "error: no such round\n"


def test_an_unexpected_error_is_one_line_without_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bug exits 70 and says how to see more."""
    _fail_with(monkeypatch, ValueError("surprise"))
    assert _run("init", "x") == 70
    shown = capsys.readouterr().err
    assert shown.startswith("error: ValueError: surprise\n  → run again with --debug")
    assert "Traceback" not in shown


@pytest.mark.parametrize("error", [ValueError("surprise"), errors.NotFound("gone")], ids=["bug", "named"])
def test_debug_shows_the_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --debug, and only then, of any error."""
    _fail_with(monkeypatch, error)
    assert _run("--debug", "init", "x") == main.explain(error)[0]
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_exits_130_in_silence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """128 + SIGINT, as shells count, and nothing on stderr."""
    _fail_with(monkeypatch, KeyboardInterrupt())
    assert _run("init", "x") == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, errors.DiskFull),
        (errno.EDQUOT, errors.DiskFull),
        (errno.EADDRINUSE, errors.PortInUse),
        (errno.EACCES, errors.ResourceError),
    ],
)
def test_errors_of_the_system_get_a_name(number: int, kind: type[SwarmError]) -> None:
    """A full disk, a port in use and a forbidden file are told in words, with advice."""
    code, what, advice = main.explain(OSError(number, "in words", "/some/file"))
    assert (code, what) == (kind.exit_code, "in words: /some/file")
    assert advice


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    """`swarm ... | head` leaves no traceback behind."""
    code = (
        "import os, sys; from swarm.cli.main import main; sys.stdout = os.fdopen(int(sys.argv[1]), 'w'); main(['-h'])"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code, str(writer)], capture_output=True, text=True, timeout=60, pass_fds=[writer]
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_init_writes_a_run_file_that_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NAME/run.toml, named after the folder, of the preset that was asked for."""
    assert _run("init", str(tmp_path / "my-run"), "--preset", "tiny", "--json") == 0
    target = tmp_path / "my-run" / "run.toml"
    assert json.loads(capsys.readouterr().out) == {"run_file": str(target), "preset": "tiny", "data": "data"}
    assert run_file.parse(target.read_text()) == presets.tiny("my-run")


def test_init_points_at_existing_data(tmp_path: Path) -> None:
    """--data is written relative to the run file, so that the folder can move with it."""
    assert _run("init", str(tmp_path / "x"), "--data", str(tmp_path / "text-data")) == 0
    assert run_file.parse((tmp_path / "x" / "run.toml").read_text()).data.path == "../text-data"


def test_init_overwrites_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An edited run file is not lost to a second `swarm init`."""
    target = tmp_path / "x" / "run.toml"
    assert _run("init", str(tmp_path / "x")) == 0
    target.write_text("mine")
    assert _run("init", str(tmp_path / "x")) == 78
    assert target.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert _run("init", str(tmp_path / "x"), "--force") == 0
    assert run_file.parse(target.read_text()) == presets.demo("x")


@pytest.mark.parametrize(
    ("arguments", "said"), [(["x", "--preset", "tinny"], "did you mean 'tiny'?"), (["bad name"], "name: ")]
)
def test_init_with_bad_input_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip in the preset or the name is told before a folder is made."""
    monkeypatch.chdir(tmp_path)
    assert _run("init", *arguments) == 78
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_init_help_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    """The help is written out, so that it needs no import; it names what there is."""
    assert _run("init", "--help") == 0
    shown = capsys.readouterr().out
    assert [name for name in presets.PRESETS if name not in shown] == []


def test_a_table_is_aligned_lines_when_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns line up, no frame, no trailing blanks."""
    output.table("Peers", ["peer", "tokens"], [["a", 5], ["longer", 12]])
    assert capsys.readouterr().out == "Peers\npeer    tokens\na       5\nlonger  12\n"


def test_json_is_json_whatever_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """NaN and infinity, which JSON cannot say, become null; words stay readable."""
    output.print_json({"loss": float("nan"), "rounds": [1, float("inf")], "name": "é"})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"loss": None, "rounds": [1, None], "name": "é"}
    assert "é" in shown


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_plain_progress_is_a_line_per_tenth_and_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a fast nor a long job floods a log."""
    clock = Clock()
    with output._plain_progress(1000, "files", "reading", clock) as advance:
        for _ in range(1000):
            clock.now_s += 0.11
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 100 of 1000 files (10 %)"
    assert lines[-1] == "reading: 1000 of 1000 files (100 %)"
    assert len(lines) == 10


def test_fast_progress_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A job of a moment says that it is done, once."""
    with output.progress(10, "files") as advance:
        for _ in range(10):
            advance()
    assert capsys.readouterr().err == "10 of 10 files (100 %)\n"


def test_progress_of_nothing_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """No work, no line, no division by zero."""
    with output.progress(0, "files"):
        pass
    assert capsys.readouterr().err == ""


def test_a_live_view_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """Elsewhere than on a terminal: the newest values, at most every interval."""
    clock = Clock()
    with output.LiveView("training", interval_s=5.0, clock=clock) as view:
        for _ in range(12):
            view.update({"round": clock.now_s})
            clock.now_s += 1.0
    assert capsys.readouterr().out.splitlines() == [f"training: round {at}" for at in (0.0, 5.0, 10.0)]


def test_a_live_view_stops_showing_what_became_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """As what training waits for: an old reason would stay for ever."""
    clock = Clock()
    with output.LiveView("training", interval_s=1.0, clock=clock) as view:
        for waits_for in ("", "shard 1", ""):
            view.update({"round": 1, "waits for": waits_for})
            clock.now_s += 1.0
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["training: round 1", "training: round 1, waits for shard 1", "training: round 1"]


def _terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_a_terminal_gets_frames_bars_and_redrawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same three calls, drawn; text of others is shown, not interpreted as markup."""
    terminal = _terminal(monkeypatch)
    output.table("Peers", ["peer"], [["[red]x"]])
    with output.progress(2, "files", "reading") as advance:
        advance(2)
    with output.LiveView("training") as view:
        view.update({"round": 7, "who": "[blink]y"})
    shown = terminal.getvalue()
    assert "[red]x" in shown and "┃" in shown
    assert "2/2" in shown
    assert "[blink]y" in shown and "7" in shown
