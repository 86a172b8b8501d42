"""The entropy bonus: its coefficient step by step, in checkpoints, and what an update's metrics say of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.objective import Objective
from lowvram_grpo.training.entropy_control import EntropyControl, entropy_control_of
from lowvram_grpo.training.experience import MicroBatch, split
from lowvram_grpo.training.loss import micro_loss
from lowvram_grpo.training.metrics import UpdateSums
from lowvram_grpo.training.policy_factor import policy_factor, wanted_rows
from lowvram_grpo.training.scoring import Scores

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
ENTROPIES = (0.5, 0.1, 0.15, 0.3, 0.2, 0.05, 0.9, 0.9, 0.9)


def test_the_coefficient_is_trls_step_by_step():
    """TRL's rule, one line a step, as its `_compute_loss` has it."""
    ours = EntropyControl(0.1, True, low=0.08, high=0.115, delta=0.01, target=0.2)
    coef, last, applied = 0.1, math.inf, []
    for entropy in ENTROPIES:
        assert ours.applied == (coef if last <= 0.2 else 0.0)
        applied.append(ours.applied)
        coef = min(coef + 0.01, 0.115) if entropy <= 0.2 else max(coef - 0.01, 0.08)
        last = entropy
        assert ours.step(entropy) == {"entropy_coef": coef}
    assert applied[0] == 0.0 and {x > 0 for x in applied} == {True, False}
    before = ours.coef, ours.last_entropy
    ours.step(math.nan)
    assert (ours.coef, ours.last_entropy) == before


