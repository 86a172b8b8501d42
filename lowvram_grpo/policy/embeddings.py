"""The two tables of a language model, lm_head and the input embedding, made small.

In a 4-bit model of 0.5B parameters with 151,936 tokens they are more than half of the weights. While their adapter
trains, both are frozen, so

* a `QuantizedTable` in int8 or NF4 serves lm_head (`QuantizedHead`) and, where the two are tied, the input embedding
  (`QuantizedEmbedding`) too: one table in memory, read a tile or some rows at a time, by rollouts and training alike;
* an untied input embedding can stay in host memory (`HostEmbedding`): a step needs the rows of its tokens only. So can,
  tied or not, a table of what each layer is given of a token (Gemma 3n and 4): in Gemma 4 E2B it is 4.7 GB of 16-bit
  weights, most of the model.

A model with a quantized table computes what the plain model would compute with that table's dequantized weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram_grpo.errors import UserError
from lowvram_grpo.kernels.decode.logits import linear_logits
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.quantized import Int8Weight, NF4Weight
from lowvram_grpo.memory.host import host_buffer
from lowvram_grpo.memory.ledger import held_on_host

KINDS = {"int8": Int8Weight, "nf4": NF4Weight}


class QuantizedTable(nn.Module):
    """An `Int8Weight` or `NF4Weight` as buffers that move with the module and stay out of its state_dict.

    A module of its own, not buffers of each user: `.to` replaces the buffers of a module, and two users would end up
    with a copy each.
    """

    def __init__(self, weight: Int8Weight | NF4Weight):
        super().__init__()
        tensors, self._numbers = weight.flatten()
        self._kind = type(weight)
        self._names = [f"part{i}" for i in range(len(tensors))]
        for name, tensor in zip(self._names, tensors):
            self.register_buffer(name, tensor, persistent=False)
        self._made: Int8Weight | NF4Weight | None = None

    @property
    def weight(self) -> Int8Weight | NF4Weight:
        """The same object for as long as the buffers are, so that what is known of it is kept too."""
        tensors = [getattr(self, name) for name in self._names]
        if self._made is None or any(a is not b for a, b in zip(self._made.flatten()[0], tensors)):
            if self._kind is Int8Weight:
                self._made = Int8Weight(*tensors)
            else:
                offset, block = self._numbers
                self._made = NF4Weight(*tensors[:3], tuple(tensors[3:]) or None, offset, int(block))
        return self._made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves, never casts: `model.bfloat16()` would round the scales."""

        def moved(tensor: Tensor) -> Tensor:
            bits = tensor.view(torch.uint8)
            out = fn(bits)
            return tensor if out is bits else out.view(tensor.dtype)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{self._kind.__name__}, shape={tuple(self.weight.shape)}"


