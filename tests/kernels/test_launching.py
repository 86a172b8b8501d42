"""Launches go to the card of their tensors, and whether kernels work is asked where nobody is disturbed."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from decode_problems import RAGGED, Problem
from lowvram_grpo.kernels import products, runtime
from lowvram_grpo.kernels.decode import attention as decode_attention
from lowvram_grpo.kernels.decode import attention_triton as decode_attention_triton
from lowvram_grpo.kernels.decode import int8_logits, sample, small_product
from lowvram_grpo.kernels.layer import ops as layer_ops
from lowvram_grpo.kernels.layer import rope_kernel
from lowvram_grpo.kernels.quantized import Int8Weight
from lowvram_grpo.kernels.runtime import HAS_TRITON, device_guard, interpreted, sync_debug, trial

FOLDER = Path(runtime.__file__).parent
# Launched inside of linear_logps' own guard, or of a segment's.
GUARDED_BY_THE_CALLER = {"direction.py", "fold_triton.py", "fused_fold.py", "lists_triton.py", "delta_triton.py"}
in_triton = pytest.mark.skipif(not (HAS_TRITON and interpreted()), reason="needs Triton's interpreter")


def launches(tree, guarded=False):
    """(line, whether in a guard) of each `kernel[grid](...)`."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded
        if isinstance(node, ast.With):
            inside |= any("device_guard(" in (said := ast.unparse(x)) or "device_of(" in said for x in node.items)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and "kernel" in ast.unparse(node.func):
            yield node.lineno, guarded
        yield from launches(node, inside)


def test_every_launch_is_in_a_guard():
    found = {path.name: list(launches(ast.parse(path.read_text("utf-8")))) for path in FOLDER.rglob("*.py")}
    assert len([line for lines in found.values() for line in lines]) >= 12
    bare = {name for name, lines in found.items() if not all(guarded for _, guarded in lines)}
    assert bare == GUARDED_BY_THE_CALLER


def test_the_guard_changes_the_card_only_where_it_is_another(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or runtime._HERE)
    for tensor, expected in (
        (torch.zeros(1), []),
        (SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)), []),
        (SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1)), [torch.device("cuda", 1)]),
    ):
        entered.clear()
        with device_guard(tensor):
            assert entered == expected


