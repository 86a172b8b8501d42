"""Where completions come from other than a plain turn of the policy: tools that it calls, environments that it acts in,
or a function of the user's (`rollout_func`, as TRL 1.16 has it)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lowvram_grpo.data.encoding import row_kwargs
from lowvram_grpo.data.messages import is_conversational
from lowvram_grpo.data.tool_calls import check_template, schemas_of
from lowvram_grpo.errors import Terminated, UserError, WrongType, one_line
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.rollout.turns import converse_anew
from lowvram_grpo.training.environments import Environments, Shared
from lowvram_grpo.training.tool_loop import ToolLoop, named_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowvram_grpo.rollout.engine import RolloutEngine
    from lowvram_grpo.rollout.sampler import Sampling
    from lowvram_grpo.rollout.vllm import VLLMEngine

Rows = list[dict[str, Any]]
_RETURNED = ("prompt_ids", "completion_ids", "logprobs")


class Speaker(Protocol):
    """What agents need of a `Collector`."""

    engine: RolloutEngine | VLLMEngine
    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: dict[str, Any] | None

    def encode(self, prompts: list, own: Sequence[dict[str, Any]] | None = None) -> list[list[int]]: ...

    def decode(self, batch: RolloutBatch, prompts: list) -> list: ...


@dataclass
class Made:
    """Completions, B = rows * G of them, groups adjacent.

    Attributes:
        prompts, completions: as rewards see them.
        columns: what rewards get beside the columns of the data.
        metrics: of this rollout.
    """

    batch: RolloutBatch
    prompts: list
    completions: list
    columns: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class ToolAgents:
    """The policy with tools, in environments or without. Where memory runs out in a rollout it is made anew, and its
    tools are called anew too.

    Args:
        iterations: how often a completion's calls are answered at most; None: as often as it has room.
    """

    samples_itself = False

    def __init__(self, tools: Sequence[Callable], environments: Environments | None, iterations: int | None):
        self.tools, self.environments, self.iterations = list(tools), environments, iterations
        self.all_tools = self.tools if environments is None else environments.all_tools()
        if wrong := [tool for tool in self.all_tools if not callable(tool)]:
            raise WrongType(f"tools must be functions, and {wrong[0]!r} is a {type(wrong[0]).__name__}.")
        if len(named_tools(self.tools)) < len(self.tools):
            raise UserError("Two tools have the same name, so a call of it could mean either; rename one.")
        self._schemas = {
            name: schemas_of(self.tools if environments is None else environments.tools_of(name))
            for name in ([None] if environments is None else environments.factories)
        }
        # Of the last rollout: what scripts read as `trainer.environments`.
        self.instances: list[Any] | None = None

    def check(self, tokenizer: PreTrainedTokenizerBase, prompt: Any, kwargs: dict[str, Any]) -> None:
        """Raises:
        UserError: this model's template knows no tools, or prompts are plain text."""
        if not is_conversational(prompt):
            raise UserError(
                "Tools and environments need prompts that are conversations (lists of messages), and these are plain "
                "text; pass --system-prompt or --template, or write [{'role': 'user', 'content': ...}] into the data."
            )
        for schemas in self._schemas.values():
            if schemas:
                check_template(tokenizer, schemas, kwargs)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Of all tools: what a prompt tells of, or at most tells of where environments differ."""
        return list({s["function"]["name"]: s for schemas in self._schemas.values() for s in schemas}.values())

    def _told(self, rows: Rows) -> list[dict[str, Any]] | None:
        """What the chat template gets for each row, over the settings of the run."""
        own = row_kwargs(rows)
        if self.environments is None or not self.environments.several:
            return own
        named = [{"tools": self._schemas[self.environments.name_of(row)] or None} for row in rows]
        return [{**tools, **of_row} for tools, of_row in zip(named, own or [{}] * len(rows))]

    def generate(
        self, collector: Speaker, rows: Rows, num_generations: int, *, seed: int, sampling: Sampling | None
    ) -> Made:
        engine, sampled_by = collector.engine, sampling or collector.engine.sampling
        each, columns = [row for row in rows for _ in range(num_generations)], {}
        if self.environments is None:
            ids, group = collector.encode([row["prompt"] for row in rows], self._told(rows)), num_generations
            prompts, tools = [row["prompt"] for row in each], [named_tools(self.tools)] * len(each)
        else:
            prompts, self.instances, tools = self.environments.begin(each)
            ids, group = collector.encode(prompts, self._told(each)), 1
            columns["environments"] = Shared(self.instances)
        loop = ToolLoop(
            collector.tokenizer, tools, iterations=self.iterations, limit=sampled_by.max_new_tokens,
            sampled=(*sampled_by.eos_ids, sampled_by.pad_id), kwargs=collector.chat_template_kwargs,
        )  # fmt: skip
        settings = {} if sampling is None else {"sampling": sampling}
        converse = getattr(engine, "converse", None)
        if converse is None:
            batch = converse_anew(engine, ids, group, seed=seed, reply=loop.reply, **settings)
        else:
            batch = converse(ids, group, seed=seed, reply=loop.reply, **settings)
        return Made(batch, prompts, loop.messages, columns, loop.metrics())


class RolloutFunction:
    """A user's function `f(prompts) -> {"prompt_ids", "completion_ids", "logprobs", ...}`; prompts stand as often as
    they have completions, and so do lists in what it returns. `env_mask` (1 sampled, 0 inserted) says what
    the loss leaves out; any other field goes to the rewards."""

    environments = instances = None
    samples_itself = True

    @property
    def all_tools(self) -> list[Callable]:
        return []

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return []

    def __init__(self, function: Callable[[list], dict[str, list]]):
        self.function = function

    def check(self, tokenizer: PreTrainedTokenizerBase, prompt: Any, kwargs: dict[str, Any]) -> None:
        """It renders its prompts itself."""

    def generate(
        self, collector: Speaker, rows: Rows, num_generations: int, *, seed: int, sampling: Sampling | None
    ) -> Made:
        prompts = [row["prompt"] for row in rows for _ in range(num_generations)]
        try:
            found = self.function(list(prompts))
        except (UserError, Terminated):
            raise
        except Exception as error:
            raise UserError(f"rollout_func failed ({type(error).__name__}: {one_line(error)}).") from error
        batch, others = self._batch(found, len(prompts), set((sampling or collector.engine.sampling).eos_ids))
        return Made(batch, prompts, collector.decode(batch, prompts), others)

    def _batch(self, found: Any, count: int, ends: set[int]) -> tuple[RolloutBatch, dict[str, list]]:
        """Raises:
        UserError: it is not what TRL's rollout_func returns."""
        missing = [name for name in _RETURNED if not isinstance(found, dict) or found.get(name) is None]
        if missing:
            raise UserError(
                f"rollout_func must return a dict with {', '.join(_RETURNED)}, and lacks {', '.join(missing)}; "
                "logprobs are those of the sampled tokens, one list a completion."
            )
        lists = {name: list(value) for name, value in found.items() if name != "logprob_token_ids"}
        for name, value in lists.items():
            if len(value) != count:
                raise UserError(
                    f"rollout_func was given {count} prompts (each as often as it has completions) and returned "
                    f"{len(value)} {name}; return one for each."
                )
        ids = [[int(token) for token in row] for row in lists["completion_ids"]]
        logps = [torch.tensor([_number(x) for x in row]) for row in lists["logprobs"]]
        mask = lists.pop("env_mask", None)
        mask = None if mask is None else [[int(bool(x)) for x in row] for row in mask]
        for name, rows in (("logprobs", logps), ("env_mask", mask)):
            at = next((i for i, row in enumerate(rows or []) if len(row) != len(ids[i])), None)
            if at is not None:
                raise UserError(
                    f"rollout_func returned {len(rows[at])} {name} for the {len(ids[at])} tokens of completion {at}; "
                    "return one for each token."
                )
        if empty := next((i for i, row in enumerate(ids) if not row), None):
            raise UserError(f"rollout_func returned no token for completion {empty}; return at least an end token.")
        prompts = [[int(token) for token in row] for row in lists["prompt_ids"]]
        truncated = [row[-1] not in ends for row in ids]
        others = {name: value for name, value in lists.items() if name not in _RETURNED}
        return RolloutBatch(prompts, ids, logps, truncated, mask), others


def _number(logp: Any) -> float:
    """Servers give a list a token, the sampled one first, or None for what they could not count."""
    if isinstance(logp, (list, tuple)):
        logp = logp[0] if logp else None
    return float("nan") if logp is None else float(logp)


Agents = ToolAgents | RolloutFunction


def agents_of(
    tools: Sequence[Callable] | None,
    environment_factory: Any,
    rollout_func: Callable[[list], dict[str, list]] | None,
    iterations: int | None,
) -> Agents | None:
    """None where the policy just answers.

    Raises:
        UserError: what does not go together.
    """
    if rollout_func is not None:
        if tools or environment_factory is not None:
            raise UserError(
                "rollout_func makes completions itself, so tools and environment_factory would have no effect; drop "
                "them, or rollout_func."
            )
        return RolloutFunction(rollout_func)
    if not tools and environment_factory is None:
        return None
    tools = list(tools or [])
    environments = None if environment_factory is None else Environments(environment_factory, tools)
    return ToolAgents(tools, environments, iterations)
