"""TRL's GRPOTrainer twice, from the same weights: as it is, and switched on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import digit_share, make_model, make_tokenizer
from datasets import Dataset
from torch import Tensor

from lowvram_grpo.integrations.trl import switch_on

# TRL's own clock: everything else that it logs must agree.
_CLOCK = {"step_time"}
OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 5}


def prompts(count: int = 24) -> Dataset:
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [" ".join(letters[(5 * i + j) % 26] for j in range(1 + i % 4)) for i in range(count)]
    return Dataset.from_dict({"prompt": rows})


def trainer_of(folder: Path, model: Any = None, adapter: Any = None, kind: type | None = None, **overrides: Any):
    """TRL's trainer of a model of two layers; settings that are multiples of nothing."""
    import trl

    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2, "num_generations": 3, "max_completion_length": 7, "max_steps": 3,
        "learning_rate": 0.3, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "beta": 0.0,
        "temperature": 0.9, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, "seed": 11, **overrides,
    }  # fmt: skip
    if model is None:
        tiny = make_model()
        tiny.lm_head.weight.data[1] *= 3  # ends that are likely: some completions end early, some are cut
        tiny.save_pretrained(folder / "model")
        model = str(folder / "model")
        settings.setdefault("model_init_kwargs", {"dtype": "float32"})
    return (kind or trl.GRPOTrainer)(
        model, [digit_share], trl.GRPOConfig(**settings), prompts(), processing_class=make_tokenizer(),
        peft_config=adapter,
    )  # fmt: skip


def trained(trainer: Any, start: dict[str, Tensor] | None = None) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """(a row of the log a step, trained weights) after `train()`, from the trained weights `start`."""
    weights = lambda: {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    if start:
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                p.copy_(start.get(name, p))
    torch.manual_seed(3)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], weights()


def agree(theirs: tuple, ours: tuple, rel: float = 1e-5) -> None:
    """Losses, norms of gradients and all other numbers that TRL logs, step by step, and the weights at the end."""
    assert len(theirs[0]) == len(ours[0]) > 2
    assert any(0 < row.get("completions/clipped_ratio", 0) < 1 for row in theirs[0])
    for step, (their, mine) in enumerate(zip(theirs[0], ours[0]), 1):
        assert their.keys() == mine.keys()
        for name in their.keys() - _CLOCK:
            apart = abs(mine[name] - their[name])
            assert apart <= rel * max(0.1, abs(their[name])), f"step {step}, {name}: {mine[name]} for {their[name]}"
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=10 * rel, atol=10 * rel)


def chunked_calls() -> tuple[Any, list[int]]:
    """A patch that counts what still goes through TRL's own head."""
    import trl.trainer.utils as utils

    calls, apply = [], utils._ChunkedLogProbFunction.apply

    def counted(hidden: Tensor, *rest: Any) -> Any:
        calls.append(len(hidden))
        return apply(hidden, *rest)

    return patch.object(utils._ChunkedLogProbFunction, "apply", counted), calls


def pair(folder: Path, *, adapter: Callable | None = None, direction: str = "auto", kind=None, **overrides: Any):
    """(TRL's, ours) of the same settings, where only the log-prob path differs; a model's own sampling is TRL's."""
    make = lambda name: trainer_of(
        folder / name, adapter=adapter() if adapter else None, kind=kind, **overrides
    )  # fmt: skip
    theirs, ours = make("theirs"), make("ours")
    start = {n: p.detach().clone() for n, p in theirs.model.named_parameters() if p.requires_grad}
    switch_on(ours, engine=False, direction=direction)
    own = trained(theirs)
    counting, calls = chunked_calls()
    with counting:
        found = trained(ours, start)
    assert not calls
    assert any(not value.equal(start[name]) for name, value in own[1].items())
    return own, found
