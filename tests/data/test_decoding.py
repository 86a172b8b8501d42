"""What of a completion is text: everything but the ids that end or fill it, for rewards, logs and chat alike."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from conftest import make_tokenizer

from lowvram_grpo.data.conversation import TextStream
from lowvram_grpo.data.decoding import silent_ids, spoken
from lowvram_grpo.rewards.tags import format, label
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.training.cold_start import reference_ids
from lowvram_grpo.training.collect import Collector

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<|tool_call|>"]


def tagged():
    tokenizer = make_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [*TAGS, "<|im_end|>"]})
    return tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def collected(tokenizer, completions, prompts, eos_ids=(1,)):
    """Completions as the rewards get them from a sampler that drew these ids."""
    seen = []

    def rewards(prompts, completions, ids, columns, state, seed):
        seen.extend(completions)
        return SimpleNamespace(total=torch.zeros(len(ids)), per_func=torch.zeros(len(ids), 1), extras={}, metrics={})

    batch = RolloutBatch.__new__(RolloutBatch)
    object.__setattr__(batch, "completion_ids", completions)
    engine = SimpleNamespace(generate=lambda *a, **k: batch, sampling=Sampling(8, eos_ids, 0))
    guard = SimpleNamespace(run=lambda phase, work: work())
    collector = Collector(
        engine, rewards, tokenizer, guard, max_prompt_length=None, chat_template_kwargs=None, scale_rewards="none",
        only_prompts=False, tell=lambda phase: None,
    )  # fmt: skip
    rollout, _ = collector.collect([{"prompt": p} for p in prompts], 1, seed=0, trainer_state=None)
    assert rollout.completions == seen
    return seen


def test_tags_that_are_special_tokens_reach_the_rewards():
    tokenizer = tagged()
    row = [*ids_of(tokenizer, "<think>a</think><answer>4</answer>"), 1]
    (text,) = collected(tokenizer, [row], ["a"])
    assert text.replace(" ", "") == "<think>a</think><answer>4</answer>"
    assert format([text]) == [1.0] and label([text]) == [5.0]
    (chat,) = collected(tokenizer, [row], [[{"role": "user", "content": "a"}]])
    assert chat == [{"role": "assistant", "content": text}]


def test_end_and_padding_say_nothing_and_the_rest_stays():
    tokenizer = tagged()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tool = tokenizer.convert_tokens_to_ids("<|tool_call|>")
    row = [*ids_of(tokenizer, "a b"), tool, 2, 0, 0, end]  # 2 is <unk>, 0 the padding
    assert collected(tokenizer, [row], ["a"], eos_ids=(1, end)) == ["a b <|tool_call|> <unk>"]
    # An id that does not end a completion here is something that was said.
    assert collected(tokenizer, [row], ["a"]) == ["a b <|tool_call|> <unk> <|im_end|>"]


def test_chat_shows_what_the_rewards_see():
    tokenizer = tagged()
    row = ids_of(tokenizer, "<think> a b </think> <answer> 4 </answer>")
    stream = TextStream(tokenizer)
    shown = "".join(map(stream.push, [*row, 0])) + stream.finish()
    assert shown == spoken(tokenizer, row, silent_ids(tokenizer)) and "</think>" in shown


def test_spaces_before_punctuation_stay():
    tokenizer = make_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    assert spoken(tokenizer, [2, 3], ()) == "<unk> 0"
    tokenizer.add_tokens([".", "n't"])
    assert spoken(tokenizer, tokenizer.convert_tokens_to_ids(["a", "."]), ()) == "a ."


def test_a_reference_ends_once_and_has_the_ids_of_its_tags():
    tokenizer = tagged()
    ids = reference_ids(tokenizer, "<answer>4</answer>")
    assert ids == [*tokenizer.convert_tokens_to_ids(["<answer>", "4", "</answer>"]), 1]
    assert reference_ids(tokenizer, "<answer>4</answer><eos>") == ids
    assert spoken(tokenizer, ids, silent_ids(tokenizer)).replace(" ", "") == "<answer>4</answer>"
