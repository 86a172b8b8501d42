"""Runs with tools, environments and a rollout_func, a small model's and token by token."""

from __future__ import annotations

import json

import pytest
import torch
from chatting import END, Scripted, asked, calling, chat_tokenizer, ids_of, small_model
from datasets import Dataset

from lowvram_grpo import GRPOConfig, UserError
from lowvram_grpo.training.trainer import GRPOTrainer

CALL, DONE = calling("multiply", a=3, b=4), "It is 12.<|im_end|>"


def multiply(a: int, b: int) -> int:
    """Multiplies.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


def by_length(completions, **kwargs):
    return [float(len(completion)) + 0.1 * i for i, completion in enumerate(completions)]


class Counter:
    """Counts; its methods are tools."""

    def reset(self, **row):
        self.count, self.row = 0, row

    def add(self, step: int) -> int:
        """Adds.

        Args:
            step: How much.
        """
        self.count += step
        return self.count

    def _hidden(self):
        """No tool."""

    @property
    def trap(self):
        raise RuntimeError("evaluated")


class Judging(Counter):
    def get_reward(self):
        return float(self.count)


class Telling(Judging):
    made = 0

    def __init__(self):
        type(self).made += 1

    def reset(self, **row):
        super().reset(**row)
        return f" You have {self.made and len(row)} things."

    async def get_reward(self):
        return -float(self.count)


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


@pytest.fixture
def trainer(tmp_path, tokenizer):
    def make(script=None, rewards=by_length, data=None, settings=None, template=None, **arguments):
        data = Dataset.from_list(data or asked(4)) if data is None or isinstance(data, list) else data
        if template is not None:
            tokenizer.chat_template = template
        usual = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none", "num_generations": 2,
            "prompts_per_step": 2, "per_device_train_batch_size": 4, "max_completion_length": 400, "max_steps": 1,
            "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "self_test": script is None,
            "signal_check": False, "shuffle_dataset": False,
        }  # fmt: skip
        args = GRPOConfig(**{**usual, **(settings or {})})
        made = GRPOTrainer(small_model(tokenizer), rewards, args, data, processing_class=tokenizer, **arguments)
        if script is not None:
            made.collector.engine = Scripted(made.collector.engine, tokenizer, script)
        return made

    return make


SCRIPT = [[CALL, DONE], [DONE], [CALL, CALL, DONE], [calling("multiply", a=3, c=4), DONE]]


def test_the_mask_token_by_token(trainer, tokenizer):
    """Each completion is what was sampled and, between it, what the template writes for an answer; the loss counts the
    former, later tokens attend to all."""
    run = trainer(SCRIPT, tools=[multiply], settings={"loss_type": "dapo", "beta": 0.1})
    rollout = run.collect(asked(2), 0)
    answer = "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    twelve, wrong = answer.format(12), answer.format("{'error': \"multiply() got an unexpected keyword argument 'c'\"}")
    pieces = [
        [(CALL, 1), (twelve, 0), (DONE, 1)], [(DONE, 1)],
        [(CALL, 1), (twelve, 0), (CALL, 1), (twelve, 0), (DONE, 1)],
        [(calling("multiply", a=3, c=4), 1), (wrong.replace("multiply()", "multiply()"), 0), (DONE, 1)],
    ]  # fmt: skip
    micro = run.cut(rollout, 1)[0][0]
    for row, parts in enumerate(pieces):
        ids = [i for text, _ in parts for i in ids_of(tokenizer, text)]
        mask = [by for text, by in parts for _ in ids_of(tokenizer, text)]
        assert rollout.batch.completion_ids[row] == ids and rollout.batch.tool_mask[row] == mask
        n = len(ids)
        assert micro.completion_ids[row, :n].tolist() == ids and micro.completion_mask[row].sum() == n
        for name in ("loss_mask", "tool_mask", "sampled_mask"):
            assert getattr(micro, name)[row].long().tolist() == mask + [0] * (micro.loss_mask.shape[1] - n), name
        assert (micro.weights[row] > 0).long().tolist()[:n] == mask
        assert micro["tool_mask"] is micro.tool_mask
    sampled = sum(map(sum, rollout.batch.tool_mask))
    assert micro.weights.sum().item() == pytest.approx(1) and micro.weights.max().item() == pytest.approx(1 / sampled)
    assert rollout.sampled_tokens == sampled
    assert rollout.tokens == sampled + sum(map(len, rollout.batch.prompt_ids))

    # Inserted tokens are attended to: another answer gives other log-probs behind it, and no gradient comes from it.
    other = rollout.batch.completion_ids[0].copy()
    at = rollout.batch.tool_mask[0].index(0) + 12
    other[at] = (other[at] + 1) % 200 + 5
    changed = run.cut(rollout, 1)[0][0]
    changed.completion_ids[0, at] = other[at]
    with torch.no_grad():
        a, b = (run.learner.score(m).logps[0] for m in (micro, changed))
    assert torch.equal(a[:at], b[:at]) and not torch.equal(a[at + 1 :], b[at + 1 :])


def test_the_loss_is_that_of_sampled_tokens_alone(trainer):
    """Log-probs of inserted tokens may be anything: neither loss nor a metric moves."""
    run = trainer(SCRIPT, tools=[multiply], settings={"beta": 0.1, "loss_type": "grpo"})
    micro, found = run.cut(run.collect(asked(2), 0), 1)[0][0], []
    run.learner.prepare(micro)
    scores = run.learner.score(micro)
    for shift in (0.0, -3.0):  # of all log-probs that are given, by other factors
        moved = torch.where(micro.tool_mask, 0.0, shift)
        score = scores._replace(logps=scores.logps + moved, entropy=scores.entropy - moved)
        run.learner.score = lambda *a, score=score, **k: score
        micro.ref_per_token_logps = scores.logps.detach() - 0.1 + 2 * moved
        micro.old_per_token_logps = scores.logps.detach() + 0.2 + moved * 0.5
        sums, _ = run.learner.loss(micro)
        found.append([float(x.detach().sum()) for x in sums if isinstance(x, torch.Tensor)])
        found[-1] += [float(x) for x in run.learner.sampler_gap(micro, score.logps.detach()).values()]
    assert found[0] == pytest.approx(found[1]) and len(found[0]) > 10


def test_a_run_with_tools(trainer, tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        seen.append((completions, answer))
        return by_length(completions)

    run = trainer(SCRIPT, reward, tools=[multiply], settings={"log_completions": True, "beta": 0.1})
    run.train()
    log = run.state.log_history[-1]
    assert log["tools/call_frequency"] == 1.0 and log["tools/failure_frequency"] == 0.25
    n = lambda *texts: sum(len(ids_of(run.processing_class, text)) for text in texts)
    assert log["completions/max_length"] == n(CALL, CALL, DONE) and log["completions/min_length"] == n(DONE)
    completions, answers = seen[-1]
    assert answers == ["0", "0", "1", "1"]
    assert [m["role"] for m in completions[2]] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert completions[2][0]["tool_calls"][0]["function"] == {"name": "multiply", "arguments": {"a": 3, "b": 4}}
    row = json.loads((tmp_path / "run" / "completions.jsonl").read_text().splitlines()[0])
    assert row["completion"] == 'assistant: -> multiply({"a": 3, "b": 4})\ntool: 12\nassistant: It is 12.'
    # What the model is told of tools counts as its prompt.
    prompt = run.processing_class.decode(run.collector.encode([asked(1)[0]["prompt"]])[0])
    assert prompt.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "multiply"')


def test_the_engine_itself_converses(trainer):
    """No script: what a model of random weights says has no calls, and the self-test holds over its masks."""
    run = trainer(tools=[multiply], settings={"max_completion_length": 8})
    run.train()
    assert run.collector.engine.converses and run.state.log_history[-1]["tools/call_frequency"] == 0


def test_environments(trainer):
    script = [[calling("add", step=2), DONE], [DONE], [calling("add", step=1), calling("add", step=4), DONE], [DONE]]
    seen = []

    def reward(completions, environments, **kwargs):
        seen.append(environments)
        return [one.count + 0.5 for one in environments]

    run = trainer(script, reward, environment_factory=Judging, settings={"max_steps": 2})
    run.train()
    assert [one.count for one in run.environments] == [2, 0, 5, 0] and run.tools[0].__name__ == "add"
    assert all(a is b for a, b in zip(seen[0], seen[1])) and len({id(one) for one in seen[0]}) == 4
    assert run.reward_func_names == ["reward", "Judging"] and run.reward_weights.tolist() == [1.0, 1.0]
    log = run.state.log_history[-1]
    assert log["rewards/Judging/mean"] == 1.75 and log["rewards/reward/mean"] == 2.25
    assert run.environments[0].row.keys() == {"prompt", "answer"}


class Strict(Judging):
    """Takes what its rows have and no more."""

    def reset(self, level):
        super().reset(level=level)
        return [{"type": "text", "text": f"Level {level}"}, {"type": "text", "text": ", go."}]


@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "stream"])
def test_data_without_prompts(trainer, streamed):
    """As in TRL: `reset` writes the prompt and gets the other columns alone, of the evaluation data too."""
    rows = [{"level": i, "environment": "strict"} for i in range(4)]
    data = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if streamed else data
    run = trainer(
        [[DONE]] * 4, None, data, environment_factory={"strict": Strict},
        eval_dataset={"more": Dataset.from_list(rows)},
    )  # fmt: skip
    assert run.eval_dataset["more"][3]["prompt"] == [{"role": "user", "content": ""}]
    run.train()
    assert [prompt[0]["content"] for prompt in run._logs["prompt"]] == [f"Level {i}, go." for i in (0, 0, 1, 1)]
    assert run.environments[2].row == {"level": 1}


def test_an_observation_behind_a_prompt_in_parts(trainer):
    data = [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "Begin."}]}]}] * 4
    run = trainer([[DONE]] * 4, None, data, environment_factory=Telling)
    rollout = run.collect(data[:2], 0)
    assert rollout.prompts[0][-1]["content"] == "Begin. You have 1 things."
    assert "Begin. You have" in run.processing_class.decode(rollout.batch.prompt_ids[0])


@pytest.mark.parametrize("said", [3, [{"type": "image", "image": "x"}], {"a": 1}], ids=["number", "image", "dict"])
def test_an_observation_that_is_no_text(trainer, said):
    class Odd(Judging):
        def reset(self, **row):
            super().reset(**row)
            return said

    run = trainer([[DONE]] * 4, None, environment_factory=Odd)
    with pytest.raises(UserError, match="environment Odd returned"):
        run.collect(asked(2), 0)


def test_environments_by_name(trainer):
    """Each row has its own environment's tools, observation and reward, which may be async."""
    data = [{**row, "environment": name} for row, name in zip(asked(2), ("telling", "judging"))]

    class Other(Judging):
        def subtract(self, step: int) -> int:
            """Subtracts.

            Args:
                step: How much.
            """
            self.count -= step
            return self.count

    script = [[calling("add", step=2), DONE], [DONE], [calling("subtract", step=1), DONE], [DONE]]
    run = trainer(
        script, None, data=data, environment_factory={"telling": Telling, "judging": Other},
        settings={"reward_weights": None},
    )  # fmt: skip
    rollout, _ = run.collector.collect(data, 2, seed=0, trainer_state=run.state)
    assert run.rewards.names == ["Telling", "Other"]
    assert rollout.rewards.tolist() == [-2.0, 0.0, -1.0, 0.0]
    assert rollout.rewards_per_func.isnan().tolist() == [[False, True]] * 2 + [[True, False]] * 2
    assert rollout.prompts[0][-1]["content"] == "Question 0? You have 2 things."
    told = [run.processing_class.decode(ids) for ids in rollout.batch.prompt_ids]
    assert "subtract" not in told[0] and "subtract" in told[2]
    with pytest.raises(UserError, match="A row has environment 'nowhere'"):
        run.collector.collect([{**data[0], "environment": "nowhere"}], 2, seed=0, trainer_state=run.state)


