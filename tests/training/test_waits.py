"""How often the host waits for the device in a whole step of the trainer, and that nothing is lost by asking later."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from lowvram_grpo.kernels.runtime import HAS_TRITON
from peft import LoraConfig
from waits import Waits

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.memory.host import upload
from lowvram_grpo.rewards.runner import RewardRunner
from lowvram_grpo.training.experience import MicroBatch, load_updates, save_updates, split
from lowvram_grpo.training.gradient_check import GradientCheck
from lowvram_grpo.training.loss import KernelChoice, LossSums
from lowvram_grpo.training.metrics import MetricBook, UpdateSums, read, sampler_metrics
from lowvram_grpo.training.scoring import Scores

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def counted(trainer):
    """Counts the waits of each micro-batch (forward and backward), and of each step beside its rollout and those."""
    found = {"micro": [], "step": []}

    @contextmanager
    def outside(waits):
        waits.__exit__(None, None, None)
        yield
        waits.__enter__()

    watch = []

    def micro(inner):
        def run(*args, **kwargs):
            with outside(watch[-1]), Waits() as waits:
                out = inner(*args, **kwargs)
            found["micro"].append(waits.where)
            return out

        return run

    trainer.compute_loss = micro(trainer.compute_loss)
    trainer.accelerator.backward = micro(trainer.accelerator.backward)
    collect, step = trainer.collect, trainer.training_step

    def collected(*args, **kwargs):
        with outside(watch[-1]):
            return collect(*args, **kwargs)

    def stepped(*args, **kwargs):
        if watch:  # what transformers did since
            watch[-1].__exit__(None, None, None)
            found["step"].append(watch[-1].where)
        watch.append(Waits().__enter__())
        return step(*args, **kwargs)

    trainer.collect, trainer.training_step = collected, stepped
    try:
        trainer.train()
    finally:
        watch[-1].__exit__(None, None, None)
    found["step"].append(watch[-1].where)
    return found


@pytest.mark.skipif(not HAS_TRITON, reason="PyTorch's own fold, which no GPU takes, makes lists by nonzero")
def test_a_micro_batch_waits_at_most_twice_and_a_step_ten_times(config, dataset, tokenizer):
    # torch's AdamW reads its count of steps, which lies on the host, and is taken for a wait here.
    args = config(
        per_device_train_batch_size=4, fused_loss="on", logging_steps=1, signal_check=False, self_test=False, beta=0.04,
        kv_cache_dtype="int8", optim="adamw_8bit", optimizer_offload=True, max_completion_length=4,
    )  # fmt: skip
    trainer = GRPOTrainer(
        make_model(), digit_share, args, dataset, processing_class=tokenizer, peft_config=LORA, observer=Quiet()
    )
    trainer.learner.kernels = KernelChoice("cublas", True, "the fused product takes the interpreter minutes")
    trainer.guard.active = True
    found = counted(trainer)
    # On a CPU alone it is looked whether a target lies outside of the vocabulary.
    micro = [[x for x in where if "targets.m" not in x] for where in found["micro"]]
    assert len(micro) == 2 * 2 * 2 and len(found["step"]) == 2
    for forward, backward in zip(micro[::2], micro[1::2]):
        assert len(forward) == 1 and backward == [], (forward, backward)
    assert all(0 < len(where) <= 10 for where in found["step"]), found["step"]


def sums(scale):
    """Of two completions that count, of 6 and 4 tokens times `scale`, and one that does not."""
    number = lambda *x: torch.tensor(x if len(x) > 1 else float(*x))
    return LossSums(
        number(0.5), number(7 * scale), number(2 * scale), number(6.0 * scale, 4.0 * scale, 0.0), number(1.0, 0.0, 0.0),
        number(0.0, 1.0 * scale, 0.0), number(1 - 0.1 * scale), number(1 + 0.2 * scale),
    )  # fmt: skip


def test_an_updates_metrics_are_read_at_once():
    update, scores = UpdateSums(), Scores(None, None, rows=8, diffuse=2, bound=torch.tensor(0.25))
    scored, sampled, mask = torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3)
    with Waits() as waits:
        for scale in (1, 2):
            update.add(sums(scale), scores, sampler_metrics(scored, sampled, mask))
    assert waits.where == []
    with Waits() as waits:
        found = update.take()
    assert len(waits.where) == 1
    assert found == pytest.approx({
        "entropy": 0.7, "kl": 0.2, "clip_ratio/low_mean": 2 / 30, "clip_ratio/high_mean": 0.1,
        "clip_ratio/region_mean": 5 / 30, "clip_ratio/low_min": 0.0, "clip_ratio/high_max": 0.25, "ratio/min": 0.8,
        "ratio/max": 1.4, "sweep/diffuse_ratio": 0.25, "sweep/direction_bound_max": 0.25,
    })  # fmt: skip
    assert len(update.gaps) == 2 and all(type(x) is float for gap in update.gaps for x in gap.values())


def test_no_token_means_no_ratio_and_no_gap():
    update = UpdateSums()
    none = sums(0)._replace(ratio_min=torch.tensor(torch.inf), ratio_max=torch.tensor(-torch.inf))
    update.add(none, Scores(None, None))
    assert not any(name.startswith(("ratio/", "clip_ratio/low_min", "clip_ratio/high_max")) for name in update.take())
    gap = sampler_metrics(torch.zeros(1, 2), torch.full((1, 2), torch.nan), torch.tensor([[0, 0]]))
    book = MetricBook()
    for values in read([gap, sampler_metrics(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1, 0]]))]):
        book.add(values)
    taken = book.take()  # what is not applicable counts in no mean
    assert taken["sampling/sampling_logp_difference/mean"] == 1.0 == taken["sampling/sampling_logp_difference/max"]
    assert read([]) == []


def test_the_gradient_check_asks_once():
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(4)])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[-1].bias.grad[0] = 1.0
    check = GradientCheck("adamw_torch")
    with Waits() as waits:
        check.look(model, [], live=True, clipped=0.0)
    assert check._done and len(waits.where) == 1


def micro(rows=4):
    lengths = [3, 1, 2, 5]
    mask = torch.tensor([[t < n for t in range(5)] for n in lengths])
    ids = torch.arange(20).view(4, 5)
    floats = [x.float() for x in (mask, mask[:, 0], mask)]
    prompt = torch.ones(4, 2, dtype=torch.long)
    return MicroBatch(prompt, prompt, ids, mask.long(), mask, *floats, prompt_lengths=[2] * 4,
                      completion_lengths=lengths, group_sizes=[2, 2])  # fmt: skip


def test_micro_batches_are_split_by_what_the_host_knows():
    with Waits() as waits:
        parts = split(micro(), 3)
    assert waits.where == [] and [part.completion_ids.shape for part in parts] == [(3, 3), (1, 5)]


def test_a_checkpoint_holds_micro_batches_without_what_they_were_uploaded_with(tmp_path):
    whole = micro()
    names = [name for name, value in vars(whole).items() if isinstance(value, torch.Tensor)]
    filler = torch.zeros(2**16)
    for name, moved in zip(names, upload([getattr(whole, n) for n in names] + [filler], filler.device, pack=True)):
        setattr(whole, name, moved)
    save_updates([[whole]], str(tmp_path))
    assert (tmp_path / "rollout.pt").stat().st_size < 20_000
    ((again,),) = load_updates(str(tmp_path), torch.device("cpu"), pytest.fail)
    assert all(torch.equal(getattr(again, name), getattr(micro(), name)) for name in names)


def test_a_rollout_that_another_version_kept_is_sampled_anew_and_that_is_said(tmp_path):
    save_updates([[micro()]], str(tmp_path))
    ((kept,),) = torch.load(tmp_path / "rollout.pt")
    del kept["token_share"]
    torch.save([[kept]], tmp_path / "rollout.pt")
    said = []
    assert load_updates(str(tmp_path), torch.device("cpu"), said.append) is None
    assert len(said) == 1 and tmp_path.name in said[0] and "sample anew" in said[0]


def test_rewards_stay_on_the_host():
    runner = RewardRunner([digit_share], device="meta")  # stands for a GPU
    result = runner(["a"] * 2, ["1 a", "b"], [[1], [2]], {})
    assert result.per_func.device.type == result.total.device.type == "cpu"
    assert result.total.tolist() == [0.5, 0.0]
