"""`weight_offload`: what it may be, and what it does not go together with."""

from __future__ import annotations

import pytest

from lowvram_grpo import GRPOConfig
from lowvram_grpo.errors import UserError
from lowvram_grpo.recipe.resolve import resolve
from lowvram_grpo.recipe.weight_offload import settled, streamed_layers


def config(**settings):
    return GRPOConfig(output_dir="never", use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    "given,kept", [("off", "off"), ("auto", "auto"), ("AUTO", "auto"), (None, "off"), (False, "off"), ("7", 7), (3, 3)]
)
def test_values(given, kept):
    assert config(weight_offload=given).weight_offload == kept == settled(given)


@pytest.mark.parametrize("given", [0, -1, "0", "-1", "some", "all", 1.5, True, ""])
def test_bad_values_get_a_sentence(given):
    with pytest.raises(UserError, match="off, auto, or a number of decoder layers, at least 1") as caught:
        config(weight_offload=given)
    assert str(caught.value).startswith(f"weight_offload is {given!r}")


def test_more_layers_than_there_are_are_all():
    assert [streamed_layers(value, 12) for value in ("off", "auto", 5, 12, 99)] == [0, 12, 5, 12, 12]


@pytest.mark.parametrize(
    "beside,said",
    [
        ({"gradient_checkpointing": False}, "needs gradient_checkpointing"),
        ({"rollout_adapters": "merged"}, "set rollout_adapters to auto"),
        ({"use_vllm": True, "vllm_mode": "colocate"}, "set vllm_mode to server"),
    ],
)
def test_what_it_does_not_go_together_with(beside, said):
    with pytest.raises(UserError, match=said):
        config(weight_offload=4, **beside)
    assert config(**beside).weight_offload == "off"


def test_weights_that_are_trained_do_not_wait_in_host_memory():
    with pytest.raises(UserError, match="weight_offload 4 needs a frozen base"):
        resolve({"model": "Qwen2.5-0.5B", "preset": "8gb", "use_peft": False, "weight_offload": 4})
    recipe = resolve({"model": "Qwen2.5-0.5B", "preset": "8gb", "use_peft": False})
    assert recipe.training["weight_offload"] == "off"


def test_a_recipe_file_says_it_as_a_number_or_a_word(tmp_path):
    for text, kept in (("weight_offload = 6", 6), ('weight_offload = "auto"', "auto")):
        file = tmp_path / "recipe.toml"
        file.write_text(f'model = "Qwen2.5-0.5B"\npreset = "8gb"\n{text}\n', encoding="utf-8")
        recipe = resolve({}, file)
        assert settled(recipe.training["weight_offload"]) == kept
        assert f'weight_offload = "{kept}"' in recipe.to_toml()