def test_what_does_not_go(trainer):
    class NoReset:
        def add(self):
            """Adds."""

    for arguments, why in (
        ({"environment_factory": NoReset}, "has no method `reset`"),
        ({"environment_factory": Counter, "rewards": None}, "There is no reward"),
        ({"tools": [multiply, multiply]}, "Two tools have the same name"),
        ({"tools": [3]}, "tools must be functions"),
        ({"tools": [multiply], "data": [{"prompt": "plain"}] * 4}, "need prompts that are conversations"),
        ({"tools": [multiply], "template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
         "does not support tool calling"),
        ({"tools": [multiply], "rollout_func": lambda prompts, trainer: {}}, "rollout_func makes completions itself"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            trainer(**arguments)


def rollout(tokenizer, **more):
    def function(prompts, trainer):
        assert isinstance(trainer, GRPOTrainer) and prompts[0] == prompts[1] != prompts[2]
        prompts[0][0]["content"] = "changed"  # a copy
        ids = [ids_of(tokenizer, f"Done {i}<|im_end|>") for i in range(len(prompts))]
        found = {
            "prompt_ids": [[7, 8]] * len(prompts),
            "completion_ids": ids,
            "logprobs": [[-0.5] * len(r) for r in ids],
        }
        return {**found, **{name: make(ids) for name, make in more.items()}}

    return function


def first(run):
    return run.collect(run.train_dataset.to_list()[:2], 0)


def test_rollout_func(trainer, tokenizer):
    seen = []

    def reward(completions, score, same, **kwargs):
        seen.append((completions, score, same))
        return score

    half = lambda ids: [[1] * 2 + [0] * (len(row) - 3) + [1] for row in ids]
    made = rollout(tokenizer, env_mask=half, score=lambda ids: [1.0, 2.0, 3.0, 5.0], same=lambda ids: "all")
    run = trainer(rewards=reward, rollout_func=made)
    run.train()
    completions, score, same = seen[-1]
    assert completions[1] == [{"role": "assistant", "content": "Done 1"}]
    assert score == [1.0, 2.0, 3.0, 5.0] and same == ["all"] * 4
    assert run.state.log_history[-1]["completions/max_length"] == 3
    batch = first(run).batch
    assert batch.tool_mask == half(batch.completion_ids) and batch.truncated == [False] * 4
    assert batch.sampling_per_token_logps[0].tolist() == [-0.5 * by for by in batch.tool_mask[0]]


def test_logprobs_that_nobody_knows(trainer, tokenizer):
    """None for all, or for some tokens: they are held against nothing, and an off-policy correction leaves them."""
    run = trainer(rollout_func=rollout(tokenizer, logprobs=lambda ids: None), settings={"kv_cache_dtype": "int8"})
    run.train()
    assert not any("sampling/" in name for name in run.state.log_history[-1])
    some = lambda ids: [[[-0.5, 0.0], None, *[-0.5] * (len(row) - 2)] for row in ids]
    run = trainer(rollout_func=rollout(tokenizer, logprobs=some), settings={"kv_cache_dtype": "int8"})
    run.train()
    assert all(value == value for value in run.state.log_history[-1].values() if isinstance(value, float))
    micro = run.cut(first(run), 1)[0][0]
    assert micro.known_mask[0, :3].tolist() == [True, False, True] and micro.loss_mask[0, :3].all()


WRONG = {
    "a list": (lambda prompts, trainer: [], "returned a list; return a dict"),
    "keys": (lambda prompts, trainer: {"prompt_ids": [[1]] * 4}, r"must return keys \['completion_ids', 'logprobs'\]"),
    "raises": (lambda prompts, trainer: 1 / 0, "failed .ZeroDivisionError: division by zero"),
    "few": ({"completion_ids": lambda ids: ids[:3]}, "given 4 prompts .* returned 3 completion_ids"),
    "short": ({"logprobs": lambda ids: [[-1.0]] * 4}, "returned 1 logprobs for the 7 tokens of completion 0"),
    "mask": ({"env_mask": lambda ids: [[1]] * 4}, "returned 1 env_mask for the 7 tokens of completion 0"),
    "logits": ({"logprobs": lambda ids: [[5.0] * len(r) for r in ids]}, "logprobs of completion 0 with 5 among them"),
    "infinite": ({"logprobs": lambda ids: [[float("-inf")] * len(r) for r in ids]}, "of completion 0 with inf among"),
    "empty": ({"completion_ids": lambda ids: [[]] * 4, "logprobs": lambda ids: [[]] * 4}, "no token in completion_ids"),
    "unknown": ({"prompt_ids": lambda ids: [[9999]] * 4}, "the token 9999 in prompt_ids 0, and the model knows 0 to"),
    "texts": ({"prompt_ids": lambda ids: ["a"] * 4}, "something else than token ids in prompt_ids 0"),
    "long": ({"prompt_ids": lambda ids: [[5] * 2000] * 4}, "prompt and completion of 2007 tokens .*1024 positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_rollout_func_that_can_not_be_learned_from(trainer, tokenizer, case):
    wrong, why = WRONG[case]
    run = trainer(rollout_func=rollout(tokenizer, **wrong) if isinstance(wrong, dict) else wrong)
    with pytest.raises(UserError, match=why):
        first(run)


def test_a_subclass_that_generates(tmp_path, tokenizer):
    class Doubling(GRPOTrainer):
        def _generate(self, prompts):
            out = list(super()._generate(prompts))
            assert len(prompts) == 4 and len(out) == 8
            out[1] = [[*ids[:3], END] for ids in out[1]]
            out[4] = [[*logps[:3], -0.25] for logps in out[4]]
            out[3] = [[{"role": "assistant", "content": "mine"}] for _ in out[3]]
            return tuple(out)

    seen = []

    def reward(completions, **kwargs):
        seen.append(completions)
        return [float(i) for i in range(len(completions))]

    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", num_generations=2, prompts_per_step=2, max_steps=1,
        per_device_train_batch_size=4, max_completion_length=6, save_strategy="no", disable_tqdm=True, self_test=False,
    )  # fmt: skip
    run = Doubling(small_model(tokenizer), reward, args, Dataset.from_list(asked(4)), processing_class=tokenizer)
    run.train()
    assert seen[-1][0][0]["content"] == "mine" and run.state.log_history[-1]["completions/max_length"] == 4
