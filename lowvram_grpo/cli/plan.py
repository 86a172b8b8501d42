"""`lowvram-grpo plan`: will it fit, what was chosen, where does each GiB go."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lowvram_grpo.cli.flags import parse_extra
from lowvram_grpo.errors import UserError
from lowvram_grpo.run.quiet import hush

if TYPE_CHECKING:
    from lowvram_grpo.plan.planner import Plan

GIB = 2**30


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
    start(model, vram, preset, context.args, config=config, as_json=as_json)


def start(
    model: str | None, vram: float | None, preset: str | None, extra: list[str], *, config: Path | None, as_json: bool
) -> None:
    """Print one plan, or with neither card nor preset the plans of all presets.

    Raises:
        UserError: an unknown model, preset or flag.
    """
    hush()
    from lowvram_grpo.jobs.loading import adopt_stored_quantization
    from lowvram_grpo.plan.architectures import resolve_config
    from lowvram_grpo.plan.fitting import plan_on_paper
    from lowvram_grpo.policy.model_names import told_of_shape
    from lowvram_grpo.recipe import preset as presets
    from lowvram_grpo.recipe.resolve import resolve

    if vram is not None and not vram > 2:
        raise UserError(f"--vram is {vram:g}; it must be a size of card above 2 GB, as in --vram 8.")
    flags = {"model": model, **parse_extra(extra)}
    chosen = preset or (presets.pick_for_gib(vram) if vram is not None else None)
    names = [chosen] if chosen else [name for name in presets.names() if presets.load(name).vram_gib is not None]
    recipes = [resolve({**flags, "preset": name}, config) for name in names]
    model = recipes[0].model
    if not model:
        raise UserError("No model given; pass --model with a well-known name, a folder or a config.json.")
    say = (lambda sentence: None) if as_json else lambda sentence: print(f"[lowvram-grpo] {sentence}")
    told_of_shape(model, say)
    resolved, source = resolve_config(model, **recipes[0].hub_arguments)
    for number, recipe in enumerate(recipes):
        if not adopt_stored_quantization(recipe, resolved, (lambda sentence: None) if number else say):
            raise UserError(
                f"{model!r} is stored in a format whose memory is not counted; plan for the model that it was made "
                "from, as in --model Qwen2.5-7B --quantization nf4."
            )
    cards = [vram if vram is not None else presets.load(recipe.preset).vram_gib for recipe in recipes]
    if None in cards:
        raise UserError(f"Preset {chosen} has no card to plan for; take one of 4gb to 24gb, or pass --vram.")
    if chosen is None:
        plans = [plan_on_paper(recipe, resolved, card, advise=False) for recipe, card in zip(recipes, cards)]
        matrix(plans, cards, source, as_json)
        return
    found = plan_on_paper(recipes[0], resolved, cards[0])
    if as_json:
        print(json.dumps({**found.as_json(), "vram_gib": cards[0]}, indent=2))
    else:
        show(found, cards[0], source)


def matrix(plans: list[Plan], cards: list[float], source: str, as_json: bool) -> None:
    """One line a preset."""
    if as_json:
        rows = [{**plan.as_json(), "vram_gib": card} for plan, card in zip(plans, cards)]
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False, title=_name(plans[0], source), title_justify="left")
    for column in ("preset", "card", "budget", "peak", "fits", "changed from the preset"):
        table.add_column(column, justify="right" if column in ("card", "budget", "peak") else "left")
    for plan, card in zip(plans, cards):
        changed = [*map(str, plan.rungs), *(climb.words for climb in plan.climbs)]
        table.add_row(
            plan.recipe.preset, f"{card:g} GB", f"{plan.budget / GIB:.1f}", f"{plan.prediction.peak / GIB:.2f}",
            "[green]yes[/green]" if plan.fits else "[red]no[/red]", ", ".join(changed) or "nothing",
        )  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    console.print(_HOW)


_HOW = (
    "GiB. Budget: what a Windows desktop leaves of such a card. Peaks are predicted (docs/memory.md), CUDA context "
    "included; --vram or --preset shows one in full, with reasons; --memory-plan savers never climbs. In brackets: the "
    "preset's."
)


def raised(console: Console, plan: Plan) -> None:
    """What went up from the preset, and what each of it buys."""
    if plan.layers is not None:
        console.print("raised from the preset, as layers come over the bus once a pass, whatever it is for (modelled):")
    else:
        console.print(
            f"climbed from the preset, as memory is left: a step takes {plan.time:.0%} of the preset's time (modelled "
            f"by counts for {plan.card}, not measured)"
        )
    for climb in plan.climbs:
        share = f" ({climb.share:+.0%} without)" if climb.share >= 0.005 else ""
        before, now = (str(value).lower() for value in (climb.before, climb.rung.value))
        text = f"{climb.rung.key} {before} -> {now}{share}: {climb.reason}"
        console.print(fill(text, console.width, initial_indent="  ", subsequent_indent="    "))


def _name(plan: Plan, source: str) -> str:
    """The model, and where its configuration is from if that says more."""
    model = str(plan.recipe.model)
    return model if model in source or source in model else f"{model} ({source})"


def show(plan: Plan, card: float, source: str) -> None:
    """The plan in full, for people."""
    from lowvram_grpo.memory.ram import words
    from lowvram_grpo.plan.paper import setting

    console, found = Console(highlight=False), plan.prediction
    verdict = "[green]fits[/green]" if plan.fits else "[red]does not fit[/red]"
    console.print(f"[bold]{_name(plan, source)}[/bold]")
    console.print(
        f"{verdict}: peak {found.peak / GIB:.2f} GiB of {plan.budget / GIB:.1f}, which a Windows desktop leaves of "
        f"{card:g} GB; preset {plan.recipe.preset}", soft_wrap=True,
    )  # fmt: skip
    keys = ("num_generations", "prompts_per_step", "max_prompt_length", "max_completion_length")
    console.print("  " + ", ".join(f"{key} {setting(plan.recipe, key)}" for key in keys))
    phases = Table(box=None, pad_edge=False)
    phases.add_column("phase")
    phases.add_column("peak GiB", justify="right")
    phases.add_column("")
    for name, size in found.phases.items():
        bar = "█" * round(40 * size / max(plan.budget, found.peak))
        phases.add_row(name, f"{size / GIB:.2f}", f"[{'cyan' if size <= plan.budget else 'red'}]{bar}[/]")
    console.print(phases)
    parts = Table(box=None, pad_edge=False)
    parts.add_column(f"at the peak ({found.peak_phase})")
    parts.add_column("MiB", justify="right")
    for name, size in sorted(found.categories.items(), key=lambda item: -item[1]):
        parts.add_row(name, f"{size / 2**20:,.0f}")
    console.print(parts)
    if found.on_host:
        console.print(f"host memory: {words(found.host)}, beside Python's own; page-locked, but for an embedding")
    console.print("savers taken on top of the preset: " + (", ".join(map(str, plan.rungs)) or "none"))
    if plan.climbs:
        raised(console, plan)
    for price in filter(None, (plan.streaming, plan.layers, plan.fetching)):
        console.print(price.words)
    for sentence in plan.advice:
        console.print(f"instead: {sentence}")
