"""Plain LoRA layers in few launches, with a gradient: what training, scoring and evaluation run.

peft takes eight launches beside the base's product of each layer (casts of A, B and x, two products, a scaling, a copy,
a sum), and some twenty back. Here siblings (q, k and v; gate and up) are one autograd function:

    z = s x A^T    all siblings' A stacked, one product
    y = x W^T + z B^T    the second product adds in place
    dz = s dy B,   dA = dz^T x (one product),   dB = dy^T z,   dx = dy W + dz A (added up in place)

The first sibling that is asked computes for all of them, and the others find their answers waiting. 16-bit copies of A
and B are made at once for a pass through the decoder, and of a layer at once where it is computed again; gradients of
float32 factors are accumulated and given back in float32. x and z (tokens, rank) are kept for the backward pass.

A layer goes peft's own way where its adapter is not all that acts: another adapter beside it, a variant such as DoRA,
dropout in force, hooks on a factor or on the base, a base that is trained or of a kind that is not known (LLM.int8).
"""

from __future__ import annotations

import weakref
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowvram_grpo.memory.ledger import counted_as
from lowvram_grpo.policy.frozen_base import add_product, is_touched, knows, product, product_back
from lowvram_grpo.policy.own_forward import give_forward, stands_in
from lowvram_grpo.policy.plain_lora import PlainLora, acting, plain_groups
from lowvram_grpo.policy.wrapper import unwrap

_PLACE = "_fused_lora_place"  # of a layer: its group, and which of the siblings it is


def fuse_lora(model: nn.Module, *, nf4_kernel: bool) -> int:
    """Have the plain LoRA layers of `model` compute in this way from now on; how many they are.

    Which adapter acts, whether it is switched off, and what it weighs is seen at each call: adapters may be trained,
    loaded, mixed, switched and merged as ever.

    Args:
        nf4_kernel: `kernels/layer/nf4_dense.py` runs on the model's device.
    """
    groups = [known for loras in plain_groups(model) if (known := [x for x in loras if knows(x.layer.base_layer)])]
    decoder = _decoder(model)
    shared = _Shared()
    for loras in groups:
        group = _Group([lora.layer for lora in loras], shared, nf4_kernel)
        shared.groups.append(group)
        for i, layer in enumerate(group.layers):
            vars(layer)[_PLACE] = group, i
            give_forward(layer, _forward)
    if groups:
        for key, hook in list(decoder._forward_pre_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _Shared):  # of an earlier call
                del decoder._forward_pre_hooks[key]
        decoder.register_forward_pre_hook(shared.pass_begins)
    return sum(map(len, groups))


def _decoder(model: nn.Module) -> nn.Module:
    inner = unwrap(model)
    return getattr(inner, getattr(inner, "base_model_prefix", ""), inner)


def forget_copies(model: nn.Module) -> None:
    """Let go of the 16-bit copies, for a phase that has no use for them; the next pass makes them again."""
    for hook in _decoder(model)._forward_pre_hooks.values():
        if isinstance(shared := getattr(hook, "__self__", None), _Shared):
            shared.forget()


@stands_in
def _forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    group, i = vars(self)[_PLACE]
    answer = None if args or kwargs else group.answer(i, x)
    return type(self).forward(self, x, *args, **kwargs) if answer is None else answer


class _Block(NamedTuple):
    """A factor of one layer, or of siblings one below the other: a (r, I); which columns of z are its own; and s."""

    a: Tensor
    columns: slice
    scaling: float


class _Factors(NamedTuple):
    """One adapter of a group, in the dtype that it is computed in.

    Attributes:
        blocks: from x to z.
        b: of each layer (O, r).
        columns: of z, of each layer.
    """

    blocks: list[_Block]
    b: list[Tensor]
    columns: list[slice]


class _Job(NamedTuple):
    """Layers of a group that are computed together, by their places in it, and the adapter that acts in them."""

    group: _Group
    members: list[int]
    loras: list[PlainLora]
    dtype: torch.dtype

    @property
    def bases(self) -> list[nn.Module]:
        return [self.group.layers[m].base_layer for m in self.members]

    def factors(self) -> _Factors:
        """Of these layers alone."""
        found = self.group.shared.factors(self.group, self.loras, self.dtype)
        if len(self.members) == len(self.group.layers):
            return found
        (m,) = self.members
        own, width = found.columns[m], found.b[m].shape[1]
        block = next(x for x in found.blocks if x.columns.start <= own.start < x.columns.stop)
        first = own.start - block.columns.start
        block = _Block(block.a[first : first + width], slice(0, width), block.scaling)
        return _Factors([block], [found.b[m]], [slice(0, width)])


