from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.reward_model import load_reward_model
from lowvram_grpo.rewards import runner as module

RewardRunner = partial(module.RewardRunner, load_model=load_reward_model)

PROMPTS = ["a b c", "d", "e f"] * 4
COMPLETIONS = [" 1 2", " 3", " 4 5 6 7"] * 4


def make_judge(**overrides):
    torch.manual_seed(3)
    settings = {
        "vocab_size": 41,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "num_labels": 1,
        "attention_dropout": 0.5,
        "initializer_range": 0.3,
    }
    return LlamaForSequenceClassification(LlamaConfig(**{**settings, **overrides}))


@pytest.fixture
def judge_dir(tmp_path):
    folder = tmp_path / "tiny-judge"
    make_judge().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def alone(judge, tokenizer, text):
    """The score of one unpadded text."""
    with torch.no_grad():
        return judge.eval()(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()


def run(judge, prompts=PROMPTS, completions=COMPLETIONS, **settings):
    runner = RewardRunner([judge], **settings)
    return runner, runner(prompts, completions, [[1]] * len(prompts), {}, None).total


def test_a_folder_scores_each_row_as_it_would_alone(judge_dir):
    runner, total = run(judge_dir)
    judge, tokenizer = LlamaForSequenceClassification.from_pretrained(judge_dir), make_tokenizer()
    expected = [alone(judge, tokenizer, p + c) for p, c in zip(PROMPTS, COMPLETIONS)]
    assert runner.names == ["tiny-judge"]
    assert len(set(expected)) == 3
    torch.testing.assert_close(total, torch.tensor(expected))


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer, judge = make_tokenizer(), make_judge(pad_token_id=0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    _, total = run(judge, ["<eos> a b c", "a b c"], [" 1", " 1"], processing_classes=[tokenizer])
    torch.testing.assert_close(total, torch.tensor([alone(judge, tokenizer, "<eos> a b c 1")] * 2))


def test_a_module_in_train_mode_scores_messages_through_the_chat_template():
    judge, tokenizer = make_judge().train(), make_tokenizer(chat=True)
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    completions = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    _, total = run(judge, prompts, completions, processing_classes=[tokenizer])
    texts = [f"user {p} assistant {c} " for p, c in zip(PROMPTS, COMPLETIONS)]
    torch.testing.assert_close(total, torch.tensor([alone(judge, tokenizer, t) for t in texts]))
    assert not any(p.requires_grad for p in judge.parameters())


def test_what_cannot_judge_is_named(tmp_path, judge_dir):
    policy = tmp_path / "policy"
    make_model().save_pretrained(policy)
    with pytest.raises(UserError, match=r"policy' is not a trained reward model: its checkpoint lacks score.weight"):
        RewardRunner([str(policy)])
    with pytest.raises(UserError, match=r"nowhere' can't be loaded as a reward model"):
        RewardRunner([str(tmp_path / "nowhere")])
    two = tmp_path / "two"
    make_judge(num_labels=2).save_pretrained(two)
    with pytest.raises(UserError, match="two' was trained with 2 outputs"):
        RewardRunner([str(two)])
    with pytest.raises(UserError, match="has 2 outputs"):
        run(make_judge(num_labels=2), processing_classes=[make_tokenizer()])
    with pytest.raises(UserError, match="has no chat template"):
        run(judge_dir, [[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}]])
    with pytest.raises(UserError, match=r"make 40 tokens, but the reward model 'tiny-judge' reads 32"):
        run(judge_dir, ["a " * 38], ["b b"])


def test_a_model_by_name_takes_something_that_loads_models(judge_dir):
    with pytest.raises(UserError, match=r"tiny-judge' is no built-in one, and nothing was given here that loads"):
        module.RewardRunner([judge_dir])


def rewritten(folder, change):
    path = f"{folder}/model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change,words",
    [
        (
            lambda w: {k: v for k, v in w.items() if "score" not in k},
            "not a trained reward model: its checkpoint lacks score",
        ),
        (lambda w: {k: v for k, v in w.items() if "layers.1" not in k}, "lacks 'model.layers.1"),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, "begin with 'module.'"),
        (lambda w: {**w, "model.norm.weight": torch.ones(3)}, r"'model.norm.weight' is \(3,\) and not \(32,\)"),
    ],
    ids=["no head", "a layer short", "prefixed", "another shape"],
)
def test_every_weight_of_a_judge_comes_from_its_checkpoint(judge_dir, change, words):
    rewritten(judge_dir, change)
    with pytest.raises(UserError, match=words):
        RewardRunner([judge_dir])


def test_what_a_judge_has_no_place_for_is_said(judge_dir):
    rewritten(judge_dir, lambda weights: {**weights, "v_head.weight": torch.ones(1)})
    with pytest.warns(UserWarning, match="1 weight that the model has no place for: 'v_head.weight'"):
        RewardRunner([judge_dir])


@pytest.mark.parametrize("saved", [True, False])
def test_a_judge_in_an_adapter_brings_its_head(tmp_path, saved):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    untrained = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS" if saved else None, init_lora_weights=False)
    judge = get_peft_model(untrained, lora)
    judge.save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    if not saved:
        with pytest.raises(UserError, match=r"judge' is not a trained reward model: its checkpoint lacks score.weight"):
            RewardRunner([str(tmp_path / "judge")])
        return
    _, total = run(str(tmp_path / "judge"), processing_classes=[make_tokenizer()])
    expected = [alone(judge, make_tokenizer(), p + c) for p, c in zip(PROMPTS, COMPLETIONS)]
    torch.testing.assert_close(total, torch.tensor(expected))
    make_judge().save_pretrained(tmp_path / "judge")
    with pytest.raises(UserError, match="holds an adapter beside a model"):
        RewardRunner([str(tmp_path / "judge")])
