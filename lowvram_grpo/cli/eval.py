"""`lowvram-grpo eval`: a dataset through sampler and rewards, greedy and sampled, an adapter and its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from lowvram_grpo.cli.chat import check_filters
from lowvram_grpo.cli.eval_report import as_json, explained, found_of, settings_of, versions
from lowvram_grpo.cli.eval_screen import Progress, print_tables
from lowvram_grpo.cli.train import parse_extra, prepare_cuda
from lowvram_grpo.errors import UserError, counted
from lowvram_grpo.run.quiet import hush

if TYPE_CHECKING:
    from datasets import Dataset

    from lowvram_grpo.jobs.evaluation import Scored
    from lowvram_grpo.jobs.inference import LoadedPolicy
    from lowvram_grpo.memory.guard import Guard
    from lowvram_grpo.recipe.resolve import Recipe
    from lowvram_grpo.rewards.runner import RewardRunner
    from lowvram_grpo.rollout.sampler import Sampling
    from lowvram_grpo.training.collect import Collector
    from lowvram_grpo.training.experience import Rollout

_SPLITS = ("test", "validation", "valid", "dev", "train")
_USUAL_KS = (1, 4, 8)
# Whole waves of any preset on a GPU; on a CPU, few enough for the progress bar to move.
_COMPLETIONS_A_CALL = {"cuda": 64, "cpu": 16}


@dataclass(frozen=True)
class Wanted:
    """What is asked of an evaluation, beside its recipe.

    Attributes:
        samples: completions a prompt of the sampled pass; 0 leaves it out.
        threshold: of a pass; None: as `evaluation.default_threshold`.
        filters: of the sampled pass: temperature, top_p, top_k, min_p and repetition_penalty (of both).
        ks: of pass@k.
    """

    greedy: bool
    samples: int
    ks: tuple[int, ...]
    threshold: float | None
    limit: int | None
    compare_base: bool
    filters: dict[str, Any]
    out: Path | None
    as_json: bool

    @classmethod
    def checked(cls, *, k: str | None, **rest: Any) -> Wanted:
        """With `k` as it was written (`1,4,8`; None: those of 1, 4 and 8 that `samples` allows).

        Raises:
            UserError: numbers that can't be, or nothing to do.
        """
        from lowvram_grpo.jobs.evaluation import check_ks

        samples, limit, out = rest["samples"], rest["limit"], rest["out"]
        if samples < 0 or not (samples or rest["greedy"]):
            raise UserError(f"--samples is {samples}; give 1 or more, or 0 with --greedy for the greedy pass alone.")
        if limit is not None and limit < 1:
            raise UserError(f"--limit is {limit}; it must be 1 or more.")
        try:
            ks = tuple(sorted({int(part) for part in k.split(",")})) if k else None
        except ValueError as error:
            raise UserError(f"--k is {k!r}; write numbers with commas, as in --k 1,4,8.") from error
        if ks:
            check_ks(ks, samples)
        check_filters(rest["filters"], None)
        if samples and not rest["filters"]["temperature"]:
            raise UserError(
                "--temperature is 0, at which all samples are the same; give one above 0, or --samples 0 for the "
                "greedy pass alone."
            )
        if out and (out / "eval.json").exists():
            raise UserError(f"{out} holds an evaluation already; choose another --out.")
        return cls(ks=ks or tuple(k for k in _USUAL_KS if k <= samples), **rest)


def start(flags: dict[str, Any], extra: list[str], **options: Any) -> None:
    """Evaluate, and show and write what was found.

    Args:
        flags: the recipe's settings that were given; `extra` has more of them as arguments.
        options: of `Wanted.checked`.

    Raises:
        UserError: whatever a person can mend, before the model is loaded where it can be known.
    """
    notice = prepare_cuda()
    hush()
    from lowvram_grpo.jobs.evaluation import default_threshold
    from lowvram_grpo.jobs.inference import load_policy, recipe_to_sample
    from lowvram_grpo.jobs.loading import check_device, load_tokenizer_of, training_config
    from lowvram_grpo.jobs.task import check_reward_columns, guess_notice, prepared, reward_specs
    from lowvram_grpo.rewards.registry import full_marks, resolve_reward
    from lowvram_grpo.rewards.runner import RewardRunner

    wanted = Wanted.checked(**options)
    console = Console(stderr=True, highlight=False)
    tell = lambda text: console.print(escape(text), style="dim", soft_wrap=not console.is_terminal)
    if notice:
        tell(notice)
    flags = {**flags, **parse_extra(extra)}
    recipe = recipe_to_sample(flags, tell)
    if {"reward", "template"} & flags.keys() and "reward_weights" not in flags:
        recipe.training.pop("reward_weights", None)
    if "template" in flags and "reward" not in flags:
        recipe.reward = []
    check_device(recipe)
    if wanted.compare_base and not recipe.adapter:
        raise UserError("--compare-base compares an adapter with its base; pass --adapter.")
    raw, place = _data(recipe, flags)
    specs = reward_specs(recipe, raw.column_names)
    if guessed := guess_notice(recipe):
        tell(guessed)
    rewards = [resolve_reward(spec) for spec in specs]
    tokenizer = load_tokenizer_of(recipe)
    args = training_config(recipe, weights=[weight for _, weight in rewards])
    if wanted.limit:
        raw = raw.select(range(min(wanted.limit, len(raw))))
    data = prepared(recipe, raw, tell)
    check_reward_columns(recipe, [func for func, _ in rewards], data)
    _check_lengths(recipe, args, tokenizer, data, tell)
    full = [full_marks(func) for func, _ in rewards]
    threshold = default_threshold(args.reward_weights, full) if wanted.threshold is None else wanted.threshold
    with console.status(f"loading {escape(recipe.model)}"):
        policy = load_policy(recipe, args, tokenizer, tell)
        runner = RewardRunner(
            [func for func, _ in rewards], weights=args.reward_weights, device=args.device, timeout=args.reward_timeout
        )
    adapter = f" with {recipe.adapter}" if recipe.adapter else ""
    tell(f"{recipe.model}{adapter} on {args.device}; {counted(len(data), 'prompt')} of {place}.")
    scored = _passes(policy, runner, data, wanted, console, tell)
    found = found_of(scored, wanted, threshold)
    found["settings"] = settings_of(recipe, args, specs, wanted, threshold, place, data)
    found["versions"] = versions(args)
    if wanted.out:
        wanted.out.mkdir(parents=True, exist_ok=True)
        (wanted.out / "eval.json").write_text(as_json(found) + "\n", encoding="utf-8")
    if wanted.as_json:
        print(as_json(found))
    else:
        print_tables(found, Console(highlight=False))
        for sentence in explained(wanted, threshold, full, scored):
            tell(sentence)
    if wanted.out:
        tell(f"written: {wanted.out / 'eval.json'}, {wanted.out / 'completions.jsonl'}")


def _data(recipe: Recipe, flags: dict[str, Any]) -> tuple[Dataset, str]:
    """The data that was named, else the run's evaluation data, else the run's data; and what it is called.

    Raises:
        UserError: there is none, or it can't be read.
    """
    from lowvram_grpo.data.load import load

    if "data" in flags:
        place, split, config = recipe.data, flags.get("split"), flags.get("data_config")
    else:
        place, split, config = recipe.eval_data or recipe.data, recipe.eval_split, recipe.data_config
        split = flags.get("split") or split
    if not place:
        raise UserError("No data given; pass --data with a folder, a json/jsonl/csv/parquet file or a hub id.")
    data = load(place, config=config, split=split, prefer=_SPLITS)
    named = split or (str(data.split) if data.split else None)
    return data, f"{place}, split {named}" if named else place


def _check_lengths(recipe: Recipe, args, tokenizer, data: Dataset, tell: Callable[[str], None]) -> None:
    """Say how many prompts are cut, as training cuts them; see `warmup.check_lengths`.

    Raises:
        UserError: a prompt and its completion exceed the model's positions.
    """
    from lowvram_grpo.data.encoding import check_prompts, prompt_length_report
    from lowvram_grpo.jobs.loading import hub_arguments
    from lowvram_grpo.policy.load import model_config

    check_prompts(tokenizer, data, chat_template_kwargs=args.chat_template_kwargs)
    report = prompt_length_report(
        tokenizer, data, max_prompt_length=args.max_prompt_length, chat_template_kwargs=args.chat_template_kwargs
    )
    if report.cut:
        tell(report.sentence(args.max_prompt_length))
    longest = min(report.longest, args.max_prompt_length or report.longest)
    config = model_config(recipe.model, **hub_arguments(recipe)).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and longest + args.max_completion_length > limit:
        raise UserError(
            f"The longest prompt ({longest} tokens) and max_completion_length {args.max_completion_length} do not fit "
            f"the model's {limit} positions; lower --max-prompt-length or --max-completion-length."
        )


def _passes(
    policy: LoadedPolicy,
    runner: RewardRunner,
    data: Dataset,
    wanted: Wanted,
    console: Console,
    tell: Callable[[str], None],
) -> dict[str, dict[str, Scored]]:
    """policy -> pass -> scores, both in the order in which they are shown."""
    from lowvram_grpo.jobs.evaluation import completion_rows, evaluate
    from lowvram_grpo.run import jsonl

    call = _COMPLETIONS_A_CALL.get(policy.args.device.type, 16)
    collector = _collector(policy, runner, _guard(policy, call, tell))
    greedy, sampled = _samplings(policy, wanted.filters)
    plans = [("greedy", greedy, 1)] * wanted.greedy + [("sampled", sampled, wanted.samples)] * bool(wanted.samples)
    policies = ["base"] * wanted.compare_base + ["adapter" if policy.has_adapter else "model"]
    scored: dict[str, dict[str, Scored]] = {name: {} for name in policies}
    if wanted.out:
        wanted.out.mkdir(parents=True, exist_ok=True)
        (wanted.out / "completions.jsonl").unlink(missing_ok=True)  # of an evaluation that was broken off
    total = len(policies) * len(data) * sum(group for _, _, group in plans)
    with Progress(console, total) as progress, policy.autocast():
        for name in policies:
            for kind, sampling, group in plans:

                def seen(first: int, rollout: Rollout, name=name, kind=kind, group=group) -> None:
                    progress.add(len(rollout.rewards), sum(map(len, rollout.batch.completion_ids)))
                    if wanted.out:
                        rows = completion_rows(rollout, runner.names, first, group)
                        rows = ({"policy": name, "pass": kind, **row} for row in rows)
                        jsonl.append(wanted.out / "completions.jsonl", rows)

                progress.begin(f"{name}, {kind}" if wanted.compare_base else kind)
                with policy.adapter(name != "base"):
                    scored[name][kind] = evaluate(
                        collector,
                        data,
                        group,
                        sampling=sampling,
                        seed=policy.args.seed,
                        completions_a_call=call,
                        seen=seen,
                    )
    return scored


def _samplings(policy: LoadedPolicy, filters: dict[str, Any]) -> tuple[Sampling, Sampling]:
    """Greedy, and sampled with `filters`; both up to the recipe's max_completion_length."""
    sampled = replace(policy.sampling, **filters)
    return replace(sampled, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0), sampled


