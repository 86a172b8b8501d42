"""The run directory: where a run keeps everything that a person, or `--resume`, wants to see afterwards.

recipe.toml         the resolved recipe
metrics.jsonl       one row a logged step
completions.jsonl   one row a completion
rewards.log         what reward functions printed
checkpoint-N/       written by transformers.Trainer
cold_start/         the adapter after the cold start: GRPO's reference
adapter/            the trained adapter, its tokenizer and model card; model/ where all weights were trained
not_applied.md      settings of the recipe that had nothing to act on here, and why
trackers.json       under what names report_to's trackers know the run
run.lock            says which process the run belongs to now; empty otherwise
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram_grpo.errors import CantWrite, UserError, why_unwritten
from lowvram_grpo.run import jsonl, lock
from lowvram_grpo.run.checkpoints import CUT_OFF, damage, replace_text

# The first line of a recipe that a run wrote.
RECIPE_HEADER = "# The resolved recipe of a lowvram-grpo run."
# What an attempt that died before its first step may have left beside its recipe.
_ATTEMPTS = ("recipe.toml.tmp", "not_applied.md", "rewards.log", "rewards.log.1", "vllm_adapter", "trackers.json",
             "runs")  # the last is TensorBoard's  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunDirectory:
    """The paths inside one run directory. Constructing it touches no disk; see `create` and `open`."""

    path: Path

    @classmethod
    def create(cls, output_dir: str | Path | None, name: str) -> RunDirectory:
        """Make the directory of a new run: `output_dir`, or runs/<name>-<YYYYmmdd-HHMMSS> below the working directory.

        A directory in which an earlier attempt logged nothing (it died while it was loading) is used again.

        Raises:
            UserError: it can't be written to, or holds a run or other files.
        """
        run = cls(Path(output_dir) if output_dir else _fresh(Path("runs"), name))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            probe = run.path / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"Can't write to the output directory {run.path} ({error.strerror or error}); "
                "choose another with --output-dir."
            ) from error
        run.check_new()
        return run

    def check_new(self) -> None:
        """Whether a new run may begin here.

        Raises:
            UserError: there is a run, or other files.
        """
        if self.started:
            raise UserError(
                f"{self.path} already holds a run; continue it with --resume {self.path}, "
                "or choose another --output-dir for a new one."
            )
        own = {self.metrics_path.name, self.completions_path.name, lock.NAME}
        if self._recipe_is_ours():
            own |= {self.recipe_path.name, *_ATTEMPTS}
        if strangers := sorted(entry.name for entry in self.path.iterdir() if entry.name not in own):
            raise UserError(
                f"{self.path} is not empty and holds no run (it has {strangers[0]}); choose another --output-dir, "
                "or give --resume a run's directory."
            )

    def _recipe_is_ours(self) -> bool:
        """A recipe that a person wrote is no run's, and not to be overwritten."""
        try:
            text = self.recipe_path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        return not text.strip() or text.startswith(RECIPE_HEADER)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run.

        Raises:
            UserError: there is no such directory, or it holds no recipe.toml.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            raise UserError(f"There is no run directory {run.path}; give the path that the training run printed.")
        if not run.recipe_path.is_file():
            raise UserError(f"{run.path} is not a run directory: it has no {run.recipe_path.name}.")
        return run

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def completions_path(self) -> Path:
        return self.path / "completions.jsonl"

    @property
    def adapter_dir(self) -> Path:
        return self.path / "adapter"

    @property
    def model_dir(self) -> Path:
        return self.path / "model"

    @property
    def not_applied_path(self) -> Path:
        return self.path / "not_applied.md"

    @property
    def result_dir(self) -> Path | None:
        """What a finished run has left: its adapter, or its whole model; None before."""
        if any(self.adapter_dir.glob("adapter_model.*")):
            return self.adapter_dir
        return self.model_dir if (self.model_dir / "config.json").is_file() else None

    @property
    def cold_start_dir(self) -> Path:
        return self.path / "cold_start"

    @property
    def started(self) -> bool:
        """Whether there is anything that a new run would overwrite."""
        logs = (self.metrics_path, self.completions_path)
        return (
            any(log.is_file() and log.stat().st_size for log in logs)
            or self.adapter_dir.exists()
            or self.model_dir.exists()
            or self.cold_start_dir.exists()
            or bool(self._checkpoints())
        )

    def lock(self) -> AbstractContextManager[None]:
        """This process's for the length of the block; see `lock.hold`."""
        return lock.hold(self.path)

    def write_recipe(self, text: str) -> None:
        """Replace recipe.toml in one step.

        Raises:
            CantWrite: the disk is full, or forbids it.
        """
        replace_text(self.recipe_path, text)

    def write_not_applied(self, text: str) -> None:
        """Replace not_applied.md in one step. Raises as `write_recipe`."""
        replace_text(self.not_applied_path, text)

    def write_adapter(self, write: Callable[[Path], None], *, whole: bool = False) -> Path:
        """Have `write` fill a folder, and put it in the place of adapter/, or of model/ for a `whole` one: the earlier
        is there until then.

        Returns:
            that place.

        Raises:
            CantWrite: the disk is full, or forbids it.
        """
        place = self.model_dir if whole else self.adapter_dir
        fresh, old = place.with_suffix(".new"), place.with_suffix(".old")
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        try:
            write(fresh)
            if place.exists():
                place.rename(old)
            fresh.rename(place)
        except Exception as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if why_unwritten(error) is None:
                raise
            raise CantWrite(place, error) from error
        shutil.rmtree(old, ignore_errors=True)
        return place

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; [] before the first."""
        return jsonl.read(self.metrics_path)

    def latest_checkpoint(self, damaged: Callable[[Path, str], None] | None = None) -> Path | None:
        """The whole checkpoint-N with the highest N; `damaged` hears of each one above it, and what is wrong."""
        for _, checkpoint in sorted(self._checkpoints(), reverse=True):
            why = damage(checkpoint)
            if why is None:
                return checkpoint
            if damaged is not None:
                damaged(checkpoint, why)
        return None

    def checkpoint_to_resume(self, tell: Callable[[str], None]) -> Path | None:
        """The checkpoint to go on from; `tell` hears of damaged ones. None where the run has not come to its first.

        Raises:
            UserError: there were checkpoints, and none is whole.
        """
        damaged: list[tuple[Path, str]] = []
        found = self.latest_checkpoint(lambda path, why: damaged.append((path, why)))
        lost = [f"{path.name}: {why}" for path, why in damaged if why != CUT_OFF]
        if found is None and lost:
            raise UserError(
                f"No checkpoint of {self.path} is whole ({'; '.join(lost)}); put the files back, or begin a new run."
            )
        for path, why in damaged:
            tell(f"{path.name} is left out: {why}.")
        return found

    def truncate_after(self, step: int) -> None:
        """Drop the rows of both logs whose step comes after `step` (and torn ones): a resumed run writes them again.

        Rows of the cold start stand at step 0; `truncate_after(-1)` empties both logs.
        """
        for path in (self.metrics_path, self.completions_path):
            jsonl.keep(path, lambda row: row["step"] <= step)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        if not self.path.is_dir():
            return []
        matches = ((_CHECKPOINT.fullmatch(entry.name), entry) for entry in self.path.iterdir() if entry.is_dir())
        return [(int(match[1]), entry) for match, entry in matches if match]


def _fresh(parent: Path, name: str) -> Path:
    """A new directory below `parent`, with a name that Windows accepts."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:48] or "run"
    stem = f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = parent / stem, 2
    with contextlib.suppress(OSError):  # where nothing can be made, whoever is given the path finds out why
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir()  # fails where it exists: two runs that begin at once get two directories
                break
            except FileExistsError:
                path, number = parent / f"{stem}-{number}", number + 1
    return path
