"""Call every reward function on a batch of completions, and let none of them fail silently."""

from __future__ import annotations

import copy
import inspect
import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.rewards.builtin import BUILTIN, refuse
from lowvram_grpo.rewards.calls import Caller
from lowvram_grpo.rewards.guards import World, seed_all
from lowvram_grpo.rewards.model import RewardModel, Visitor
from lowvram_grpo.rewards.outputs import (
    Logs,
    RewardFailure,
    Unanswered,
    extras_of,
    listed,
    mean_metrics,
    number,
    rows_of,
)  # fmt: skip
from lowvram_grpo.rewards.signatures import arguments_of, distinct, known, name_of

LoadModel = Callable[[str, dict[str, Any]], torch.nn.Module]

# Batches in a row on which a function may fail for every completion, where its errors are no reason to stop.
HOPELESS = 5


class RewardResult(NamedTuple):
    """Rewards of n completions by F functions.

    Attributes:
        per_func: (n, F) float32, NaN where a function returned None.
        total: (n,) float32 weighted sum over the functions that apply, NaN where none does.
        extras: column -> n values, what the functions gave to `log_extra`.
        metrics: name -> mean of what they gave to `log_metric`; with `errors` none, `rewards/NAME/failed` too.
    """

    per_func: Tensor
    total: Tensor
    extras: dict[str, list]
    metrics: dict[str, float]


class Scored(NamedTuple):
    """What one function made of a batch: n rewards (NaN for None), its logs, and how many rows it failed on."""

    rewards: list[float]
    logs: Logs
    failed: int = 0


