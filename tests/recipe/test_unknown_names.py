"""A name that is no field says what to write instead: in a script, a recipe and on the command line."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import pytest
from transformers import HfArgumentParser

from lowvram_grpo import GRPOConfig, GRPOTrainer, UserError
from lowvram_grpo.cli.flags import parse_extra
from lowvram_grpo.errors import UnknownSetting
from lowvram_grpo.recipe import unknown_names
from lowvram_grpo.recipe.resolve import ALIASES, job_types, resolve


def said(**given):
    with pytest.raises(UserError) as caught:
        GRPOConfig(output_dir="run", use_cpu=True, **given)
    assert isinstance(caught.value, TypeError)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


@pytest.mark.parametrize(
    "given,words",
    [
        ({"num_generation": 8}, "no field 'num_generation' (did you mean 'num_generations'?)"),
        ({"zebra": 8}, "no field 'zebra'."),
        ({"quantization": "nf4"}, "BitsAndBytesConfig(load_in_4bit=True"),
        ({"quantization": "int8"}, "BitsAndBytesConfig(load_in_8bit=True"),
        ({"quantization": "gptq"}, "quantization_config=..."),
        ({"model": "x"}, "first argument of GRPOTrainer"),
        ({"max_new_tokens": 3}, "write max_completion_length"),
        ({"kl_coef": 0.1}, "write beta"),
        ({"reward_model_name_or_path": "x"}, "among the reward_funcs"),
        ({"num_samples": 3}, "write num_generations"),
        ({"max_length": 3}, "max_prompt_length and max_completion_length"),
        ({"generation_config": {}}, "write generation_kwargs"),
        ({"use_vllm_colocate": True}, "vllm_mode 'colocate'"),
        ({"unsloth_num_chunks": 1}, "write workspace_mib"),
        ({"ppo_mini_batch_size": 1}, "write per_device_train_batch_size"),
        ({"torch_dtype": "bfloat16"}, "model_init_kwargs={'dtype': ...}"),
        ({"lora_r": 8}, "LoraConfig(r=...)"),
        ({"tools": []}, "pass it to GRPOTrainer"),
    ],
)
def test_in_a_script(given, words):
    assert words in said(**given)


@pytest.mark.parametrize(
    "given,words",
    [
        ({"tokenizer": 1}, "no argument 'tokenizer' (write processing_class)."),
        ({"ref_model": 1}, "'ref_model' (the reference is the model without its adapter"),
        ({"beta": 0.1}, "'beta' (it is a field: args=GRPOConfig(beta=...))."),
        ({"reward_func": 1, "zebra": 2}, "none of these arguments: 'reward_func' (write reward_funcs); 'zebra'."),
        ({"pefft_config": 1}, "'pefft_config' (did you mean 'peft_config'?)."),
    ],
)
def test_arguments_that_a_trainer_has_not(given, words):
    with pytest.raises(UnknownSetting) as caught:
        GRPOTrainer("no/model", [], **given)
    assert words in str(caught.value) and isinstance(caught.value, (TypeError, UserError))


def test_arguments_of_trl_that_are_none(dataset):
    with pytest.raises(UserError, match=r"^Model 'no/model' is neither"):  # what is looked at later
        GRPOTrainer("no/model", len, train_dataset=dataset, tools=None, rollout_func=None, environment_factory=None)


def test_several_at_once():
    text = said(max_new_tokens=3, kl_coef=0.1, zebra=1)
    assert all(f"'{name}'" in text for name in ("max_new_tokens", "kl_coef", "zebra")) and "write beta" in text


def test_advice_leads_to_fields_and_never_away_from_one():
    fields = {f.name for f in dataclasses.fields(GRPOConfig)}
    assert set(unknown_names._OTHERS) <= fields
    names = [*unknown_names._RENAMED, *unknown_names._ELSEWHERE, *unknown_names._ANYWHERE]
    assert len(names) == len(set(names))
    assert not fields & set(names)
    assert len(unknown_names._RENAMED) == sum(len(names.split()) for names in unknown_names._OTHERS.values())


def test_whatever_a_recipe_has_of_its_own_a_script_is_told_about():
    fields = {f.name for f in dataclasses.fields(GRPOConfig)}
    for name in {*job_types(), *ALIASES} - fields:
        assert name == "quantization" or name in unknown_names._ELSEWHERE, name


def test_in_a_recipe_and_on_the_command_line():
    with pytest.raises(UserError, match=r"Unknown setting 'kl_coef' on the command line \(write beta\)\."):
        resolve({"kl_coef": 0.1})
    with pytest.raises(UserError, match=r"Unknown flag --max-new-tokens \(write --max-completion-length\)\."):
        parse_extra(["--max-new-tokens", "3"])
    with pytest.raises(UserError, match=r"did you mean '--num-generations'"):
        parse_extra(["--num-generation", "3"])
    with pytest.raises(UserError, match="no value model"):
        parse_extra(["--gae-lambda", "3"])


@dataclasses.dataclass
class Longer(GRPOConfig):
    extra: int = 3


class Own(GRPOConfig):
    def __init__(self, extra, **others):
        super().__init__(**others)
        self.extra = extra


def test_it_is_a_dataclass_like_any_other(tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=True, beta=0.5)
    assert args.output_dir == str(tmp_path)
    assert "beta" in inspect.signature(GRPOConfig).parameters and "self" not in inspect.signature(GRPOConfig).parameters
    for again in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args)):
        assert again.beta == 0.5 and type(again) is GRPOConfig
    assert dataclasses.asdict(args)["beta"] == 0.5
    assert dataclasses.replace(args, beta=0.0).beta == 0.0
    with pytest.raises(TypeError, match="no field 'betta'"):
        dataclasses.replace(args, betta=0.0)
    (parsed,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", "--pad_to_multiple_of", "8", "--beta", "0.25",
         "--transformers_continuous_batching_config", '{"a": 1}']
    )  # fmt: skip
    assert (parsed.pad_to_multiple_of, parsed.beta) == (8, 0.25)
    assert parsed.transformers_continuous_batching_config == {"a": 1}


def test_classes_made_from_it(tmp_path):
    assert Longer(str(tmp_path), use_cpu=True, extra=4).extra == 4
    assert "extra" in inspect.signature(Longer).parameters
    with pytest.raises(TypeError, match=r"Longer has no field 'extr' \(did you mean 'extra'"):
        Longer(str(tmp_path), extr=4)
    assert Own(4, output_dir=str(tmp_path), use_cpu=True).extra == 4
