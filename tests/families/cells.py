"""What works for a family, each cell of docs/models.md computed from its tiny model.

A cell is `yes`, `yes` with a remark, or the reason of a refusal in the project's own words. A wrong number is none of
these: it raises.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.plan.counting import Blueprint
from lowvram_grpo.plan.prediction import CannotPredict, predict
from lowvram_grpo.policy import shared_prefix
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.delta_rule import give_recurrences
from lowvram_grpo.policy.embeddings import place_embeddings
from lowvram_grpo.policy.load import bitsandbytes_config, keep_differentiable, load_causal_lm
from lowvram_grpo.policy.lora_targets import linear_layers
from lowvram_grpo.rollout import support
from lowvram_grpo.rollout.batch import pad_left
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.training.scoring import score
from tests.conftest import make_tokenizer
from tests.families import gguf_file
from tests.families.zoo import Family, config_of, tiny
from tests.plan.measured import measured, settings

YES = "yes"
CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16], [17, 18, 19, 20], [21, 22, 23, 24, 25, 26, 27]]
GROUP, ROWS, TOKENS = 2, 3, 10  # fewer rows than completions: they are refilled
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def adapted(model: nn.Module) -> nn.Module:
    """In an adapter that says something."""
    torch.manual_seed(2)
    model = attach_lora(model, LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _reason(reason: str | None, model: nn.Module) -> str:
    """Without the name of the class, which the row has."""
    if reason is None:
        return YES
    return f"no: {reason.removeprefix(f'{type(model).__name__} ').removeprefix('does not fit it: ')}"


def engine(family: Family) -> str:
    """Greedy completions of ragged prompts through an adapter are those of transformers' `generate` for each prompt
    alone, in float32 and with rows refilled; or why the engine leaves them to it."""
    model = adapted(tiny(family))
    base = model.get_base_model()
    sampling = Sampling(temperature=0, max_new_tokens=TOKENS, eos_ids=(1,), pad_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = RolloutEngine(model, sampling, ROWS).generate(PROMPTS, GROUP, seed=0)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        expected = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        for found in batch.completion_ids[i * GROUP : (i + 1) * GROUP]:
            assert found == expected, (family.name, prompt, found, expected)
    lengths = {len(ids) for ids in batch.completion_ids}
    assert len({tuple(ids) for ids in batch.completion_ids}) > 1 and max(lengths) > 1
    return _reason(support.why_not(base), base)


def sampled_is_scored(family: Family) -> str:
    """Log-probs that were sampled with are those that training scores, whoever samples."""
    model = adapted(tiny(family))
    sampling = Sampling(temperature=0.8, max_new_tokens=TOKENS, eos_ids=(1,), pad_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = RolloutEngine(model, sampling, ROWS).generate(PROMPTS, GROUP, seed=3)
    logps = _scored(model, batch.prompt_ids, batch.completion_ids, temperature=0.8).detach()
    for row, sampled in zip(logps, batch.sampling_per_token_logps):
        torch.testing.assert_close(row[: len(sampled)], sampled, rtol=0, atol=2e-4)
    return YES


def _scored(model: nn.Module, prompts: list[list[int]], completions: list[list[int]], **kwargs) -> Tensor:
    ids, mask = pad_left(prompts, 0, CPU)
    width = max(map(len, completions))
    padded = torch.tensor([[*c, *[0] * (width - len(c))] for c in completions])
    wanted = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in completions])
    kwargs = {"temperature": 1.0, "workspace_mib": 1, **kwargs}
    return score(model, ids, mask, padded, wanted, **kwargs).logps


def _rows() -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Prompts, completions of other lengths, and how many have the same prompt."""
    generator = torch.Generator().manual_seed(4)
    lengths = [3, 8, 1, 6, 2]
    completions = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]
    return [PROMPTS[0]] * 3 + [PROMPTS[2]] * 2, completions, [3, 2]


