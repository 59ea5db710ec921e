"""The Typer app, and ``main``: one line for what a person can put right, a traceback only with ``--debug``."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from uad_plugins.errors import UadxError
from uad_plugins.registry import registry
from uadx import __version__
from uadx.commands import data, deploy, doctor, evaluate, plugins, predict, quantize, quickstart, teacher, thresholds, train

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

app = typer.Typer(
    name="uadx",
    help="One model for many products: train, evaluate and run visual anomaly detection on the edge.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"uadx {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""


app.command("quickstart")(quickstart.quickstart)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("quantize")(quantize.quantize)
app.command("deploy")(deploy.deploy)
app.command("predict")(predict.predict)
app.command("thresholds")(thresholds.thresholds)
app.add_typer(data.app, name="data")
app.add_typer(teacher.app, name="teacher")
app.add_typer(plugins.app, name="plugins")
app.command("doctor")(doctor.doctor)


def add_plugin_commands(application: typer.Typer) -> None:
    """Add the commands of the installed plugins; the registry has none with the name of a built-in one."""
    for command in registry().items("command"):
        own = command.app
        if own.registered_callback is None and len(own.registered_commands) == 1 and not own.registered_groups:
            (single,) = own.registered_commands
            single.name, single.help = command.name, single.help or command.summary
            application.registered_commands.append(single)
        else:
            application.add_typer(own, name=command.name, help=command.summary)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or bool(os.environ.get("UADX_DEBUG"))
    # Before or after the command, as one types it.
    words = [word for word in words if word != "--debug"]
    if not debug:
        # Libraries warn their developers, at import already, of what users can do nothing about.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # It misses a GPU where there is a compiler for one.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: a file's name may hold what the terminal cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        add_plugin_commands(app)
        app(args=words, prog_name="uadx")
    except UadxError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {_line(error.message)}\n")
        if error.hint:
            sys.stderr.write(f"hint: {_line(error.hint)}\n")
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        # Typer takes Ctrl-C and a reader who has enough for itself, and says nothing of either.
        if leaving.code == INTERRUPTED:
            sys.stderr.write("interrupted\n")
        raise
    except KeyboardInterrupt:
        # While the commands of plugins are loaded.
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    except OSError as error:
        if debug:
            raise
        message, hint = _of_the_system(error)
        sys.stderr.write(f"error: {_line(message)}\nhint: {_line(hint)}\n")
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        sys.stderr.write(f"error: {type(error).__name__}: {_line(str(error))}\n")
        sys.stderr.write("hint: run it again with --debug to see where\n")
        sys.exit(1)


def _of_the_system(error: OSError) -> tuple[str, str]:
    """Return what the operating system refused, in words, and what to do about it."""
    if not error.filename:
        return f"{type(error).__name__}: {error}", "run it again with --debug to see where"
    path = Path(os.fsdecode(error.filename))
    # What is written is made ready under a hidden name beside its own.
    path = path.parent if path.name.startswith(".") and not path.exists() else path
    cache = os.environ.get("UADX_CACHE")
    if cache and path.is_relative_to(Path(cache).expanduser()):
        hint = "set UADX_CACHE to a folder that you may write to"
    elif isinstance(error, PermissionError):
        hint = "name another place, or change its permissions"
    elif isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        hint = "a file is where a folder is needed, or the other way round: name another place"
    elif error.errno == errno.ENOSPC:
        hint = "make room on the disk, and run it again"
    else:
        hint = "check the path; run it again with --debug to see where"
    return f"{path}: {error.strerror}", hint


def _line(text: str) -> str:
    # Blanks within a line may be part of a file's name.
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
