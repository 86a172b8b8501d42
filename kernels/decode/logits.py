"""Logits of a few hidden states over the whole vocabulary: what a sampler needs, where a sweep would keep none.

Memory: N x V float32 for the logits, and `workspace_mib` for a tile of the weight where it is not a view. The product
is the sweep's own (same dtype, float32 accumulation and output), so the sampler sees the numbers that are scored. An
int8 head that is `fused` takes no workspace, see `int8_logits`.
"""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.cuts import cuts
from lowvram_grpo.kernels.decode.int8_logits import covers, int8_logits
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.products import compute_dtype, matmul, without_autocast
from torch import Tensor


def linear_logits(hidden: Tensor, head: Head, *, workspace_mib: int = 64, fused: bool = False) -> Tensor:
    """`softcap(scale * (W h + b))`, float32 (N, V), for hidden states (N, H) of any float dtype; no gradient.

    Args:
        fused: by the kernel of `int8_logits`, where it covers the hidden states and the weight.
    """
    with without_autocast(hidden), torch.no_grad():
        h = hidden.to(compute_dtype(hidden))
        if fused and covers(h, head.weight):
            out = int8_logits(h, head.weight, None if head.bias is None else head.bias.detach().to(h.device))
        else:
            out = _by_tiles(h, head, workspace_mib)
        if head.logit_scale != 1.0:
            out *= head.logit_scale
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out


def _by_tiles(h: Tensor, head: Head, workspace_mib: int) -> Tensor:
    """`W h + b`, a tile of the weight at a time."""
    vocab, width = head.shape
    out = torch.empty(len(h), vocab, dtype=torch.float32, device=h.device)
    view = head.is_view(h.dtype, h.device)
    columns = vocab if view else _columns(len(h), vocab, width, h.element_size(), workspace_mib)
    buffer = torch.empty(0 if view else columns, width, dtype=h.dtype, device=h.device)
    for v0, v1 in cuts(vocab, columns, h.device):
        w, bias = head.tile(v0, v1, buffer)
        if v1 - v0 == vocab:
            matmul(h, w.T, out)
        else:
            # A product straight into columns of `out` is a copy anyway wherever the library wants them dense.
            out[:, v0:v1] = matmul(h, w.T, torch.empty(len(h), v1 - v0, device=h.device))
        if bias is not None:
            out[:, v0:v1] += bias
    return out


def _columns(n: int, vocab: int, width: int, item: int, workspace_mib: int) -> int:
    """Vocabulary entries a tile. Three quarters for the weights: int8 scales, or NF4's own output, come beside them."""
    columns = workspace_mib * 2**20 * 3 // 4 // (2 * width * item + 4 * n)
    columns -= columns % 128 if columns > 128 else 0
    return max(1, min(vocab, columns))
