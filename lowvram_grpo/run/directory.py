"""The run directory: where a run keeps everything that a person, or `--resume`, wants to see afterwards.

recipe.toml         the resolved recipe
metrics.jsonl       one row a logged step
completions.jsonl   one row a completion
checkpoint-N/       written by transformers.Trainer
cold_start/         the adapter after the cold start: GRPO's reference
adapter/            the trained adapter, its tokenizer and model card
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.run import jsonl

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
        run = cls(Path(output_dir)) if output_dir else cls(_fresh(Path("runs"), name))
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
        if run.started:
            raise UserError(
                f"{run.path} already holds a run; continue it with --resume {run.path}, "
                "or choose another --output-dir for a new one."
            )
        own = {run.recipe_path.name, run.metrics_path.name, run.completions_path.name}
        if strangers := sorted(entry.name for entry in run.path.iterdir() if entry.name not in own):
            raise UserError(
                f"{run.path} is not empty and holds no run (it has {strangers[0]}); choose another --output-dir, "
                "or give --resume a run's directory."
            )
        return run

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
    def cold_start_dir(self) -> Path:
        return self.path / "cold_start"

    @property
    def started(self) -> bool:
        """Whether there is anything that a new run would overwrite."""
        logs = (self.metrics_path, self.completions_path)
        return (
            any(log.is_file() and log.stat().st_size for log in logs)
            or self.adapter_dir.exists()
            or self.cold_start_dir.exists()
            or bool(self._checkpoints())
        )

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; [] before the first."""
        return jsonl.read(self.metrics_path)

    def latest_checkpoint(self) -> Path | None:
        """The whole checkpoint-N with the highest N. The trainer writes trainer_state.json last, so a checkpoint
        without one that parses was cut off by the end of its process."""
        for _, checkpoint in sorted(self._checkpoints(), reverse=True):
            try:
                with open(checkpoint / "trainer_state.json", encoding="utf-8") as file:
                    state = json.load(file)
            except (OSError, ValueError):
                continue
            if isinstance(state, dict) and "global_step" in state:
                return checkpoint
        return None

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
    """A path below `parent` that does not exist yet and that Windows accepts."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:48] or "run"
    stem = f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = parent / stem, 2
    while path.exists():
        path, number = parent / f"{stem}-{number}", number + 1
    return path
