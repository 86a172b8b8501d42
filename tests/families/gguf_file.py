"""A tiny model as llama.cpp's converter would write it, by transformers' own tables read backwards."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from tests.families.zoo import Family, config_of

# What llama.cpp calls the family's architecture, and settings of a tiny model that such a file can say.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3.5": ("qwen35", {}),
    "Qwen3.5 MoE": ("qwen35moe", {}),
    "Qwen3-Next": ("qwen3next", {}),
    "Qwen3 MoE": ("qwen3moe", {}),
    # Every sixth layer is a full one; all members but 27B scale by 256.
    "Gemma 3": ("gemma3", {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 256}),
    "Gemma 4 E": ("gemma4", {}),
    "Gemma 4 dense": ("gemma4", {}),
    "Gemma 4 unified": ("gemma4", {}),
    "Gemma 4 MoE": ("gemma4", {}),
    "LFM2": ("lfm2", {}),
    "LFM2 MoE": ("lfm2moe", {}),
    "SmolLM3": ("smollm3", {}),
    "gpt-oss": ("gpt-oss", {}),
    "OLMo 3": ("olmo2", {}),
    "Ministral 3": ("mistral3", {}),
    "Phi-4-mini": ("phi3", {}),
    "Granite 4 hybrid": ("granitehybrid", {}),
    "Granite 4 hybrid MoE": ("granitehybrid", {}),
    "Granite 4": ("granitehybrid", {}),
    "Granite 3": ("granite", {}),
    "Llama 3": ("llama", {}),
    "Mistral": ("llama", {"sliding_window": None}),
}


def config_for(family: Family) -> Any:
    return config_of(family, **ARCHITECTURES[family.name][1])


def write(path: str, family: Family, model: nn.Module) -> None:
    """The GGUF file of `model`, whose configuration is `config_for(family)`. Of an architecture that transformers or
    the package `gguf` has no tables of, a file that says no more than its name."""
    import gguf

    architecture, config = ARCHITECTURES[family.name][0], model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for key, value in _metadata(config).items():
        _add(writer, f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    for key, value in _scaled_rotary(config).items():
        _add(writer, f"{architecture}.{key}", value)
    for name, value in _tensors(architecture, model).items():
        writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: Any) -> dict[str, Any]:
    heads = _full_layer(config)
    size = getattr(heads, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or []
    kv_heads: Any = heads.num_key_value_heads
    if "conv" in kinds:
        kv_heads = [kv_heads if kind == "full_attention" else 0 for kind in kinds]
    rotated = size * _rotary(config).get("partial_rotary_factor", 1.0)
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None) or config.norm_eps,
        "rope.dimension_count": int(rotated),
        "rope.freq_base": float(_rotary(config).get("rope_theta", 1e4)),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "shortconv.l_cache": getattr(config, "conv_L_cache", None),
    }
    if "linear_attention" in kinds and hasattr(config, "linear_num_value_heads"):
        values = config.linear_num_value_heads
        found |= {
            "full_attention_interval": kinds.index("full_attention") + 1,
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": values,
            "ssm.inner_size": values * config.linear_value_head_dim,
            "rope.dimension_sections": [*_rotary(config).get("mrope_section", ()), 0],
        }
    return {key: value for key, value in found.items() if value is not None}


def _full_layer(config: Any) -> Any:
    """Where layers differ, as Gemma 4's do, a file has the sizes of those with full attention."""
    if not getattr(config, "per_layer_attributes", None):
        return config
    return config.per_layer_config[config.layer_types.index("full_attention")]


def _rotary(config: Any) -> dict[str, Any]:
    parameters = config.rope_parameters or {}
    return parameters.get("full_attention", parameters)


