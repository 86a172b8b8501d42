"""The gated delta rule over sequences: PyTorch and kernels against the definition, token by token, in float64."""

from __future__ import annotations

import inspect

import pytest
import torch
from delta_problems import DEVICE, check, problem, results, tokens
from lowvram_grpo.kernels.recurrent import delta_chunks, delta_kernels, delta_rule
from lowvram_grpo.kernels.recurrent.delta_rule import gated_delta_rule, segment_tokens
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted, jit, tl

from lowvram_grpo.memory.ledger import Ledger

in_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
# (B, L, Hk, Hv, Dk, Dv)
SHAPES = [
    (2, 1, 1, 1, 16, 16),
    (1, 3, 2, 4, 24, 20),
    (2, 65, 1, 3, 17, 33),
    (1, 200, 2, 2, 64, 48),
    (1, 71, 1, 2, 128, 40),
]
KERNEL_DTYPES = [torch.bfloat16, torch.float16] + [torch.float32] * interpreted()  # float32 is for PyTorch on a card


def of(path, **settings):
    return lambda *given: gated_delta_rule(*given, path=path, **settings)


def transformers_rule(*given):
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    group = given[2].shape[2] // given[1].shape[2]  # before 5.24 layers repeat heads themselves
    q, k = (x.repeat_interleave(group, 2) for x in given[:2])
    return inspect.unwrap(modeling.torch_chunk_gated_delta_rule)(
        q, k, *given[2:5], initial_state=given[5], output_final_state=True, use_qk_l2norm_in_kernel=True
    )


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_are_the_definition(shape, repeat):
    given, gradients = problem(*shape, dtype=torch.float64, repeat=repeat)
    for mine, truth in zip(results(of("torch"), given, gradients), results(tokens, given, gradients)):
        assert (mine - truth).abs().max() <= 1e-12 * truth.abs().max()