class _Shared:
    """What the layers of one model have in common: the copies of the adapter that acts, and the answers that siblings
    wait for, of one group at a time."""

    def __init__(self):
        self.groups: list[_Group] = []
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: no copies, no answers."""
        return {"groups": self.groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.groups = state["groups"]
        self.forget()

    def forget(self) -> None:
        self._made: dict[_Group, tuple[_Factors, int]] = {}
        self._rooms: dict[tuple[_Group, int], Tensor] = {}
        self._key, self._stale, self._backward = None, True, False
        self.drop_answers()

    def pass_begins(self, *_: Any) -> None:
        """A hook of the decoder. Weights may have changed, and an optimizer's kernel leaves no version behind."""
        self._stale, self._backward = True, False
        self.drop_answers()

    # Answers

    def drop_answers(self, gone: weakref.ref | None = None) -> None:
        if gone is None or gone is self._x:  # the end of an older x is not that of a newer one's answers
            self._group = self._x = None
            self._answers: dict[int, Tensor] = {}

    def keep_answers(self, group: _Group, x: Tensor, answers: dict[int, Tensor]) -> None:
        self._group, self._x, self._answers = group, weakref.ref(x, self.drop_answers), answers

    def take(self, group: _Group, i: int, x: Tensor) -> Tensor | None:
        if self._group is not group or i not in self._answers or self._x() is not x:
            return None
        answer = self._answers.pop(i)
        if not self._answers:
            self.drop_answers()
        return answer

    def waits(self, group: _Group, i: int) -> bool:
        """Whether an answer of `i` waits, to another input than it has come with."""
        return self._group is group and i in self._answers

    # Copies

    def factors(self, group: _Group, loras: list[PlainLora], dtype: torch.dtype) -> _Factors:
        """In a forward pass all groups' copies are made at once, which is what autocast's cache would hold; in a
        backward pass a group's are made when its layer is computed again, and held until its gradients are there."""
        key, backward = (loras[0].name, dtype), torch._C._current_graph_task_id() != -1
        if key != self._key or (backward and not self._backward):
            self.forget()
            self._key, self._backward = key, backward
        if self._stale and not backward:
            self._refresh()
        made, version = self._made.get(group, (None, 0))
        if made is None or version != _version(loras):
            made, _ = self._made[group] = self._copy([(group, loras)])[0]
        return made

    def spend(self, group: _Group) -> None:
        """The group's gradients are there."""
        if self._backward and self._made.pop(group, None):
            self._rooms = {key: room for key, room in self._rooms.items() if key[0] is not group}

    def _refresh(self) -> None:
        """All groups' in a few launches."""
        every = [(group, loras) for group in self.groups if (loras := group.acting()) and loras[0].name == self._key[0]]
        self._made = dict(zip((group for group, _ in every), self._copy(every)))
        self._stale = False

    def _copy(self, every: list[tuple[_Group, list[PlainLora]]]) -> list[tuple[_Factors, int]]:
        dtype, made, to, source = self._key[1], [], [], []
        # A pass in inference mode would leave rooms that no other pass may write to.
        with torch.inference_mode(False), torch.no_grad(), counted_as("adapter"):
            for group, loras in every:
                ends = list(accumulate((len(lora.a) for lora in loras), initial=0))
                columns = [slice(*pair) for pair in pairwise(ends)]
                if all(lora.a.dtype == dtype for lora in loras):
                    blocks = [_Block(x.a.detach(), part, x.scaling) for x, part in zip(loras, columns)]
                else:
                    a = self._room(group, -1, (ends[-1], loras[0].a.shape[1]), loras[0].a.device)
                    to += [a[part] for part in columns]
                    source += [lora.a.detach() for lora in loras]
                    alike = len({lora.scaling for lora in loras}) == 1
                    parts = [slice(0, ends[-1])] if alike else columns
                    blocks = [_Block(a[part], part, lora.scaling) for part, lora in zip(parts, loras)]
                b = []
                for i, lora in enumerate(loras):
                    if lora.b.dtype == dtype:
                        b.append(lora.b.detach())
                    else:
                        b.append(self._room(group, i, lora.b.shape, lora.b.device))
                        to.append(b[-1])
                        source.append(lora.b.detach())
                made.append((_Factors(blocks, b, columns), _version(loras)))
            if to:
                torch._foreach_copy_(to, source)
        return made

    def _room(self, group: _Group, i: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The same memory as the last time."""
        old = self._rooms.get((group, i))
        if old is None or old.shape != shape or old.device != device:
            self._rooms[group, i] = old = torch.empty(shape, dtype=self._key[1], device=device)
        return old


def _version(loras: list[PlainLora]) -> int:
    """Grows whenever one of the factors is changed by an operator."""
    return sum(lora.a._version + lora.b._version for lora in loras)


class _Group:
    """LoRA layers that are likely to be given the same tensor."""

    def __init__(self, layers: list[nn.Module], shared: _Shared, kernel: bool):
        self.layers, self.shared, self.kernel = layers, shared, kernel
        self._together = len(layers) > 1

    def acting(self) -> list[PlainLora] | None:
        """The adapter that acts in all of these layers; None where it is not one and the same, and plain."""
        loras = [acting(layer) for layer in self.layers]
        if None in loras or len({lora.name for lora in loras}) > 1:
            return None
        return None if any(is_touched(layer.base_layer) for layer in self.layers) else loras

    def answer(self, i: int, x: Tensor) -> Tensor | None:
        """The i-th layer's output; None where peft must give it."""
        layer, shared = self.layers[i], self.shared
        if (answer := shared.take(self, i, x)) is not None:
            return answer
        graph = torch.is_grad_enabled()
        if layer.disable_adapters:
            if layer.merged or (graph and x.requires_grad) or is_touched(layer.base_layer):
                return None
            return product(layer.base_layer, x, self.kernel)
        if shared.waits(self, i) and not graph:
            # These siblings read different tensors. While a graph is made it stays undecided: what a checkpointed
            # layer saves must be the same the second time.
            self._together = False
        loras = self.acting()
        if loras is None or not x.numel():
            return None
        alone = not self._together or shared.waits(self, i)
        members = [i] if alone else list(range(len(self.layers)))
        job = _Job(self, members, loras, _dtype(x, loras[0]))
        weights = [weight for m in members for weight in (loras[m].a, loras[m].b)]
        if graph and (x.requires_grad or any(weight.requires_grad for weight in weights)):
            answers = dict(zip(members, _Products.apply(job, x, *weights)))
        else:
            answers = dict(zip(members, _products(job, x)[0]))
        answer = answers.pop(i)
        if answers:
            shared.keep_answers(self, x, answers)
        return answer


def _dtype(x: Tensor, lora: PlainLora) -> torch.dtype:
    """What peft computes the adapter in."""
    kind = x.device.type
    if kind == "meta":  # where autocast does not count, and weights are in its dtype
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lora.a.dtype


def _products(job: _Job, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of each layer y (..., O), and z (N, R), scaled."""
    blocks, bs, columns = job.factors()
    low = x.reshape(-1, x.shape[-1]).to(job.dtype)
    z = low.new_empty(len(low), columns[-1].stop)
    for a, part, s in blocks:
        z[:, part].addmm_(low, a.T, beta=0, alpha=s)
    answers = []
    for base, b, part in zip(job.bases, bs, columns):
        y = product(base, x, job.group.kernel).contiguous()
        add_product(y.view(-1, len(b)), z[:, part], b.T)
        answers.append(y)
    return answers, z


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        answers, z = _products(job, x)
        ctx.save_for_backward(x, z)
        ctx.job, ctx.dtypes = job, [weight.dtype for weight in weights]
        ctx.autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        ctx.set_materialize_grads(False)
        return tuple(answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple:
        x, z = ctx.saved_tensors  # which computes a checkpointed layer again
        job, dtype = ctx.job, ctx.job.dtype
        (blocks, bs, columns), dx, dz = job.factors(), None, torch.empty_like(z)
        want_x, wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        das, dbs = [None] * len(bs), [None] * len(bs)
        scaling = {column: s for _, part, s in blocks for column in range(part.start, part.stop)}
        for i, (base, b, part, dy) in enumerate(zip(job.bases, bs, columns, dys)):
            if dy is None:
                dz[:, part].zero_()
                continue
            dy = dy.reshape(-1, len(b))
            if want_x:
                at = dtype if ctx.autocast else base.weight.dtype
                at = (base.compute_dtype or x.dtype) if hasattr(base, "compute_dtype") else at
                dx = product_back(base, dy.to(at), job.group.kernel, dx)
            dy = dy.to(dtype)
            dz[:, part].addmm_(dy, b, beta=0, alpha=scaling[part.start])
            if wanted[2 * i + 1]:
                dbs[i] = _product_in(dy.T, z[:, part], ctx.dtypes[2 * i + 1])
        low = x.reshape(-1, x.shape[-1]).to(dtype)
        for a, part, _ in blocks:
            if dx is not None:
                add_product(dx, dz[:, part], a)
            inside = [i for i, own in enumerate(columns) if part.start <= own.start < part.stop and wanted[2 * i]]
            if inside:
                da = _product_in(dz[:, part].T, low, ctx.dtypes[0])
                for i in inside:
                    das[i] = da[columns[i].start - part.start : columns[i].stop - part.start]
        dx = None if dx is None else dx.to(x.dtype).view(x.shape)
        job.group.shared.spend(job.group)
        return None, dx, *(grad for pair in zip(das, dbs) for grad in pair)


def _product_in(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, accumulated in float32 and, on CUDA, never rounded to fewer bits on the way."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and dtype == torch.float32:
        return torch.ops.aten.mm.dtype(a, b, dtype)
    return torch.mm(a, b).to(dtype)
