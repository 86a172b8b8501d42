"""Whether a checkpoint gave a model all of its weights: none made up, none of another shape, none left over unsaid.

transformers fills what is missing with random numbers and says so in a table that a command line hides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from lowvram_grpo.errors import UserError, counted, some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Buffers that older versions of transformers saved and newer ones compute; each model's own are known to transformers.
_COMPUTED = re.compile(r"(^|\.)(masked_bias|rotary_emb\.inv_freq|position_ids)$")
_QUANTIZATION_STATE = re.compile(r"\.(SCB|weight_format|weight\.\w+(\.\w+)?)$")


def account(model: str, loaded: PreTrainedModel, report: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Judge what from_pretrained reports (`output_loading_info`) of `loaded`, which it made from `model`.

    Tied weights, quantization state and the buffers that a class names (`_keys_to_ignore_on_load_*`) are not in the
    report any more.

    Args:
        tell: hears of weights that the model has no place for.

    Raises:
        UserError: weights are missing or of another shape.
    """
    missing = sorted(report["missing_keys"])
    unexpected = sorted(name for name in report["unexpected_keys"] if not _COMPUTED.search(name))
    if missing:
        raise lacking(model, missing, unexpected, loaded)
    # (name, stored shape, the model's shape)
    shapes = [(name, tuple(theirs), tuple(ours)) for name, theirs, ours in report["mismatched_keys"]]
    shapes += _misshapen_quantized(loaded)
    if shapes:
        raise misshapen(model, shapes)
    if unexpected:
        tell(left_over(model, unexpected))


def lacking(model: str, missing: list[str], unexpected: list[str], loaded: nn.Module) -> UserError:
    """For weights that the checkpoint of `model` lacks; `loaded` is the model that wants them, on any device."""
    # What bitsandbytes stores beside a packed weight is nothing that could be there instead of one.
    unexpected = [name for name in unexpected if not _QUANTIZATION_STATE.search(name)]
    return UserError(f"The checkpoint of {model!r} lacks {some(missing)}{_why(missing, unexpected, loaded)}")


def misshapen(model: str, shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> UserError:
    """For weights as (name, shape in the checkpoint, shape in the model)."""
    name, theirs, ours = min(shapes)
    more = f", and {counted(len(shapes) - 1, 'other')} so" if len(shapes) > 1 else ""
    return UserError(
        f"In the checkpoint of {model!r}, {name!r} is {theirs} and not {ours} as its configuration says{more}; is the "
        "config.json beside it its own?"
    )


def left_over(model: str, names: list[str]) -> str:
    """The notice for weights that nothing was done with."""
    held = counted(len(names), "weight")
    return f"the checkpoint of {model} holds {held} that the model has no place for: {some(names)}."


def _why(missing: list[str], unexpected: list[str], loaded: nn.Module) -> str:
    """The end of the sentence: the likely cause, and what to do."""
    prefix = next((name[: -len(missing[0])] for name in unexpected if name.endswith(missing[0])), "")
    adapted = [name for name in unexpected if ".lora_" in name or ".base_layer." in name]
    if adapted or prefix.startswith("base_model.model."):
        return (
            f" and holds {some(adapted or unexpected)}: it was saved with an adapter around it; save it again after "
            "model.merge_and_unload(), or save the adapter alone and pass it as --adapter."
        )
    if prefix and {prefix + name for name in missing} <= {*unexpected}:
        return (
            f", as all its names begin with {prefix!r}: a wrapped or compiled model was saved; save the model inside "
            "(model._orig_mod after torch.compile, model.module after DataParallel), or take the prefix off the names."
        )
    if unexpected:
        return f" and holds {some(unexpected)} instead; give the config.json that belongs to it, or another checkpoint."
    declared = (loaded.config.architectures or [""])[0]
    if declared.endswith("Model") and missing == [f"{_head_name(loaded)}.weight"]:
        return f": it was saved from {declared}, without the output head; save the whole causal language model."
    return "; download it again, or give the config.json that belongs to it."


def _head_name(model: nn.Module) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head and head is not None), None)


def _misshapen_quantized(model: nn.Module) -> Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Quantized linear layers of another shape than their configuration's: transformers packs whatever it reads."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not hasattr(module, "weight"):
            continue
        state = getattr(module.weight, "quant_state", None)
        shape, ours = getattr(state, "shape", module.weight.shape), (module.out_features, module.in_features)
        if tuple(shape) != ours and (state is not None or type(module).__name__ == "Linear8bitLt"):
            yield f"{name}.weight", tuple(shape), ours
