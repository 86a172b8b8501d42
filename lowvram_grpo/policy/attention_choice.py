"""What attends in the packed layouts: `attention`, a setting, against what this card and this xformers can do.

The question is asked before a pass, once a case and process: whether xformers can be imported, has an operator for the
card, the dtype and the heads (with a backward, where a pass has one), and agrees with plain attention on a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError, is_out_of_memory, one_line
from lowvram_grpo.policy.attend import causal_mask
from lowvram_grpo.policy.attention import attention_dtype, head_sizes
from lowvram_grpo.policy.xformers_attention import Blocks, Case, Kernel, bias_of, library, packed_attention

# Compute capabilities where `auto` takes xformers, for each kind of pass. Modelled, not measured: on 7.5 every training
# pass pads its completions and reads a mask with sdpa. benchmarks/calibrate.py may propose others.
AUTO: dict[str, tuple[tuple[int, int], ...]] = {"training": ((7, 5),), "prefill": ()}
INSTALL = "pip install 'xformers>=0.0.35'"  # its wheels are for torch 2.10 and later

_ANSWERS: dict[Case, str | None] = {}


def why_not(case: Case) -> str | None:
    """Why xformers is not usable, in words that follow "because"; None where it is.

    Asked once a case and process, by a few tokens that are compared with plain attention: not while a graph is being
    captured, nor inside of a checkpointed layer. Memory that runs out is no answer, and raised.
    """
    reason = _absent(case.device)
    if reason:
        return reason
    if case not in _ANSWERS:
        _ANSWERS[case] = _tried(library()[0], case)
    return _ANSWERS[case]


def _absent(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it has no kernels for {'a CPU' if device.type == 'cpu' else device.type}"
    return library()[1]


def _tried(ops: Any, case: Case) -> str | None:
    dtype = str(case.dtype).removeprefix("torch.")
    what = f"{dtype} heads of {case.head}" + (", backward" if case.training else "")
    what += ", with a sliding window" if case.windowed else ""
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode(0)
        with torch.autocast(case.device.type, enabled=False):
            near = _agrees(ops, case)
    except NotImplementedError:  # its dispatcher, with pages of reasons
        return f"it has no operator for {what} on sm_{''.join(map(str, torch.cuda.get_device_capability(case.device)))}"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"its kernel for {what} fails here ({type(error).__name__}: {one_line(error)})"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return None if near else f"its kernel for {what} does not agree with plain attention here"


def _agrees(ops: Any, case: Case) -> bool:
    """Whether it computes what `plain` does, gradients included."""
    keys = (3, 5, 9) if case.training else (3, 2, 4)
    blocks, made = Blocks((3, 2, 4), keys, 2 if case.windowed else None), torch.Generator().manual_seed(0)
    shapes = ((9, 4, case.head), (sum(keys), 4, case.head), (sum(keys), 4, case.value_head))
    drawn = [torch.randn(1, *shape, generator=made, device="cpu").to(case.device, case.dtype) for shape in shapes]
    found = []
    for run in (lambda *x: packed_attention(*x, bias_of(ops, blocks, case.device), 0.3, ops), _plain(blocks, 0.3)):
        with torch.enable_grad():
            given = [x.clone().requires_grad_(case.training) for x in drawn]
            out = run(*given)
            if case.training:
                (out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).sum().backward()
        found.append([out.detach(), *(x.grad for x in given if case.training)])
    near = 0.01 if case.dtype == torch.float32 else 0.05
    return all(torch.allclose(a.float(), b.float(), rtol=near, atol=near) for a, b in zip(*found))


def _plain(blocks: Blocks, scale: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention by its definition, in float32."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        parts = (q.float().split(blocks.queries, 1), k.float().split(blocks.keys, 1), v.float().split(blocks.keys, 1))
        for qs, ks, vs in zip(*parts):
            t, n = qs.shape[1], ks.shape[1]
            scores = torch.einsum("bqhd,bkhd->bhqk", qs, ks) * scale
            scores = scores.masked_fill(~causal_mask(n - t, t, blocks.window, q.device), -torch.inf)
            outs.append(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), vs))
        return torch.cat(outs, 1)

    return run


def wanted(setting: str, kind: str, device: torch.device) -> bool:
    """Whether a setting asks for xformers in passes of a kind (`training`, `prefill`) on a device."""
    if setting == "auto":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) in AUTO[kind]
    return setting == "xformers"


def kernel_of(setting: str, kind: str, decoder: nn.Module, device: torch.device) -> Kernel | None:
    """What attends in a decoder's passes of a kind, under the autocast that is on; None: sdpa alone.

    On meta it is sdpa, for a memory plan that covers both: it holds the same keys and values, and beside them padded
    queries, a mask and what it unpads.
    """
    if not wanted(setting, kind, device) or device.type != "cuda":
        return None
    asked = [case for case in cases_of(decoder, kind, device) if why_not(case) is None]
    return Kernel(frozenset(asked), kind == "training") if asked else None


def cases_of(decoder: nn.Module, kind: str, device: torch.device) -> list[Case]:
    """What a decoder's layers need; its first is that of layers without a window."""
    config = decoder.config.get_text_config()
    dtype = attention_dtype(device, next(p.dtype for p in decoder.parameters() if p.is_floating_point()))
    sizes, kinds = [size for _, size in head_sizes(config)], getattr(config, "layer_types", None)
    if len(set(sizes)) > 1 and kinds:
        found = [(size, kind == "sliding_attention") for size, kind in zip(sizes, kinds)]
    else:
        windows = [False] if getattr(config, "sliding_window", None) is None else [False, True]
        found = [(sizes[0], windowed) for windowed in windows]
    found = sorted(dict.fromkeys(found), key=lambda case: case[1])
    return [Case(device, dtype, size, size, kind == "training", windowed) for size, windowed in found]


def check_asked(setting: str, device: torch.device) -> None:
    """Whether there is an xformers to take, before a model is loaded.

    Raises:
        UserError: `xformers` without it.
    """
    if setting == "xformers" and (reason := _absent(device)):
        mend = f"; run `{INSTALL}`, or" if device.type == "cuda" else ";"
        raise UserError(f"attention is xformers, but {reason}{mend} set attention to auto or sdpa.")


def check(setting: str, kind: str, decoder: nn.Module, device: torch.device) -> str | None:
    """Whether `attention` can be what it is set to in a decoder's passes of a kind, under the autocast that is on.

    Returns:
        a sentence where part of the layers takes sdpa all the same.

    Raises:
        UserError: `xformers` where it cannot run.
    """
    check_asked(setting, device)
    if setting != "xformers":
        return None
    full, *windowed = cases_of(decoder, kind, device)
    if reason := why_not(full):
        raise UserError(f"attention is xformers, but {reason}; set attention to auto or sdpa.")
    reasons = [reason for case in windowed if (reason := why_not(case))]
    return f"attention is xformers; layers with a sliding window take sdpa, because {reasons[0]}." if reasons else None


def described(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """For `doctor`: what `attention: auto` is here, and why; heads of 64 and 128 stand for all."""
    asked = [Case(device, dtype, head, head, True, False) for head in (64, 128)]
    reasons = [reason for case in asked if (reason := why_not(case))]
    if reasons:
        return "sdpa", f"xformers is not used: {reasons[0]}"
    if wanted("auto", "training", device):
        return (
            "xformers in training, sdpa in rollouts",
            "sdpa has no kernel without a mask for this card (modelled, not measured)",
        )
    return (
        "sdpa",
        "xformers runs here, and is taken with attention=xformers; nobody has measured it faster on this card",
    )
