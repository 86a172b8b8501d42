"""What `use_peft: false` settles: no adapter, so no frozen base that could be rounded or moved to the host."""

from __future__ import annotations

from typing import Any

from lowvram_grpo.errors import UserError

# Who set a value, as the resolved recipe records it.
OF_ALL_WEIGHTS = "training of all weights"
# What a frozen base may be, and a trained one must.
_TRAINED = {
    "quantization": "none", "head_dtype": "dense", "embedding_offload": False, "weight_offload": "off",
    "expert_offload": "off",
}  # fmt: skip


def settle_all_weights(values: dict[str, Any], origin: dict[str, str]) -> None:
    """Write what follows from training all weights into settings and who set them, where these say `use_peft: false`.

    Raises:
        UserError: they ask for something that only a frozen base can be.
    """
    if values.get("use_peft", True):
        return
    if values.get("adapter"):
        raise UserError("--adapter and --use-peft false contradict each other; drop one of them.")
    for key, value in _TRAINED.items():
        if origin.get(key) in ("flag", "file") and values.get(key, value) != value:
            raise UserError(
                f"{key} {values[key]} needs a frozen base, and with --use-peft false all weights are trained; drop one "
                "of them."
            )
        values[key], origin[key] = value, OF_ALL_WEIGHTS
