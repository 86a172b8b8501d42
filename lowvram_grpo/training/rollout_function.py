"""Completions that a function of the user's makes, TRL's `rollout_func(prompts, trainer)`, and whether they can be
learned from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowvram_grpo.errors import Terminated, UserError, one_line
from lowvram_grpo.rollout.batch import RolloutBatch

_RETURNED = ("prompt_ids", "completion_ids", "logprobs")
# Of a log-prob above 0: rounding.
_ROUNDING = 1e-3


def call(function: Callable[[list], Any], prompts: Sequence[Any]) -> dict[str, Any]:
    """What it returns for these prompts, of which it gets copies; each stands as often as it has completions.

    Raises:
        UserError: it raised, or returned something else than a dict with TRL's keys.
    """
    try:
        found = function(copy.deepcopy(list(prompts)))
    except (UserError, Terminated):
        raise
    except Exception as error:
        raise UserError(f"rollout_func failed ({type(error).__name__}: {one_line(error)}).") from error
    if not isinstance(found, dict):
        raise UserError(
            f"rollout_func returned a {type(found).__name__}; return a dict with {', '.join(_RETURNED)}, a list of "
            "token ids or log-probs for each prompt it was given."
        )
    if missing := sorted({*_RETURNED} - found.keys()):
        raise UserError(
            f"rollout_func must return keys {missing} in its output dict; logprobs are those of the tokens, or None "
            "where nobody knows them."
        )
    return found


def batch_of(
    found: dict[str, Any],
    count: int,
    ends: set[int],
    *,
    vocabulary: int | None = None,
    positions: int | None = None,
    source: str = "rollout_func",
) -> tuple[RolloutBatch, dict[str, list]]:
    """A rollout of what `call` found, and further columns for the rewards.

    Args:
        count: prompts that it was called with.
        ends: ids that end a completion, padding as well: any other last one says that it was cut.
        vocabulary: ids that the model knows, from 0 on.
        positions: tokens that a prompt and its completion may have together.
        source: who made it, for people.

    Raises:
        UserError: something in it can't be learned from.
    """
    unused = {"logprob_token_ids"} | ({"env_mask"} if found.get("env_mask") is None else set())
    lists = {name: _plain(value) for name, value in found.items() if name not in unused}
    if lists["logprobs"] is None:
        lists["logprobs"] = [[None] * len(row) for row in _plain(lists["completion_ids"])]
    # As in TRL: what is no list is the same for every completion.
    lists = {n: value if isinstance(value, (list, tuple)) else [value] * count for n, value in lists.items()}
    for name, value in lists.items():
        if len(value) != count:
            raise UserError(
                f"{source} was given {count} prompts (each as often as it has completions) and returned "
                f"{len(value)} {name}; return one for each."
            )

    def of(name: str) -> list[list[int]]:
        said = f"{source} returned {{}} {name} {{}}".format
        return [_ids(row, lambda what, i=i: said(what, i), vocabulary) for i, row in enumerate(lists[name])]

    prompts, ids = of("prompt_ids"), of("completion_ids")
    mask = lists.pop("env_mask", None)
    for name, rows in (("logprobs", lists["logprobs"]), ("env_mask", mask)):
        at = next((i for i, row in enumerate(rows or []) if len(_plain(row)) != len(ids[i])), None)
        if rows is not None and at is not None:
            raise UserError(
                f"{source} returned {len(_plain(rows[at]))} {name} for the {len(ids[at])} tokens of completion "
                f"{at}; return one for each token."
            )
    longest = max((len(p) + len(c), i) for i, (p, c) in enumerate(zip(prompts, ids)))
    if positions is not None and longest[0] > positions:
        raise UserError(
            f"{source} returned a prompt and completion of {longest[0]} tokens ({longest[1]}), and the model has "
            f"{positions} positions; stop earlier."
        )
    logps = [_logps(row, f"{source} returned logprobs of completion {i}") for i, row in enumerate(lists["logprobs"])]
    tool_mask = None if mask is None else [[int(bool(x)) for x in _plain(row)] for row in mask]
    if tool_mask is not None:  # what was not sampled has no log-prob
        logps = [torch.where(torch.tensor(by) > 0, row, 0.0) for by, row in zip(tool_mask, logps)]
    others = {name: value for name, value in lists.items() if name not in _RETURNED}
    return RolloutBatch(prompts, ids, logps, [row[-1] not in ends for row in ids], tool_mask), others


def _plain(value: Any) -> Any:
    """Lists of what comes as a tensor or an array."""
    return value.tolist() if hasattr(value, "tolist") else value


def _ids(row: Any, said: Callable[[str], str], vocabulary: int | None) -> list[int]:
    """`said`: who returned it, around what is wrong with it."""
    try:
        ids = [int(token) for token in _plain(row)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{said('something else than token ids in')} ({one_line(error)}).") from error
    if not ids:
        raise UserError(f"{said('no token in')}; return at least one (an end token).")
    wrong = next((t for t in ids if t < 0 or (vocabulary is not None and t >= vocabulary)), None)
    if wrong is not None:
        known = "0 on" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise UserError(f"{said(f'the token {wrong} in')}, and the model knows {known}.")
    return ids


def _logps(row: Any, said: str) -> Tensor:
    """float32 (T,), NaN where the sampler could give none.

    Raises:
        UserError: they are no log-probs.
    """
    found = torch.tensor([_number(x) for x in _plain(row)], dtype=torch.float32)
    if bool((found > _ROUNDING).any()) or bool(found.isinf().any()):
        raise UserError(
            f"{said} with {float(found[~found.isnan()].abs().max()):.3g} among them; they must be logarithms of "
            "probabilities, finite and not above 0."
        )
    return found


def _number(logp: Any) -> float:
    """Servers give a list a token, the sampled one first, or None for what they could not count."""
    logp = _plain(logp)
    if isinstance(logp, (list, tuple)):
        logp = logp[0] if logp else None
    return math.nan if logp is None else float(logp)
