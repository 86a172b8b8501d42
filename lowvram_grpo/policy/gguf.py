"""Models in GGUF files (llama.cpp's format), dequantized one tensor at a time.

Names and layouts are mapped by transformers' own tables. What a file was quantized to is not kept: its weights are
16-bit again, or quantized anew to NF4.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.policy.accounting import left_over
from lowvram_grpo.policy.gguf_rotary import TENSORS, read_rotary, scale_rotary
from lowvram_grpo.policy.stream import materialize, skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def gguf_parts(model: str, gguf_file: str | None = None) -> tuple[str, str] | None:
    """(folder or hub id, file in it) if `model` names a GGUF file, else None.

    Raises:
        UserError: it does, and the package that reads them is missing.
    """
    if gguf_file is None:
        if not model.lower().endswith(".gguf"):
            return None
        folder, gguf_file = os.path.split(model)
    else:
        folder = model
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{gguf_file!r} is a GGUF file, and the package that reads them is missing: `pip install gguf`."
        )
    return folder or ".", gguf_file


def gguf_tokenizer(folder: str, file: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, with the end-of-sequence and pad tokens that the file names.

    `kwargs` go to AutoTokenizer, which in some versions takes those two tokens from the architecture instead.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, **kwargs)
    hub = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir")}
    reader = GGUFReader(cached_file(folder, file, **hub))
    for key, role in (("eos", "eos_token"), ("padding", "pad_token")):
        if (found := _special_token(reader, key)) is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(found))
    return tokenizer


def _special_token(reader: Any, key: str) -> int | None:
    field = reader.fields.get(f"tokenizer.ggml.{key}_token_id")
    return None if field is None else int(field.contents())


def load_gguf(
    folder: str,
    file: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "none",
    keep_on_host: Callable[[PreTrainedModel], tuple[str, ...]] = lambda model: (),
    attention: str | None = None,
    tell: Callable[[str], None] = warnings.warn,
    host_layers: Callable[[PreTrainedModel], int] = lambda model: 0,
    **hub: Any,
) -> PreTrainedModel:
    """The model in a GGUF file of a folder or hub id; `hub` has its revision, token or cache_dir, and `tell` hears of
    tensors without a place in the model.

    Raises:
        UserError: transformers has no tables for its architecture.
        OSError: no such file.
    """
    config, reader = gguf_config(folder, file, **hub)
    model = skeleton(config, dtype, **({"attn_implementation": attention} if attention else {}))
    source = gguf_source(file, model, reader, tell)
    materialize(
        model, source, device=device, dtype=dtype, quantization=quantization, keep_on_host=keep_on_host(model),
        host_layers=host_layers(model),
    )  # fmt: skip
    scale_rotary(model, reader)
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = _special_token(reader, "eos")
    model.config._name_or_path = model.name_or_path = os.path.join(folder, file)
    return model


def gguf_config(folder: str, file: str, **hub: Any) -> tuple[PretrainedConfig, Any]:
    """The model configuration in a GGUF file, and the reader that has the file open. Raises as `load_gguf`."""
    from gguf import GGUFReader
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import read_field
    from transformers.utils.hub import cached_file

    reader = GGUFReader(cached_file(folder, file, **hub))
    architecture = read_field(reader, "general.architecture")[0]
    if any("_exps" in tensor.name for tensor in reader.tensors):
        raise _unsupported(file, f"{architecture} has mixture-of-experts layers")
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=file, **hub)
    except KeyError as error:
        raise _unsupported(file, f"it lacks the key {one_line(error)}") from error
    except (ValueError, NotImplementedError) as error:
        raise _unsupported(file, one_line(error)) from error
    if getattr(config, "per_layer_attributes", None):
        raise _unsupported(file, f"the sizes of {architecture}'s layers differ, which transformers' tables leave out")
    # transformers' tables take the default of some architectures, which is right for the models they were made for.
    head_size = read_field(reader, f"{architecture}.attention.key_length")
    if head_size and hasattr(config, "head_dim"):
        config.head_dim = head_size[0]
    if _rules(architecture, config) is None:
        read_rotary(config, reader)
    return config, reader


def gguf_source(
    path: str, model: PreTrainedModel, reader: Any = None, tell: Callable[[str], None] = warnings.warn
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(parameter name, function that gives it in float32) for the tensors of a GGUF file.

    Args:
        path: of the file.
        model: of the file's configuration, on meta: its names are what the file's are mapped to.
        reader: a `gguf.GGUFReader` of `path`, if there is one.
        tell: hears of tensors that are mapped to nothing.

    Raises:
        UserError: the architecture is none that transformers maps tensor by tensor.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    reader = reader or GGUFReader(path)
    architecture = read_field(reader, "general.architecture")[0]
    if (rules := _rules(architecture, model.config)) is not None:
        return _converted(path, model, reader, rules, tell)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise _unsupported(path, one_line(error)) from error
    tied = getattr(model, "all_tied_weights_keys", {})
    stored = {tensor.name for tensor in reader.tensors}
    if strangers := sorted(stored - names.keys() - TENSORS):
        tell(left_over(path, strangers))
    return _tensors(reader, processor, {theirs: ours for theirs, ours in names.items() if ours not in tied})


def _tensors(reader: Any, processor: Any, names: dict[str, str]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    from gguf import dequantize

    for stored in reader.tensors:

        def read(stored=stored) -> Tensor:
            weights = dequantize(stored.data, stored.tensor_type)
            result = processor.process(
                weights=weights, name=stored.name, tensor_key_mapping=names, parsed_parameters={}
            )
            # Copied, for what is not quantized is a view of the file, which torch cannot take read-only.
            return torch.from_numpy(np.array(result.weights, dtype=np.float32, order="C"))

        if stored.name in names:
            yield names[stored.name], read


def _rules(architecture: str, config: PretrainedConfig) -> list[Any] | None:
    """transformers' newer rules for an architecture, tensor by tensor; None where it has none, or only older tables."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:  # before 5.24
        return None
    return GGUF_ARCHS[architecture](config) if architecture in GGUF_ARCHS else None


def _converted(
    path: str, model: PreTrainedModel, reader: Any, rules: list[Any], tell: Callable[[str], None]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """As `gguf_source`, by rules that each make one tensor of one."""
    from gguf import dequantize
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known, unused = set(model.state_dict()), getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    strangers = []
    for stored in reader.tensors:
        name, pattern = rename_source_key(stored.name, renamings, converters)
        if name not in known:
            if stored.name not in TENSORS and not any(re.search(p, name) for p in unused):
                strangers.append(stored.name)
            continue

        def read(stored=stored, name=name, pattern=pattern) -> Tensor:
            tensor = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32))
            if pattern is None:
                return tensor
            rule = copy.deepcopy(by_pattern[pattern])
            rule.add_tensor(name, stored.name, pattern, tensor)
            made = rule.convert(name, model=model, config=model.config)[name]
            return (made[0] if isinstance(made, list) else made).float()

        yield name, read
    if strangers:
        tell(left_over(path, sorted(strangers)))


def _unsupported(file: str, reason: str) -> UserError:
    return UserError(
        f"The GGUF file {os.path.basename(file)!r} cannot be trained here ({reason}); take the model's safetensors "
        "instead."
    )
