"""The reference policy of the KL term, sharing the policy's weights wherever it can.

| policy                              | reference                                             |
|-------------------------------------|-------------------------------------------------------|
| fresh LoRA adapter                  | the same weights with the adapter switched off        |
| an adapter that already says something | a frozen second copy of that adapter               |
| all weights trained                 | a frozen copy of the model                            |
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lowvram_grpo.policy.wrapper import is_peft

REFERENCE = "reference"
_WEIGHTS = "reference.safetensors"


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
    """Gives back the model as it was when it was made, or last frozen.

    `kind` is `adapter off`, `frozen adapter` or `frozen copy`.
    """

    def __init__(self, model: nn.Module, *, follows: bool = False):
        """`follows` keeps separate weights even for a blank adapter, so that `sync` has something to mix into."""
        self._model = model
        self._copy: nn.Module | None = None
        self._adapter = model.active_adapters[0] if is_peft(model) else None
        if self._adapter is None:
            self.kind = "frozen copy"
        elif adapter_is_blank(model, self._adapter) and not follows:
            self.kind = "adapter off"
        else:
            self.kind = "frozen adapter"
        self._take()
        #: Whether the reference has weights that do not follow from how the model was loaded: a checkpoint needs them.
        self.moved = self.kind == "frozen adapter"

    def freeze(self) -> None:
        """Make the policy as it is now the reference."""
        self.kind, self.moved = "frozen copy" if self._adapter is None else "frozen adapter", True
        self._take()

    def _take(self) -> None:
        if self.kind == "frozen copy":
            self._copy = None  # before the new copy is made: there is no room for three
            self._copy = copy.deepcopy(self._model).eval().requires_grad_(False)
        elif self.kind == "frozen adapter":
            self._ensure_adapter()
            self._mix(1.0)

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
        else:
            yield self._copy

    def sync(self, alpha: float) -> None:
        """reference <- alpha * policy + (1 - alpha) * reference, parameter by parameter (TR-DPO, arXiv:2404.09656)."""
        self._mix(alpha)

    def _ensure_adapter(self) -> None:
        if REFERENCE not in self._model.peft_config:
            self._model.add_adapter(REFERENCE, copy.deepcopy(self._model.peft_config[self._adapter]))
        self._model.set_adapter(self._adapter)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(reference, policy) tensors, one pair a weight that differs between them."""
        if self.kind == "frozen copy":
            yield from zip(self._copy.parameters(), self._model.parameters())
            return
        policy = dict(self._model.named_parameters())
        for name, parameter in policy.items():
            if f".{REFERENCE}." in f"{name}.":
                yield parameter, policy[name.replace(f".{REFERENCE}", f".{self._adapter}")]

    @torch.no_grad()
    def _mix(self, alpha: float) -> None:
        for reference, policy in self._pairs():
            reference.lerp_(policy.to(reference.dtype), alpha)

    def state(self) -> dict[str, Tensor]:
        """Weights that a checkpoint must hold; empty where the reference follows from the model's own."""
        if self.kind == "adapter off":
            return {}
        return {f"{i:06d}": reference.detach().cpu().contiguous() for i, (reference, _) in enumerate(self._pairs())}

    def save(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        state = self.state()
        if state:
            save_file(state, Path(folder) / _WEIGHTS, metadata={"kind": self.kind})

    @torch.no_grad()
    def restore(self, folder: str | Path) -> None:
        """Take up the reference that `save` left; a folder without one leaves it as it is."""
        from safetensors.torch import load_file

        path = Path(folder) / _WEIGHTS
        if not path.is_file():
            return
        self.moved = True
        if self._adapter is not None:
            self.kind = "frozen adapter"
            self._ensure_adapter()
        saved = load_file(path)
        for i, (reference, _) in enumerate(self._pairs()):
            reference.copy_(saved[f"{i:06d}"])
