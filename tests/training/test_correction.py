"""correction.py against its formula in float64, and what of it a configuration and the log show."""

from __future__ import annotations

import math

import pytest
import torch

from lowvram_grpo import UserError
from lowvram_grpo.recipe.config import CORRECTION_MODES
from lowvram_grpo.training.correction import Correction, quotients
from lowvram_grpo.training.loss_settings import correction_of
from lowvram_grpo.training.metrics import sampler_metrics


def batch(seed=0, rows=5, tokens=7):
    """Log-probs that differ by up to some nats; masked places hold what must not matter."""
    generator = torch.Generator().manual_seed(seed)
    scored = -torch.rand(rows, tokens, generator=generator) * 3
    sampled = scored + torch.randn(rows, tokens, generator=generator) * 0.8
    mask = torch.tensor([[t < n for t in range(tokens)] for n in (7, 1, 4, 0, 6)])
    scored[~mask], sampled[~mask] = math.inf, math.nan
    return scored, sampled, mask


def formula(scored, sampled, mask, mode, low, high):
    """Token by token, in Python's float64."""
    out = []
    for p, q, m in zip(scored.tolist(), sampled.tolist(), mask.tolist()):
        gaps = [a - b if inside else 0.0 for a, b, inside in zip(p, q, m)]
        if mode.startswith("sequence"):
            gaps = [sum(gaps)] * len(gaps)
        row = []
        for ratio in map(math.exp, gaps):
            if mode.endswith("truncate"):
                ratio = min(max(ratio, low or 0.0), high or math.inf)
            elif ratio < (low or 0.0) or ratio > (high or math.inf):
                ratio = 0.0
            row.append(ratio)
        out.append(row)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("mode", CORRECTION_MODES)
@pytest.mark.parametrize("low, high", [(None, 1.3), (0.5, 2.0), (0.7, None)])
def test_weights_are_those_of_the_formula(mode, low, high):
    scored, sampled, mask = batch()
    found = Correction(mode, low, high).weights(scored.requires_grad_(), sampled, mask)
    expected = formula(scored, sampled, mask, mode, low, high)
    rows = mask.any(1)  # of a completion without a token nobody asks
    inside = mask if mode.startswith("token") else rows[:, None].expand_as(mask)
    assert torch.allclose(found.double()[inside], expected[inside], rtol=2e-6, atol=0)
    assert found.dtype == torch.float32 and not found.requires_grad and found.isfinite().all()
    raw = quotients(scored, sampled, mask, per_sequence=mode.startswith("sequence"))
    assert (found != raw).any()  # the bounds do something here


@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_equal_log_probs_weigh_exactly_one(mode):
    scored, _, mask = batch()
    assert (Correction(mode, 0.5, 2.0).weights(scored, scored.clone(), mask) == 1).all()


@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_a_row_does_not_depend_on_its_neighbours(mode):
    scored, sampled, mask = batch()
    whole = Correction(mode, 0.5, 2.0).weights(scored, sampled, mask)
    apart = [Correction(mode, 0.5, 2.0).weights(*(x[i : i + 1] for x in (scored, sampled, mask))) for i in range(5)]
    assert torch.equal(whole, torch.cat(apart))


def test_huge_gaps_stay_finite_and_broken_log_probs_stay_visible():
    scored, mask = torch.tensor([[-1.0, -500.0, -1.0]]), torch.ones(1, 3)
    sampled = torch.tensor([[-900.0, -1.0, math.nan]])
    for mode in CORRECTION_MODES[:2]:
        found = Correction(mode, None, 3.0).weights(scored, sampled, mask)
        assert found[0, 0] == (3.0 if mode.endswith("truncate") else 0.0) and 0 < found[0, 1] < 1e-8
        assert found[0, 2].isnan()


def test_metrics_count_what_was_applied_and_keep_the_raw_ratio():
    scored, sampled = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, 9.0]]), torch.full((2, 3), -1.0)
    sampled[0, 0] = -1.0 - math.log(8.0)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    token = sampler_metrics(scored, sampled, mask, Correction("token_truncate", None, 3.0))
    assert token["sampling/importance_sampling_ratio/max"] == 3.0
    assert token["sampling/importance_sampling_ratio/mean"] == pytest.approx(7 / 5)
    assert token["sampling/raw_importance_sampling_ratio/max"] == pytest.approx(8.0)
    assert token["sampling/corrected_share"] == pytest.approx(1 / 5)
    assert token["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(8.0) / 5)
    whole = sampler_metrics(scored, sampled, mask, Correction("sequence_mask", None, 3.0))
    assert whole["sampling/importance_sampling_ratio/mean"] == pytest.approx(0.5)  # one of two completions is out
    assert whole["sampling/corrected_share"] == pytest.approx(0.5)
    plain = sampler_metrics(scored, sampled, mask)
    assert plain["sampling/importance_sampling_ratio/max"] == pytest.approx(8.0) and len(plain) == 13
    nothing = sampler_metrics(scored, sampled, mask * 0, Correction())
    assert len(nothing) == 17 and all(value.isnan() for value in nothing.values())


def test_divergences_from_the_sampler_are_ms_swifts():
    """Written out in float64 from ms-swift's `rollout_correction/*`."""
    scored, sampled, mask = batch()
    found = sampler_metrics(scored, sampled, mask)
    rows = [
        [(p, q) for p, q, m in zip(ps, qs, ms) if m]
        for ps, qs, ms in zip(scored.tolist(), sampled.tolist(), mask.tolist())
    ]
    rows = [row for row in rows if row]
    mean = lambda values: sum(values) / len(values)
    gaps = [p - q for row in rows for p, q in row]
    of_rows = [mean([p - q for p, q in row]) for row in rows]
    expected = {
        "kl": mean(gaps),
        "k3_kl": mean([math.exp(g) - g - 1 for g in gaps]),
        "training_ppl": mean([math.exp(-mean([p for p, _ in row])) for row in rows]),
        "rollout_ppl": mean([math.exp(-mean([q for _, q in row])) for row in rows]),
        "log_ppl_diff": -mean(of_rows),
        "ppl_ratio": mean([math.exp(-g) for g in of_rows]),
        "chi2_token": mean([math.exp(2 * g) for g in gaps]) - 1,
        "chi2_seq": mean([math.exp(2 * g) for g in of_rows]) - 1,
    }
    for name, value in expected.items():
        assert float(found[f"rollout_correction/{name}"]) == pytest.approx(value, rel=1e-5), name
    equal = sampler_metrics(sampled, sampled, mask)
    assert all(equal[f"rollout_correction/{name}"] == 0 for name in ("kl", "k3_kl", "log_ppl_diff", "chi2_token"))


def test_a_configuration_switches_it_on(config):
    assert correction_of(config()) is None
    assert correction_of(config(use_vllm=True, vllm_importance_sampling_correction=False)) is None
    assert correction_of(config(use_vllm=True)) == Correction("sequence_mask", None, 3.0)  # TRL's defaults
    capped = config(use_vllm=True, vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_cap=2.0)
    assert correction_of(capped) == Correction("token_truncate", None, 2.0)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"mode": "tokens"}, "one of token_truncate, token_mask"),
        ({"clip_min": 3.0}, "first must be below the second"),
        ({"mode": "token_truncate", "clip_max": None}, "needs a bound"),
        ({"clip_max": 0.0}, "above 0"),
        ({"clip_min": -1.0}, "at least 0"),
    ],
)
def test_bounds_that_make_no_sense(config, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        config(**{f"vllm_importance_sampling_{name}": value for name, value in settings.items()})