class RewardRunner:
    """Runs reward functions of TRL's kinds: sync, async, and sequence-classification models.

    Args:
        reward_funcs: functions `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, async ones,
            models, and strings: a built-in's name, an address, else the folder or hub id of a model. A function
            without `**kwargs` receives the arguments it names.
        weights: one a function; all 1 when None.
        processing_classes: tokenizers of the models, one a function; None entries are loaded with the model.
        device: of the policy; results lie on the host.
        model_place: where models are kept and run: `auto`, `cuda`, `cpu` or `in_turn` (see `model.RewardModel`).
        timeout: seconds a function may take on one batch; None waits forever.
        errors: `stop` raises what went wrong. `none` asks a function that failed again, for one completion at a time,
            and takes what fails for None; one that took too long is not asked again.
        tell: hears what is waited for, and what failed.
        load_model: makes a model of a name and `model_init_kwargs` (`policy.reward_model.load_reward_model`).
        visitor: keeps models in host memory (see `model.RewardModel`).
        model_init_kwargs: for `from_pretrained` of models given as strings.

    Attributes:
        names: one a function, distinct.
        weights: (F,) float32.
        capture: entered around a batch, and told whose turn it is (`run.capture.Capture`).

    Raises:
        UserError: no function, lists of different lengths, or a model that can't be loaded.
    """

    def __init__(
        self,
        reward_funcs: Sequence[Callable | str | torch.nn.Module],
        *,
        weights: Sequence[float] | None = None,
        processing_classes: Sequence | None = None,
        device: torch.device | str = "cpu",
        model_place: str = "auto",
        timeout: float | None = None,
        errors: str = "stop",
        tell: Callable[[str], None] = lambda sentence: None,
        load_model: LoadModel | None = None,
        visitor: Visitor | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ):
        if not reward_funcs:
            raise UserError("no reward function: give at least one with --reward (or reward_funcs).")
        for what, values in (("reward weights", weights), ("reward processing classes", processing_classes)):
            if values is not None and len(values) != len(reward_funcs):
                raise UserError(
                    f"The number of {what} ({len(values)}) must match the number of reward functions "
                    f"({len(reward_funcs)}); give one for each."
                )
        classes = processing_classes if processing_classes is not None else [None] * len(reward_funcs)
        load = partial(_loaded, load_model, model_init_kwargs or {})
        self.funcs = [_as_function(f, load, c, device, model_place, visitor) for f, c in zip(reward_funcs, classes)]
        self.names = distinct([name_of(f) for f in self.funcs])
        self.weights = torch.tensor([1.0] * len(self.funcs) if weights is None else weights, dtype=torch.float32)
        self.errors, self.tell = errors, tell
        self.capture: Any = None
        self._caller = Caller(timeout, tell)
        self._world = World()
        self._hopeless = [0] * len(self.funcs)
        self._told: set[str] = set()

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence,
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, Sequence],
        trainer_state: Any = None,
        *,
        seed: int | None = None,
    ) -> RewardResult:
        """Score n completions; async functions run at the same time as each other and as the sync ones. Each function
        gets copies of its own, and what it changes of the process is put back (`guards`).

        Args:
            prompts, completions: n strings or n lists of messages.
            completion_ids: n lists of sampled token ids.
            columns: the data's other columns, n values each.
            trainer_state: handed on, as are `log_extra(column, values)` and `log_metric(name, value)`.
            seed: of the global random numbers that functions see.

        Raises:
            UserError: a function raised, took too long, lacks a column, or returned the wrong number of rewards or
                something that is not a finite number; the sentence names the function.
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        batch = _Batch(self, given, columns, trainer_state, len(completions), seed)
        capture: AbstractContextManager = self.capture or nullcontext()
        with self._world.entered(seed), torch.autocast("cuda", enabled=False), capture:
            scored = self._run(batch)
        per_func = torch.tensor([one.rewards for one in scored], dtype=torch.float32).T.contiguous()
        total = (per_func * self.weights).nansum(dim=1)
        total[per_func.isnan().all(dim=1)] = torch.nan
        metrics = mean_metrics([one.logs for one in scored])
        if self.errors == "none":
            metrics |= {f"rewards/{name}/failed": float(one.failed) for name, one in zip(self.names, scored)}
        return RewardResult(per_func, total, extras_of(zip(self.names, (one.logs for one in scored))), metrics)

    @property
    def models(self) -> list[RewardModel]:
        """Those of the functions that are models and may be kept elsewhere."""
        return [func for func in self.funcs if isinstance(func, RewardModel) and func.movable]

    def _run(self, batch: _Batch) -> list[Scored]:
        start, every = time.monotonic(), range(batch.n)
        pending = {i: self._begun(i, batch, every) for i, func in enumerate(self.funcs) if _is_async(func)}
        scored: list[Any] = [None] * len(self.funcs)
        try:
            for i in sorted(range(len(self.funcs)), key=lambda i: i in pending):
                if self.capture is not None:
                    self.capture.of(self.names[i])
                try:
                    if i in pending:
                        logs, future = pending[i]
                        scored[i] = self._scored(i, self._caller.wait(self.names[i], future, start), logs)
                    else:
                        scored[i] = self._asked(i, batch, every)
                except RewardFailure as error:
                    scored[i] = self._despite(i, batch, error)
                self._count(i, scored[i], batch.n)
        finally:
            self._caller.abandon([future for _, future in pending.values()])
        return scored

    def _begun(self, i: int, batch: _Batch, rows: Sequence[int]) -> tuple[Logs, Future]:
        logs = Logs()
        call = batch.call(i, rows, logs)
        return logs, self._caller.submit(self.names[i], call, partial(listed, n=len(rows), name=self.names[i]))

    def _asked(self, i: int, batch: _Batch, rows: Sequence[int]) -> Scored:
        """What a function that is not async gives for some rows."""
        logs, name = Logs(), self.names[i]
        if batch.seed is not None:  # what one function draws must not depend on what another has drawn
            seed_all(batch.seed + i)
        call = batch.call(i, rows, logs)
        return self._scored(i, self._caller.call(name, call, partial(listed, n=len(rows), name=name)), logs)

    def _scored(self, i: int, values: list[Any], logs: Logs) -> Scored:
        name, rewards, failed = self.names[i], [], 0
        logs.check(len(values), name)
        for row, value in enumerate(values):
            try:
                rewards.append(number(value, row, name))
            except RewardFailure as error:
                self._pass_over(i, error)
                rewards.append(math.nan)
                failed += 1
        return Scored(rewards, logs, failed)

    def _pass_over(self, i: int, error: RewardFailure) -> None:
        """Go on in spite of `error`, or don't."""
        if self.errors == "stop":
            raise error
        self._last = error
        if self.names[i] not in self._told:
            self._told.add(self.names[i])
            self.tell(f"{error} Its reward is None there (reward_errors none; said once, rewards/.../failed counts).")

    def _despite(self, i: int, batch: _Batch, error: RewardFailure) -> Scored:
        """The rewards of a function that failed on a batch, asked for one completion at a time."""
        self._pass_over(i, error)
        if isinstance(error, Unanswered):
            return Scored([math.nan] * batch.n, Logs(), batch.n)
        begun = [self._begun(i, batch, [row]) for row in range(batch.n)] if _is_async(self.funcs[i]) else None
        try:
            parts = [self._alone(i, batch, row, begun[row] if begun else None) for row in range(batch.n)]
        finally:
            self._caller.abandon([future for _, future in begun or ()])
        rewards = [math.nan if part is None else part.rewards[0] for part in parts]
        failed = sum(1 if part is None else part.failed for part in parts)
        return Scored(rewards, rows_of([None if part is None else part.logs for part in parts]), failed)

    def _alone(self, i: int, batch: _Batch, row: int, begun: tuple[Logs, Future] | None) -> Scored | None:
        try:
            if begun is None:
                return self._asked(i, batch, [row])
            logs, future = begun
            return self._scored(i, self._caller.wait(self.names[i], future, time.monotonic()), logs)
        except RewardFailure as error:
            self._pass_over(i, error)
            return None

    def _count(self, i: int, scored: Scored, n: int) -> None:
        """Raises:
        UserError: the function has failed on every completion, again and again: nothing is learned from it."""
        self._hopeless[i] = self._hopeless[i] + 1 if scored.failed == n else 0
        if self._hopeless[i] >= HOPELESS:
            raise UserError(f"{self._last} It failed on every completion of {HOPELESS} batches in a row.")