def test_the_gradient_is_that_of_finite_differences():
    given, _ = problem(1, 5, 1, 2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(of("torch"), [x.requires_grad_() for x in given])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_pytorch_is_as_exact_as_transformers(shape, dtype):
    check(of("torch"), transformers_rule, *problem(*shape, dtype=dtype))


@in_triton
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_as_exact_as_transformers(shape, dtype):
    check(of("triton"), transformers_rule, *problem(*shape, dtype=dtype), slack=2e-6 if interpreted() else 2e-3)


@in_triton
@pytest.mark.parametrize("decay", [0.0, 20.0])
def test_repeated_keys_that_are_hardly_forgotten(decay):
    given, gradients = problem(1, 150, 1, 2, 20, 24, dtype=torch.float16, repeat=True, decay=decay)
    for path in ("torch", "triton"):
        check(of(path), transformers_rule, given, gradients, slack=1e-5 if interpreted() else 2e-3)


@in_triton
def test_rows_as_they_are():
    given, gradients = problem(1, 40, 2, 2, 16, 16, dtype=torch.float16)
    for path in ("torch", "triton"):
        exact = lambda *given: tokens(*given, normalize=False)
        check(of(path, normalize=False), exact, given, gradients, exact=exact, slack=1e-5 if interpreted() else 2e-3)


@in_triton
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_half_of_the_gradients_and_no_initial_state(path):
    given, gradients = problem(2, 70, 1, 2, 16, 20, dtype=torch.float16)
    zero = torch.zeros_like(given[5])
    for wanted in (0, 1):
        inputs = [x.clone().requires_grad_() for x in given[:5]]
        outs = gated_delta_rule(*inputs, path=path)
        found = torch.autograd.grad(outs[wanted], inputs, gradients[wanted].to(outs[wanted]))
        nothing = [torch.zeros_like(d) if i != wanted else d for i, d in enumerate(gradients)]
        expected = results(of(path), [*given[:5], zero], nothing)
        for mine, theirs in zip((*outs, *found), expected):
            assert torch.equal(mine, theirs)


@in_triton
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_inputs_may_be_parts_of_one_tensor(path):
    given, gradients = problem(1, 50, 2, 2, 16, 16, dtype=torch.float16)
    packed = torch.cat([x.flatten(2) for x in given[:3]], -1).mT.contiguous().mT  # last dimension with gaps
    views = [x.unflatten(2, (2, 16)) for x in packed.split(32, -1)]
    for mine, theirs in zip(results(of(path), [*views, *given[3:]], gradients), results(of(path), given, gradients)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    dense = gated_delta_rule(*given, path=path)[0]
    assert torch.equal(gated_delta_rule(*given[:5], given[5].double(), path=path)[0], dense)


def test_sequences_are_apart_and_states_carry_over():
    given, _ = problem(3, 90, 1, 2, 16, 16, dtype=torch.float64)
    out, state = gated_delta_rule(*given)
    alone = gated_delta_rule(*(x[1:2] for x in given))
    torch.testing.assert_close((out[1:2], state[1:2]), alone, rtol=1e-12, atol=1e-12)
    first, between = gated_delta_rule(*(x[:, :37] for x in given[:5]), given[5])
    second, last = gated_delta_rule(*(x[:, 37:] for x in given[:5]), between)
    torch.testing.assert_close((torch.cat([first, second], 1), last), (out, state), rtol=1e-12, atol=1e-12)
    nothing = gated_delta_rule(*(x[:, :0] for x in given[:5]), given[5])
    assert nothing[0].shape == (3, 0, 2, 16) and torch.equal(nothing[1], given[5])
    assert nothing[1].data_ptr() != given[5].data_ptr()


def test_autocast_leaves_states_in_float32():
    given, _ = problem(1, 80, 1, 1, 16, 16)
    expected = gated_delta_rule(*given)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = gated_delta_rule(*given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@in_triton
@pytest.mark.parametrize("name", ["_inverse", "decays", "rows_into"])
def test_the_comparison_fails_when_a_kernel_is_wrong(name, monkeypatch):
    if not interpreted():
        pytest.skip("what was compiled is kept")
    broken = {"_inverse": _no_inverse, "decays": _no_decays, "rows_into": _rows_twice}[name]
    monkeypatch.setattr(delta_kernels, name, jit(broken))
    given, gradients = problem(1, 45, 1, 1, 16, 16)
    with pytest.raises(AssertionError):
        check(of("triton"), transformers_rule, given, gradients)


def _no_inverse(a, SIZE):
    i = tl.arange(0, SIZE)
    return tl.where(i[:, None] == i[None, :], 1.0, -a)  # the first term of it


def _no_decays(later, earlier, causal):
    return tl.where(causal, 1.0, 0.0)


def _rows_twice(ptr, token, length, stride, first, width, factor, values, PRECISION):
    rows = delta_kernels.load_part(ptr, token, length, stride, first, width, delta_kernels._SLICE)
    return 2.0 * tl.dot(tl.trans(rows), factor[:, None] * values, input_precision=PRECISION)


def bytes_of(function, given):
    """The most that forward and backward hold beside what is given."""
    with Ledger() as ledger:
        out = function(*given)[0]
        out.backward(torch.ones_like(out))
    return ledger.peak


def test_memory_is_a_fraction_of_transformers():
    nothing, cases = torch.zeros(1, 2, 32, 32), {}
    for device in ("cpu", "meta"):
        given = [x.to(device).requires_grad_() for x in problem(1, 2048, 1, 2, 32, 32, dtype=torch.bfloat16)[0][:5]]
        cases[device] = bytes_of(gated_delta_rule, given)
        if device == "cpu":
            theirs = bytes_of(lambda *x: transformers_rule(*x, nothing), given)
    assert cases["cpu"] <= theirs / 4
    # A plan counts the kernels' buffers, too.
    assert cases["cpu"] <= cases["meta"] <= theirs / 3


def test_on_meta_tensors_only_one_segment_is_computed(monkeypatch):
    seen = []
    chunk = delta_chunks._chunk
    monkeypatch.setattr(delta_chunks, "_chunk", lambda given, unit: seen.append(1) or chunk(given, unit))
    given = [x.to("meta").requires_grad_() for x in problem(1, 1000, 1, 1, 16, 16)[0]]
    out, state = gated_delta_rule(*given)
    grads = torch.autograd.grad((out, state), given, (out, state))
    assert [x.shape for x in grads] == [x.shape for x in given] and {x.device.type for x in grads} == {"meta"}
    assert len(seen) == 4 + 3 + 4  # of four segments of four chunks each: forward, the states again, backward


def test_segments_are_as_many_as_their_chunks():
    assert [segment_tokens(n, 64) for n in (0, 1, 64, 65, 256, 257, 1024, 1025)] == [
        64,
        64,
        64,
        128,
        128,
        192,
        256,
        320,
    ]


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x: x[:2] + [x[2][:, :3]] + x[3:], "q and k are"),
        (lambda x: x[:3] + [x[3][..., :1]] + x[4:], "q and k are"),
        (lambda x: [x[0][:, :, :1], *x[1:]], "q and k are"),
        (lambda x: [*x[:5], x[5][:, :1]], "the initial state is"),
    ],
)
def test_shapes_that_do_not_belong_together(change, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*change(problem(1, 4, 2, 2, 8, 8)[0]))


def test_paths():
    given = problem(1, 4, 1, 1, 8, 8)[0]
    with pytest.raises(ValueError, match="one of triton, torch"):
        gated_delta_rule(*given, path="cuda")
    assert not delta_rule.delta_triton.fits(*given[:5])
