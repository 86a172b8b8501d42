"""Log-probs through a head that is trained itself: logits are recomputed in the backward pass, tile by tile.

    D_iv = dL/dl_iv = [c_i (1[v = t_i] - p_iv) - f_i p_iv (log p_iv + entropy_i)] * slope * scale / T
    dh = D W      dW = D^T h      db = sum_i D_i

where c = dL/dlogp and f = dL/dentropy. 8NVH FLOP in all. A weight tile is the outer loop, so that its gradient is
complete, in float32, before it is rounded.
Memory: the workspace, and the gradients themselves.
"""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.products import add_matmul, matmul, without_autocast
from lowvram_grpo.kernels.sweep.plan import plan_tiles
from lowvram_grpo.kernels.transform import LOWEST


class TrainableHead(torch.autograd.Function):
    """(logps, entropy), differentiable in hidden states, weight and bias; entropy with `entropy_gradient` alone."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, sweep_once, transform, dtype, workspace_mib, entropy_gradient):
        """sweep_once: a Head's statistics, by the same sweep that scores without gradient, its products in `dtype`."""
        swept = sweep_once(Head(weight.detach(), bias, transform.scale, transform.softcap))
        ctx.save_for_backward(hidden, weight, bias, targets, swept.lse, swept.entropy if entropy_gradient else None)
        ctx.transform, ctx.dtype = transform, dtype
        ctx.plan = plan_tiles(len(hidden), *weight.shape, workspace_mib, tile_bytes=16 + 4 * entropy_gradient)
        if not entropy_gradient:
            ctx.mark_non_differentiable(swept.entropy)
        return swept.logps, swept.entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        transform, plan = ctx.transform, ctx.plan
        factor = transform.scale / transform.temperature
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        with without_autocast(hidden):
            for v0 in range(0, weight.shape[0], plan.columns):
                # The products of the forward pass, or exp(logit - lse) would not sum to 1.
                w = weight.detach()[v0 : v0 + plan.columns].to(ctx.dtype)
                d_w = torch.zeros_like(w, dtype=torch.float32) if d_weight is not None else None
                for r0 in range(0, len(hidden), plan.rows):
                    block = slice(r0, r0 + plan.rows)
                    h, c, t = hidden[block].to(w.dtype), grad_logps[block, None], targets[block] - v0
                    logits = matmul(h, w.T, torch.empty(len(h), len(w), device=h.device))
                    if bias is not None:
                        logits += bias.detach()[v0 : v0 + plan.columns].float()
                    logits = transform(logits)
                    slope = transform.slope(logits)
                    log_p = logits.sub_(lse[block, None])
                    if entropy is None:
                        d_logits = log_p.exp_().mul_(-c)
                    else:
                        p, f = log_p.exp(), grad_entropy[block, None]
                        # An entry of logit -inf has p = 0 and must not add 0 * inf.
                        d_logits = log_p.clamp_(min=LOWEST).add_(entropy[block, None]).mul_(f).add_(c).mul_(p.neg_())
                        del p
                    here = (t >= 0) & (t < len(w))
                    d_logits.scatter_add_(1, t.clamp(0, len(w) - 1)[:, None], torch.where(here[:, None], c, 0.0))
                    if slope is not None:
                        d_logits *= slope
                    d_logits *= factor
                    if d_bias is not None:
                        d_bias[v0 : v0 + plan.columns] += d_logits.sum(0)
                    d_logits = d_logits.to(w.dtype)
                    add_matmul(d_hidden[block], d_logits, w)
                    if d_w is not None:
                        add_matmul(d_w, d_logits.T, h)
                if d_w is not None:
                    d_weight[v0 : v0 + plan.columns] = d_w.to(weight.dtype)
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        return d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None, None, None, None
