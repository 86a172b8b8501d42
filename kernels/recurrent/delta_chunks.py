"""The gated delta rule in PyTorch: token by token as it is defined, and a chunk at a time, forward and back.

A head keeps a state S (Dk, Dv). Token t decays it, corrects what it says of the key, and reads it (Yang et al. 2024,
"Gated Delta Networks", arXiv:2412.06464, equation 10):

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T        o_t = S_t^T q_t / sqrt(Dk)

In a chunk whose decays add up to G_1 .. G_C, from the state S it begins with (the WY representation, section 3.3):

    A = beta_i k_i.k_j exp(G_i - G_j), j < i        P = q_i.k_j exp(G_i - G_j), j <= i
    R = beta (V - exp(G) K S)                       U = (I + A)^-1 R
    O = exp(G) Q S + P U                            S' = exp(G_C) S + (exp(G_C - G) K)^T U

No exponent here is positive as long as no g is. All sums are float32 (float64 of float64), autocast or not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # tokens that the PyTorch path takes at a time
EPS = 1e-6  # of the norms of queries and keys


class Inputs(NamedTuple):
    """What the rule reads of some tokens: q, k (B, L, Hk, Dk), v (B, L, Hv, Dv), g and beta (B, L, Hv); Hv is a
    multiple of Hk, and a key head serves Hv / Hk value heads in a row."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def tokens(self, begin: int, end: int) -> Inputs:
        """Views of some of the tokens."""
        return Inputs(*(x[:, begin:end] for x in self))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of states and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def delta_rule_tokens(
    given: Inputs, initial_state: Tensor | None = None, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """The definition, a token at a time: (out (B, L, Hv, Dv), state (B, Hv, Dk, Dv)). Differentiable by autograd."""
    q, k = (_heads(x, given, normalize) for x in given[:2])
    v, g, beta = (x.transpose(1, 2).to(compute_dtype(x)) for x in given[2:])
    state = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state.to(q.dtype)
    outs = []
    for t in range(v.shape[2]):
        state = state * g[:, :, t, None, None].exp()
        correction = beta[:, :, t, None] * (v[:, :, t] - _read(state, k[:, :, t]))
        state = state + k[:, :, t, :, None] * correction[:, :, None]
        outs.append(_read(state, q[:, :, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outs, 1).to(given.q.dtype), state


def _read(state: Tensor, key: Tensor) -> Tensor:
    return (state * key[..., None]).sum(-2)


def _heads(x: Tensor, given: Inputs, normalize: bool) -> Tensor:
    """(B, Hv, L, Dk) of queries or keys."""
    x = x.transpose(1, 2).to(compute_dtype(x))
    if normalize:
        x = x * _inverse_norm(x)
    return x.repeat_interleave(given.v.shape[2] // x.shape[1], 1)


def _inverse_norm(x: Tensor) -> Tensor:
    return torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)


class _Chunk(NamedTuple):
    """A chunk, heads first: q (scaled), k (B, H, C, Dk), v (B, H, C, Dv), beta (B, H, C, 1), decays as in the formulas:
    begin = exp(G), end = exp(G_C - G) (B, H, C, 1), between = exp(G_i - G_j) of j <= i (B, H, C, C)."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    begin: Tensor
    end: Tensor
    between: Tensor

    @property
    def whole(self) -> Tensor:
        """exp(G_C), (B, H, 1, 1)."""
        return self.begin[:, :, -1:]

    def lower(self) -> Tensor:
        """A, and beside it what counts for nothing: the solvers read it as unitriangular."""
        return self.beta * (self.k @ self.k.mT) * self.between

    def attention(self) -> Tensor:
        """P."""
        return (self.q @ self.k.mT) * self.between

    def solved(self, state: Tensor) -> Tensor:
        """U."""
        right = self.beta * (self.v - self.begin * (self.k @ state))
        return torch.linalg.solve_triangular(self.lower(), right, upper=False, unitriangular=True)

    def after(self, state: Tensor, solved: Tensor) -> Tensor:
        """S'."""
        return self.whole * state + (self.end * self.k).mT @ solved


def _chunk(given: Inputs, normalize: bool) -> _Chunk:
    q, k = (_heads(x, given, normalize) for x in given[:2])
    v, g, beta = (x.transpose(1, 2).to(q.dtype) for x in given[2:])
    total = g.cumsum(2)
    upper = torch.ones(2 * total.shape[-1:], dtype=torch.bool, device=q.device).triu_(1)
    between = (total[..., None] - total[:, :, None]).masked_fill_(upper, float("-inf")).exp_()
    end = (total[:, :, -1:] - total).exp()
    return _Chunk(q * q.shape[-1] ** -0.5, k, v, beta[..., None], total.exp()[..., None], end[..., None], between)


def segment_forward(given: Inputs, state: Tensor, out: Tensor | None, normalize: bool) -> Tensor:
    """The state after these tokens; what they read goes into `out` (B, L, Hv, Dv), if that is wanted."""
    for begin in range(0, given.v.shape[1], CHUNK):
        c = _chunk(given.tokens(begin, begin + CHUNK), normalize)
        u = c.solved(state)
        if out is not None:
            out[:, begin : begin + CHUNK] = (c.begin * (c.q @ state) + c.attention() @ u).transpose(1, 2)
        state = c.after(state, u)
    return state


def segment_backward(
    given: Inputs, state: Tensor, d_out: Tensor | None, d_state: Tensor, grads: Inputs, normalize: bool
) -> Tensor:
    """The gradient to the state before these tokens; those to the inputs are written into `grads`.

    Args:
        state: before these tokens.
        d_out: gradient to what they read, or None for zeros.
        d_state: gradient to the state after them.
    """
    begins = range(0, given.v.shape[1], CHUNK)
    states = [state]
    for begin in begins[:-1]:
        c = _chunk(given.tokens(begin, begin + CHUNK), normalize)
        states.append(c.after(states[-1], c.solved(states[-1])))
    for begin in reversed(begins):
        some = given.tokens(begin, begin + CHUNK)
        d = some.v.new_zeros(some.v.shape) if d_out is None else d_out[:, begin : begin + CHUNK]
        d = d.transpose(1, 2).to(state.dtype)
        d_state = _chunk_backward(some, states.pop(), d, d_state, grads.tokens(begin, begin + CHUNK), normalize)
    return d_state


def _chunk_backward(
    given: Inputs, state: Tensor, d_out: Tensor, d_state: Tensor, grads: Inputs, normalize: bool
) -> Tensor:
    c = _chunk(given, normalize)
    a, p, u = c.lower().tril_(-1), c.attention(), c.solved(state)
    # To U, to R by the transposed system, and from there to V and K S.
    d_u = p.mT @ d_out + (c.end * c.k) @ d_state
    d_r = torch.linalg.solve_triangular(a.mT, d_u, upper=True, unitriangular=True)
    d_v = c.beta * d_r
    # What reads a state, back onto queries and keys: the rows of these three meet q and k in the gradients of decays.
    by_out = c.begin * (d_out @ state.mT)
    by_key = c.begin * (d_r @ state.mT)
    by_end = c.end * (u @ d_state.mT)
    out_decay, key_decay, end_decay = ((x * y).sum(-1) for x, y in ((by_out, c.q), (by_key, c.k), (by_end, c.k)))
    # To P and A, whose decays are each one's own factor.
    d_p, d_a = d_out @ u.mT, -(d_r @ u.mT)
    pairs = d_p * p + d_a * a
    d_total = out_decay - c.beta[..., 0] * key_decay - end_decay + pairs.sum(-1) - pairs.sum(-2)
    d_last = (c.whole * state * d_state).sum((-2, -1)) + end_decay.sum(-1)
    d_p, unscaled = d_p * c.between, (d_a * c.between).tril_(-1)
    d_beta = (d_r * c.v).sum(-1) - key_decay + (unscaled * (c.k @ c.k.mT)).sum(-1)
    d_a = c.beta * unscaled
    d_q = by_out + d_p @ c.k
    d_k = by_end - c.beta * by_key + d_p.mT @ c.q + (d_a + d_a.mT) @ c.k
    d_state = c.whole * d_state + (c.begin * c.q).mT @ d_out - (c.begin * c.k).mT @ d_v
    scale = c.q.shape[-1] ** -0.5
    grads.q.copy_(_to_rows(d_q * scale, given.q, c.q / scale, normalize))
    grads.k.copy_(_to_rows(d_k, given.k, c.k, normalize))
    grads.v.copy_(d_v.transpose(1, 2))
    # G is a sum of all g before: a sum of all that come after, on the way back.
    grads.g.copy_((d_total.flip(-1).cumsum(-1).flip(-1) + d_last[..., None]).transpose(1, 2))
    grads.beta.copy_(d_beta.transpose(1, 2))
    return d_state


def _to_rows(d: Tensor, x: Tensor, unit: Tensor, normalize: bool) -> Tensor:
    """The gradient (B, C, Hk, Dk) to x from that to its normalized rows (B, Hv, C, Dk)."""
    group = unit.shape[1] // x.shape[2]
    d = d.unflatten(1, (-1, group)).sum(2)
    if normalize:
        unit, rows = unit[:, ::group], x.transpose(1, 2).to(d.dtype)
        d = _inverse_norm(rows) * (d - unit * (unit * d).sum(-1, keepdim=True))
    return d.transpose(1, 2)