def test_a_fixed_coefficient_stays_and_is_in_no_checkpoint(tmp_path):
    control = EntropyControl(0.01)
    assert control.applied == 0.01 and control.step(0.0) == {"entropy_coef": 0.01}
    control.save(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("done", range(3))
def test_what_is_saved_goes_on(tmp_path, done):
    made = lambda: EntropyControl(0.1, True, delta=0.03)
    first, second = made(), made()
    for entropy in ENTROPIES[:done]:
        first.step(entropy)
    first.save(str(tmp_path))
    second.restore(str(tmp_path))
    assert second == first
    made().restore(str(tmp_path / "of another run"))


def test_a_configuration_asks_for_it(config):
    assert entropy_control_of(config()) is None
    assert entropy_control_of(config(entropy_coef=0.02)) == EntropyControl(0.02)
    adaptive = config(use_adaptive_entropy=True, entropy_coef_max=0.5, entropy_target=0.3, entropy_coef_delta=0.1)
    assert entropy_control_of(adaptive) == EntropyControl(0.0, True, 0.0, 0.5, 0.1, 0.3)


def update(rows=4, t=5, **kwargs):
    g = torch.Generator().manual_seed(0)
    lengths = [3, 1, 2, 5]
    mask = torch.tensor([[i < n for i in range(t)] for n in lengths])
    mask[2] = False  # truncated, and not counted
    logps, ids = -torch.rand(rows, t, generator=g), torch.ones(rows, t, dtype=torch.long)
    micro = MicroBatch(
        ids[:, :2], ids[:, :2], ids, ids * 0 + (torch.arange(t) < torch.tensor(lengths)[:, None]), mask,
        mask / mask.sum(), torch.tensor([1.0, -1.0, 1.0, 0.0]), logps + torch.randn(rows, t, generator=g) * 0.3,
        torch.full((rows,), 1.0 / mask.sum()), logps + torch.randn(rows, t, generator=g) * 0.3,
        prompt_lengths=[2] * 4, completion_lengths=lengths, **kwargs,
    )  # fmt: skip
    return micro, logps, torch.rand(rows, t, generator=g)


def run(micros, logps, entropy, objective, coef):
    """(gradients of logps and entropy, metrics, acted entropy) of an update in these micro-batches."""
    logps, entropy, row = logps.clone().requires_grad_(), entropy.clone().requires_grad_(), 0
    sums = UpdateSums(objective)
    for micro in micros:
        b, t = micro.loss_mask.shape
        scores = Scores(logps[row : row + b, :t], entropy[row : row + b, :t])
        parts = policy_factor(micro, scores.logps.detach(), scores.entropy.detach(), objective)
        out = micro_loss(scores, micro, objective, False, parts, coef)
        out.loss.backward()
        sums.add(out, scores)
        row += b
    return logps.grad, entropy.grad, sums.take(), sums.acted_entropy


@pytest.mark.parametrize("loss_type, level", [("dapo", "token"), ("dapo", "sequence"), ("cispo", "sequence")])
def test_however_an_update_is_cut(loss_type, level):
    objective = Objective(beta=0.0, loss_type=loss_type, importance_sampling_level=level, epsilon=0.05)
    micro, logps, entropy = update()
    whole = run([micro], logps, entropy, objective, 0.3)
    mask = micro.loss_mask
    torch.testing.assert_close(whole[1], -0.3 * mask / mask.sum())
    assert whole[3] == pytest.approx(float(entropy[mask].mean())) and "policy_loss" in whole[2]
    for rows in (3, 1):
        cut = run(split(micro, rows), logps, entropy, objective, 0.3)
        torch.testing.assert_close(cut[:2], whole[:2])
        assert cut[2] == pytest.approx(whole[2]) and cut[3] == pytest.approx(whole[3])


def test_clip_metrics_count_what_trl_counts():
    """Tokens, or completions where these have one ratio; extremes are of completions, however the update is cut."""
    micro, logps, entropy = update()
    mask = micro.loss_mask
    objective = Objective(beta=0.0, epsilon=0.05)
    ratio = (logps - micro.old_per_token_logps).exp()
    low = (ratio < 0.95) & (micro.advantages < 0)[:, None] & mask
    high = (ratio > 1.05) & (micro.advantages > 0)[:, None] & mask
    rows = mask.any(1)
    share = lambda x: (x.sum(1) / mask.sum(1))[rows]
    for cut in ([micro], split(micro, 2)):
        found = run(cut, logps, entropy, objective, None)[2]
        for name, sign, fold in (("low_min", -1.0, min), ("high_max", 1.0, max)):
            # All of one sign, and far enough that something of every completion is clipped.
            moved = lambda part: replace(
                part,
                advantages=torch.full_like(part.advantages, sign),  # noqa: B023
                old_per_token_logps=part.old_per_token_logps - 0.3 * sign,  # noqa: B023
            )
            over = ((ratio * math.exp(0.3 * sign) - 1) * sign > 0.05) & mask
            extreme = run([moved(part) for part in cut], logps, entropy, objective, None)[2][f"clip_ratio/{name}"]
            assert 0 < extreme == pytest.approx(fold(share(over).tolist()))
        assert found["clip_ratio/low_mean"] == pytest.approx(float(low[mask].float().mean()))
        assert found["clip_ratio/region_mean"] == pytest.approx(float((low | high)[mask].float().mean()))
        assert found["clip_ratio/low_min"] == pytest.approx(float(share(low).min()))
        assert found["clip_ratio/high_max"] == pytest.approx(float(share(high).max())) and high.any()
        assert "policy_loss" not in found
    sequence = run(
        [micro], logps, entropy, Objective(beta=0.0, epsilon=0.0, importance_sampling_level="sequence"), None
    )[2]
    assert sequence["clip_ratio/high_mean"] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert sequence["clip_ratio/high_max"] in (0.0, 1.0) and sequence["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("loss_type, names", [
    ("cispo", {"cispo_clip_ratio"}), ("sapo", set()), ("vespo", {"vespo/phi_seq_mean"}),
    ("luspo", {f"clip_ratio/{x}" for x in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")}),
])  # fmt: skip
def test_metrics_have_the_names_of_the_loss(loss_type, names):
    micro, logps, entropy = update()
    found = run([micro], logps, entropy, Objective(beta=0.0, loss_type=loss_type, epsilon_high=1.1), None)[2]
    assert {name for name in found if "clip" in name or "vespo" in name} == names
    if loss_type == "vespo":
        phi = policy_factor(micro, logps, entropy, Objective(beta=0.0, loss_type="vespo")).phi
        assert found["vespo/phi_seq_mean"] == pytest.approx(float(phi[micro.loss_mask.any(1)].mean()))


def test_rows_that_need_a_gradient():
    micro, _, _ = update()
    mask, live = micro.loss_mask, (torch.tensor([1.0, -1.0, 1.0, 0.0]) != 0)[:, None]
    few = mask & (torch.arange(5) == 0)
    masked = update(entropy_mask=few)[0]
    plain, per_sequence = Objective(beta=0.0), Objective(beta=0.0, importance_sampling_level="sequence")
    assert torch.equal(wanted_rows(micro, plain), mask & live)
    assert torch.equal(wanted_rows(micro, Objective()), mask)
    assert torch.equal(wanted_rows(micro, plain, True), mask)
    assert torch.equal(wanted_rows(masked, plain), few & live)
    assert torch.equal(wanted_rows(masked, plain, True), few)
    assert torch.equal(wanted_rows(masked, per_sequence), mask & live)
    detached = Objective(beta=0.0, loss_type="cispo", importance_sampling_level="sequence")
    assert torch.equal(wanted_rows(masked, detached), few & live)


def test_adaptive_runs_resume_exactly(config, dataset, tokenizer, tmp_path):
    """Six steps at once, and three with the rest from their checkpoint, have one coefficient and one policy."""
    settings = dict(
        use_adaptive_entropy=True, entropy_coef=0.1, entropy_coef_delta=0.04, entropy_target=2.62, num_iterations=2,
        save_steps=3, save_strategy="steps", logging_steps=1, signal_check=False, self_test=False, beta=0.0,
        learning_rate=0.02, lr_scheduler_type="constant", loss_type="cispo", top_entropy_quantile=0.5,
    )  # fmt: skip

    def trained(where, steps, resume=None):
        args = config(output_dir=str(tmp_path / where), max_steps=steps, **settings)
        trainer = GRPOTrainer(
            make_model(), digit_share, args, dataset, processing_class=tokenizer, peft_config=LORA, observer=Quiet()
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole", 6)
    trained("part", 3)
    rest = trained("part", 6, str(tmp_path / "part" / "checkpoint-3"))
    logged = lambda trainer: [row["entropy_coef"] for row in trainer.state.log_history if "entropy_coef" in row]
    assert logged(rest) == logged(whole)[-len(logged(rest)) :] and len(set(logged(whole))) > 2
    assert rest.learner.entropy == whole.learner.entropy
    for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters()):
        assert torch.equal(a, b), name
