"""How a run goes on from a checkpoint that was made with other settings: its place in the data, its optimizer, its
schedule. Beside what transformers keeps, a checkpoint says what it was made with (`Made`)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lowvram_grpo.data.batching import PromptSampler
from lowvram_grpo.errors import UserError, one_line

if TYPE_CHECKING:
    from lowvram_grpo.recipe.batch_plan import BatchPlan
    from lowvram_grpo.recipe.config import GRPOConfig

_FILE = "made_with.json"
# What a rollout that has steps left to serve was sampled, scored and weighed with. Where one of these changes, the rest
# of it is not used: its prompts are sampled from anew.
ROLLOUT_SETTINGS = (
    "num_generations", "max_prompt_length", "max_completion_length", "chat_template_kwargs",
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
    "reward_weights", "scale_rewards", "multi_objective_aggregation", "loss_type", "mask_truncated_completions", "beta",
    "kl_estimator",
    "importance_sampling_level", "num_iterations", "seed", "data_seed", "shuffle_dataset", "curriculum",
    "resample_dead_groups", "disable_dropout",
    "kv_cache_dtype", "use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "bf16", "fp16",
)  # fmt: skip
# Entries of a parameter group in which optimizers count their steps; all others are settings.
_PROGRESS = frozenset({"params", "k", "weight_sum", "lr_max", "scheduled_lr", "train_mode", "prev_lr", "setup", "step"})
# What torch.load and load_state_dict raise for files and states that are damaged or belong elsewhere.
UNLOADABLE = (OSError, EOFError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError)


@dataclass(frozen=True)
class Made:
    """What a checkpoint was made with.

    Attributes:
        settings: of GRPOConfig, as json has them.
        data: number of prompts (None of a stream), a digest of some of them, and the names of the rewards.
        prompts, repeats: of `PromptSampler`.
        shift: optimizer steps that the run's count is ahead of its place in the data; see `shift_of`.
        optimizer: whose state it holds.
    """

    settings: dict[str, Any]
    data: list[Any]
    prompts: int
    repeats: int
    shift: int
    optimizer: str

    def save(self, folder: str | Path) -> None:
        (Path(folder) / _FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Made | None:
        """None for a checkpoint of an earlier version, which does not say it."""
        try:
            return cls(**json.loads((Path(folder) / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def made_with(
    args: GRPOConfig,
    data: Sequence[dict],
    plan: BatchPlan,
    rewards: list[str],
    shift: int,
    optimizer: Any,
    *,
    whole: bool = True,
) -> Made:
    """What a checkpoint of today is made with; `rewards` are the names of the reward functions, and `data` is not the
    `whole` of a stream."""
    return Made(
        json.loads(args.to_json_string()),
        [len(data) if whole else None, _digest(data), rewards],
        plan.prompts_per_rollout,
        plan.steps_per_rollout,
        shift,
        kind_of(optimizer),
    )


def _digest(data: Sequence[dict]) -> str:
    """Of up to 32 prompts spread over the data: enough to tell one data set, or one template, from another."""
    rows = sorted({len(data) * i // 32 for i in range(32)})
    return hashlib.sha1(json.dumps([data[i]["prompt"] for i in rows], default=str).encode()).hexdigest()


def serves_on(made: Made | None, now: Made) -> bool:
    """Whether the rest of a rollout in progress is what the settings of today would have sampled."""
    if made is None:
        return True
    same = (made.prompts, made.repeats, made.data) == (now.prompts, now.repeats, now.data)
    return same and all(made.settings.get(name) == now.settings.get(name) for name in ROLLOUT_SETTINGS)


def shift_of(made: Made | None, step: int, now: Made, *, serves: bool) -> int:
    """Optimizer steps that the count `step` of a resumed run is ahead of its place in the data: `step - shift` steps of
    today's batches end where the checkpoint's rollouts ended, or less than one batch before. No prompt is left out.

    Other data (another number of prompts) are begun at the first of the same epoch. A stream's place is kept apart.
    """
    if made is None:
        return 0
    if serves:
        return made.shift
    if made.data[0] is None or now.data[0] is None:
        return step
    epoch, within = divmod(step - made.shift, steps_an_epoch(made.data[0], made.prompts, made.repeats))
    rollouts = 0
    if made.data[0] == now.data[0]:
        rollouts = min(made.data[0], within // made.repeats * made.prompts) // now.prompts
    return step - epoch * steps_an_epoch(now.data[0], now.prompts, now.repeats) - rollouts * now.repeats


def steps_an_epoch(rows: int, prompts: int, repeats: int) -> int:
    return len(PromptSampler(_Rows(rows), prompts=prompts, repeats=repeats, shuffle=False, seed=0))


@dataclass(frozen=True)
class _Rows(Sized):
    count: int

    def __len__(self) -> int:
        return self.count


def step_of(checkpoint: Path | None) -> int:
    """The N of checkpoint-N; 0 without one."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def planned_steps(args: GRPOConfig, data: Sequence[dict], checkpoint: Path | None = None) -> int:
    """Optimizer steps of the whole run, counted as the trainer does, which goes on from `checkpoint`."""
    if args.max_steps > 0:
        return args.max_steps
    made = Made.load(checkpoint) if checkpoint is not None else None
    now = made_with(args, data, args.batch_plan(), made.data[2] if made is not None else [], 0, None)
    shift = shift_of(made, step_of(checkpoint), now, serves=serves_on(made, now))
    return shift + math.ceil(args.num_train_epochs * steps_an_epoch(now.data[0], now.prompts, now.repeats))


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """A name for what the state of an optimizer means: its class, and the bits of bitsandbytes' moments."""
    inner = getattr(optimizer, "optimizer", optimizer)
    bits = getattr(getattr(inner, "args", None), "optim_bits", None)
    name = f"{type(inner).__module__.partition('.')[0]} {type(inner).__name__}"
    return f"{name} ({bits} bits)" if bits else name