def _gradients(model: nn.Module, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the adapter's gradients of a loss that weighs each token differently."""
    prompts, completions, _ = _rows()
    model.zero_grad(set_to_none=True)
    logps = _scored(model.train(), prompts, completions, **kwargs)
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(5))
    (logps * weights).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def shared_prompts(family: Family) -> str:
    """Log-probs and LoRA gradients with each prompt once are those of the plain path; or why prompts are not shared."""
    model = adapted(tiny(family))
    plain, gradients = _gradients(model)
    base = model.get_base_model()
    reason = shared_prefix.why_not(base)
    if reason is None:
        shared, others = _gradients(model, group_sizes=_rows()[2])
        torch.testing.assert_close(shared, plain, rtol=1e-3, atol=1e-4)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            assert gradient is not None, name
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    return _reason(reason, base)


@contextmanager
def saved(family: Family) -> Iterator[str]:
    """The tiny model as a checkpoint, as it is published: experts one by one."""
    with tempfile.TemporaryDirectory() as folder:
        tiny(family).save_pretrained(folder)
        yield folder


def nf4(family: Family) -> str:
    """Loaded in 4 bits from a checkpoint: passes and gradients are finite, and near those in 16 bits; which matrices
    stay in 16 bits that a 4-bit base should not have."""
    with saved(family) as folder:
        streamed = _loads(folder, "nf4")
        model = load_causal_lm(folder, device=CPU, dtype=torch.float32, quantization_config=_NF4)
    kept = in_16_bits(model)
    keep_differentiable(model)
    logps, gradients = _gradients(adapted(model))
    assert torch.isfinite(logps).all() and all(torch.isfinite(g).all() for g in gradients.values())
    dense = _gradients(adapted(tiny(family)))[0]
    assert F.cosine_similarity(logps.flatten(), dense.flatten(), 0) > 0.9
    remarks = [f"{', '.join(kept)} in 16 bits"] if kept else []
    remarks += [] if streamed else ["weights are not streamed"]
    return f"{YES}, but {', '.join(remarks)}" if remarks else YES


_NF4 = bitsandbytes_config("nf4", torch.float32)
# In 16 bits in every 4-bit model: few numbers, decisions, or no matrix of a product.
_SMALL = re.compile(r"(^|[._])(router|gate|shared_expert_gate|conv|conv1d|embed_tokens\w*)$|Router|Embedding")


def in_16_bits(model: nn.Module) -> list[str]:
    """Kinds of matrices beside lm_head and the embeddings that are not in 4 bits."""
    head, found = model.get_output_embeddings(), set()
    for name, module in model.named_modules():
        if module is head or _SMALL.search(name) or _SMALL.search(type(module).__name__):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and not hasattr(parameter, "quant_state") and not leaf.endswith("bias"):
                found.add("experts" if name.endswith("experts") else _kind(name))
    return sorted(found)


def _kind(name: str) -> str:
    """Of a layer, without its number."""
    return ".".join(part for part in name.split(".") if not part.isdigit()).split("layers.")[-1]


def _loads(folder: str, quantization: str) -> bool:
    """Whether the checkpoint goes in tensor by tensor."""
    from transformers import AutoConfig

    from lowvram_grpo.policy.checkpoint import can_stream, checkpoint_source
    from lowvram_grpo.policy.stream import skeleton

    config = AutoConfig.from_pretrained(folder)
    return can_stream(skeleton(config, torch.float32), checkpoint_source(folder), quantization) is not None


def head(family: Family) -> str:
    """With lm_head (and what is tied to it) in int8 and in NF4, scores are those of the dense model that has the same
    numbers in its tables."""
    said = []
    for kind in ("int8", "nf4"):
        small, dense = tiny(family).requires_grad_(False), tiny(family)
        prompts, completions, _ = _rows()
        try:
            place_embeddings(small, head_dtype=kind, embedding_offload=False, device=CPU, workspace_mib=1)
        except UserError as error:
            said.append(f"{kind} no: {error}")
            continue
        table = small.get_output_embeddings().quantized_weight
        with torch.no_grad():
            dense.get_output_embeddings().weight.copy_(
                table.rows(torch.arange(table.shape[0]), torch.empty(table.shape))
            )
            expected, found = (_scored(model, prompts, completions) for model in (dense, small))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
        assert not torch.equal(expected, _scored(tiny(family), prompts, completions))
    return "; ".join(said) or YES


