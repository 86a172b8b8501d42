"""Packed layouts by xformers: the translation into its biases, and the choice. Its kernels need a card."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module

import pytest
import torch
from biases import DOCUMENTED, ops_of
from passes import COMPLETIONS, GROUPS, PROMPTS, adapted, assert_same, micro_batch, tiny, training_pass

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.host import upload
from lowvram_grpo.policy import attention_choice, xformers_attention
from lowvram_grpo.policy.attention import AttentionParams, ranges
from lowvram_grpo.policy.attention_choice import check, check_asked, described, kernel_of, wanted, why_not
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.gather_kv import KVCopies, gather_kv
from lowvram_grpo.policy.shared_prefix import PrefixLayout
from lowvram_grpo.policy.shared_prefix import why_not as cannot_share
from lowvram_grpo.policy.xformers_attention import Case, Kernel, shared_blocks
from lowvram_grpo.rollout.attention import PrefillLayout
from lowvram_grpo.rollout.cache import GroupCache
from lowvram_grpo.training import scoring

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


# The package's own definitions where it is installed, which it need not be.
BIASES = {"documented semantics": DOCUMENTED}
with suppress(ImportError):
    BIASES["xformers' own"] = import_module("xformers.ops").fmha.attn_bias


@pytest.fixture(params=BIASES)
def ops(request, monkeypatch):
    """xformers with a kernel for this machine."""
    made = ops_of(BIASES[request.param])
    monkeypatch.setattr(xformers_attention, "library", lambda: (made, None))
    return made


def kernel(dtype=torch.float64, head=8, training=True, windows=(False, True)):
    return Kernel(frozenset(Case(CPU, dtype, head, head, training, windowed) for windowed in windows), training)


def layouts(lengths=COMPLETIONS, groups=GROUPS, prompts=PROMPTS):
    """By sdpa, and by xformers."""
    width = max(prompts) + max(lengths)
    made = {"width": width, "prompt_width": max(prompts), "device": CPU}
    return [PrefixLayout(prompts, lengths, groups, **made, kernel=of) for of in (None, kernel())]


def attended(layout, window, heads=4, shared=2):
    """Output and gradients of random tokens."""
    made = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randn(1, n, layout.length, 8, generator=made, dtype=torch.float64).requires_grad_()
    given = draw(heads), draw(shared), draw(shared)
    out = layout.attend(0, *given, AttentionParams(0.3, 0.0, window, None))
    (out * torch.randn(out.shape, generator=made, dtype=torch.float64)).sum().backward()
    return [out.detach(), *(x.grad for x in given)]


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 99])
@pytest.mark.parametrize(
    "lengths", [COMPLETIONS, [1, 1, 1, 1, 1], [3, 0, 2, 0, 0], [9, 1, 1, 2, 17]], ids=["ragged", "one", "none", "long"]
)
def test_sequences_in_a_bias_are_the_shared_prompts(ops, lengths, window, shared):
    by_sdpa, by_xformers = (attended(layout, window, shared=shared) for layout in layouts(lengths))
    assert ops.calls == 1
    for a, b in zip(by_sdpa, by_xformers):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("window", [None, 2, 99])
def test_sequences_in_a_bias_are_the_prompts_of_a_prefill(ops, monkeypatch, window, grouped):
    monkeypatch.setattr(xformers_attention, "_takes_grouped_heads", lambda q: grouped)
    lengths, made = [3, 1, 7], torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, heads, 11, 8, generator=made, dtype=torch.float64) for heads in (4, 2, 2))
    outs, caches = [], []
    for of in (None, kernel(training=False)):
        caches.append(GroupCache(3, 7, 1, 1))
        layout = PrefillLayout(caches[-1], lengths, [2, 0, 1], of)
        with torch.no_grad():
            outs.append(layout.attend(0, q, k, v, AttentionParams(0.3, 0.0, window, None)))
    assert ops.calls == (2 if grouped else 1)  # the five-dimensional one calls itself
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
    assert torch.equal(*(cache.layer(0, k, v).prompts.keys for cache in caches))


def test_biases_are_made_once_a_layout(ops, monkeypatch):
    made = []
    monkeypatch.setattr(xformers_attention, "bias_of", lambda *a, f=xformers_attention.bias_of: made.append(1) or f(*a))
    layout = layouts()[1]
    for window in (None, 3, None, 3, 99):  # 99 is wider than all keys
        attended(layout, window)
    assert len(made) == 2


@pytest.mark.parametrize(
    "params",
    [AttentionParams(0.3, 0.1, None, None), AttentionParams(0.3, 0.0, 3, None)],
    ids=["dropout", "a window that has no backward"],
)
def test_what_xformers_cannot_do_is_left_to_sdpa(ops, params):
    made = {"width": 12, "prompt_width": 5, "device": CPU, "kernel": kernel(windows=(False,))}
    layout = PrefixLayout(PROMPTS, COMPLETIONS, GROUPS, **made)
    q, k, v = (torch.randn(1, heads, layout.length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    layout.attend(0, q, k, v, params)
    assert ops.calls == 0
    layout.attend(0, q, k, v, params._replace(dropout=0.0, window=None))
    layout.attend(0, q.float(), k.float(), v.float(), params._replace(dropout=0.0, window=None))  # a case never tried
    assert ops.calls == 1


@pytest.mark.parametrize("family,settings", [("Qwen3", {}), ("Mistral", {"sliding_window": 4})])
def test_a_model_trains_by_it_as_without(ops, monkeypatch, family, settings):
    model = adapted(tiny(family, **settings)).double()
    plain = training_pass(model)
    assert cannot_share(model) is None
    checkpoint_activations(model)
    monkeypatch.setattr(scoring, "kernel_of", lambda *asked: kernel())
    assert_same(plain, training_pass(model, group_sizes=GROUPS), rtol=1e-5)  # logps are float32
    assert ops.calls == 4  # two layers, each run again


def test_blocks_say_which_key_is_whose():
    blocks, index, copies = shared_blocks([(2, [1, 0, 3]), (1, [0])])
    assert blocks == ((2, 1, 3, 1), (2, 3, 5, 1), None)
    assert index.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert [each.copies for each in copies] == [3, 1]
    assert copies[0].shared.tolist() == [0, 1, 2, 3, 5, 6] and copies[0].own.tolist() == [4, 7, 8, 9]
    assert copies[1].shared.tolist() == [10] and not len(copies[1].own)


def test_gradients_of_copies_are_summed_in_one_place():
    """As autograd's own way back from an index does, but for what is padding."""
    x = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 1, 0, 1, 2, 3, 0, 1, 4, 4])  # the last one is padding
    copies = KVCopies(2, 3, torch.tensor([0, 1, 2, 3, 6, 7]), torch.tensor([4, 5, 8]))
    given = torch.randn(10, 6, 3, dtype=torch.float64)
    given[9] = 0
    out = gather_kv(x, index, 6, [copies])
    mine = torch.autograd.grad((out * given).sum(), x)[0]
    plain = x[0].transpose(0, 1).repeat_interleave(3, 1)[index]
    assert torch.equal(out, plain)
    torch.testing.assert_close(mine, torch.autograd.grad((plain * given).sum(), x)[0])


