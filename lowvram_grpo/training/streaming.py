"""Prompts that come as a stream: what that asks of the settings, and what a trainer keeps of its place in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lowvram_grpo.data.stream_loader import Place
from lowvram_grpo.data.streams import is_stream
from lowvram_grpo.errors import UserError, counted

if TYPE_CHECKING:
    from lowvram_grpo.data.stream_loader import StreamLoader
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.training.continuation import Made


def check_streams(args: GRPOConfig, train: Any, evaluated: Any) -> None:
    """Whether streams can be read with these settings.

    Raises:
        UserError: accelerate is to dispatch batches, or a run on a stream has no length.
    """
    several = evaluated.values() if isinstance(evaluated, dict) else (evaluated,)
    if not any(map(is_stream, (train, *several))):
        return
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise UserError(
            "Iterable datasets require `dispatch_batches=False`, but accelerator_config sets it to True; drop it."
        )
    check_steps(args, train)


def check_steps(args: GRPOConfig, train: Any) -> None:
    """Raises:
    UserError: `train` is a stream, and nothing says how long to train on it."""
    if is_stream(train) and args.max_steps <= 0:
        raise UserError(
            "The training data is a stream, whose number of prompts nobody knows, so num_train_epochs can't say how "
            "long to train; set max_steps (--max-steps N)."
        )


def found_place(folder: Any, made: Made | None, now: Made, *, serves: bool) -> tuple[Place, str]:
    """Where a run goes on in a stream, and a sentence for people where that is not where it stood.

    Args:
        made, now: what the checkpoint in `folder` was made with, and what one of today would be.
        serves: the rollout in progress is used up first.
    """
    place = Place.load(folder)
    if place is None or (made is not None and made.data[:2] != now.data[:2]):
        return Place(), "the data is not what the checkpoint was made with: it is begun at its first row."
    return (place if serves else replace(place, served=0)), ""


class StreamProgress(TrainerCallback):
    """Keeps the place behind the last whole step, and epochs that are no guess: transformers would give the share of
    max_steps.

    Attributes:
        loader: the one that trains now.
        place: None before the first step of this process.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.loader: StreamLoader | None = None
        self.place: Place | None = None
        self.tell = tell

    def on_step_end(self, args, state, control, **kwargs):
        if self.loader is not None:
            self.place, state.epoch = self.loader.place, self.loader.epoch

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.loader is not None and not self.loader.given and state.global_step < state.max_steps:
            self.tell(
                "the data gave no rows when it was begun anew: training ends after "
                f"{counted(state.global_step, 'step')} of {state.max_steps} (a stream has to begin anew each time it "
                "is iterated over)."
            )
