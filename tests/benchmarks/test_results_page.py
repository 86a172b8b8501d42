"""RESULTS.md says of each claim what was measured, or that nothing was; and the pictures are drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import claims
import pytest
import report
from plots import draw

ROOT = Path(report.__file__).parents[1]
CARD = {
    "gpu": "NVIDIA Made Up", "capability": "9.0", "memory_gib": 79.1, "cuda": "13.0", "commit": "c0ffee00" * 5,
    "versions": {"torch": "2.11.0", "triton": "3.6.0"}, "dry_run": False, "utc": "2026-11-27T00:00:00Z",
}  # fmt: skip


def memory(model, total, predicted, **extra):
    phases = ("rollout", "score", "forward", "backward", "optimizer")
    parts = {"base weights": 0.55 * predicted, "activations": 0.2 * predicted, "head": 0.1 * predicted,
             "CUDA context": 0.1 * predicted, "fragmentation": 0.05 * predicted}  # fmt: skip
    row = {
        **CARD, "part": "memory", "op": "train-step", "provider": "ours", "model": model, "preset": "8gb",
        "vram_gib": 8.0,
        "cap_gib": 6.3, "rungs": [], "fits": True, "fits_predicted": True, "predicted_peak_mib": predicted,
        "predicted_peak_phase": "rollout", "predicted_mib": {p: predicted * (1 - i / 20) for i, p in enumerate(phases)},
        "predicted_parts_mib": {p: {k: v * (1 - i / 20) for k, v in parts.items()} for i, p in enumerate(phases)},
        "total_mib": total, "context_mib": 420.0, "context_known": True, "fragmentation": 0.05, "unseen_mib": 33.0,
        "peak_reserved_gib": (total - 420) / 1024, "step_s": [9.0, 8.0], "setup": "device=cuda steps=2",
        "phases_mib": {p: {"allocated": (total - 420) * (1 - i / 20) * 0.97, "reserved": total - 420}
                       for i, p in enumerate(phases)},
    }  # fmt: skip
    return {**row, **extra}


def train(provider, shape, width, ms, mib):
    return {
        **CARD, "part": "kernels", "op": "train", "provider": provider, "shape": shape, "width": width, "rows": 4096,
        "dtype": "bfloat16", "profile": "peaked", "ms": ms, "peak_mib": mib, "gate": "passed", "error_grad": 1e-3,
        "error_logps": 1e-3, "floor_ms": 1.5, "ceiling_tflops": 700.0, "share_of_ceiling": 0.7, "diffuse_share": 0.01,
    }  # fmt: skip


def rollout(provider, tokens_s, speedup, head="dense", group=8, model="Qwen2.5-0.5B"):
    return {
        **CARD, "part": "rollouts", "op": "rollout", "provider": provider, "model": model, "weights": "nf4",
        "dtype": "bfloat16", "head": head, "group": group, "rows": group, "prompts": 1, "prompt": 256, "tokens": 256,
        "length": 64, "lora": 16, "threads": 8, "profile": "sampled", "setup": f"G {group}, {head}",
        "tokens_per_second": tokens_s, "seconds": 64 * group / tokens_s, "speedup": speedup, "limit_ms": 1.4,
        "share_of_limit": 0.4, "step_ms": 3.5, "bandwidth_gbs": 3000.0, "prefill_s": 0.02, "kv_mib": 10.0,
        "peak_mib": 99.0,
    }  # fmt: skip


def made_up():
    check = lambda part, path, status, **more: {
        **CARD,
        "part": part,
        "op": "check",
        "path": path,
        "status": status,
        **more,
    }
    unpredicted = {"provider": "trl", "predicted_mib": None, "predicted_peak_mib": None}
    rows = [
        memory("Qwen2.5-0.5B", 1210.0, 1130.0), memory("Qwen2.5-7B", 5500.0, 5430.0),
        memory("Qwen3-8B", 6100.0, 5940.0), memory("Qwen2.5-0.5B", 3000.0, 1.0, step_s=[21.0, 19.5], **unpredicted),
        check("smoke", "oom", "passed", events=["forward: per_device_train_batch_size=4"], loss=[0.1, 0.2]),
        check("smoke", "graphs:int8", "passed", graphs=2, completions_equal=8, of=8),
        check("tests", "tests/gpu/test_a.py::test_one", "passed"),
        check("tests", "tests/gpu/test_a.py::test_two", "failed", error="AssertionError: 1 | 2"),
        {**CARD, "part": "train", "op": "demo", "model": "bundled", "steps": 60, "reward_first": 0.4,
         "reward_last": 0.8, "step_s": 0.3, "peak_gib": 0.4,
         "rewards": [0.4 + i / 150 + 0.05 * (i % 3) for i in range(60)]},
        {**CARD, "part": "profile", "op": "decode step", "model": "Qwen2.5-0.5B", "total_us": 3000.0, "busy_us": 900.0,
         "launches": 1354, "kernels": [{"us": 300.0, "calls": 48, "name": "gemm"}],
         "gaps": [{"us": 40.0, "host": "aten::mm", "after": "a", "before": "b"}]},
    ]  # fmt: skip
    for shape, width, scale in (("qwen2.5-0.5b", 896, 1), ("qwen2.5-1.5b", 1536, 2), ("llama3.1-8b", 4096, 4)):
        times = {"ours-fused": (2.0, 70.0), "ours-cublas": (2.4, 90.0), "eager": (5.0, 3700.0), "liger": (9.0, 800.0)}
        rows += [train(name, shape, width, ms * scale, mib) for name, (ms, mib) in times.items()]
    for model, speed in (("Qwen2.5-0.5B", 1.0), ("Qwen2.5-7B", 0.2)):
        rows += [rollout("ours", 3600 * speed, 4.0, model=model), rollout("hf-dynamic", 900 * speed, 1.0, model=model),
                 rollout("ours", 4400 * speed, 4.9, "int8", model=model),
                 rollout("ours-eager", 1800 * speed, 2.0, model=model)]  # fmt: skip
    return rows


@pytest.fixture
def results(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_up()), encoding="utf-8")
    return tmp_path


def test_the_readme_says_what_is_quoted():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("*", "").split())
    for claim in claims.CLAIMS:
        assert claim.quote is None or claim.quote in readme, claim.quote


def test_without_rows_of_a_gpu_nothing_is_measured_on_one():
    rows = report.load(ROOT / "benchmarks" / "results")
    text = report.document([row for row in rows if row["gpu"] == "cpu"], {}, roofline=True)
    lines = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith(("| “", "| (not"))}
    assert "**Nothing has been measured on a GPU yet.**" in text and len(lines) == len(claims.CLAIMS)
    for claim in claims.CLAIMS:
        assert (claims.NOT in lines[claim.of]) != claim.cpu
    if all(row["gpu"] == "cpu" for row in rows):  # the rows that are committed make the page that is committed
        assert (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8") == text


def test_every_claim_has_its_measured_value_card_and_commit(results):
    rows = report.load(results)
    text = report.document(rows, {}, roofline=False)
    found = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith(("| “", "| (not"))}
    for claim in claims.CLAIMS:
        line = found[claim.of]
        assert claim.cpu or ("NVIDIA Made Up; torch 2.11.0, triton 3.6.0; commit c0ffee00c0ff" in line), line
    assert "Qwen3-8B trains: 5.96 GiB of 6.30 (predicted 5.80)" in text
    assert "took forward: per_device_train_batch_size=4, and went on" in text
    assert "qwen2.5-0.5b, 4096 rows: 70 MiB (eager 3700)" in text and "1.33 x the bare product" in text
    assert "8 of 8 completions" in text and "2.00 to 2.00 x as fast as without" in text
    assert "Qwen2.5-0.5B, int8 head, G 8, 256 tokens: 4400 tokens/s, 4.90 x generate" in text
    assert "8.0 s a step, 0.77 GiB; TRL 19.5 s" in text and "1 tests of tests/gpu pass, 1 failed" in text
    assert "Nothing has been measured on a GPU" not in text
    # No cell breaks its table.
    assert not [line for line in text.splitlines() if line.startswith("| tests/gpu") and line.count("|") != 4]


@pytest.mark.parametrize("setting", ["attention=xformers", "fused_ops=off"])
def test_a_run_that_is_compared_with_another_is_no_claim(setting):
    rows = made_up()
    others = [{**r, "setup": f"device=cuda {setting}", "total_mib": 1.0, "fits": False, "step_s": [99.0]}
              for r in rows if r.get("part") == "memory" and r.get("provider") == "ours"]  # fmt: skip
    assert others and [c.find(rows + others) for c in claims.CLAIMS] == [c.find(rows) for c in claims.CLAIMS]


def test_a_model_that_did_not_fit_is_no_success(results):
    (row,) = [r for r in made_up() if r.get("model") == "Qwen3-8B"]
    said = claims.eight_gigabytes([{**row, "fits": False}]).said
    assert "does NOT fit" in said
    failed = {**CARD, "part": "smoke", "op": "check", "path": "oom", "status": "failed", "error": "the guard slept"}
    assert claims.step_down([failed]).said == "FAILED: the guard slept"


def test_pictures_are_drawn_of_a_gpu_alone(results):
    drawn = draw(report.load(results), "NVIDIA Made Up", results / "plots", "card")
    names = [path.name for path in drawn]
    assert names == ["card-train-4096-bfloat16-peaked.png", "card-rollouts.png", "card-reward.png", "card-memory.png",
                     "card-memory-8gb.png"]  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in drawn)
    cpu = [{**row, "gpu": "cpu"} for row in report.load(results) if row.get("op") in ("rollout", "demo")]
    assert draw(cpu, "a CPU", results / "none", "cpu") == []


def test_every_row_belongs_to_a_section(results):
    text = report.document(report.load(results), {}, roofline=False)
    for title in ("Where a step's time goes", "The device's tests and checks", "Rollouts", "Peak memory, predicted",
                  "Whole training steps", "Log-probs and their gradient", "The bundled model"):  # fmt: skip
        assert re.search(rf"^### {title}", text, re.M), title
