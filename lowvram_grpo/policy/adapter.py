"""An adapter that exists already: looked at before the model is loaded, then put onto it."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lowvram_grpo.errors import UserError, one_line, some
from lowvram_grpo.policy.expert_targets import names_as_they_are, was_without_experts
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.hub import way_to_the_hub
from lowvram_grpo.policy.text_model import adapter_mapping, save_under_whole_names
from lowvram_grpo.policy.variants import check_adapter
from lowvram_grpo.policy.weight_stream import stream_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

# What peft, torch and safetensors raise for weights that are damaged or belong to another model.
_UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?Size\((\[.*?\])\) from checkpoint.*?Size\((\[.*?\])\)", re.DOTALL)


def adapter_config(adapter: str) -> PeftConfig:
    """The configuration of a LoRA adapter (folder or hub id); its weights are not read.

    Raises:
        UserError: there is no such adapter, or it is no LoRA adapter.
    """
    from peft import PeftConfig
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

    folder = Path(adapter)
    if folder.is_dir():
        if not (folder / CONFIG_NAME).is_file():
            inside = folder / "adapter"
            remedy = (
                f"did you mean {inside}?"
                if (inside / CONFIG_NAME).is_file()
                else "give the folder that a run left as RUN/adapter, or that save_pretrained wrote."
            )
            raise UserError(f"The folder {adapter} holds no adapter, as it has no {CONFIG_NAME}; {remedy}")
        if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise UserError(
                f"The adapter {adapter} has no weights ({SAFETENSORS_WEIGHTS_NAME}); copy them there, or give another."
            )
    try:
        config = PeftConfig.from_pretrained(adapter)
    except _UNLOADABLE as error:
        if folder.is_dir():
            raise UserError(
                f"The {CONFIG_NAME} of the adapter {adapter} can't be read ({one_line(error)}); give another adapter."
            ) from error
        raise UserError(
            f"Adapter {adapter!r} is neither a local folder nor reachable on the hub; check the name, pass a local "
            f"folder such as RUN/adapter, or {way_to_the_hub()}."
        ) from error
    try:
        # Whether there is a reference is known later.
        check_adapter(config, fresh=False, reference=False)
    except UserError as error:
        raise UserError(f"{adapter}: {error}") from error
    return config


def load_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Wrap `model` with an existing adapter (folder or hub id), trainable.

    Raises:
        UserError: there is no such adapter, or it does not fit the model.
    """
    from peft import PeftModel

    config = adapter_config(adapter)
    base = config.base_model_name_or_path
    try:
        names = {"is_trainable": True, "key_mapping": adapter_mapping(model)}
        with warnings.catch_warnings(), names_as_they_are(was_without_experts(model, config)):
            # Of a language model that was taken out of a whole one: there are no towers to leave out.
            warnings.filterwarnings("ignore", message="You have passed exclude_modules")
            wrapped = PeftModel.from_pretrained(model, adapter, **names)
            # Again, for its report: from_pretrained only warns of what it did not find.
            report = wrapped.load_adapter(adapter, wrapped.active_adapter, **names)
    except _UNLOADABLE as error:
        raise _misfit(f"The adapter {adapter}", error, base) from error
    check_whole(f"The adapter {adapter}", report, base)
    head_of(wrapped.get_base_model())
    save_under_whole_names(wrapped)
    return wrapped


def restore_adapter(model: PeftModel, checkpoint: str, name: str) -> None:
    """Load the weights of the adapter `name`, which the model has, from a checkpoint's folder.

    Raises:
        UserError: they are damaged, or of another model.
    """
    changed = getattr(model, "changed_base", None)
    try:
        if changed is not None:
            stream = stream_of(model)
            with stream.at_home() if stream else nullcontext():  # the base's weights may change
                changed.restore(model, checkpoint)
            return
        # Into the dtype that it has: peft would make an adapter in 16 bits float32, which takes other steps.
        report = model.load_adapter(
            checkpoint, name, is_trainable=True, autocast_adapter_dtype=False, key_mapping=adapter_mapping(model)
        )
    except _UNLOADABLE as error:
        raise _misfit(f"The checkpoint {checkpoint}", error) from error
    check_whole(f"The checkpoint {checkpoint}", report)


def check_whole(what: str, report: Any, base: str | None = None) -> None:
    """Whether all weights of an adapter were found, and all that were found had a place.

    An adapter of which a part is left out is another one, so here that is no mere notice.

    Args:
        what: what was loaded, for people.
        report: `missing_keys` and `unexpected_keys`, as `PeftModel.load_adapter` returns them.
        base: the model that it was made for, if known.

    Raises:
        UserError: something is missing or left over.
    """
    remedy = f"give --model the one it was trained on{f', {base}' if base else ''}, or another adapter."
    if report.missing_keys:
        held = f" and holds {some(report.unexpected_keys)} instead" if report.unexpected_keys else ""
        raise UserError(f"{what} lacks {some(report.missing_keys)}{held}; {remedy}")
    if report.unexpected_keys:
        raise UserError(f"{what} holds {some(report.unexpected_keys)}, for which this model has no place; {remedy}")


def _misfit(what: str, error: Exception, base: str | None = None) -> UserError:
    """One sentence for weights, called `what`, that did not load. `base` is the model they were made for, if known."""
    if isinstance(error, KeyError):
        return UserError(f"{what} lacks {error.args[0]!r}; give another, or one that was saved whole.")
    mismatches = _MISMATCH.findall(str(error))
    if not mismatches:
        return UserError(f"{what} can't be loaded onto this model: {one_line(error)}.")
    name, theirs, ours = mismatches[0]
    more = f" (and so on for {len(mismatches)} weights)" if len(mismatches) > 1 else ""
    return UserError(
        f"{what} was made for another model: {name} is {theirs} in it, and {ours} in this model{more}; "
        f"give --model the one it was trained on{f', {base}' if base else ''}."
    )
