"""Which of its weights a run leaves, where evaluations choose them, and when it ends because none gets better."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from lowvram_grpo.errors import UserError, counted
from lowvram_grpo.recipe.settings import value_of
from lowvram_grpo.run.checkpoints import STATE

if TYPE_CHECKING:
    from transformers import TrainerState

    from lowvram_grpo.recipe.config import GRPOConfig

_COUNTER = "early_stopping_patience_counter"


@dataclass(frozen=True)
class Best:
    """The weights that were loaded at the end of a run.

    Attributes:
        step: optimizer steps that they have had.
        metric, value: of the evaluation that chose them.
        last: optimizer steps that were made.
        early: whether the run ended before its time, for want of anything better.
    """

    step: int
    metric: str
    value: float
    last: int
    early: bool

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl, where report and model card find it (`run.metrics.best_of`)."""
        return {
            "step": self.last, "best/step": self.step, "best/metric": self.metric, "best/value": self.value,
            "best/stopped_early": self.early,
        }  # fmt: skip


def best_of(args: GRPOConfig, state: TrainerState, callbacks: Iterable[TrainerCallback] = ()) -> Best | None:
    """What a run that is over has loaded; None where it keeps its last weights."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None or state.best_metric is None:
        return None
    early = state.global_step < state.max_steps and any(map(_ran_out, callbacks))
    step = state.best_global_step or int(state.best_model_checkpoint.rpartition("-")[2])
    return Best(step, metric_name(args), float(state.best_metric), state.global_step, early)


def metric_name(args: GRPOConfig) -> str:
    """The metric that evaluations are compared by, as it is logged."""
    name = str(args.metric_for_best_model)
    return name if name.startswith("eval_") else f"eval_{name}"


def check_early_stopping(args: GRPOConfig, callbacks: Iterable[Any]) -> None:
    """Whether a callback of transformers' that a script brings will have something to go by; without a metric it is the
    reward, as everywhere else.

    Raises:
        UserError: nothing is evaluated.
    """
    kinds = [each if isinstance(each, type) else type(each) for each in callbacks]
    if not any(issubclass(kind, EarlyStoppingCallback) for kind in kinds):
        return
    if value_of(args.eval_strategy) == "no":
        raise UserError(
            "an EarlyStoppingCallback is given, but nothing is evaluated; pass eval_dataset and eval_strategy, or drop "
            "it."
        )
    if args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = "eval_reward", True


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, which says why a run ends.

    Args:
        early_stopping_patience: evaluations without a better one.
        early_stopping_threshold: by how much one has to be better.
        tell: hears it.
    """

    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float | None = 0.0,
        tell: Callable[[str], None] = print,
    ):
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self._tell = tell

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """What transformers' asks for here is known before a model is loaded."""

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        # Each of several evaluation datasets has an evaluation of its own, and one of them the metric.
        if metric_name(args) not in metrics:
            return
        stopping = control.should_training_stop
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop and not stopping:
            by = f" by more than {self.early_stopping_threshold:g}" if self.early_stopping_threshold else ""
            self._tell(
                f"stopping at step {state.global_step} of {state.max_steps}: {metric_name(args)} has not got "
                f"better{by} in {counted(self.early_stopping_patience_counter, 'evaluation')} (best: "
                f"{state.best_metric:.4g})."
            )


def _ran_out(callback: Any) -> bool:
    if not isinstance(callback, EarlyStoppingCallback):
        return False
    return callback.early_stopping_patience_counter >= callback.early_stopping_patience


def stopped_early(checkpoint: Path | None, patience: int) -> bool:
    """Whether a run that is that patient has ended at a checkpoint, whatever steps are left of it."""
    if checkpoint is None or not patience:
        return False
    try:
        kept = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["stateful_callbacks"]
        return int(kept[EarlyStopping.__name__]["attributes"][_COUNTER]) >= patience
    except (OSError, ValueError, KeyError, TypeError):  # of a run without, or of another version
        return False


def restore_callbacks(state: TrainerState, callbacks: Iterable[Any], *, arguments: bool) -> None:
    """Give callbacks what a checkpoint's `state` has counted for them; one that is new begins at nothing.

    Args:
        arguments: also what they were made with (transformers' `restore_callback_states_from_checkpoint`).
    """
    kinds: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            kinds.setdefault(type(callback).__name__, []).append(callback)
    for name, group in kinds.items():
        kept = state.stateful_callbacks.setdefault(name, group[0].state())
        # Several of a kind are a list, to which transformers adds at each checkpoint.
        of_each = kept[-len(group) :] if isinstance(kept, list) else [kept]
        for callback, found in zip(group, of_each):
            for part in ("args", "attributes") if arguments else ("attributes",):
                for attribute, value in found.get(part, {}).items():
                    setattr(callback, attribute, value)