def _scaled_rotary(config: Any) -> dict[str, Any]:
    """What the converter writes of linear and YaRN scaling, and of LongRoPE beside its two tensors."""
    rotary = _rotary(config)
    kind, before = rotary.get("rope_type"), rotary.get("original_max_position_embeddings")
    if kind == "longrope":
        return {"rope.scaling.original_context_length": int(before or config.original_max_position_embeddings)}
    if kind not in ("linear", "yarn"):
        return {}
    found = {"rope.scaling.type": kind, "rope.scaling.factor": float(rotary["factor"])}
    return found | ({"rope.scaling.original_context_length": int(before)} if before else {})


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _tensors(architecture: str, model: nn.Module) -> dict[str, np.ndarray]:
    if architecture == "qwen35":
        return _gated_delta_tensors(model)
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    config = model.config
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    kind = {"mistral": "llama"}.get(config.model_type)
    try:
        names = get_gguf_hf_weights_map(model, processor, kind)
    except NotImplementedError:
        experts = any(name.endswith("experts") for name, _ in model.named_modules())
        return {f"blk.0.ffn_{'gate_exps' if experts else 'gate'}.weight": np.zeros((4, 4))}
    tied = getattr(model, "all_tied_weights_keys", {})
    state = model.state_dict()
    found = {}
    for theirs, ours in names.items():
        if ours in tied or ours not in state:
            continue
        value = state[ours].float().numpy()
        if architecture == "llama" and (".q_proj." in ours or ".k_proj." in ours):
            value = _interleaved(value, config.num_attention_heads if ".q_" in ours else config.num_key_value_heads)
        if architecture == "gemma3" and "norm.weight" in theirs:
            value = value + 1
        if architecture == "lfm2" and "shortconv.conv" in theirs:
            value = value.squeeze(1)
        if "experts" in ours:
            theirs = theirs.replace("exps.weight", "exps") + ".weight"
        found[theirs] = value
    rotary = _rotary(config)
    if rotary.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            found[f"rope_factors_{kind}.weight"] = np.array(rotary[f"{kind}_factor"])
    if rotary.get("rope_type") == "llama3":
        size = config.head_dim
        plain = 1 / rotary["rope_theta"] ** (np.arange(0, size, 2) / size)
        found["rope_freqs.weight"] = plain / model.model.rotary_emb.inv_freq.numpy()
    return found


_GATED_DELTA = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta", "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out", "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
}  # fmt: skip


def _gated_delta_tensors(model: nn.Module) -> dict[str, np.ndarray]:
    """As llama.cpp's converter makes them: norms with their 1, decay as a number, and value heads in tiles, the first
    of each key head before the second of any."""
    config = model.config
    keys, values, width = (
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_value_head_dim,
    )
    tiled = lambda x, size: x.reshape(keys, values // keys, size, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
    before = 2 * keys * config.linear_key_head_dim  # rows of queries and keys
    behind = lambda x: np.concatenate([x[:before], tiled(x[before:], width)])
    found = {}
    for name, tensor in model.state_dict().items():
        value, parts = tensor.float().numpy(), name.split(".")
        if name in getattr(model, "all_tied_weights_keys", {}):
            continue
        if parts[1] != "layers":
            found[{"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"] = (
                value + 1 if parts[1] == "norm" else value
            )
            continue
        layer = ".".join(part for part in parts[3:] if part != "weight")
        if layer.endswith("norm") and layer != "linear_attn.norm":
            value = value + 1
        elif layer.endswith(("in_proj_a", "in_proj_b", "dt_bias", "A_log")):
            value = tiled(-np.exp(value) if layer.endswith("A_log") else value, 1)
        elif layer.endswith("in_proj_z"):
            value = tiled(value, width)
        elif layer.endswith(("in_proj_qkv", "conv1d")):
            value = behind(value.squeeze(1) if layer.endswith("conv1d") else value)
        elif layer == "linear_attn.out_proj":
            value = tiled(value.T, width).T
        end = "" if layer.endswith(("A_log", "dt_bias")) else ".weight"
        found[f"blk.{parts[2]}.{_GATED_DELTA[layer]}{end}"] = value
    return found


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring elements, transformers the two halves of a head."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
