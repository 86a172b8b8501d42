"""Where a run begins: in a directory of its own, or in an earlier one's from its last checkpoint on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_grpo.jobs.resume import check_changes
from lowvram_grpo.recipe.resolve import resolve
from lowvram_grpo.run.directory import RunDirectory

if TYPE_CHECKING:
    from lowvram_grpo.recipe.resolve import Recipe


@dataclass(frozen=True)
class Start:
    """A run's directory and, where a run is resumed, the checkpoint to go on from (None: it has not come to one)."""

    directory: RunDirectory
    checkpoint: Path | None = None
    resumed: bool = False


def reopen(recipe: Recipe, locks: ExitStack | None, tell: Callable[[str], None]) -> Start:
    """Where the run that `recipe` resumes goes on.

    Args:
        locks: gets the lock of the directory; None: it is only looked at.
        tell: hears of damaged checkpoints, of what has changed since, and of what has no effect.

    Raises:
        UserError: no such run, another process has it, no whole checkpoint, or a change that can't take effect.
    """
    directory = RunDirectory.open(recipe.resume)
    if locks is not None:
        locks.enter_context(directory.lock())
    checkpoint = directory.checkpoint_to_resume(tell)
    for sentence in check_changes(resolve({}, directory.recipe_path), recipe, directory, checkpoint):
        tell(sentence)
    return Start(directory, checkpoint, resumed=True)


def begin(recipe: Recipe, locks: ExitStack) -> Start:
    """A new run's directory with `recipe` in it; `locks` gets its lock.

    Raises:
        UserError: --output-dir holds something else, or can't be written to.
    """
    name = f"{Path(str(recipe.model)).name}-{'+'.join(Path(place).stem for place in recipe.places[:2])}"
    directory = RunDirectory.create(recipe.output_dir, name)
    locks.enter_context(directory.lock())
    directory.check_new()  # again, for another process may have been here until the lock was free
    directory.write_recipe(recipe.to_toml())
    return Start(directory)
