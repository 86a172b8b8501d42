"""Mixtures of experts that are stored in 4 bits: the bits of bitsandbytes' as they are, MXFP4 an expert at a time."""

from __future__ import annotations

import json

import pytest
import torch
from mixtures import loaded, mixture
from safetensors.torch import load_file, save_file

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.load import bitsandbytes_config
from lowvram_grpo.policy.quantized_experts import quantized_experts

IDS = torch.arange(3, 30).view(3, 9)


def settings(folder, **more):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def stored_in_nf4(folder, double=True):
    """As transformers 4 saves a model in bitsandbytes' NF4: each linear layer with what belongs to it, each expert's
    too. Of those of layer 1, the router's neighbour is left in 16 bits, as a list of modules may say."""
    from bitsandbytes.nn import Params4bit

    path, tensors = folder / "model.safetensors", {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight") or "layers.1.self_attn.o_proj" in name:
            tensors[name] = tensor
            continue
        weight = Params4bit(
            tensor.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=double, blocksize=64
        ).to("cpu")
        tensors[name] = weight.data
        tensors |= {f"{name}.{k}": v.contiguous() for k, v in weight.quant_state.as_dict(packed=True).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = bitsandbytes_config("nf4", torch.float32).to_dict()
    settings(folder, quantization_config={**config, "llm_int8_skip_modules": ["lm_head", "layers.1.self_attn.o_proj"]})


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_experts_stored_in_nf4_keep_their_bits(tmp_path, family, double):
    for name in ("dense", "stored"):
        mixture(family).save_pretrained(tmp_path / name)
    stored_in_nf4(tmp_path / "stored", double)
    made, found = loaded(tmp_path / "dense"), loaded(tmp_path / "stored", "none")
    assert type(found.model.layers[1].self_attn.o_proj) is torch.nn.Linear
    assert type(found.model.layers[0].self_attn.o_proj).__name__ == "Linear4bit"
    for (_, a), (_, b) in zip(quantized_experts(made), quantized_experts(found), strict=True):
        if double:
            assert torch.equal(a.home.records, b.home.records)
        else:  # scales that were not quantized are, here
            both = [m.expert_layout.dense(m.home.record(2), torch.empty(m.expert_layout.weights)) for m in (a, b)]
            torch.testing.assert_close(*both, atol=2e-3, rtol=2e-2)
    away = loaded(tmp_path / "stored", "none", expert_offload="auto")
    assert torch.equal(away(IDS).logits, found(IDS).logits)
    if double:
        made.model.layers[1].self_attn.o_proj = found.model.layers[1].self_attn.o_proj
        assert torch.equal(made(IDS).logits, found(IDS).logits)
    with pytest.raises(
        UserError, match=r"stored in nf4 already and cannot be loaded in int8|int8, which is for linear"
    ):
        loaded(tmp_path / "stored", "int8")


def stored_in_mxfp4(folder):
    """Random blocks and exponents in the place of gpt-oss's experts; the dense ones by transformers' own function."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path, tensors, dense = folder / "model.safetensors", {}, {}
    torch.manual_seed(4)
    for name, tensor in load_file(path).items():
        tensors[name] = tensor.clone()
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        count, inside, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, out, inside // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 124, (count, out, inside // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, path, metadata={"format": "pt"})
    settings(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return dense


def test_gpt_oss_in_mxfp4_is_brought_to_nf4_expert_by_expert(tmp_path):
    for name in ("dense", "stored"):
        mixture("gpt_oss").save_pretrained(tmp_path / name)
    dense = stored_in_mxfp4(tmp_path / "stored")
    save_file({**load_file(tmp_path / "dense/model.safetensors"), **dense}, tmp_path / "dense/model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    made, found = loaded(tmp_path / "dense"), loaded(tmp_path / "stored")
    for (_, a), (_, b) in zip(quantized_experts(made), quantized_experts(found), strict=True):
        assert torch.equal(a.home.records, b.home.records)
    assert torch.equal(made(IDS).logits, found(IDS).logits)
    whole = loaded(tmp_path / "stored", "none").state_dict()
    assert all(torch.equal(whole[name], value.float()) for name, value in dense.items())


def test_a_recipe_brings_mxfp4_to_what_it_says():
    from types import SimpleNamespace

    from lowvram_grpo.jobs.loading import adopt_stored_quantization
    from lowvram_grpo.recipe.resolve import resolve

    recipe, said = resolve({"model": "x", "preset": "8gb"}, None), []
    assert adopt_stored_quantization(
        recipe, SimpleNamespace(quantization_config={"quant_method": "mxfp4"}), said.append
    )
    assert recipe.quantization == "nf4" and "stored in mxfp4; its experts are brought to nf4" in said[0]
