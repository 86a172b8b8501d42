"""Tiny models of several families, and one training pass to compare them by."""

from __future__ import annotations

import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn

from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.training.scoring import Scores, score

TINY = {
    "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
PROMPTS, COMPLETIONS, GROUPS = [5, 5, 5, 3, 3], [4, 7, 1, 6, 2], [3, 2]


def tiny(family: str, **overrides) -> nn.Module:
    """A random causal language model of a family (`Llama`, `Gemma3Text`, ...)."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **overrides})
    return getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()


def adapted(model: nn.Module) -> nn.Module:
    """With an adapter on every linear layer that already does something."""
    model = attach_lora(model, LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"]))
    for name, p in model.named_parameters():
        if "lora_B" in name and not p.is_meta:
            nn.init.normal_(p, std=0.3)
    return model


def micro_batch(prompts=PROMPTS, completions=COMPLETIONS, groups=GROUPS, device="cpu", vocab=41) -> list[Tensor]:
    """Ragged ids and masks, the prompts of a group equal: the first arguments of `score`."""
    generator = torch.Generator().manual_seed(1)
    ids = lambda *shape: torch.randint(3, vocab, shape, generator=generator)
    lengths, width = torch.tensor(prompts)[:, None], max(completions)
    prompt_ids = ids(len(groups), max(prompts)).repeat_interleave(torch.tensor(groups), 0)
    prompt_mask = (torch.arange(max(prompts)) >= max(prompts) - lengths).long()
    mask = (torch.arange(width) < torch.tensor(completions)[:, None]).long()
    batch = [prompt_ids * prompt_mask, prompt_mask, ids(len(prompts), width) * mask, mask]
    return [tensor.to(device) for tensor in batch]


def training_pass(model: nn.Module, batch: list[Tensor] | None = None, **kwargs) -> tuple[Scores, dict[str, Tensor]]:
    """Scores, and the gradients of a loss that weighs each token differently."""
    batch = micro_batch() if batch is None else batch
    model.zero_grad(set_to_none=True)
    model.train()
    scores = score(model, *batch, temperature=0.9, workspace_mib=1, **kwargs)
    weights = torch.randn(scores.logps.shape, generator=torch.Generator().manual_seed(2)).to(scores.logps.device)
    (scores.logps * weights).sum().backward()
    return scores, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(
    left: tuple[Scores, dict[str, Tensor]], right: tuple[Scores, dict[str, Tensor]], rtol: float = 1e-4
) -> None:
    """Log-probs, entropies and every gradient agree, relative to the largest of each tensor."""
    (a, grads), (b, others) = left, right
    assert grads and grads.keys() == others.keys()
    pairs = {"logps": (a.logps, b.logps), "entropy": (a.entropy, b.entropy)}
    for name, (x, y) in {**pairs, **{n: (grads[n], others[n]) for n in grads}}.items():
        assert x.shape == y.shape
        assert float((x - y).detach().abs().max()) <= rtol * float(x.detach().abs().max()) + 1e-6, name
