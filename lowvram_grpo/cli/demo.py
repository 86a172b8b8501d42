"""`lowvram-grpo demo`: the bundled model, prompts and recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram_grpo.cli.flags import OutputDir
from lowvram_grpo.errors import UserError
from lowvram_grpo.run.quiet import hush

_ASSETS = Path(__file__).resolve().parent.parent / "demo"


def demo(
    output_dir: OutputDir = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")] = False,
) -> None:
    """Train the small bundled model on the bundled prompts: no network, no GPU, a minute or two."""
    start(output_dir, steps, plain=plain)


def start(output_dir: Path | None, steps: int | None, *, plain: bool) -> None:
    """Train on the CPU whatever the machine has: the demo is the same everywhere.

    Raises:
        UserError: `steps` is no number of steps.
    """
    if steps is not None and steps < 1:
        raise UserError(f"--steps is {steps}; the demo takes 1 step or more (leave it out for the whole demo).")
    hush()
    from lowvram_grpo.jobs.train import run
    from lowvram_grpo.recipe.resolve import resolve
    from lowvram_grpo.recipe.tables import read_table

    recipe_file = _ASSETS / "recipe.toml"
    table = read_table(recipe_file)
    flags = {"model": str(_ASSETS / table["model"]), "data": str(_ASSETS / table["data"]), "preset": "cpu"}
    flags |= {
        "use_cpu": True,
        "max_steps": steps,
        "output_dir": str(output_dir) if output_dir else None,
        "plain": plain,
    }
    directory = run(resolve({k: v for k, v in flags.items() if v not in (None, False)}, recipe_file))
    _summary(directory)


def _summary(directory: Path) -> None:
    """First and last steps side by side: what the demo is there to show."""
    from lowvram_grpo.run.directory import RunDirectory
    from lowvram_grpo.run.metrics import ends

    rewards = [row["reward"] for row in RunDirectory(directory).metrics() if row.get("reward") is not None]
    first, last = ends(rewards)
    if first:
        before, after = sum(first) / len(first), sum(last) / len(last)
        over = "step" if len(first) == 1 else f"{len(first)} steps"
        print(f"mean reward: {before:.3f} over the first {over}, {after:.3f} over the last {over}.")
    elif last:
        print(f"mean reward: {last[0]:.3f} in the only step.")
