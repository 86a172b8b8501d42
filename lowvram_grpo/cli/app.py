"""The command line: its commands, and what becomes of an error. A command imports its work when it is called: `--help`
loads neither torch nor transformers."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lowvram_grpo import __version__
from lowvram_grpo.cli import bench
from lowvram_grpo.cli.chat import chat
from lowvram_grpo.cli.demo import demo
from lowvram_grpo.cli.doctor import doctor
from lowvram_grpo.cli.eval import evaluate
from lowvram_grpo.cli.flags import MORE_FLAGS
from lowvram_grpo.cli.plan import plan
from lowvram_grpo.cli.presets import presets
from lowvram_grpo.cli.report import report
from lowvram_grpo.cli.train import train
from lowvram_grpo.errors import Stopped, Terminated, UserError, one_line
from lowvram_grpo.faults import boundary, report_of, while_doing

_GRACE_SECONDS = 5.0

app = typer.Typer(
    name="lowvram-grpo",
    help="GRPO for language models on the GPU you already own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lowvram-grpo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error, with any command.")] = False,
) -> None:
    """GRPO for language models on the GPU you already own."""


app.command(context_settings=MORE_FLAGS)(train)
app.command(context_settings=MORE_FLAGS)(plan)
app.command()(demo)
app.command()(doctor)
app.command()(presets)
app.command(context_settings=MORE_FLAGS)(chat)
app.command("eval", context_settings=MORE_FLAGS)(evaluate)
app.command()(report)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point: one sentence and exit code 2 for what a person can mend, 1 for a bug of ours (its traceback goes
    into a file), 130 for Ctrl-C, 143 for SIGTERM. `--debug`, anywhere on the line, prints tracebacks."""
    signal.signal(signal.SIGTERM, _on_terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    debug = "--debug" in sys.argv[1:]
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        with boundary():
            code = app(arguments, standalone_mode=False)
    except Stopped as stop:
        code = stop.code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as error:
        if debug:
            traceback.print_exception(type(error), error, error.__traceback__)
        _fail(error)
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> NoReturn:
    """Exit. Where threads that a reward function has started still run (`rewards.guards`), Python would wait for them:
    a few seconds are enough."""
    left = [t for t in threading.enumerate() if getattr(t, "left_by_reward", False) and not t.daemon]

    def end() -> None:
        for thread in left:
            thread.join(_GRACE_SECONDS / len(left))
        if alive := [thread.name for thread in left if thread.is_alive()]:
            print(f"[lowvram-grpo] threads of a reward function still run: {', '.join(alive)}; ending without them.",
                  file=sys.stderr)  # fmt: skip
            os._exit(code)

    if left:
        threading.Thread(target=end, daemon=True).start()
    sys.exit(code)


def _on_terminate(signum, frame) -> None:
    # An exception, unlike the default, leaves the live view: the terminal gets its cursor back.
    raise Terminated(128 + signum)


def _fail(error: Exception) -> NoReturn:
    if isinstance(error, UserError):
        sentence, code = str(error), 2
    # typer's own usage errors; their class moved when typer took click in, so they are known by what they can do.
    elif hasattr(error, "format_message"):
        sentence, code = error.format_message(), 2
    else:
        sentence, code = _bug(error), 1
    if sentence:  # a bare `lowvram-grpo` has none: typer has printed the help already
        print(f"error: {sentence}", file=sys.stderr)
    _leave(code)


def _bug(error: Exception) -> str:
    """A sentence for an error that nobody foresaw, and its report in a file."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}, line {last.lineno}"
    said = f"{type(error).__name__}{while_doing(error)}: {one_line(error)} ({place})"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lowvram-grpo-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(report_of(error))
        where = f"please report it with {file.name}, which holds the traceback"
    except OSError:
        where = "please report it with what --debug prints"
    return f"{said}. This looks like a bug of lowvram-grpo; {where}."


if __name__ == "__main__":
    main()
