"""Chat and evaluation of a policy whose layers wait in host memory: its answers are those of a resident one."""

from __future__ import annotations

from lowvram_grpo.jobs.inference import load_policy, recipe_to_sample, stream_answer
from lowvram_grpo.jobs.loading import load_tokenizer_of, training_config


def test_answers_are_those_of_a_policy_on_the_device(model_dir):
    answers = []
    for offload in ("off", 1, "auto"):
        said = []
        flags = {"model": model_dir, "use_cpu": True, "weight_offload": offload, "quantization": "none"}
        recipe = recipe_to_sample(flags, said.append)
        policy = load_policy(recipe, training_config(recipe, weights=[]), load_tokenizer_of(recipe), said.append)
        shown = []
        stream_answer(policy, [5, 6, 7], policy.sampling, 3, shown.append)
        batch = policy.engine.generate([[5, 6, 7], [8]], 4, seed=2)
        answers.append((shown, batch.completion_ids))
        assert any("wait in host memory" in text for text in said) == (offload != "off"), said
    assert answers[0] == answers[1] == answers[2] and answers[0][0]