def gguf(family: Family) -> str:
    """Loaded from a GGUF file of its architecture it says what the model says that the file was written from; or why
    such a file is refused."""
    model = tiny(family, **gguf_file.ARCHITECTURES[family.name][1])
    ids = torch.tensor(PROMPTS[:1])
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/tiny.gguf"
        gguf_file.write(path, family, model)
        try:
            loaded = load_causal_lm(path, device=CPU, dtype=torch.float32)
        except UserError as error:
            return f"no: {_cause(error, gguf_file.ARCHITECTURES[family.name][0])}"
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    return YES


def _cause(error: UserError, architecture: str) -> str:
    """What stands in brackets in the sentence of a refusal, in the same words for all architectures."""
    found = re.search(r"cannot be trained here \((.*)\);", str(error))
    assert found, error
    cause = found[1].replace(f"architecture {architecture}", "this architecture").replace(architecture, "it")
    return cause.replace("it's", "its")


PLANNED = {
    "num_generations": 4, "prompts_per_step": 2, "per_device_train_batch_size": 4, "max_prompt_length": 30,
    "max_completion_length": 12, "optim": "adamw_torch", "workspace_mib": 1, "gradient_checkpointing": True,
    "shared_prefix": "auto", "head_dtype": "int8",
}  # fmt: skip
# What a phase may be predicted too low and too high, of what it takes, and what is no prediction any more.
TOO_LOW, TOO_HIGH, WRONG = 0.03, 0.06, 0.1


def plan(family: Family) -> str:
    """GRPOTrainer takes two steps, and what was predicted for every phase on meta tensors is what they take on a CPU;
    or why nothing is predicted."""
    config = config_of(family, vocab_size=512)
    prompts = [" ".join("abcdefghij" * 3), " ".join("abcdefghijk" * 2 + "lmnopqr")]
    with tempfile.TemporaryDirectory() as folder:
        tiny(family, vocab_size=512).save_pretrained(f"{folder}/model")
        args = settings(Path(folder), **PLANNED)
        give_recurrences(tiny(family), args.fused_ops)  # what is compared once a process is no part of a run
        real = measured(f"{folder}/model", args, make_tokenizer(), prompts, "none", LORA)
        streamed = _loads(f"{folder}/model", "none")
    try:
        found = predict(Blueprint(config, "none", torch.float32, LORA, "cpu", longest_prompt=30), args, exact=True)
    except (CannotPredict, ValueError) as error:
        return f"no: {one_line(error).partition('. ')[0]}"
    if not streamed:
        # Threads of transformers' make the weights, and the ledger does not see into them.
        return f"{YES}, but not held against a real run: its weights are not streamed"
    off = {phase: size / real[phase].bytes - 1 for phase, size in found.phases.items()}
    assert min(off.values()) > -WRONG, (family.name, off)
    said = []
    for share, way, outside in ((TOO_LOW, "low", lambda x: x < -TOO_LOW), (TOO_HIGH, "high", lambda x: x > TOO_HIGH)):
        if phases := [phase for phase, found in off.items() if outside(found)]:
            said.append(f"more than {share:.0%} too {way}: {', '.join(phases)}")
    return f"{YES}, but {'; '.join(said)}" if said else YES


def targets(family: Family) -> tuple[list[str], dict[str, str]]:
    """(kinds of layers that `all-linear` trains, kinds that it leaves out -> why)."""
    layers = linear_layers(tiny(family))
    model = attach_lora(tiny(family), LoraConfig(**LORA))
    adapted_ones = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert adapted_ones == {f"base_model.model.{name}" for name, why in layers.items() if why is None}
    left = {_kind(name): why for name, why in layers.items() if why is not None}
    return sorted({_kind(name) for name, why in layers.items() if why is None}), left


def merged(family: Family) -> str:
    """A merged model says what its adapter said, saved and loaded again by transformers alone."""
    from transformers import AutoModelForCausalLM

    model, ids = adapted(tiny(family)), torch.tensor(PROMPTS[:1])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = model(input_ids=ids).logits
        model.merge_and_unload().save_pretrained(folder)
        found = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    return YES


CELLS: dict[str, Callable[[Family], str]] = {
    "engine": engine, "sampled = scored": sampled_is_scored, "shared prefix": shared_prompts, "nf4": nf4, "head": head,
    "GGUF": gguf, "plan": plan,
}  # fmt: skip