class _Batch:
    """What functions are given: each its own copies, of all rows or of some."""

    def __init__(
        self, runner: RewardRunner, given: dict[str, Any], columns: dict[str, Any], state: Any, n: int, seed: int | None
    ):
        self._runner, self._given, self._columns, self._state = runner, given, columns, state
        self.n, self.seed = n, seed

    def call(self, i: int, rows: Sequence[int], logs: Logs) -> Callable[[], Any]:
        """The function's call.

        Raises:
            UserError: it asks for a column that the data lack.
        """
        given = self._given
        if len(rows) < self.n:
            given = {key: [values[row] for row in rows] for key, values in given.items()}
        hooks = {"trainer_state": _own_state(self._state), "log_extra": logs.extra, "log_metric": logs.metric}
        func, name = self._runner.funcs[i], self._runner.names[i]
        return partial(func, **arguments_of(func, name, {**given, **hooks}, self._columns))


def _own_state(state: Any) -> Any:
    """A copy of transformers' TrainerState whose numbers and history are the function's own."""
    own = copy.copy(state)
    if isinstance(history := getattr(own, "log_history", None), list):
        own.log_history = list(history)
    return own


def _as_function(func: Any, load: Callable, processing_class: Any, *where: Any) -> Callable:
    """`where`: device, place and visitor of `RewardModel`."""
    func = known(func)
    if isinstance(func, (str, torch.nn.Module)):
        return RewardModel(load(func) if isinstance(func, str) else func, processing_class, *where)
    if not callable(func):
        raise UserError(
            f"a reward function is {func!r}, which can't be called; give a function, a model or a model's name."
        )
    return func


def _loaded(load_model: LoadModel | None, init_kwargs: dict[str, Any], name: str) -> torch.nn.Module:
    if load_model is None:
        raise UserError(
            f"the reward {name!r} is no built-in one, and nothing was given here that loads models by name."
        )
    refuse(name)
    near = did_you_mean(name, BUILTIN) if re.fullmatch(r"[\w-]+", name) else ""
    try:
        return load_model(name, init_kwargs)
    except UserError as error:
        if not near:
            raise
        raise UserError(f"{name!r} is no built-in reward{near}; as a reward model: {error}") from error


def _is_async(func: Callable) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004
