"""Language models of real sizes with random weights: no download, and the memory and the work of the real ones.

They come into being by the code that streams a checkpoint (`policy.stream.materialize`), from a source that makes one
tensor at a time in host memory, where a checkpoint's would be too. The final norm is scaled until the head's softmax is
as peaked as a trained model's (0.5B, random tokens: 1.1 nats, 60 entries above 2^-16): with plain random weights every
row would be diffuse, and nothing that depends on the entropy (the sweep's direction, the sampler) would run as it does
in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_grpo.policy.embeddings import stays_on_host
from lowvram_grpo.policy.stream import expected_names, materialize, skeleton
from lowvram_grpo.policy.weight_stream import layers_on_host
from lowvram_grpo.recipe.weight_offload import OFF

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHT_STD = 0.02
# Standard deviation of the logits: twice sqrt(2 ln V), where a random-energy softmax condenses onto a few entries.
LOGIT_STD = 10.0
PAD, EOS, UNKNOWN = 1, 2, 0
# Numbers that all weights are cut from: a 14B model's own would take minutes to draw. A prime, so that the rows of a
# matrix do not repeat.
_POOL = 2**24 - 3


def random_model(
    config: PretrainedConfig,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    head_dtype: str = "dense",
    embedding_offload: bool = False,
    weight_offload: str | int = OFF,
    expert_offload: str | int = OFF,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model on `device` whose weights are random, in eval mode.

    Args:
        quantization: none or nf4.
        dtype: of the weights that are not quantized.
        head_dtype, embedding_offload, weight_offload: tables that these will make smaller, and layers that wait there,
            are left in host memory, as a run does.
        expert_offload: of GRPOConfig.

    Raises:
        UserError: another quantization.
    """
    with _disable_current_modes():  # built on the host, one layer at a time: nothing of it is on the device
        empty = skeleton(config, dtype)
    model = materialize(
        empty,
        _source(empty, expected_names(empty), dtype, seed),
        device=device,
        dtype=dtype,
        quantization=quantization,
        keep_on_host=stays_on_host(empty, head_dtype, embedding_offload),
        host_layers=layers_on_host(weight_offload, empty),
        expert_offload=expert_offload,
    )
    model.generation_config.eos_token_id = EOS
    return model


def _source(
    model: nn.Module, names: list[str], dtype: torch.dtype, seed: int
) -> Iterable[tuple[str, Callable[[], Tensor]]]:
    """(name, function that makes it) of all weights that `materialize` expects, whatever it makes of the model."""
    return _made(model, model.state_dict(keep_vars=True), names, dtype, seed)


def _made(
    model: nn.Module, state: dict[str, Any], names: list[str], dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    text = model.config.get_text_config()
    kinds = {f"{name}.": type(module).__name__.lower() for name, module in model.named_modules()}
    numbers = sum(state[name].numel() for name in names)
    # As a file's pages are, what is read is nothing that a ledger should count.
    with _disable_current_modes():
        pool = torch.randn(min(_POOL, numbers), generator=torch.Generator().manual_seed(seed)).mul_(WEIGHT_STD)
        pool = pool.to(dtype)
    # Gemma's norms multiply by 1 + weight.
    zero_gain = 1.0 if text.model_type.startswith("gemma") else 0.0
    final_gain = LOGIT_STD / (WEIGHT_STD * math.sqrt(text.hidden_size))
    final = next(name for name in reversed(list(state)) if name.endswith("norm.weight"))
    at = 0
    for name in names:
        like = state[name]
        parent, _, leaf = name.rpartition(".")
        if name == final:
            yield name, lambda like=like: torch.full(like.shape, final_gain - zero_gain, dtype=dtype)
        elif leaf == "bias":
            yield name, lambda like=like: torch.zeros(like.shape, dtype=dtype)
        elif "norm" in kinds[f"{parent}."]:
            yield name, lambda like=like: torch.full(like.shape, 1.0 - zero_gain, dtype=dtype)
        elif isinstance(like, nn.Parameter):
            yield name, lambda like=like, at=at: _cut(pool, at, like.numel()).view(like.shape)
            at = (at + like.numel()) % len(pool)
        else:
            yield name, lambda like=like: torch.zeros(like.shape) if like.is_meta else like


def _cut(pool: Tensor, start: int, count: int) -> Tensor:
    """`count` numbers of `pool` from `start` on, over and over."""
    with _disable_current_modes():
        out, done = torch.empty(count, dtype=pool.dtype), 0
        while done < count:
            piece = pool[start : start + count - done]
            out[done : done + len(piece)] = piece
            done, start = done + len(piece), 0
    return out


def word_tokenizer(vocab: int) -> Any:
    """A token for every id: `<unk>`, `<pad>`, `<eos>`, `w3` ... `w{vocab - 1}`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # No special token may be the beginning of a word: it would be cut out of it.
    special = {"<unk>": UNKNOWN, "<pad>": PAD, "<eos>": EOS}
    words = {f"w{i}": i for i in range(len(special), vocab)}
    tokenizer = Tokenizer(models.WordLevel({**special, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def word_prompts(count: int, tokens: int, vocab: int) -> list[str]:
    """Prompts of exactly `tokens` tokens of `word_tokenizer`, each another one."""
    return [" ".join(f"w{3 + (i * 7919 + j * 31) % (vocab - 3)}" for j in range(tokens)) for i in range(count)]