def load_state(path: Path) -> dict[str, Any] | None:
    """A state that torch.save wrote, on the CPU; None where there is no such file.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return None
    import pickle

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*UNLOADABLE, pickle.UnpicklingError) as error:
        raise UserError(
            f"The checkpoint {path.parent} is damaged: its {path.name} can't be read ({one_line(error)}); remove that "
            "folder to go on from the one before it."
        ) from error


def load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any], checkpoint: Path, made: Made | None) -> None:
    """Take up the moments of a checkpoint. Learning rate, betas, weight decay and all other settings stay those that
    `optimizer` was made with.

    Raises:
        UserError: they are another optimizer's, or another model's.
    """
    kind, before = kind_of(optimizer), made.optimizer if made is not None else _guess(saved)
    family = lambda name: name.startswith("bitsandbytes")
    same = kind == before if made is not None else before is None or family(kind) == family(before)
    if not same:
        raise UserError(
            f"{checkpoint} holds the moments of {before}, which {kind} can't go on with; keep optim as it was, or "
            f"start a new run from its weights with --adapter {checkpoint}."
        )
    groups = [
        {**{k: v for k, v in mine.items() if k not in _PROGRESS}, **{k: v for k, v in theirs.items() if k in _PROGRESS}}
        for mine, theirs in zip(optimizer.param_groups, saved["param_groups"])
    ]
    groups += saved["param_groups"][len(groups) :]  # which load_state_dict then refuses
    try:
        optimizer.load_state_dict({**saved, "param_groups": groups})
    except UNLOADABLE as error:
        raise UserError(
            f"The optimizer state of {checkpoint} does not fit this model ({one_line(error)}); it is another model's."
        ) from error


def _guess(saved: dict[str, Any]) -> str | None:
    """How `kind_of` begins for what left this state, where a checkpoint of an earlier version does not say it; None
    where that can't be told."""
    keys = next((set(state) for state in saved.get("state", {}).values() if state), set())
    if "state1" in keys:
        return "bitsandbytes"
    return "torch AdamW" if keys == {"exp_avg", "exp_avg_sq", "step"} else None


def place_schedule(scheduler: Any, saved: dict[str, Any] | None, steps: int, *, same: bool) -> bool:
    """Move a new schedule to its place in a run of which `steps` are done.

    A schedule that is a function of the step is computed there, from today's rate and horizon. One that follows the
    metrics goes on as it was left, if its settings are the `same`.

    Returns:
        whether it could; otherwise it stands at its beginning.
    """
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, LambdaLR):
        done = steps if saved is None else saved.get("last_epoch", steps)  # fp16 may have skipped some
        scheduler.last_epoch, scheduler._step_count = done, done + 1
        _set_rates(groups, [base * factor(done) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)])
        scheduler._last_lr = [group["lr"] for group in groups]
        return True
    fresh = scheduler.state_dict()
    if saved is None or not same or saved.keys() != fresh.keys() or saved.get("base_lrs") != fresh.get("base_lrs"):
        return False
    scheduler.load_state_dict(saved)
    _set_rates(groups, scheduler.get_last_lr())
    return True


def _set_rates(groups: list[dict[str, Any]], rates: Sequence[Any]) -> None:
    for group, rate in zip(groups, rates):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
