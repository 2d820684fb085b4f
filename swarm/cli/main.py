"""`swarm`: the one command, its subcommands, and what every error becomes.

Decides names, order and exit codes; leaves each command to its module. Nothing heavy is imported before a command
runs, so that `swarm --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from swarm.cli import (
    audit,
    compare,
    data,
    download,
    evaluate,
    export,
    generate,
    init,
    keys,
    leaderboard,
    plan,
    push,
    researcher,
    run,
    seeds,
)
from swarm.errors import DiskFull, PortInUse, ResourceError, SwarmError

EXIT_USAGE = 64  # sysexits.h EX_USAGE
EXIT_BUG = 70  # EX_SOFTWARE
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE

_EPILOG = """\b
Exit codes (sysexits.h):
  0   done
  64  the command line is wrong
  65  an input file or invite cannot be used
  69  somebody cannot be reached; trying again may help
  70  a bug; --debug shows the traceback
  74  the machine lacks something: disk, device, port
  75  already running with the same key or folder
  76  bytes that are not what they claim; do not use them
  77  this peer is not admitted to the run
  78  a setting is wrong; the message says which
  130 interrupted
  141 whoever read the output is gone"""

# Newer typers carry their own click, older ones use the public one: a public name of typer leads to either's base.
_CommandLineError: Any = typer.BadParameter.__mro__[2]


@dataclass(slots=True)
class _Options:
    debug: bool = False


app = typer.Typer(
    name="swarm",
    help="Volunteers train language models together: join a run, start one, or use what one made.",
    epilog=_EPILOG,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS = (
    (run.join, "Train in the run that an invite names."),
    (init.init, "Write a run file to edit and start."),
    (plan.plan, "Show which spans of a run fit into how much memory."),
    (run.start, "Sign a run file's rules, serve the run, print its invite."),
    (run.seed, "Keep a seed peer of a run."),
    (seeds.seeds, "List who may keep a further seed peer of a run."),
    (run.status, "Show a run's rounds, loss and who contributed."),
    (researcher.checkpoints, "List the checkpoints that a run published."),
    (download.download, "Fetch a checkpoint from a run's peers and mirrors, verified."),
    (download.verify, "Check a checkpoint folder, offline."),
    (audit.audit, "Recompute a checkpoint from the run's signed log."),
    (generate.generate, "Continue a text with a checkpoint."),
    (export.export, "Write a checkpoint in another format: bf16, GGUF."),
    (leaderboard.leaderboard, "Compare the checkpoints of one or several runs."),
    (push.push, "Upload a checkpoint to the Hugging Face Hub."),
    (push.sign, "Sign a checkpoint as OpenSSF's model-signing does."),
    (compare.diff, "Show what changed between two checkpoints."),
    (compare.lineage, "Show where a checkpoint comes from."),
)
for _command, _summary in _COMMANDS:
    app.command(_command.__name__, short_help=_summary)(_command)
app.command("eval", short_help="Measure a checkpoint with lm-evaluation-harness.")(evaluate.evaluate)
app.add_typer(keys.app, name="keys", short_help="Show and change who governs a run, k of n.")
app.add_typer(data.app, name="data", short_help="Turn text into what a run trains on.")


@app.callback(invoke_without_command=True)
def _swarm(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    context.ensure_object(_Options).debug = debug
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"swarmtrain {version_of('swarmtrain')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in ``arguments`` (the process's own where None) and exit with its code."""
    sys.exit(_run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: list[str]) -> int:
    options = _Options()
    try:
        command = typer.main.get_command(app)
        code = command.main(arguments, prog_name="swarm", standalone_mode=False, obj=options)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except SystemExit as error:
        # typer's own way of ending when whoever read our output is gone.
        if isinstance(error.__context__, BrokenPipeError):
            return EXIT_PIPE_CLOSED
        raise
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    """Print ``error`` as one line, and one of advice; the exit code."""
    code, what, advice = explain(error)
    print(f"error: {' '.join(what.split())}", file=sys.stderr)
    if advice:
        print(f"  → {' '.join(advice.split())}", file=sys.stderr)
    return code


def explain(error: Exception) -> tuple[int, str, str]:
    """(exit code, what and why, what to do) of ``error``."""
    if isinstance(error, SwarmError):
        return error.exit_code, str(error), error.advice
    if isinstance(error, OSError):
        named = _named(error)
        return named.exit_code, str(named), named.advice
    if isinstance(error, _CommandLineError):
        context = getattr(error, "ctx", None)
        advice = f"see: {context.command_path} --help" if context is not None else ""
        return EXIT_USAGE, error.format_message(), advice
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return EXIT_BUG, what, "run again with --debug (swarm --debug ...) for the traceback, and report it"


def _named(error: OSError) -> SwarmError:
    where = f": {error.filename}" if error.filename else ""
    what = f"{error.strerror or error}{where}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(what, "free some space and run the same command again; nothing finished is lost")
    if error.errno == errno.EADDRINUSE:
        return PortInUse(what, "choose another port, or stop what uses this one")
    return ResourceError(what, "check that the file is there, and that you may use it")


if __name__ == "__main__":
    main()