def test_an_upload_is_one_tensor():
    parts = upload([ranges([(3, 2), (0, 0), (7, 1)]), torch.arange(6).view(2, 3), ranges([])], CPU, pack=True)
    assert [part.tolist() for part in parts] == [[3, 4, 7], [[0, 1, 2], [3, 4, 5]], []]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


# The choice


@pytest.fixture
def playing(monkeypatch):
    """A card of some compute capability, and an xformers; no question is answered yet."""

    def play(capability=(8, 6), ops=None, reason=None):
        monkeypatch.setattr(attention_choice, "library", lambda: (ops, reason))
        monkeypatch.setattr(attention_choice, "_ANSWERS", {})
        for name, answer in (("get_device_capability", capability), ("get_sync_debug_mode", 0)):
            monkeypatch.setattr(torch.cuda, name, lambda *a, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
        # Its questions are asked of CPU tensors.
        monkeypatch.setattr(attention_choice, "_tried", lambda ops, case, f=attention_choice._tried: f(
            ops, case._replace(device=CPU)))  # fmt: skip

    return play


CASE = Case(CARD, torch.float32, 8, 8, True, False)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_xformers_that_is_right_is_taken(playing, training, windowed):
    playing(ops=ops_of(DOCUMENTED))
    assert why_not(CASE._replace(training=training, windowed=windowed)) is None


def test_what_is_wrong_on_this_card_is_not_taken(playing):
    wrong = ops_of(DOCUMENTED)
    right = wrong.memory_efficient_attention
    wrong.memory_efficient_attention = lambda *a, **kw: right(*a, **{**kw, "scale": 0.31 * 2})
    playing(ops=wrong)
    assert "does not agree with plain attention" in why_not(CASE)

    class Halved(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: grad / 2)

    playing(ops=ops_of(DOCUMENTED))
    assert why_not(CASE) is None
    wrong.memory_efficient_attention = lambda q, k, v, **kw: right(q, Halved.apply(k), v, **kw)
    playing(ops=wrong)
    assert "does not agree" in why_not(CASE)
    assert why_not(CASE._replace(training=False)) is None


@pytest.mark.parametrize(
    "error,words",
    [
        (NotImplementedError("No operator found\npages"), ["no operator for float32 heads of 8, backward on sm_75"]),
        (RuntimeError("CUDA error: no kernel image\nmore"), ["fails here (RuntimeError: CUDA error: no kernel image"]),
        (AttributeError("_C"), ["fails here (AttributeError"]),
    ],
)
def test_an_operator_that_fails_is_a_phrase(playing, error, words):
    broken = ops_of(DOCUMENTED)

    def fail(*args, **kwargs):
        raise error

    broken.memory_efficient_attention = fail
    playing((7, 5), ops=broken)
    for word in words:
        assert word in why_not(CASE)
    assert "\n" not in why_not(CASE)


def test_memory_that_runs_out_is_no_answer(playing):
    ops, full = ops_of(DOCUMENTED), [True]
    attend = ops.memory_efficient_attention

    def fail_once(*args, **kwargs):
        if full:
            full.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attend(*args, **kwargs)

    ops.memory_efficient_attention = fail_once
    playing(ops=ops)
    with pytest.raises(torch.OutOfMemoryError):
        why_not(CASE)
    assert why_not(CASE) is None


def test_a_broken_install_is_one_phrase(tmp_path, monkeypatch, capfd, caplog, recwarn):
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text(
        "import logging, warnings\nlogging.getLogger('xformers').warning('WARNING[XFORMERS]: loud')\n"
        "warnings.warn('loud')\nraise OSError('undefined symbol: _ZN3c10\\nand more')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    xformers_attention.library.cache_clear()
    try:
        assert xformers_attention.library() == (None, "its import fails (OSError: undefined symbol: _ZN3c10 and more)")
    finally:
        xformers_attention.library.cache_clear()
    assert "loud" not in "".join(capfd.readouterr()) + caplog.text and not recwarn.list


def test_auto_takes_it_on_turing_alone_until_a_card_has_judged(playing):
    model = tiny("Mistral", sliding_window=4)
    for capability, kinds in (((7, 5), ["training"]), ((8, 6), []), ((9, 0), [])):
        playing(capability, ops=ops_of(DOCUMENTED))
        assert [kind for kind in ("training", "prefill") if kernel_of("auto", kind, model.model, CARD)] == kinds
        both = kernel_of("xformers", "prefill", model.model, CARD)
        assert {case.windowed for case in both.cases} == {False, True} and not both.training
        assert kernel_of("sdpa", "training", model.model, CARD) is None
    assert kernel_of("xformers", "training", model.model, torch.device("meta")) is None
    assert not wanted("auto", "training", CPU)


def test_asked_for_and_not_there_is_one_sentence(playing):
    playing(reason="it is not installed")
    with pytest.raises(UserError, match=r"but it is not installed; run `pip install 'xformers>=0.0.35'`, or set atten"):
        check_asked("xformers", CARD)
    check_asked("auto", CARD)
    with pytest.raises(UserError, match="no kernels for a CPU; set attention to auto or sdpa"):
        check_asked("xformers", CPU)
    ops = ops_of(DOCUMENTED)
    ops.memory_efficient_attention = lambda *a, **kw: (_ for _ in ()).throw(NotImplementedError())
    playing((7, 5), ops=ops)
    with pytest.raises(UserError, match="no operator for float32 heads of 8, backward on sm_75; set attention"):
        check("xformers", "training", tiny("Llama").model, CARD)
    assert check("auto", "training", tiny("Llama").model, CARD) is None


def test_layers_that_take_sdpa_all_the_same_are_named(playing):
    ops = ops_of(DOCUMENTED)
    bias = DOCUMENTED.BlockDiagonalCausalFromBottomRightMask

    class NoWindow:
        @staticmethod
        def from_seqlens(*args, **kwargs):
            made = bias.from_seqlens(*args, **kwargs)
            made.make_local_attention_from_bottomright = lambda w: (_ for _ in ()).throw(NotImplementedError())
            return made

    ops.fmha.attn_bias = type("Biases", (), {**vars(DOCUMENTED), "BlockDiagonalCausalFromBottomRightMask": NoWindow})
    playing((7, 5), ops=ops)
    said = check("xformers", "training", tiny("Mistral", sliding_window=4).model, CARD)
    assert "layers with a sliding window take sdpa, because it has no operator" in said
    assert check("xformers", "training", tiny("Llama").model, CARD) is None


def test_doctor_says_what_auto_is(playing):
    playing(reason="it is not installed")
    assert described(CARD, torch.float32) == ("sdpa", "xformers is not used: it is not installed")
    playing((7, 5), ops=ops_of(DOCUMENTED))
    assert described(CARD, torch.float32)[0] == "xformers in training, sdpa in rollouts"
    playing((8, 6), ops=ops_of(DOCUMENTED))
    what, why = described(CARD, torch.float32)
    assert what == "sdpa" and "attention=xformers" in why


def test_a_micro_batch_needs_no_lengths_from_the_device_for_it(ops, monkeypatch):
    """Both copies of a layout's indices, sdpa's and xformers', come in one upload."""
    count = []
    monkeypatch.setattr("lowvram_grpo.policy.shared_prefix.upload", lambda *a: count.append(1) or upload(*a))
    model = tiny("Llama").double()
    assert cannot_share(model) is None
    monkeypatch.setattr(scoring, "kernel_of", lambda *asked: kernel())
    batch = micro_batch()
    count.clear()
    training_pass(model, batch, group_sizes=GROUPS, prompt_lengths=PROMPTS, completion_lengths=COMPLETIONS)
    assert count == [1] and ops.calls == 2
