"""The command line. A command's module is imported when the command is called: `--help` loads neither torch nor
transformers."""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lowvram_grpo import __version__
from lowvram_grpo.cli import bench
from lowvram_grpo.cli.report import report
from lowvram_grpo.cli.sampling import chat, evaluate
from lowvram_grpo.errors import Stopped, Terminated, UserError, one_line
from lowvram_grpo.faults import boundary, report_of, while_doing

app = typer.Typer(
    name="lowvram-grpo",
    help="GRPO for language models on the GPU you already own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_Out = Annotated[
    Path | None, typer.Option("--output-dir", "-o", help="Run directory; default runs/<model>-<data>-<time>.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lowvram-grpo {__version__}")
        raise typer.Exit


def _help_all(wanted: bool) -> None:
    if wanted:
        from lowvram_grpo.cli.fields import show

        show()
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error, with any command.")] = False,
) -> None:
    """GRPO for language models on the GPU you already own."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, GGUF file, hub id, or name such as Qwen2.5-0.5B.")
    ] = None,
    model_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="save_to_disk folder, json/jsonl/csv/parquet file or folder, or hub id."),
    ] = None,
    data_config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to train on; default train.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Data to evaluate on.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Split to evaluate on.")] = None,
    template: Annotated[str | None, typer.Option("--template", "-t", help="tldr, tldr-zh or r1.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompts.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column with the reference answers.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt; replaces the template's.")] = None,
    few_shot: Annotated[
        str | None, typer.Option(help="json file with a list of {prompt, completion} shown first.")
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="`plain` (base models) or a .jinja file.")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            "-r",
            help="Built-in name, file.py:function, module:function or reward model; append :weight. Repeatable.",
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="auto, or one of `lowvram-grpo presets`.")] = None,
    memory_plan: Annotated[
        str | None,
        typer.Option(help="auto (savers where memory is short, climb where it is left), savers, or off."),
    ] = None,
    quantization: Annotated[str | None, typer.Option("--quantization", "-q", help="none, int8 or nf4.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager or flash_attention_2.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Start from this LoRA adapter; it becomes the reference too.")
    ] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Scale of the adapter.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Dropout of the adapter; default 0.")] = None,
    lora_target_modules: Annotated[
        str | None, typer.Option(help="all-linear, or module names separated by commas.")
    ] = None,
    cold_start: Annotated[
        str | None, typer.Option(help="auto, off, or a number of supervised steps on the references.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Recipe file, TOML or YAML (TRL's keys work).")
    ] = None,
    output_dir: _Out = None,
    resume: Annotated[str | None, typer.Option(help="Run directory to go on with.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")] = False,
    help_all: Annotated[
        bool,
        typer.Option("--help-all", callback=_help_all, is_eager=True, help="List the flags of GRPOConfig, and exit."),
    ] = False,
) -> None:
    """Train a LoRA adapter with GRPO. Every GRPOConfig field is a flag too; --help-all lists them."""
    from lowvram_grpo.cli.train import start

    options = dict(locals())
    for apart in ("context", "config", "resume", "dry_run", "help_all", "start"):
        del options[apart]
    start(options, context.args, config=config, resume=resume, dry_run=dry_run)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Well-known name, folder, config.json, GGUF file or hub id.")
    ] = None,
    vram: Annotated[float | None, typer.Option(help="Size of the card in GB; without it, every preset's.")] = None,
    preset: Annotated[str | None, typer.Option(help="One of `lowvram-grpo presets`; default by --vram.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Recipe file, TOML or YAML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the GPU memory of a training run, phase by phase, without a GPU. Takes the flags of train, those of
    GRPOConfig (train --help-all) too."""
    from lowvram_grpo.cli.plan import start

    start(model, vram, preset, context.args, config=config, as_json=as_json)


@app.command()
def demo(
    output_dir: _Out = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")] = False,
) -> None:
    """Train the small bundled model on the bundled prompts: no network, no GPU, a minute or two."""
    from lowvram_grpo.cli.demo import start

    start(output_dir, steps, plain=plain)


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing, and which line mends it."""
    from lowvram_grpo.cli.doctor import start

    raise typer.Exit(start())


@app.command()
def presets(
    words: Annotated[list[str] | None, typer.Argument(metavar="[[show] NAME]", help="Show this one whole.")] = None,
) -> None:
    """List the presets, or show one with its ladder."""
    from lowvram_grpo.cli.presets import start

    start(words or [])


_more = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_more)(chat)
app.command("eval", context_settings=_more)(evaluate)
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
    sys.exit(code if isinstance(code, int) else 0)


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
    sys.exit(code)


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
