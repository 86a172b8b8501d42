"""For those who stay with TRL's GRPOTrainer: our vocabulary sweep as its log-prob path, our engine as its sampler.

    from lowvram_grpo.integrations.trl import switch_on

    trainer = GRPOTrainer(...)  # TRL's
    undo = switch_on(trainer)
    trainer.train()

Everything else stays TRL's: data, rewards, advantages, loss, metrics, checkpoints. Only this trainer and its models are
changed, never TRL's classes or modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.integrations.trl_head import Heads
from lowvram_grpo.integrations.trl_sampler import Turns


class MissingTRL(UserError, ImportError):
    """TRL is not there, or cannot be imported: an ImportError, too, as an import gives."""


try:
    import trl
    from trl import GRPOTrainer
except Exception as error:  # TRL's lazy modules turn whatever went wrong below them into errors of several kinds
    raise MissingTRL(
        f"lowvram_grpo.integrations.trl needs TRL, which cannot be imported here ({one_line(error)}); install it with "
        "pip install 'trl==1.16.*'."
    ) from error

TESTED = "1.16"
_DIRECTIONS = ("auto", "sparse", "dense")


def switch_on(
    trainer: GRPOTrainer,
    *,
    logps: bool = True,
    engine: bool = True,
    direction: str = "auto",
    rows: int | None = None,
    workspace_mib: int = 64,
) -> Callable[[], None]:
    """Give a trainer of TRL our log-prob path and our sampler, before its `train()`.

    Args:
        trainer: TRL's GRPOTrainer or a subclass, in one process.
        logps: score policy, old and reference log-probs with `linear_logps`: one sweep forward and backward, over the
            completion tokens alone.
        engine: sample with `RolloutEngine`: prompts prefilled once a group, rows that end replaced at once.
        direction: of the sweep's gradient, as in `linear_logps`; `dense` is exact to rounding.
        rows: completions that decode at once, all where None: bounds the KV cache.
        workspace_mib: for the tiles of the sweep and of a quantized head, in MiB.

    Returns:
        A function that gives the trainer its own paths back; calling it again does nothing.

    Raises:
        UserError: TRL's version, the trainer or its settings do not fit. What the model cannot do is a warning, and
            goes TRL's way.
    """
    _check(trainer, logps, engine)
    if direction not in _DIRECTIONS:
        raise UserError(f"direction must be {', '.join(_DIRECTIONS[:-1])} or {_DIRECTIONS[-1]}, not {direction!r}.")
    parts: list[Any] = []
    if logps:
        # A subclass may put the entropy into a loss of its own.
        differentiable = type(trainer) is not GRPOTrainer or trainer._entropy_bonus_enabled
        parts.append(Heads(trainer, direction, workspace_mib, entropy_gradient=differentiable))
    if engine:
        parts.append(Turns(trainer, rows, workspace_mib))
    for part in parts:
        if reason := part.why_not():
            warnings.warn(f"{part.what} stays TRL's own, because {reason}.", stacklevel=2)
        else:
            part.put_in()
    trainer._lowvram_grpo = parts

    def undo() -> None:
        for part in parts:
            part.take_out()
        if getattr(trainer, "_lowvram_grpo", None) is parts:
            del trainer._lowvram_grpo

    return undo


def _check(trainer: Any, logps: bool, engine: bool) -> None:
    if not trl.__version__.startswith(f"{TESTED}."):
        raise UserError(
            f"switch_on knows the inside of TRL {TESTED}, and {trl.__version__} is installed; install "
            f"'trl=={TESTED}.*', or train without switch_on."
        )
    if not isinstance(trainer, GRPOTrainer):
        kind = f"{type(trainer).__module__}.{type(trainer).__name__}"
        raise UserError(
            f"switch_on takes a GRPOTrainer of TRL, not a {kind}; lowvram_grpo's own has both parts already."
        )
    if not (logps or engine):
        raise UserError("switch_on has nothing to do with logps=False and engine=False; set one of them.")
    if hasattr(trainer, "_lowvram_grpo"):
        raise UserError("This trainer is switched on already; call what switch_on returned first.")
    if (processes := trainer.accelerator.num_processes) > 1:
        raise UserError(f"switch_on is made for one process, and there are {processes}; start the script with one.")
    args = trainer.args
    for at_odds, what in (
        (trainer.is_deepspeed_enabled, "deepspeed"),
        (trainer.is_fsdp_enabled, "fsdp"),
        (args.torch_compile, "torch_compile"),
    ):
        if at_odds:
            raise UserError(f"switch_on reads whole weights as they are, which {what} does not leave; set {what} off.")
    if not engine:
        return
    own = type(trainer)._generate_single_turn is GRPOTrainer._generate_single_turn
    for at_odds, what in (
        (args.use_vllm, "use_vllm=True"),
        (trainer.use_transformers_continuous_batching, "use_transformers_continuous_batching=True"),
        (trainer.rollout_func is not None, "rollout_func"),
        (not own or "_generate_single_turn" in vars(trainer), "a _generate_single_turn of its own"),
    ):
        if at_odds:
            raise UserError(f"The trainer has another sampler ({what}); drop it, or pass engine=False to switch_on.")
