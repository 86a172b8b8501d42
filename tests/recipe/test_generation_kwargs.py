"""generation_kwargs: right, without effect, or refused by name, and never a crash in the middle of a rollout."""

from __future__ import annotations

import pytest
from conftest import Quiet, digit_share
from test_decode import PROMPTS, check_logps, sampling

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.recipe.generation_kwargs import settle_generation_kwargs
from lowvram_grpo.rollout.engine import RolloutEngine

SETTINGS = {"temperature": 0.9, "top_p": 1.0, "max_completion_length": 6, "cache_implementation": None}


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({"num_beams": 2}, "num_beams 2.*does not sample"),
        ({"num_return_sequences": 2}, "num_return_sequences 2.*num_generations"),
        ({"num_beam_groups": 2}, "num_beam_groups"),
        ({"do_sample": False}, "do_sample False.*the same"),
        ({"use_cache": False}, "KV cache"),
        ({"max_new_tokens": 99}, "set max_completion_length itself"),
        ({"temperature": 0.5}, "set temperature itself"),
        ({"top_p": 0.5}, "set top_p itself"),
        ({"max_length": 64}, "counts the prompt too"),
        ({"stop_strings": ["\n"]}, "add the token's id to eos_token_id"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate True"),
        ({"output_scores": True}, "output_scores"),
        ({"penalty_alpha": 0.6}, "contrastive"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 3}, "the model that is trained"),
        ({"assistant_model": "m"}, "assistant_model"),
        ({"streamer": "s"}, "streamer"),
        ({"prefill_chunk_size": 3}, "prefill_chunk_size, which is not supported"),
        ({"no_repeat_ngram": 3}, "did you mean 'no_repeat_ngram_size'"),
    ],
    ids=str,
)
def test_refused_by_name(kwargs, words):
    with pytest.raises(UserError, match=f"^generation_kwargs has .*{words}"):
        settle_generation_kwargs(kwargs, SETTINGS)


def test_what_happens_anyway_is_left_out():
    same = {"num_beams": 1, "do_sample": True, "use_cache": True, "temperature": 0.9, "max_new_tokens": 6,
            "output_scores": False, "num_return_sequences": 1, "stop_strings": None}  # fmt: skip
    assert settle_generation_kwargs(same, SETTINGS) is None and settle_generation_kwargs(None, SETTINGS) is None
    assert settle_generation_kwargs({**same, "min_new_tokens": 2}, SETTINGS) == {"min_new_tokens": 2}


@pytest.mark.filterwarnings("ignore:generation_kwargs")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"no_repeat_ngram_size": 2}, {"suppress_tokens": [5]}, {"bad_words_ids": [[6], [7, 8]]}, {"typical_p": 0.9},
        {"eta_cutoff": 1e-3}, {"min_length": 4}, {"exponential_decay_length_penalty": [2, 1.1]},
        {"sequence_bias": [[[5], -2.0]]}, {"encoder_repetition_penalty": 1.1}, {"forced_eos_token_id": 1},
        {"renormalize_logits": True, "num_beams": 1},
    ],
    ids=str,
)  # fmt: skip
def test_the_others_sample_and_are_scored_alike(model, kwargs):
    extra = settle_generation_kwargs(kwargs, SETTINGS)
    batch = RolloutEngine(model, sampling(temperature=0.9, extra=extra), 4).generate(PROMPTS, 2, seed=0)
    assert len(batch.completion_ids) == 2 * len(PROMPTS)
    check_logps(model, batch, 0.9)


def test_end_tokens_of_ones_own_end_completions(config, dataset, tokenizer, model):
    """In our engine too: they make no foreign argument."""
    ends = list(range(3, 20))
    args = config(max_steps=1, generation_kwargs={"eos_token_id": ends, "pad_token_id": 0}, num_generations=8)
    trainer = GRPOTrainer(model, digit_share, args, dataset, processing_class=tokenizer, observer=Quiet())
    assert trainer.collector.engine.sampling.eos_ids == tuple(ends) and not trainer.collector.engine.sampling.foreign
    batch = trainer.collect([dataset[0], dataset[1]], 0).batch
    assert not all(batch.truncated)
    for ids, cut in zip(batch.completion_ids, batch.truncated):
        assert not set(ids[:-1]) & set(ends) and (ids[-1] in ends) is not cut