class QuantizedHead(nn.Module):
    """lm_head with a quantized weight (V, H) and an optional bias (V,), both frozen.

    Rollouts and scoring read `quantized_weight` through `head_of`; `forward` is for code that calls the layer itself.
    """

    def __init__(self, table: QuantizedTable, bias: Tensor | None = None, workspace_mib: int = 64):
        super().__init__()
        self.table, self.workspace_mib = table, workspace_mib
        self.out_features, self.in_features = table.weight.shape
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @property
    def quantized_weight(self) -> Int8Weight | NF4Weight:
        return self.table.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> float32 logits (..., V), a tile of `workspace_mib` at a time; without gradient.

        Raises:
            RuntimeError: a gradient was wanted; it would be silently missing.
        """
        if hidden.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a quantized lm_head has no backward of its own; score through linear_logps")
        head = Head(self.table.weight, self.bias)
        logits = linear_logits(hidden.reshape(-1, self.in_features), head, workspace_mib=self.workspace_mib)
        return logits.unflatten(0, hidden.shape[:-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Scaled(nn.Module):
    """An embedding whose rows may be multiplied by a constant, as Gemma 3's are.

    Attributes:
        scale: 0-d tensor (rounded to the output's dtype before the product, as transformers does), number or None.
    """

    def __init__(self, scale: Tensor | float | None):
        super().__init__()
        if isinstance(scale, Tensor):
            self.register_buffer("scale", scale, persistent=False)
        else:
            self.scale = scale

    def scaled(self, rows: Tensor) -> Tensor:
        if self.scale is None:
            return rows
        return rows * (self.scale.to(rows.dtype) if isinstance(self.scale, Tensor) else self.scale)


class QuantizedEmbedding(_Scaled):
    """Input embedding that gathers rows of a quantized table (V, H), in `dtype`."""

    def __init__(self, table: QuantizedTable, dtype: torch.dtype, scale: Tensor | float | None = None):
        super().__init__(scale)
        self.table, self.dtype = table, dtype
        self.num_embeddings, self.embedding_dim = table.weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        """int (...) -> (..., H)."""
        out = torch.empty(ids.numel(), self.embedding_dim, dtype=self.dtype, device=ids.device)
        return self.scaled(self.table.weight.rows(ids.reshape(-1), out).view(*ids.shape, self.embedding_dim))


class HostEmbedding(_Scaled):
    """Input embedding (V, H) in host memory; only the rows of the batch are copied.

    The host must see the ids for that, so every forward pass waits for the device, once. It gathers the rows into
    page-locked memory, so the table itself needs none. The table is neither parameter nor buffer: nothing moves it, and
    nothing takes its device for the model's. On meta there is no table at all.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, scale: Tensor | float | None = None):
        super().__init__(scale)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        held_on_host("embedding", weight.numel() * dtype.itemsize, locked=False)
        self.table: Tensor | None = None if weight.is_meta else weight.detach().to("cpu", dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """int (...) -> (..., H) on the device of `ids`."""
        if ids.is_meta:
            rows = torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device=ids.device)
        elif ids.device.type == "cpu":
            rows = F.embedding(ids, self.table)
        else:
            # A fresh piece of pinned memory each time: the caching allocator gives it out again only once the copy out
            # of it is done, so the host may run ahead.
            shape = *ids.shape, self.embedding_dim
            staging = host_buffer(math.prod(shape) * self.dtype.itemsize, pinned=ids.is_cuda).view(self.dtype)
            torch.index_select(self.table, 0, ids.reshape(-1).cpu(), out=staging.view(-1, self.embedding_dim))
            rows = staging.view(shape).to(ids.device, non_blocking=True)
        return self.scaled(rows)


PER_LAYER = "embed_tokens_per_layer"


def per_layer_owner(causal_lm: nn.Module) -> nn.Module | None:
    """The module that has a table of per-layer inputs, under the name PER_LAYER; None of most models."""
    return next((m for m in causal_lm.modules() if PER_LAYER in m._modules), None)


def host_inputs(causal_lm: nn.Module) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """Where a table is in host memory: from ids (B, L), what a decoder takes in their place, so that its pass does not
    wait for the host. None where ids will do."""
    embedding, owner = causal_lm.get_input_embeddings(), per_layer_owner(causal_lm)
    tables = (embedding, None if owner is None else getattr(owner, PER_LAYER))
    if not any(isinstance(table, HostEmbedding) for table in tables):
        return None

    def look_up(ids: Tensor) -> dict[str, Tensor]:
        found = {"inputs_embeds": embedding(ids)}
        if owner is not None:
            # Gemma 4 could make up for ids that it is not given.
            given = inspect.signature(owner.get_per_layer_inputs).parameters
            found["per_layer_inputs"] = owner.get_per_layer_inputs(ids, *[None] * (len(given) - 1))
        return found

    return look_up


def stays_on_host(causal_lm: nn.Module, head_dtype: str, embedding_offload: bool) -> tuple[str, ...]:
    """Names of the modules whose weights `place_embeddings` wants to find in host memory: those that it quantizes from
    there, and the one that stays."""
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    tied = getattr(causal_lm.config.get_text_config(), "tie_word_embeddings", False)
    wanted = [head] if head_dtype != "dense" else []
    if (embedding_offload and not tied) or (head_dtype != "dense" and tied):
        wanted.append(embedding)
    if embedding_offload and (owner := per_layer_owner(causal_lm)) is not None:
        wanted.append(getattr(owner, PER_LAYER))
    return tuple(name for name, module in causal_lm.named_modules() if any(module is table for table in wanted))


def place_embeddings(
    causal_lm: nn.Module,
    *,
    head_dtype: str,
    embedding_offload: bool,
    device: torch.device,
    dtype: torch.dtype | None = None,
    workspace_mib: int = 64,
) -> list[str]:
    """Put lm_head and the input embedding of a Hugging Face model (unwrapped from peft) where they shall be. What is
    there already is left as it is.

    Args:
        head_dtype: `dense`, `int8` or `nf4`; an input embedding that is tied to lm_head is quantized with it.
        embedding_offload: keep an untied input embedding, and a table of per-layer inputs, in host memory.
        device: of the computation. Dense tables that lie on the CPU are moved there; quantized ones are made there
            block by block, and so the dense table never is. meta: nothing but shapes.
        dtype: of the embedding's output; that of its weight if left out.
        workspace_mib: memory for tiles where the layer itself is called.

    Returns:
        one sentence for people for each thing done.

    Raises:
        UserError: a table that is trained, adapted, quantized already or of an unknown kind.
    """
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    tied = getattr(head, "weight", None) is not None and head.weight is getattr(embedding, "weight", None)
    quantize = head_dtype != "dense" and not isinstance(head, QuantizedHead)
    offload = embedding_offload and not tied and not isinstance(embedding, (HostEmbedding, QuantizedEmbedding))
    said = []
    if embedding_offload:
        said += _offload_per_layer_inputs(causal_lm, device)
    if embedding_offload and tied and per_layer_owner(causal_lm) is None:
        said.append("embedding_offload has no effect: the input embedding is lm_head, which every token needs.")
    if quantize:
        _check(head, "lm_head", nn.Linear, f"set head_dtype to dense, not {head_dtype}")
    scale = None
    if offload or (quantize and tied):
        remedy = "set embedding_offload to false" if offload else "set head_dtype to dense"
        _check(embedding, "the input embedding", nn.Embedding, remedy)
        scale = _scale_of(embedding, remedy, device)
        dtype = dtype or embedding.weight.dtype
    if quantize:
        said.append(_quantize_head(causal_lm, head_dtype, tied, scale, device, dtype, workspace_mib))
    if offload:
        weight = embedding.weight
        causal_lm.set_input_embeddings(HostEmbedding(weight, dtype, scale))
        said.append(f"the input embedding ({_mib(weight.numel() * dtype.itemsize)} MiB) stays in host memory.")
    owner = per_layer_owner(causal_lm)
    per_layer = None if owner is None else getattr(owner, PER_LAYER)
    for layer in (causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings(), per_layer):
        if layer is not None and any(p.device.type == "cpu" for p in layer.parameters()):
            layer.to(device)
    return said


def _offload_per_layer_inputs(causal_lm: nn.Module, device: torch.device) -> list[str]:
    owner = per_layer_owner(causal_lm)
    if owner is None or isinstance(table := getattr(owner, PER_LAYER), HostEmbedding):
        return []
    remedy = "set embedding_offload to false"
    _check(table, "the table of per-layer inputs", nn.Embedding, remedy)
    weight, scale = table.weight, _scale_of(table, remedy, device)
    setattr(owner, PER_LAYER, HostEmbedding(weight, weight.dtype, scale))
    size = _mib(weight.numel() * weight.element_size())
    return [f"the table of per-layer inputs ({size} MiB) stays in host memory."]


def _quantize_head(
    causal_lm: nn.Module,
    kind: str,
    tied: bool,
    scale: Tensor | float | None,
    device: torch.device,
    dtype: torch.dtype | None,
    workspace_mib: int,
) -> str:
    """Replace lm_head, and the input embedding where it is tied to it."""
    head = causal_lm.get_output_embeddings()
    dense = head.weight.numel() * head.weight.element_size()
    try:
        table = QuantizedTable(KINDS[kind].quantize(head.weight, device=device))
    except ValueError as error:
        raise UserError(f"head_dtype {kind} does not fit this model: {error}; take int8 or dense.") from error
    bias = None if head.bias is None else head.bias.detach().to(device)
    causal_lm.set_output_embeddings(QuantizedHead(table, bias, workspace_mib))
    if tied:
        causal_lm.set_input_embeddings(QuantizedEmbedding(table, dtype, scale))
        # There is no parameter left to tie, and transformers would look for it by name.
        causal_lm._tied_weights_keys, causal_lm.all_tied_weights_keys = {}, {}
    small = sum(t.numel() * t.element_size() for t in table.buffers())
    what = f"lm_head and the input embedding share one {kind} table" if tied else f"lm_head is kept in {kind}"
    return f"{what} ({_mib(small)} MiB instead of {_mib(dense)})."


def _check(layer: nn.Module | None, name: str, kind: type, remedy: str) -> None:
    """A plain, frozen layer of that kind, or a UserError."""
    if not isinstance(layer, kind) or type(layer).__module__.startswith("bitsandbytes"):
        raise UserError(f"{name} of this model is a {type(layer).__name__}, which cannot be made smaller; {remedy}.")
    if any(p.requires_grad for p in layer.parameters()):
        raise UserError(f"{name} is being trained, so it must stay dense on the device; {remedy}, or train an adapter.")


def _scale_of(embedding: nn.Embedding, remedy: str, device: torch.device) -> Tensor | float | None:
    """The factor on the embedding's rows: None for torch's own class, `embed_scale` for those of transformers."""
    name = type(embedding).__name__
    if embedding.max_norm is not None:
        raise UserError(f"the input embedding ({name}) renormalizes its rows, which is not supported; {remedy}.")
    if type(embedding).forward is nn.Embedding.forward:
        return None
    scale = getattr(embedding, "embed_scale", None)
    if not name.endswith("ScaledWordEmbedding") or scale is None:
        raise UserError(f"the input embedding is a {name}, whose rows are more than a table's; {remedy}.")
    return scale.detach().to(device) if isinstance(scale, Tensor) else float(scale)


def _mib(size: int) -> int:
    return round(size / 2**20)
