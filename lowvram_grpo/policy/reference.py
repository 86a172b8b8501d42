"""The reference policy of the KL term, sharing the policy's weights wherever it can.

| policy                                 | reference                                                               |
|----------------------------------------|-------------------------------------------------------------------------|
| fresh LoRA adapter                     | the same weights with the adapter switched off                          |
| an adapter that already says something | a frozen second copy of that adapter                                    |
| all weights trained                    | a frozen copy of the model, on the device or streamed from host memory  |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError, is_out_of_memory
from lowvram_grpo.memory.guard import release
from lowvram_grpo.policy.streamed import Streamed, copy_on_host
from lowvram_grpo.policy.wrapper import is_peft

REFERENCE = "reference"
ADAPTER_SHARES = "reference_offload has no effect: the reference shares the policy's weights, but for an adapter."
_WEIGHTS = "reference.safetensors"
# Numbers that are mixed at a time: a reference in host memory needs so much of the device for it.
_MIXED = 2**22


def adapter_is_blank(model: nn.Module, adapter: str) -> bool:
    """True if the adapter leaves the base model's outputs unchanged: every LoRA B is zero, as after initialization.

    An adapter of another kind than LoRA counts as not blank.
    """
    blank, found = True, False
    for name, parameter in model.named_parameters():
        if f".{adapter}." not in f"{name}.":
            continue
        if ".lora_B." in name or ".lora_embedding_B." in name:
            found = True
            # On meta, where memory is planned, an adapter is always a fresh one.
            blank &= parameter.is_meta or not bool(parameter.detach().any())
        elif ".lora_A." not in name and ".lora_embedding_A." not in name:
            return False
    return found and blank


class Reference:
    """Gives back the model as it was when it was made, or last frozen, or as `sync` has moved it.

    Args:
        model: the policy.
        follows: keep separate weights even for a blank adapter, so that `sync` has something to mix into.
        offload: a frozen copy lives in host memory (`streamed`).
        resort: a frozen copy that the device has no room for goes to host memory too, instead of raising.
        tell: hears in a sentence what is not as it was asked for.

    Attributes:
        kind: `adapter off`, `frozen adapter` or `frozen copy`.
        moved: it has weights that do not follow from how the model was loaded: a checkpoint needs them.

    Raises:
        UserError: the policy's adapter has the reference's name, or the copy can't be streamed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        follows: bool = False,
        offload: bool = False,
        resort: bool = False,
        tell: Callable[[str], None] = lambda sentence: None,
    ):
        self._model, self._offload, self._resort, self._tell = model, offload, resort, tell
        self._copy: nn.Module | None = None
        self._streamed: Streamed | None = None
        # Where weights are stored in 16 bits, the mean that `sync` keeps, in float32 and in host memory, by place.
        self._means: dict[int, Tensor] = {}
        self._adapter = model.active_adapters[0] if is_peft(model) else None
        if self._adapter is None:
            self.kind = "frozen copy"
        elif REFERENCE in model.peft_config:
            raise UserError(
                f"The model has an adapter named {REFERENCE!r}, which is the name of the frozen one that the KL term "
                "needs; load it under another name, as in PeftModel.from_pretrained(..., adapter_name='policy')."
            )
        elif adapter_is_blank(model, self._adapter) and not follows:
            self.kind = "adapter off"
        else:
            self.kind = "frozen adapter"
        if offload and self._adapter is not None:
            tell(ADAPTER_SHARES)
        self._take()
        self.moved = self.kind == "frozen adapter"

    @property
    def model(self) -> nn.Module | None:
        """The frozen copy, as TRL's `ref_model`; None where the reference shares the policy's weights. A streamed one's
        parameters are tensors in host memory; it may be called with ids of the policy's device all the same."""
        return self._copy

    @property
    def offloaded(self) -> bool:
        """Whether the frozen copy is streamed from host memory."""
        return self._streamed is not None

    def freeze(self) -> None:
        """Make the policy as it is now the reference."""
        self.kind, self.moved = "frozen copy" if self._adapter is None else "frozen adapter", True
        self._take()

    def _take(self) -> None:
        self._means.clear()
        if self.kind == "frozen copy":
            self._copy = self._streamed = None  # before the new copy is made: there is no room for three
            if not self._offload and not self._copied():
                self._offload = True
            if self._offload:
                self._stream(copy_on_host(self._model).eval())
        elif self.kind == "frozen adapter":
            self._ensure_adapter()
            with torch.no_grad():
                for reference, policy in self._pairs():
                    reference.copy_(policy)

    def _copied(self) -> bool:
        """Whether there is room for a copy on the device, which then is there."""
        try:
            self._copy = copy.deepcopy(self._model).eval().requires_grad_(False)
        except Exception as error:
            if not (self._resort and is_out_of_memory(error)):
                raise
        if self._copy is None:  # out here, where the failed copy's frames are gone
            release()
            self._tell(
                "no GPU memory is left for the reference's copy of all weights: it is streamed from host memory, layer "
                "by layer (reference_offload=true)."
            )
        return self._copy is not None

    def offload(self) -> None:
        """From now on the frozen copy is streamed from host memory: the same numbers, two layers on the device.

        Raises:
            UserError: there is no such copy, or it can't be streamed; it stays as it is.
        """
        if self._copy is None:
            raise UserError("reference_offload has no effect: the reference shares the policy's weights.")
        if self._streamed is None:
            self._stream(self._copy)
            self._offload = True

    def _stream(self, model: nn.Module) -> None:
        device = next(self._model.parameters()).device
        self._copy, self._streamed = model, Streamed(model, device)
        if not self._streamed.locked:
            self._tell(
                f"the system grants no page-locked memory for all of the reference ({self._streamed.bytes / 2**30:.1f} "
                "GiB), so its copies wait for the GPU: slower, the same numbers."
            )

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference model, for the length of the block. Weights are shared: do not train inside."""
        if self.kind == "adapter off":
            with self._model.disable_adapter():
                yield self._model
        elif self.kind == "frozen adapter":
            self._model.set_adapter(REFERENCE, inference_mode=True)
            try:
                yield self._model
            finally:
                self._model.set_adapter(self._adapter)
        elif self._streamed is not None:
            with self._streamed.passing():
                yield self._copy
        else:
            yield self._copy

    def _ensure_adapter(self) -> None:
        if REFERENCE not in self._model.peft_config:
            self._model.add_adapter(REFERENCE, copy.deepcopy(self._model.peft_config[self._adapter]))
            for reference, policy in self._pairs():
                if reference.dtype != policy.dtype:  # peft makes it float32 whatever the policy's is in
                    reference.data = reference.data.to(policy.dtype)
        self._model.set_adapter(self._adapter)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(reference, policy) tensors, one pair a weight that differs between them."""
        if self.kind == "frozen copy":
            yield from zip(self._copy.parameters(), self._model.parameters(), strict=True)
            return
        policy = dict(self._model.named_parameters())
        for name, parameter in policy.items():
            parts = name.split(".")
            if REFERENCE in parts:
                yield parameter, policy[".".join(self._adapter if part == REFERENCE else part for part in parts)]

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """reference <- alpha * policy + (1 - alpha) * reference, parameter by parameter (TR-DPO, arXiv:2404.09656).

        Weights that are stored in 16 bits would lose what is below half of their last place at each call, and with a
        small alpha never move at all. Their mean is kept in float32 in host memory (4 bytes a number) from the first
        call on, and the reference computes with its rounding.
        """
        for i, (reference, policy) in enumerate(self._pairs()):
            if reference.dtype.itemsize >= 4 or not reference.is_floating_point():
                _mix(reference, policy, alpha)
                continue
            if i not in self._means:
                self._means[i] = reference.detach().to("cpu", torch.float32)
            _mix(self._means[i], policy, alpha)
            reference.copy_(self._means[i])

    def state(self) -> dict[str, Tensor]:
        """Weights that a checkpoint must hold; empty where the reference follows from the model's own."""
        if self.kind == "adapter off":
            return {}
        exact = lambda i, reference: self._means.get(i, reference).detach().cpu().contiguous()
        return {f"{i:06d}": exact(i, reference) for i, (reference, _) in enumerate(self._pairs())}

    def save(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        state = self.state()
        if state:
            save_file(state, Path(folder) / _WEIGHTS, metadata={"kind": self.kind})

    @torch.no_grad()
    def restore(self, folder: str | Path) -> None:
        """Take up the reference that `save` left; a folder without one leaves it as it is."""
        from safetensors import safe_open

        path = Path(folder) / _WEIGHTS
        if not path.is_file():
            return
        self.moved = True
        if self._adapter is not None:
            self.kind = "frozen adapter"
            self._ensure_adapter()
        self._means.clear()
        with safe_open(path, framework="pt") as file:  # one at a time: the host may have no room for a second copy
            for i, (reference, _) in enumerate(self._pairs()):
                saved = file.get_tensor(f"{i:06d}")
                if saved.dtype.itemsize > reference.dtype.itemsize:
                    self._means[i] = saved
                reference.copy_(saved)


def _mix(mean: Tensor, policy: Tensor, alpha: float) -> None:
    """mean <- alpha * policy + (1 - alpha) * mean, computed where the policy is, some numbers at a time."""
    if mean.is_meta or not (mean.is_contiguous() and policy.is_contiguous()):
        mean.lerp_(policy.to(mean.device, mean.dtype), alpha)
        return
    for here, there in zip(mean.view(-1).split(_MIXED), policy.view(-1).split(_MIXED)):
        if here.device == there.device:
            here.lerp_(there.to(here.dtype), alpha)
        else:
            here.copy_(here.to(there.device).lerp_(there.to(here.dtype), alpha))
