"""The policy's adapter on disk, a folder for each state of its weights, for an engine that reads it from there."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.text_model import rename_saved
from lowvram_grpo.policy.wrapper import is_peft

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


class Version(NamedTuple):
    """One state of the adapter.

    Attributes:
        number: from 1.
        name: never used twice, not by another run either. vLLM's prefix cache knows adapters by name: new weights
            under an old name would be given keys and values that the old ones made (vllm-project/vllm#42125).
        folder: absolute, as peft writes it.
    """

    number: int
    name: str
    folder: Path


class AdapterVersions:
    """Writes the active adapter of `model` whenever its weights have changed. `rank` is its largest.

    Raises:
        UserError: there is no adapter, or it is none that vLLM can run.
    """

    def __init__(self, model: nn.Module, folder: str | os.PathLike):
        if not is_peft(model):
            raise UserError(
                "use_vllm sends LoRA adapters to vLLM, and here all weights are trained; pass a peft_config, or set "
                "use_vllm to false."
            )
        self.model: PeftModel = model
        self.adapter = model.active_adapters[0]
        config = model.peft_config[self.adapter]
        beyond = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if _has(config, name)]
        if getattr(config, "bias", "none") != "none":
            beyond.append("bias")
        if beyond:
            raise UserError(
                f"vLLM runs plain LoRA adapters, and this one has {', '.join(beyond)}; leave that out, or set use_vllm "
                "to false."
            )
        self.rank = max([config.r, *(getattr(config, "rank_pattern", None) or {}).values()])
        self.folder = Path(folder).resolve()
        self.current: Version | None = None
        self._run, self._digest = uuid.uuid4().hex[:8], b""

    def renew(self) -> Version | None:
        """Save the weights under a new name if they differ from those last saved; the folder of the version before
        stays. None if they do not: they are asked themselves, as optimizer steps, cold starts and resumed runs change
        them, and evaluation does not."""
        digest = self._fingerprint()
        if digest == self._digest:
            return None
        number = 1 if self.current is None else self.current.number + 1
        name = f"lowvram-grpo-{self._run}-{number}"
        folder = self.folder / name
        self.model.save_pretrained(str(folder), selected_adapters=[self.adapter], save_embedding_layers=False)
        if self.adapter != "default":  # peft gives any other adapter a folder inside
            folder = folder / self.adapter
        rename_saved(folder, self.model)
        self.current, self._digest = Version(number, name, folder), digest
        return self.current

    def forget(self) -> None:
        """Save again at the next `renew`, whatever the weights are."""
        self._digest = b""

    def remove(self, version: Version) -> None:
        shutil.rmtree(self.folder / version.name, ignore_errors=True)

    def _fingerprint(self) -> bytes:
        digest = hashlib.blake2b()
        for name, parameter in self.model.named_parameters():
            if "lora_" in name and f".{self.adapter}." in f"{name}.":
                digest.update(name.encode())
                raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy())
        return digest.digest()


def _has(config: object, name: str) -> bool:
    return bool(getattr(config, name, None))
