"""`lowvram-grpo demo`: the bundled model, prompts and recipe."""

from __future__ import annotations

from pathlib import Path

from lowvram_grpo.cli.quiet import hush

_ASSETS = Path(__file__).resolve().parent.parent / "demo"


def start(output_dir: Path | None, steps: int | None, *, plain: bool) -> None:
    """Train on the CPU whatever the machine has: the demo is the same everywhere."""
    hush()
    from lowvram_grpo.job import run
    from lowvram_grpo.recipe import resolve
    from lowvram_grpo.tables import read_table

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
    """First and last ten steps side by side: what the demo is there to show."""
    from lowvram_grpo.run.directory import RunDirectory

    rewards = [row["reward"] for row in RunDirectory(directory).metrics() if row.get("reward") is not None]
    first, last = rewards[:10], rewards[-10:]
    if first:
        before, after = sum(first) / len(first), sum(last) / len(last)
        print(f"mean reward: {before:.3f} over the first {len(first)} steps, {after:.3f} over the last {len(last)}.")
