"""Policies whose weights are streamed, and resident ones that they are held against."""

from __future__ import annotations

from functools import partial

import torch
from passes import adapted, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps
from lowvram_grpo.policy.fused_lora import fuse_lora
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm
from lowvram_grpo.policy.weight_stream import stream_weights
from lowvram_grpo.policy.wrapper import unwrap

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 5}


def saved_model(folder):
    tiny("Llama", **SIZES).save_pretrained(folder)
    return str(folder)


def loaded(folder, kind, **settings):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    config = None if kind in ("float32", "bfloat16") else bitsandbytes_config(kind, dtype)
    return load_causal_lm(folder, device=CPU, dtype=dtype, quantization_config=config, **settings)


class Checkpointed(nn.Module):
    """A layer whose hooks run again when it is computed again, as with transformers of earlier versions."""

    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, *args, **kwargs):
        return checkpoint(partial(self.layer, **kwargs), *args, use_reentrant=self.reentrant)


def policy(base, n=0, fused=True, tile=None, reentrant=False, around=False):
    torch.manual_seed(7)
    model = adapted(base)
    if n:
        stream_weights(model, n, CPU)
    if tile:
        tile_mlps(model, tile)
    if around:
        layers = unwrap(model).model.layers
        unwrap(model).model.layers = nn.ModuleList(Checkpointed(layer, reentrant) for layer in layers)
        model.enable_input_require_grads()
    else:
        checkpoint_activations(model, {"use_reentrant": reentrant})
    if fused:
        fuse_lora(model, nf4_kernel=False)
    return model


def assert_same_bits(ours, theirs):
    (a, grads), (b, others) = ours, theirs
    assert torch.equal(a.logps, b.logps)
    assert grads.keys() == others.keys() and len(grads) == 70, len(grads)
    for name, grad in others.items():
        assert torch.equal(grads[name], grad), name
        assert grad.abs().sum() > 0
