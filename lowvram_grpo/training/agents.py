"""Where completions come from other than a plain turn of the policy: tools that it calls, environments that it acts in,
or a function of the user's (`rollout_func`, as TRL 1.16 has it)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lowvram_grpo.data.encoding import row_kwargs
from lowvram_grpo.data.messages import is_conversational
from lowvram_grpo.data.tool_calls import ToolSpeech, schemas_of
from lowvram_grpo.errors import UserError, WrongType
from lowvram_grpo.rewards.guards import World
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.rollout.turns import converse_anew
from lowvram_grpo.training.environments import Environments, Shared
from lowvram_grpo.training.rollout_function import batch_of, call
from lowvram_grpo.training.tool_loop import ToolLoop, named_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowvram_grpo.rollout.engine import RolloutEngine
    from lowvram_grpo.rollout.sampler import Sampling
    from lowvram_grpo.rollout.vllm import VLLMEngine

Rows = list[dict[str, Any]]


class Speaker(Protocol):
    """What agents need of a `Collector`."""

    engine: RolloutEngine | VLLMEngine
    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: dict[str, Any] | None
    rewards: Any
    tell: Callable[[str], None]

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
        self._world = World()
        self._speech: ToolSpeech | None = None

    def check(self, tokenizer: PreTrainedTokenizerBase, prompt: Any, kwargs: dict[str, Any]) -> None:
        """Raises:
        UserError: this model's template knows no tools, or prompts are plain text."""
        if not is_conversational(prompt):
            raise UserError(
                "Tools and environments need prompts that are conversations (lists of messages), and these are plain "
                "text; pass --system-prompt or --template, or write [{'role': 'user', 'content': ...}] into the data."
            )
        if self.schemas:
            self._speech = ToolSpeech(tokenizer, self.schemas, kwargs)

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
            prompts, tools = [row["prompt"] for row in each], [named_tools(self.tools)] * len(each)
            ids, group = collector.encode(prompts[::num_generations], self._told(rows)), num_generations
        else:
            with self._entered(collector, seed):
                prompts, self.instances, tools = self.environments.begin(each)
            ids, group = _shared(collector.encode(prompts, self._told(each)), num_generations)
            columns["environments"] = Shared(self.instances)
        run = collector.chat_template_kwargs or {}
        loop = ToolLoop(
            collector.tokenizer, self._speech, tools, [row for row in ids for _ in range(group)],
            iterations=self.iterations, limit=sampled_by.max_new_tokens,
            sampled=(*sampled_by.eos_ids, sampled_by.pad_id),
            kwargs=[{**run, **own} for own in self._told(each) or [{}] * len(each)],
            entered=lambda: self._entered(collector, seed), seed=seed,
        )  # fmt: skip
        settings = {} if sampling is None else {"sampling": sampling}
        converse = getattr(engine, "converse", None)
        if converse is None:
            batch = converse_anew(engine, ids, group, seed=seed, reply=loop.reply, **settings)
        else:
            batch = converse(ids, group, seed=seed, reply=loop.reply, **settings)
        return Made(batch, prompts, loop.messages, columns, loop.metrics())

    @contextmanager
    def _entered(self, collector: Speaker, seed: int) -> Iterator[None]:
        """The process as other people's code may have it: what it changes is put back, what it prints is kept off the
        live view, as with rewards."""
        capture: AbstractContextManager = getattr(collector.rewards, "capture", None) or nullcontext()
        with self._world.entered(seed), capture:
            if not isinstance(capture, nullcontext):
                capture.of("tools")
            yield


def _shared(ids: list[list[int]], group: int) -> tuple[list[list[int]], int]:
    """(prompts, completions of each): one a group where all of it was told the same, else one a completion."""
    groups = [ids[i : i + group] for i in range(0, len(ids), group)]
    same = all(row == rows[0] for rows in groups for row in rows)
    return ([rows[0] for rows in groups], group) if same else (ids, 1)


class RolloutFunction:
    """A user's function `f(prompts) -> {"prompt_ids", "completion_ids", "logprobs", ...}`; prompts stand as often as
    they have completions, and so do lists in what it returns. `env_mask` (1 sampled, 0 inserted) says what the loss
    leaves out; any other field goes to the rewards."""

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
        by, model = sampling or collector.engine.sampling, getattr(collector.engine, "model", None)
        config = None if model is None else model.config.get_text_config()
        batch, columns = batch_of(
            call(self.function, prompts), len(prompts), {*by.eos_ids, by.pad_id},
            vocabulary=getattr(config, "vocab_size", None),
            positions=getattr(config, "max_position_embeddings", None),
        )  # fmt: skip
        return Made(batch, prompts, collector.decode(batch, prompts), columns)


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
