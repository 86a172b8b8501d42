"""The sweep as torch.library operators: fake tensors, torch.compile, opcheck, and addresses beyond 32 bits."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps
from lowvram_grpo.kernels.runtime import HAS_TRITON
from lowvram_grpo.kernels.sweep.autograd import sweep_op
from lowvram_grpo.kernels.sweep.direction import Entries, RowGrads, sparse_direction
from problems import eager_and_compiled, peaked
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
def test_compiled_code_gives_the_same_values_and_gradients(kind):
    hidden, head, targets = peaked(10, 300, 64, bias=True)
    head = head if kind == "dense" else head.quantized(kind)
    ref = hidden + 0.1

    def step(hidden):
        out = linear_logps(hidden * 1.0, head, targets, entropy=True, ref_hidden=ref, kl=True, direction="sparse")
        return (out.logps * out.entropy).sum() + out.kl.sum()

    torch.testing.assert_close(*eager_and_compiled(step, hidden))


def test_fake_tensors_have_the_real_ones_shapes():
    hidden, head, targets = peaked(6, 120, 16)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (hidden, head.weight, targets)]
        out = linear_logps(fake[0].requires_grad_(), Head(fake[1]), fake[2], entropy=True)
        assert out.logps.shape == (6,) and out.entropy.shape == (6,)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_every_fake_output_has_the_real_ones_shape(mode, kl, entropy):
    """What is only known to the device has a symbol, and the same symbol wherever it is the same number."""
    hidden, head, targets = peaked(6, 120, 16)
    tensors, numbers = head.flatten()
    args = [hidden.requires_grad_(), hidden.detach() if kl else None, tensors, targets, head.centre(hidden.device)[0]]
    settings = (1.0, mode, 2.0**-16, 64, 0.015, None, torch.float32, 4, True, kl, entropy)
    call = lambda h, ref, weights, t, mean: sweep_op(h, ref, weights, numbers, t, None, mean, *settings)
    real = call(*args)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = call(*torch.utils._pytree.tree_map(lambda x: x if x is None else mode.from_tensor(x), args))
    meaning = {}
    for i, (r, f) in enumerate(zip(real, fakes, strict=True)):
        assert r.dtype == f.dtype and r.ndim == f.ndim
        for a, b in zip(r.shape, f.shape):
            assert a == (b if isinstance(b, int) else meaning.setdefault(str(b), a)), i


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_opcheck(mode):
    hidden, head, targets = peaked(6, 120, 16)
    tensors, numbers = head.flatten()
    mean = head.centre(hidden.device)[0]
    args = [hidden.requires_grad_(), hidden.detach(), tensors, numbers, targets, None, mean]
    settings = (1.0, mode, 2.0**-16, 64, 0.015, None, torch.float32, 4, True, True, True)
    torch.library.opcheck(sweep_op, (*args, *settings), test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
def test_a_head_survives_the_trip_through_a_schema(kind):
    _, head, _ = peaked(2, 70, 64, bias=True, scale=0.5, softcap=9.0)
    head = head if kind == "dense" else head.quantized(kind)
    again = Head.unflatten(*head.flatten())
    read = lambda h: h.tile(3, 61, torch.empty(58, 64))
    torch.testing.assert_close(read(again), read(head))
    assert (again.logit_scale, again.softcap) == (0.5, 9.0)


@pytest.mark.parametrize("use_triton", [False, True] if HAS_TRITON else [False])
def test_weights_beyond_32_bits_are_addressed_right(use_triton):
    """V * H = 2.6e9 elements. The memory is reserved, not used: only the pages that are written exist."""
    v, h = 40_000, 65_536
    weight = torch.empty(v, h, dtype=torch.bfloat16)
    if torch.cuda.is_available():
        weight = weight.cuda()
    last = v - 1
    weight[last] = 3.0
    weight[last - v // 2] = 5.0
    device = weight.device
    none = torch.empty(0, device=device)
    entries = Entries(
        torch.tensor([0, 2], device=device), torch.tensor([last, last - v // 2], dtype=torch.int32, device=device),
        torch.tensor([1.0, 2.0], device=device), none, none, torch.zeros(1, device=device), none, none,
    )  # fmt: skip
    c, mean = RowGrads(torch.tensor([-1.0], device=device)), torch.zeros(h, device=device)
    out = sparse_direction(Head(weight), entries, c, mean, 1.0, torch.float32, use_triton=use_triton)
    assert (out == 13.0).all()


@pytest.mark.parametrize("path", ["cublas", "fused"] if HAS_TRITON else [])
def test_a_row_stride_beyond_32_bits(path):
    """Rows of hidden states 1.1e9 elements apart: the third one starts beyond 2^31."""
    hidden, head, targets = peaked(3, 90, 16)
    far = torch.empty(3, 1_100_000_000, dtype=torch.bfloat16, device="cpu")[:, :16]
    far.copy_(hidden)
    near = far.contiguous()
    head = Head(head.weight.bfloat16())
    out = [linear_logps(h, head, targets, path=path).logps for h in (far, near)]
    assert torch.equal(*out)
