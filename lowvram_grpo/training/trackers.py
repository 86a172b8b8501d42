"""report_to: our metrics go out through transformers' callbacks. Here is what a run asks of them beside that: that they
begin before it samples, go on where a resumed run goes on, and end no run when they fail."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.run.checkpoints import replace_text

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from lowvram_grpo.recipe.config import GRPOConfig

FILE = "trackers.json"
_EVENTS = ("on_train_begin", "on_log", "on_evaluate", "on_predict", "on_save", "on_push_begin", "on_train_end")
# What helps where one can't begin.
_REMEDIES = {
    "wandb": "run `wandb login`, set WANDB_MODE=offline to send it later with `wandb sync`, or drop it from report_to",
    "comet_ml": "run `comet login`, set COMET_START_ONLINE=false, or drop it from report_to",
    "swanlab": "run `swanlab login`, set SWANLAB_MODE=offline, or drop it from report_to",
}


class Trackers:
    """The trackers among a trainer's callbacks.

    Args:
        args: of the trainer; settings of trackers in it may be settled.
        tell: hears once of each tracker that fails, and what was settled.
    """

    def __init__(self, args: GRPOConfig, callbacks: list[TrainerCallback], tell: Callable[[str], None]):
        self._args, self._tell, self._told = args, tell, set()
        self._named = {name: each for each in callbacks if (name := _name_of(each)) in args.report_to}
        for name, callback in self._named.items():
            for event in _EVENTS:
                setattr(callback, event, self._guarded(name, getattr(callback, event)))
        if args.push_to_hub and args.log_completions and "trackio" in self._named:
            self._keep_completions_here()

    def begin(self, trainer: Any, checkpoint: Path | None) -> None:
        """Before anything is sampled or logged.

        Args:
            checkpoint: that a run goes on from.

        Raises:
            UserError: one can't begin.
        """
        for name, callback in self._named.items():
            try:
                with self._as_before(name, checkpoint):
                    if name == "tensorboard":
                        self._open_tensorboard(callback, checkpoint)
                    elif hasattr(callback, "setup") and not getattr(callback, "_initialized", True):
                        callback.setup(self._args, trainer.state, trainer.model)
            except Exception as error:  # whatever a network, and other people's code, can do
                remedy = _REMEDIES.get(name, "see to that, or drop it from report_to")
                raise UserError(f"report_to {name} can't begin ({one_line(error)}); {remedy}.") from error
        if "wandb" in self._named and (run := getattr(sys.modules.get("wandb"), "run", None)) is not None:
            with suppress(OSError):
                Path(self._args.output_dir).mkdir(parents=True, exist_ok=True)
                replace_text(Path(self._args.output_dir) / FILE, json.dumps({"wandb": str(run.id)}))

    def _guarded(self, name: str, event: Callable) -> Callable:
        @wraps(event)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return event(*args, **kwargs)
            except Exception as error:
                if name not in self._told:
                    self._told.add(name)
                    self._tell(f"report_to {name} failed ({one_line(error)}); training goes on, and it is asked again.")
                return None

        return call

    @contextmanager
    def _as_before(self, name: str, checkpoint: Path | None) -> Iterator[None]:
        """wandb takes a resumed run up under its id, unless the environment names another."""
        known = self._earlier() if name == "wandb" and checkpoint is not None else None
        if known is None or "WANDB_RUN_ID" in os.environ:
            yield
            return
        resume = os.environ.get("WANDB_RESUME")
        os.environ |= {"WANDB_RUN_ID": known, "WANDB_RESUME": resume or "allow"}
        try:
            yield
        finally:  # a later run of this process is another one
            del os.environ["WANDB_RUN_ID"]
            if resume is None:
                del os.environ["WANDB_RESUME"]

    def _earlier(self) -> str | None:
        try:
            return json.loads((Path(self._args.output_dir) / FILE).read_text(encoding="utf-8"))["wandb"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _open_tensorboard(self, callback: Any, checkpoint: Path | None) -> None:
        """In the run's directory from the first row on, and after a resume in the same place, where what was written
        behind the checkpoint is taken back."""
        if callback.tb_writer is not None:  # a script's own
            return
        from transformers.integrations.integration_utils import default_logdir

        before = sorted((Path(self._args.output_dir) / "runs").glob("*")) if checkpoint is not None else []
        if callback.logging_dir is None:
            callback.logging_dir = str(before[-1]) if before else os.path.join(self._args.output_dir, default_logdir())
        if checkpoint is not None:
            step = int(checkpoint.name.rpartition("-")[2])
            callback.tb_writer = callback._SummaryWriter(log_dir=callback.logging_dir, purge_step=step + 1)

    def _keep_completions_here(self) -> None:
        """With each push transformers makes a copy of a local trackio project on the hub, tables and all."""
        args = self._args
        if args.trackio_space_id is None and args.trackio_static_space_id is None:
            args.trackio_static_space_id = False
            self._tell(
                "trackio's project stays on this machine, as it has tables of completions; set "
                "trackio_static_space_id to have it pushed with the model."
            )


def _name_of(callback: TrainerCallback) -> str | None:
    """The name that report_to has for it."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return next((name for name, kind in INTEGRATION_TO_CALLBACK.items() if type(callback) is kind), None)
