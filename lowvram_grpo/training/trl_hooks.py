"""What subclasses of TRL's GRPOTrainer replace or call: rewards, the scored rollout, log-probs, the loss. Where none of
them is replaced, no step goes another way for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.objective import Advantages
from lowvram_grpo.rewards.runner import RewardResult
from lowvram_grpo.rollout.batch import RolloutBatch, pad_left
from lowvram_grpo.training.agents import Made
from lowvram_grpo.training.experience import MicroBatch, Rollout, pad_right
from lowvram_grpo.training.rollout_function import batch_of
from lowvram_grpo.training.scoring import score

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.rewards.runner import RewardRunner
    from lowvram_grpo.run.observer import Observer
    from lowvram_grpo.training.collect import Collector
    from lowvram_grpo.training.learner import Learner
    from lowvram_grpo.training.metrics import MetricBook

Rows = list[dict[str, Any]]

_TEXTS = ("prompt", "completion", "completion_ids")


class TrlHooks:
    """To be named among a trainer's bases; it brings what is named here without a value, and `_collect`, which samples
    and rewards."""

    grpo_args: GRPOConfig
    observer: Observer
    learner: Learner
    rewards: RewardRunner
    collector: Collector
    metrics: dict[str, MetricBook]
    _collect: Callable[[Rows, int, str], Rollout]

    _scored: RewardResult | None = None  # what the reward functions said last
    _mode = "train"  # of the rollout that is being made, or was made last
    _asked: tuple[int, str] | None = None  # step and mode of the rollout that is asked for
    _extra_columns: dict[str, list]
    _rollout: Rollout | None = None  # what `_generate_and_score_completions` has made
    _rows: Rows  # of the data that the rollout is of, which `_collect` made last
    _given: dict[str, Tensor]  # and what it has given of that
    _left_said = False
    _of_generate: tuple | None = None  # what `_generate` is asked for
    _metrics_of_generate: dict[str, float]

    def replaces(self, *names: str) -> bool:
        """Whether a subclass has methods of its own of one of these names."""
        return any(getattr(type(self), name) is not getattr(TrlHooks, name) for name in names)

    # Rewards

    def _calculate_rewards(
        self, inputs: Rows, prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> Tensor:
        """(n, F) float32 rewards of n completions by each function, NaN where one does not apply.

        Args:
            inputs: n rows of the data, each as often as it has completions.
        """
        names = [name for name in inputs[0] if name not in _TEXTS]
        columns = {name: [row[name] for row in inputs] for name in names}
        self._scored = self.rewards(prompts, completions, completion_ids_list, columns, self.state)
        return self._scored.per_func.to(self.args.device)

    def _log_metric(self, name: str, value: float) -> None:
        """Log a number with the metrics of the rollout that is being made, or was made last."""
        self.metrics[self._mode].add({name: float(value)})

    def _log_completion_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a column with the completions of the rollout that is being made; a value for each."""
        self._extra_columns[column].extend(values)

    def _add_extras(self, rollout: Rollout) -> None:
        """The columns that were logged so while `rollout` was made."""
        for column, values in self._extra_columns.items():
            if len(values) != len(rollout.completions):
                raise UserError(
                    f"_log_completion_extra got {len(values)} values of {column!r} for {len(rollout.completions)} "
                    "completions; give one for each."
                )
            rollout.extras[column] = values
        self._extra_columns = defaultdict(list)

    # The scored rollout

    def collect(self, rows: Rows, step: int, mode: str = "train") -> Rollout:
        """The rollout of `rows` for optimizer step `step`: sampled and rewarded, and as a subclass leaves it."""
        if not self.replaces("_generate_and_score_completions"):
            return self._collect(rows, step, mode)
        self._asked, self._rollout = (step, mode), None
        group = self._group(mode)
        outputs = self._generate_and_score_completions([row for row in rows for _ in range(group)])
        self._asked = None
        if self._rollout is None:
            raise UserError(
                "_generate_and_score_completions of a subclass does not call super()'s, and completions from elsewhere "
                "can't be trained on; call it, and change the advantages in what it returns."
            )
        return self._taken_up(self._rollout, outputs)

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Tensor]:
        """Sample and reward a completion of each row of `inputs`, in which each of the data stands as often as it has
        completions. A subclass may change `advantages` (n,); the rest is there to be read. Where other prompts took the
        place of dead groups, `inputs` has their rows afterwards.

        Returns:
            prompt_ids, prompt_mask (n, P) left-padded; completion_ids, completion_mask, sampling_per_token_logps
            (n, T) right-padded, and where tokens were inserted tool_mask, 0 at these; advantages (n,);
            num_items_in_batch, the number of sampled tokens.
        """
        step, mode = self._asked or (self.state.global_step, self._mode)
        group = self._group(mode)
        rows = inputs[::group]
        self._rollout = rollout = self._collect(rows, step, mode)
        for g, (row, before) in enumerate(zip(self._rows, rows)):
            if row is not before:
                inputs[g * group : (g + 1) * group] = [row] * group
        batch, pad_id, device = rollout.batch, self.collector.pad_id, self.args.device
        width = max(map(len, batch.completion_ids))
        ids = [torch.tensor(row) for row in batch.completion_ids]
        prompt_ids, prompt_mask = pad_left(batch.prompt_ids, pad_id, torch.device("cpu"))
        outputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": pad_right(ids, width, pad_id),
            "completion_mask": pad_right([torch.ones_like(row) for row in ids], width, 0),
            "sampling_per_token_logps": pad_right(batch.sampling_per_token_logps, width, 0.0),
            "advantages": rollout.advantages.values,
            "num_items_in_batch": torch.tensor(rollout.sampled_tokens),
        }
        if batch.tool_mask is not None:
            outputs["tool_mask"] = pad_right([torch.tensor(row) for row in batch.tool_mask], width, 1)
        self._given = outputs
        return {name: value.to(device, copy=True) for name, value in outputs.items()}

    def _generate(self, prompts: list) -> tuple:
        """A completion of each of `prompts`, in which each of the data stands as often as it has completions. A
        subclass may change what this returns, or make it itself.

        Returns:
            (prompt_ids, completion_ids, tool_mask or None, completions, log-probs, further columns for the rewards,
            None, []), lists of n; the last two are TRL's for images.
        """
        rows, group, seed, sampling = self._of_generate or ([{"prompt": p} for p in prompts], 1, self.args.seed, None)
        made = self.collector.made(rows, group, seed=seed, sampling=sampling)
        batch, self._metrics_of_generate = made.batch, made.metrics
        logps = [row.tolist() for row in batch.sampling_per_token_logps]
        return batch.prompt_ids, batch.completion_ids, batch.tool_mask, made.completions, logps, made.columns, None, []

    def made_by_generate(self, rows: Rows, group: int, *, seed: int, sampling: Any) -> Made:
        """Completions as a subclass's `_generate` makes them.

        Raises:
            UserError: something in them can't be learned from.
        """
        prompts = [row["prompt"] for row in rows for _ in range(group)]
        self._of_generate, self._metrics_of_generate = (rows, group, seed, sampling), {}
        try:
            prompt_ids, completion_ids, tool_mask, completions, logps, columns, *_ = self._generate(prompts)
        finally:
            self._of_generate = None
        found = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logps, **columns}
        found |= {} if tool_mask is None else {"env_mask": tool_mask}
        by = self.collector.engine.sampling
        batch, columns = batch_of(found, len(prompts), {*by.eos_ids, by.pad_id}, source="_generate of a subclass")
        return Made(batch, prompts, completions, columns, self._metrics_of_generate)

    def _taken_up(self, rollout: Rollout, outputs: dict[str, Any]) -> Rollout:
        """`rollout` with the advantages that a subclass has given its completions."""
        values = outputs["advantages"].detach().float().cpu()
        if values.shape != rollout.advantages.values.shape:
            raise UserError(
                f"_generate_and_score_completions of a subclass gives advantages of shape {tuple(values.shape)} for "
                f"{len(rollout.completions)} completions; give one for each."
            )
        rollout.advantages = rollout.advantages._replace(values=values)
        self._say_what_is_left(outputs)
        return rollout

    def _say_what_is_left(self, outputs: dict[str, Any]) -> None:
        same = lambda name: isinstance(outputs[name], Tensor) and torch.equal(outputs[name].cpu(), self._given[name])
        left = [name for name in outputs if name != "advantages" and not (name in self._given and same(name))]
        if left and not self._left_said:
            self._left_said = True
            self.observer.warning(
                f"_generate_and_score_completions of a subclass changes or adds {', '.join(left)}; of what it returns "
                "advantages alone are taken up here."
            )

    def _group(self, mode: str) -> int:
        return self.plan.num_generations if mode == "train" else self.generations_eval

    # Log-probs and the loss

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probs at the run's temperature, and entropies, of the last `logits_to_keep` of (n, L) tokens, which are
        padded on the left before them and on the right within them; 0 where masked.

        Args:
            batch_size: rows that go through the model at once; all if left out.
            ignored: TRL's arguments for images, of which there are none.

        Returns:
            (n, logits_to_keep) float32 log-probs, and entropies or None, both differentiable; None for the
            load-balancing loss of a mixture of experts.
        """
        args, keep = self.grpo_args, logits_to_keep
        found = []
        for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            ids, mask = input_ids[rows], attention_mask[rows]
            with self.compute_loss_context_manager():
                found.append(
                    score(
                        model, ids[:, :-keep], mask[:, :-keep], ids[:, -keep:], mask[:, -keep:],
                        temperature=args.temperature or 1.0, workspace_mib=args.workspace_mib,
                        path=self.learner.kernels.path, attention=args.attention, offload=args.activation_offload,
                        entropy_gradient=compute_entropy and torch.is_grad_enabled(),
                    )
                )  # fmt: skip
        entropies = torch.cat([scores.entropy for scores in found]) if compute_entropy else None
        return torch.cat([scores.logps for scores in found]), entropies, None

    def compute_loss(
        self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This micro-batch's share of the update's loss: those of an update add up to it.

        Args:
            inputs: has TRL's keys, too: `inputs["advantages"]`, `"old_per_token_logps" in inputs`. A dict made of them
                will do, or one of TRL's keys alone, which then counts as a whole update.

        Raises:
            UserError: outputs are asked for; there are none, as logits are never whole.
        """
        if return_outputs:
            raise UserError("GRPOTrainer has no outputs to return: the logits are never whole; leave return_outputs.")
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model: nn.Module, inputs: MicroBatch | dict[str, Any]) -> Tensor:
        if not isinstance(inputs, MicroBatch):
            inputs = self._micro_batch(inputs)
        sums, scores = self.learner.loss(inputs)
        first = inputs.old_per_token_logps is None and self.model.training
        self._sums.add(sums, scores, self.learner.sampler_gap(inputs, scores.logps.detach()) if first else None)
        return sums.loss

    def _micro_batch(self, inputs: dict[str, Any]) -> MicroBatch:
        """A dict as a micro-batch: of its fields, or of TRL's keys as they come from
        `_generate_and_score_completions`."""
        names = {field.name for field in fields(MicroBatch)}
        if "weights" in inputs:
            return MicroBatch(**{name: value for name, value in inputs.items() if name in names})
        lengths = inputs["completion_mask"].sum(1).tolist()
        cut = lambda name: [row[:n].tolist() for row, n in zip(inputs[name], lengths)]
        n, logps = len(lengths), inputs.get("sampling_per_token_logps")
        batch = RolloutBatch(
            [row[mask.bool()].tolist() for row, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"])],
            cut("completion_ids"),
            [torch.zeros(k) if logps is None else logps[i, :k].cpu() for i, k in enumerate(lengths)],
            [False] * n,
            cut("tool_mask") if inputs.get("tool_mask") is not None else None,
        )
        nothing, alone = torch.zeros(n), replace(self.plan, micro_batch_size=n)
        advantages = Advantages(inputs["advantages"].float().cpu(), nothing.bool(), nothing)
        rollout = Rollout(batch, [""] * n, [""] * n, nothing, nothing[:, None], advantages, {})
        micro = self.learner.cut(rollout, alone, self.collector.pad_id, updates=1)[0][0]
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            if inputs.get(name) is not None:
                setattr(micro, name, inputs[name][:, : max(lengths)])
        return micro

    @property
    def own_loss(self) -> bool:
        """Whether a subclass has a loss of its own, which may want a gradient where GRPO's has none."""
        return self.replaces("compute_loss", "_compute_loss")


class AskedRewards:
    """The runner of a trainer whose subclass replaces `_calculate_rewards`: called as the runner is, it asks that."""

    def __init__(self, trainer: TrlHooks):
        self._trainer = trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer.rewards, name)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, Sequence],
        *args: Any,
        **kwargs: Any,
    ) -> RewardResult:
        """As `RewardRunner.__call__`.

        Raises:
            UserError: the subclass's rewards are not one a completion and function.
        """
        trainer = self._trainer
        trainer._scored = None
        rows = [{"prompt": p, **{name: c[i] for name, c in columns.items()}} for i, p in enumerate(prompts)]
        rewards = torch.as_tensor(trainer._calculate_rewards(rows, prompts, completions, completion_ids))
        per_func, runner = rewards.detach().float().cpu(), trainer.rewards
        if per_func.shape != (len(prompts), len(runner.names)):
            raise UserError(
                f"_calculate_rewards of a subclass returned shape {tuple(per_func.shape)} for {len(prompts)} "
                f"completions and {len(runner.names)} reward functions; return one reward for each."
            )
        total = (per_func * runner.weights).nansum(dim=1)
        total[per_func.isnan().all(dim=1)] = torch.nan
        said = trainer._scored
        return RewardResult(per_func, total, said.extras if said else {}, said.metrics if said else {})