def half(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


CALLS = {
    "rms_norm": (layer_ops, "_rms_norm_kernel", lambda: layer_ops.rms_norm_triton(half(2, 8), half(8), 1e-6)),
    "swiglu": (layer_ops, "_swiglu_kernel", lambda: layer_ops.swiglu_triton(half(2, 8), half(2, 8))),
    "rope": (rope_kernel, "_rope_kernel", lambda: layer_ops.rope_triton(*[half(1, 2, 1, 4)] * 2, *[half(1, 1, 4)] * 2)),
    "sample": (sample, "_block_masses_kernel", lambda: sample.block_masses_triton(half(2, 9).float())),
    "int8_head": (
        int8_logits, "_int8_logits_kernel",
        lambda: int8_logits.int8_logits(half(2, 64), Int8Weight.quantize(half(5, 64).float())),
    ),
    "small_product": (
        small_product, "small_product_kernel",
        lambda: small_product.small_product(half(2, 64), [small_product.Sibling(half(5, 64))]),
    ),
    "attention": (
        decode_attention_triton, "own_kernel", lambda: Problem(**RAGGED, dtype=torch.float16).errors(),
    ),
}  # fmt: skip


@in_triton
@pytest.mark.parametrize("name", CALLS)
def test_launches_are_made_beside_their_tensors(name, monkeypatch):
    module, kernel, call = CALLS[name]
    within, launched = [], []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            within.append(self.tensor)

        def __exit__(self, *_):
            within.pop()

    class Launches:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(within[-1].device) or original[grid](*args, **kwargs)

    original = getattr(module, kernel)
    monkeypatch.setattr(module, "device_guard", Guard)
    monkeypatch.setattr(module, kernel, Launches())
    call()
    assert set(launched) == {torch.device("cpu")} and not within


# Whether kernels work


@pytest.fixture
def modes(monkeypatch):
    """PyTorch's sync debug mode, as it would be on a card."""
    kept = ["default"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: kept[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", kept.append)
    return kept


@in_triton
def test_whether_attention_works_may_be_asked_while_a_step_is_watched(modes, monkeypatch):
    seen, attend = [], decode_attention.decode_attention
    monkeypatch.setattr(decode_attention, "decode_attention", lambda *a, **k: seen.append(modes[-1]) or attend(*a, **k))
    monkeypatch.setattr(torch, "tensor", None)  # copies a number of the host's, and on a card waits
    decode_attention._works.cache_clear()
    with sync_debug("error"):
        assert decode_attention._works(torch.device("cpu"), torch.float32) and modes[-1] == "error"
        decode_attention.settle(torch.device("cpu"), [torch.float16])  # of a GPU alone
    assert seen == ["default"] and modes[-1] == "default"
    decode_attention._works.cache_clear()


@in_triton
def test_memory_that_runs_out_does_not_mean_that_triton_does_not_work(monkeypatch):
    answers = [torch.OutOfMemoryError("no room"), RuntimeError("Triton Error [CUDA]: out of memory"), None]

    def attend(*_, **__):
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr(decode_attention, "decode_attention", attend)
    decode_attention._works.cache_clear()
    for kind in (torch.OutOfMemoryError, RuntimeError):
        with pytest.raises(kind):
            decode_attention._works(torch.device("cpu"), torch.float32)
    assert decode_attention._works(torch.device("cpu"), torch.float32) and not answers
    answers.append(ValueError("ptxas is too old"))
    with pytest.warns(UserWarning, match="ptxas is too old"):
        assert not decode_attention._works(torch.device("cpu"), torch.float16)
    assert not decode_attention._works(torch.device("cpu"), torch.float16)
    decode_attention._works.cache_clear()


def test_memory_that_runs_out_does_not_mean_that_products_cannot_be_added(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(torch.ops.aten.addmm, "dtype_out", full)
    products._accumulates.cache_clear()
    with pytest.raises(RuntimeError, match="CUBLAS"):
        products._accumulates(torch.device("cpu"))
    monkeypatch.undo()
    products._accumulates.cache_clear()


def test_a_question_is_asked_once_and_only_an_answer_is_kept():
    asked = []

    @trial
    def question(device, dtype):
        asked.append(dtype)
        if len(asked) == 1:
            raise torch.OutOfMemoryError
        return True

    with pytest.raises(torch.OutOfMemoryError):
        question("cpu", 1)
    assert question("cpu", 1) and question("cpu", 1) and question("cpu", 2) and asked == [1, 1, 2]


def test_an_answer_does_not_depend_on_who_asks_first(modes):
    """Rotary positions in float16 are refused by an autocast to bfloat16, gradients by inference mode."""
    kept = []

    @trial
    @torch.enable_grad()
    def question(name):
        x = torch.ones(2, 2, dtype=torch.float16, requires_grad=True)
        kept.append((x @ torch.cat((x, x), 1)).sum())
        (dx,) = torch.autograd.grad(kept[-1], x)
        return dx.dtype == torch.float16 and kept[-1].dtype == torch.float16

    with torch.autocast("cpu", torch.bfloat16):
        assert question("autocast") and torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert question("inference") and torch.is_inference_mode_enabled()
    with torch.no_grad():
        assert question("no_grad")


def test_a_question_about_a_cpu_leaves_the_card_alone(modes, monkeypatch):
    """Beginning with CUDA takes memory of a card that may have none left."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", None)
    assert trial(lambda device: True)(torch.device("cpu"))
    assert modes == ["default"]


def test_rounding_is_asked_for_and_not_left_to_tritons_default(monkeypatch):
    class Kernel:
        def run(self, *args, **options):
            return args, options

    monkeypatch.setattr(runtime, "triton", SimpleNamespace(jit=lambda function: Kernel()))
    monkeypatch.setattr(runtime, "HAS_TRITON", True)
    monkeypatch.setattr(runtime, "_INTERPRETED", False)
    launch = runtime.jit(lambda: None).run
    assert launch(1, grid=2) == ((1,), {"grid": 2, "enable_fp_fusion": True})
    assert launch(enable_fp_fusion=False) == ((), {"enable_fp_fusion": False})


def test_pytorchs_word_on_a_prototype_is_not_passed_on(modes, monkeypatch):
    said = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: warnings.warn(said, stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sync_debug("error"):
            pass
        with pytest.raises(UserWarning, match="something else"), sync_debug("error"):
            warnings.warn("something else", stacklevel=1)
