"""`lowvram-grpo train`: flags to a recipe, a recipe to a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from lowvram_grpo.cli.flags import OutputDir, parse_extra
from lowvram_grpo.cli.terminal import prepare_cuda
from lowvram_grpo.errors import UserError
from lowvram_grpo.faults import boundary
from lowvram_grpo.run.quiet import hush


def _help_all(wanted: bool) -> None:
    if wanted:
        from lowvram_grpo.cli.fields import show

        show()
        raise typer.Exit


Tools = Annotated[
    list[str] | None,
    typer.Option(help="Functions that the model may call: file.py, or file.py:name,name2. Repeatable."),
]
Weights = Annotated[
    str | None, typer.Option(help="How often a row is of each --data, as in 0.7,0.3; default: every row once.")
]
Environment = Annotated[str | None, typer.Option(help="Environment that the model acts in: file.py:Class.")]


def train(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, GGUF file, hub id, or name such as Qwen2.5-0.5B.")
    ] = None,
    model_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="save_to_disk folder, json/jsonl/csv/parquet file or folder, hub id, or reasoning-gym:TASK. "
            "Repeatable: rows of all are mixed.",
        ),
    ] = None,
    data_weights: Weights = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the data while training, without a copy; takes --max-steps.")
    ] = False,
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
            help="Built-in name, file.py:function, module:function, http://address or reward model; append :weight. "
            "Repeatable.",
        ),
    ] = None,
    tools: Tools = None,
    environment: Environment = None,
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
    output_dir: OutputDir = None,
    resume: Annotated[str | None, typer.Option(help="Run directory to go on with.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")] = False,
    help_all: Annotated[
        bool,
        typer.Option("--help-all", callback=_help_all, is_eager=True, help="List the flags of GRPOConfig, and exit."),
    ] = False,
) -> None:
    """Train a LoRA adapter with GRPO. Every GRPOConfig field is a flag too; --help-all lists them."""
    options = dict(locals())
    for apart in ("context", "config", "resume", "dry_run", "help_all"):
        del options[apart]
    start(options, context.args, config=config, resume=resume, dry_run=dry_run)


def start(options: dict[str, Any], extra: list[str], *, config: Path | None, resume: str | None, dry_run: bool) -> None:
    """Resolve and run. With `resume`, the recipe of that run is the recipe file.

    Raises:
        UserError: an unknown flag, or whatever the job finds wrong.
    """
    notice = prepare_cuda()
    hush()
    from lowvram_grpo.policy.hub import offline_where_unreachable
    from lowvram_grpo.policy.model_names import named
    from lowvram_grpo.recipe.resolve import resolve
    from lowvram_grpo.run.directory import RunDirectory

    flags = {key: value for key, value in options.items() if not (value is None or value is False or value == [])}
    flags |= parse_extra(extra)
    if "output_dir" in flags:
        flags["output_dir"] = str(flags["output_dir"])
    held: AbstractContextManager = nullcontext()
    if resume:
        if config:
            raise UserError("--resume takes the recipe of its run; drop --config.")
        directory = RunDirectory.open(resume)
        config = directory.recipe_path
        if not dry_run:
            # Before the recipe is read: another process may be about to write it.
            held = directory.lock()
    say = lambda sentence: print(f"[lowvram-grpo] {sentence}")
    if notice:
        say(notice)
    with held:
        recipe = resolve(flags, config)
        recipe.resume = resume
        if recipe.model:
            recipe.model = named(recipe.model, say)
        offline_where_unreachable([recipe.model, recipe.adapter, *recipe.places, recipe.eval_data], say)
        from lowvram_grpo.jobs.train import run  # after the flags: it takes seconds, and most mistakes are made there

        with boundary(recipe.given_settings()):
            run(recipe, dry_run=dry_run)