def _collector(policy: LoadedPolicy, runner: RewardRunner, guard: Guard) -> Collector:
    from lowvram_grpo.training.collect import Collector

    args = policy.args
    return Collector(
        policy.engine,
        runner,
        policy.tokenizer,
        guard,
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
        scale_rewards="none",
        only_prompts=bool(args.remove_unused_columns),
        tell=lambda phase: None,
    )


def _guard(policy: LoadedPolicy, rows: int, tell: Callable[[str], None]) -> Guard:
    """When memory runs out: smaller waves, then smaller tiles of the head."""
    from lowvram_grpo.memory.guard import Guard
    from lowvram_grpo.plan.paper import ladder_of

    args, engine = policy.args, policy.engine
    names = {"rollout_batch_size": "rows"}
    # What the ladder could lower of a training run stands at its end already.
    settings = {"per_device_train_batch_size": 1, "optimizer_offload": True, "activation_offload": True}
    settings |= {"rollout_batch_size": engine.rows or rows, "workspace_mib": args.workspace_mib}
    return Guard(
        settings,
        lambda key, value: setattr(engine, names.get(key, key), value),
        ladder=ladder_of(policy.recipe.preset),
        tell=lambda sentence, event: tell(sentence),
        limits=f"prompts of up to {args.max_prompt_length} and completions of up to {args.max_completion_length} "
        "tokens",
        active=args.oom_step_down and args.device.type == "cuda",
    )
