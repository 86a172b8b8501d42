"""Call every reward function on a batch of completions, and let none of them fail silently."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram_grpo.errors import Terminated, UserError
from lowvram_grpo.rewards.model import RewardModel
from lowvram_grpo.rewards.registry import BUILTIN
from lowvram_grpo.rewards.signatures import arguments_of, distinct, name_of

LoadModel = Callable[[str, dict[str, Any]], torch.nn.Module]

# How often a person's Ctrl-C is looked for while the batch waits for a thread.
_POLL_SECONDS = 0.2


class RewardResult(NamedTuple):
    """Rewards of n completions by F functions.

    Attributes:
        per_func: (n, F) float32, NaN where a function returned None.
        total: (n,) float32 weighted sum over the functions that apply, NaN where none does.
        extras: column -> n values, what the functions gave to `log_extra`.
        metrics: name -> mean of what they gave to `log_metric`.
    """

    per_func: Tensor
    total: Tensor
    extras: dict[str, list]
    metrics: dict[str, float]


class RewardRunner:
    """Runs reward functions of TRL's kinds: sync, async, and sequence-classification models.

    Args:
        reward_funcs: functions `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, async ones,
            models, and strings: a built-in's name, else the folder or hub id of a model. A function without `**kwargs`
            receives the arguments it names.
        weights: one a function; all 1 when None.
        processing_classes: tokenizers of the models, one a function; None entries are loaded with the model.
        device: where models run; results lie on the host.
        timeout: seconds a function may take on one batch; None waits forever.
        load_model: makes a model of a name and `model_init_kwargs` (`policy.reward_model.load_reward_model`).
        model_init_kwargs: for `from_pretrained` of models given as strings.

    Attributes:
        names: one a function, distinct.
        weights: (F,) float32.

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
        timeout: float | None = None,
        load_model: LoadModel | None = None,
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
        self.funcs = [_as_function(f, c, device, load) for f, c in zip(reward_funcs, classes)]
        self.names = distinct([name_of(f) for f in self.funcs])
        self.weights = torch.tensor([1.0] * len(self.funcs) if weights is None else weights, dtype=torch.float32)
        self.timeout = timeout
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence,
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, Sequence],
        trainer_state: Any = None,
    ) -> RewardResult:
        """Score n completions; async functions run at the same time as each other and as the sync ones.

        Args:
            prompts, completions: n strings or n lists of messages.
            completion_ids: n lists of sampled token ids.
            columns: the data's other columns, n values each.
            trainer_state: handed on, as are `log_extra(column, values)` and `log_metric(name, value)`.

        Raises:
            UserError: a function raised, took too long, lacks a column, or returned the wrong number of rewards or
                something that is not a finite number; the sentence names the function.
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        given["trainer_state"] = trainer_state
        logs = [_Logs() for _ in self.funcs]
        calls = [
            partial(
                func, **arguments_of(func, name, {**given, "log_extra": log.extra, "log_metric": log.metric}, columns)
            )
            for func, name, log in zip(self.funcs, self.names, logs)
        ]
        outputs = self._run(calls)
        n = len(completions)
        rows = [_floats(output, n, name) for output, name in zip(outputs, self.names)]
        per_func = torch.tensor(rows, dtype=torch.float32).T.contiguous()
        total = (per_func * self.weights).nansum(dim=1)
        total[per_func.isnan().all(dim=1)] = torch.nan
        return RewardResult(per_func, total, self._extras(logs, n), _mean_metrics(logs))

    def _run(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        start = time.monotonic()
        pending = {i: self._submit(i, call) for i, call in enumerate(calls) if _is_async(self.funcs[i])}
        outputs: list[Any] = [None] * len(calls)
        try:
            for i, call in enumerate(calls):
                if i not in pending:
                    outputs[i] = self._guarded(i, call if self.timeout is None else partial(self._in_thread, i, call))
            for i, future in pending.items():
                outputs[i] = self._wait(i, future, start)
        finally:
            for future in pending.values():
                future.cancel()
        return outputs

    def _guarded(self, i: int, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (UserError, Terminated):
            raise
        except (Exception, SystemExit) as error:  # a script's main() may call sys.exit
            raise self._failure(i, error) from error

    def _failure(self, i: int, error: BaseException) -> UserError:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        return UserError(f"the reward function {self.names[i]!r} raised {type(error).__name__}: {error} ({place}).")

    def _in_thread(self, i: int, call: Callable[[], Any]) -> Any:
        future: Future = Future()

        def work() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        start = time.monotonic()
        # A daemon: a function that hangs must not keep the process alive after the error.
        threading.Thread(target=work, name=f"reward-{self.names[i]}", daemon=True).start()
        return self._wait(i, future, start)

    def _wait(self, i: int, future: Future, start: float) -> Any:
        while True:
            if wait([future], _POLL_SECONDS).done:
                return future.result()
            if self.timeout is not None and time.monotonic() - start > self.timeout:
                raise UserError(
                    f"the reward function {self.names[i]!r} did not finish within {self.timeout:g} s; "
                    "make it faster or raise --reward-timeout."
                )

    def _submit(self, i: int, call: Callable[[], Any]) -> Future:
        # One loop for the whole run, in its own thread: clients that a function keeps stay bound to their loop, and
        # a notebook has a loop running in this thread already.
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True).start()

        async def work() -> Any:
            try:
                return await call()
            except (UserError, Terminated):
                raise
            except (Exception, SystemExit) as error:  # named here: asyncio hands some on without their traceback
                raise self._failure(i, error) from error

        return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def _extras(self, logs: Sequence[_Logs], n: int) -> dict[str, list]:
        extras: dict[str, list] = {}
        for name, log in zip(self.names, logs):
            for column, values in log.extras.items():
                if len(values) != n:
                    raise UserError(
                        f"the reward function {name!r} gave log_extra {len(values)} values of {column!r} for {n} "
                        "completions; give one for each."
                    )
                extras[column if column not in extras else f"{name}/{column}"] = values
        return extras


class _Logs:
    """What one function logs during one call."""

    def __init__(self) -> None:
        self.extras: dict[str, list] = defaultdict(list)
        self.metrics: dict[str, list[float]] = defaultdict(list)

    def extra(self, column: str, values: Sequence) -> None:
        self.extras[column].extend(values)

    def metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))


def _mean_metrics(logs: Sequence[_Logs]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for log in logs:
        for name, logged in log.metrics.items():
            values[name] += logged
    return {name: sum(logged) / len(logged) for name, logged in values.items()}


def _as_function(func: Any, processing_class: Any, device: torch.device | str, load: Callable) -> Callable:
    if isinstance(func, str) and func in BUILTIN:
        return BUILTIN[func]
    if isinstance(func, (str, torch.nn.Module)):
        return RewardModel(load(func) if isinstance(func, str) else func, processing_class, device)
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
    return load_model(name, init_kwargs)


def _is_async(func: Callable) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def _floats(output: Any, n: int, name: str) -> list[float]:
    """The n rewards as floats, NaN for None."""
    if hasattr(output, "tolist"):
        output = output.tolist()
    if isinstance(output, (str, bytes, dict)) or not hasattr(output, "__iter__"):
        raise UserError(f"the reward function {name!r} returned {type(output).__name__}, not a list of {n} rewards.")
    output = list(output)
    if len(output) != n:
        raise UserError(
            f"the reward function {name!r} returned {len(output)} rewards for {n} completions; return one for each."
        )
    return [math.nan if reward is None else _float(reward, i, name) for i, reward in enumerate(output)]


def _float(reward: Any, row: int, name: str) -> float:
    try:
        value = math.nan if isinstance(reward, (str, bytes)) else float(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = math.nan
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise UserError(
            f"the reward function {name!r} gave {reward!r} for row {row}; give a finite number, or None where the "
            "reward does not apply."
        )
    return value
