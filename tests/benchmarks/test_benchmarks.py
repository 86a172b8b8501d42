"""The benchmarks run where there is no GPU, and say that this was no measurement."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import bench_rollout
import correct
import part_memory
import pytest
import report
import rollout_limit
import rollout_providers
import roofline
import torch
from conftest import make_model
from correct import oracle, verdict
from kernel_tables import OURS
from lowvram_grpo.kernels.head import Head
from plots import draw
from profiles import SHAPES, Shape, head_weight, inputs_of, measured

from lowvram_grpo.run import jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "only, parts",
    [
        ("profile", {"profile"}),
        pytest.param("sweep,memory-0.5B,profile", {"kernels", "memory", "profile"}, marks=pytest.mark.full),
    ],
    ids=["one part", "three parts"],
)
def test_the_dry_run_of_the_suite(only, parts, tmp_path):
    call = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", "--dry-run", "--minutes", "15", "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    call += ["--only", only]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["part"] for row in rows} == {"suite"} | parts
    assert all(row["dry_run"] for row in rows)
    assert not [row["error"] for row in rows if row.get("error")]
    if "kernels" in parts:
        timed = {row["provider"] for row in rows if row.get("op") == "train" and "ms" in row}
        assert {"ours-torch", "eager"} <= timed
        if sys.platform == "linux":
            assert {"ours-fused", "ours-cublas"} <= timed
    # Nothing is compiled by torch.compile unless it is asked for.
    assert not [row for row in rows if "compiled" in (row.get("provider") or "")]
    assert report.load(tmp_path) == [] and len(report.load(tmp_path, dry_run=True)) >= len(rows)
    # As much as comes back from a machine that is lent.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.txt", "rows.jsonl", "suite.log"]
    assert "all files are within what comes back" in done.stdout


def test_the_dry_run_of_the_rollout_benchmark(tmp_path):
    call = ["--dry-run", "--out", str(tmp_path / "rollouts.jsonl")]
    bench_rollout.main(call)
    rows = jsonl.read(tmp_path / "rollouts.jsonl")
    by = {row["provider"]: row for row in rows if row["head"] == "dense"}
    small = {row["provider"]: row for row in rows if row["head"] == "int8"}
    assert set(by) == set(rollout_providers.PROVIDERS) and all(row["dry_run"] for row in rows)
    # The presets' head is ours alone; what it is held against is generate with the dense one.
    assert set(small) == {name for name in by if name.startswith("ours")}
    for name in ("ours", "ours-fused", "ours-unfused"):
        ratio = small[name]["tokens_per_second"] / by["hf-dynamic"]["tokens_per_second"]
        assert small[name]["speedup"] == pytest.approx(ratio)
        assert small[name]["limit_ms"] < by[name]["limit_ms"]  # a byte a weight where there were four
    assert "missing" in by.pop("ours-eager")
    assert not [row["error"] for name, row in by.items() if name != "hf-continuous" and row.get("error")]
    # G = 4, 8 tokens in, 6 out, the last of which nobody feeds; we feed a prompt's last token once a completion.
    config = json.loads((Path(bench_rollout.DRY_MODEL) / "config.json").read_text(encoding="utf-8"))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head_dim * 4 / 2**20
    assert by["hf-dynamic"]["kv_mib"] == pytest.approx(token * 4 * (8 + 6 - 1))
    assert by["ours"]["kv_mib"] == pytest.approx(token * (8 - 1 + 4 * 6))
    for name in ("ours", "ours-int8", "ours-merged", "hf-dynamic", "hf-static"):
        row = by[name]
        assert row["tokens_per_second"] == pytest.approx(4 * 6 / row["seconds"])
        assert 0 < row["prefill_s"] < row["seconds"] and 0 < row["limit_ms"] < row["step_ms"]
    bench_rollout.main(call)
    assert len(jsonl.read(tmp_path / "rollouts.jsonl")) == len(rows)
    text = report.document(report.load(tmp_path, dry_run=True), {}, roofline=False)
    assert "| 1 x 4 | ours |" in text and "1 thread of the CPU" in text and "| ours-eager |" not in text


def test_rollouts_are_not_timed_without_what_they_are_to_show():
    model = make_model()
    assert "no graphs" in rollout_providers.missing("ours-eager", model, "none")
    assert "merged" in rollout_providers.missing("ours-merged", model, "none")
    assert rollout_providers.missing("ours", model, "nf4") is None


def test_replay_is_held_against_steps_that_are_launched_one_by_one(monkeypatch):
    task = rollout_providers.Task([[5, 6, 7]], 2, 4, greedy=False)
    found = rollout_providers.replay_is_eager(make_model(), task)
    # Nothing is captured on a CPU, which is no proof of anything.
    assert found == {"completions_equal": 2, "of": 2, "graphs": 0, "replay_equals_eager": None}
    # A replay that does nothing.
    monkeypatch.setattr(rollout_providers.StepGraphs, "__call__", lambda graphs, rows: None)
    assert rollout_providers.replay_is_eager(make_model(), task)["completions_equal"] == 0


def test_the_row_of_graphs_counts_captures(monkeypatch):
    class Graph:
        def __init__(self, replay):
            self.replay = replay

    def capture(graphs, rows):  # returns nothing, as the real one does
        graphs._graphs[rows] = Graph(lambda: graphs.step(rows))

    always = property(lambda graphs: True, lambda graphs, value: None)
    monkeypatch.setattr(rollout_providers.StepGraphs, "enabled", always, raising=False)
    monkeypatch.setattr(rollout_providers.StepGraphs, "_warm_up", lambda graphs, rows: graphs.step(rows))
    monkeypatch.setattr(rollout_providers.StepGraphs, "_capture", capture)
    task = rollout_providers.Task([[5, 6, 7]], 2, 4, greedy=False)
    found = rollout_providers.replay_is_eager(make_model(), task)
    assert found["graphs"] >= 1
    assert found == {"completions_equal": 2, "of": 2, "graphs": found["graphs"], "replay_equals_eager": True}


@pytest.mark.parametrize("tied", (True, False))
def test_a_step_reads_every_weight_once_and_no_embedding(tied):
    model = make_model(tie_word_embeddings=tied)
    every = sum(p.nbytes for p in model.parameters())
    embedding = 0 if tied else model.get_input_embeddings().weight.nbytes
    assert rollout_limit.weight_bytes(model) == every - embedding
    assert rollout_limit.kv_bytes_a_token(model, 2) == 2 * 2 * 2 * 8 * 2


def test_one_provider_that_fails_costs_no_other_its_rows(tmp_path, monkeypatch):
    def fails(model, task):
        raise ValueError("not today")

    monkeypatch.setitem(rollout_providers.PROVIDERS, "hf-static", fails)
    out = tmp_path / "rollouts.jsonl"
    bench_rollout.main(["--dry-run", "--out", str(out), "--heads", "dense", "--providers", "hf-static", "ours"])
    rows = {row["provider"]: row for row in jsonl.read(out)}
    assert rows["hf-static"]["error"] == "ValueError: not today" and "seconds" not in rows["hf-static"]
    assert rows["ours"]["speedup"] > 0 and set(rows) == {"hf-static", "ours"}


def measured_row(provider, ms, gate="passed", **extra):
    return {
        "part": "kernels", "op": "train", "provider": provider, "shape": "qwen2.5-0.5b", "rows": 4096,
        "dtype": "bfloat16", "profile": "peaked", "ms": ms, "peak_mib": 10.0, "gate": gate, "error_grad": 1e-3,
        "error_logps": 1e-3, "gpu": "Card", "commit": "c0ffee00", "versions": {"torch": "2"}, "dry_run": False,
        "utc": "2026", **extra,
    }  # fmt: skip


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_failed_gate_wins_nothing(tmp_path):
    rows = [
        measured_row("ours-fused", 1.0, gate="failed"),
        measured_row("ours-cublas", 4.0),
        measured_row("eager", 8.0),
    ]
    write(tmp_path / "a" / "kernels.jsonl", rows)
    loaded = report.load(tmp_path)
    (line,) = report.headlines(loaded)
    assert "ours-cublas 4.00 ms" in line and "2.00 x" in line
    text = report.document(loaded, {}, roofline=False)
    assert "gate failed" in text and "2.00 (cublas : eager)" in text and "1.00 / 10" not in text


def test_rows_of_other_commits_and_dry_runs_are_not_compared(tmp_path):
    rows = [measured_row("ours-fused", 1.0), measured_row("eager", 8.0, commit="decade00"),
            measured_row("trl", 9.0, dry_run=True)]  # fmt: skip
    write(tmp_path / "a" / "kernels.jsonl", rows)
    assert len(report.load(tmp_path)) == 2 and report.headlines(report.load(tmp_path)) == []


def test_the_rivals_script_gets_the_commit_of_its_header(tmp_path):
    header = {"part": "rivals", "op": "header", "gpu": "Card", "commit": "c0ffee00", "versions": {}, "dry_run": False}
    row = {"part": "train", "provider": "trl", "model": "3b", "fits": False, "cap_gib": 8.0, "utc": "2026"}
    write(tmp_path / "rivals.jsonl", [header, row])
    text = report.document(report.load(tmp_path), {}, roofline=False)
    assert "| 3b |  | trl | 8.00 | no |" in text


def memory_row(**extra):
    return {
        "part": "memory", "op": "train-step", "provider": "ours", "model": "Qwen3-8B", "preset": "8gb", "vram_gib": 8.0,
        "cap_gib": 6.3, "rungs": [], "fits": True, "fits_predicted": True, "predicted_peak_mib": 6000.0,
        "predicted_peak_phase": "rollout", "predicted_mib": {"rollout": 6000.0},
        "predicted_parts_mib": {"rollout": {"activations": 6000.0}}, "total_mib": 6300.0, "context_mib": 350.0,
        "context_known": True, "fragmentation": 0.05, "unseen_mib": 33.0, "peak_reserved_gib": 5.8,
        "phases_mib": {"rollout": {"allocated": 5600.0, "reserved": 5950.0}}, "step_s": [9.0, 8.0], "gpu": "Card",
        "commit": "c0ffee00", "versions": {"torch": "2"}, "dry_run": False, "utc": "2026", **extra,
    }  # fmt: skip


def test_predicted_peaks_stand_beside_measured_ones(tmp_path):
    write(
        tmp_path / "a" / "memory.jsonl", [memory_row(), memory_row(preset="6gb", fragmentation=0.11, context_mib=420.0)]
    )
    rows = report.load(tmp_path)
    text = report.document(rows, {}, roofline=False)
    assert "| Qwen3-8B | 8gb | 6451 | 6000 | 6300 | +300 | +5.0% | rollout | +33 |" in text
    assert "from 2 runs on this card: context 350 to 420 MiB (now 400); fragmentation 0.050 to 0.110 (now 0.08)" in text
    drawn = draw(rows, "Card", tmp_path / "plots", "card")
    assert [path.name for path in drawn] == ["card-memory.png", "card-memory-8gb.png", "card-memory-6gb.png"]


def test_only_measured_rows_calibrate(tmp_path):
    full = memory_row(fits=False, error="UserError: Out of GPU memory in the rollout phase")
    trl = memory_row(provider="trl", predicted_peak_mib=None)
    write(tmp_path / "a" / "memory.jsonl", [full, trl])
    text = report.document(report.load(tmp_path), {}, roofline=False)
    assert "Calibration of memory/overheads.py: nothing measured." in text
    assert "| Qwen3-8B | 8gb | ours | 6.30 | no |" in text and "| Qwen3-8B | 8gb | trl | 6.30 | yes |" in text


def test_the_runs_of_the_memory_part_are_in_order_of_worth(monkeypatch):
    monkeypatch.setattr(part_memory, "planned", lambda case: argparse.Namespace(fits=case.card >= 6))
    runs = [(provider, case.recipe.model, case.recipe.preset) for provider, case in part_memory.in_order(False)]
    assert runs[:2] == [("ours", "Qwen2.5-0.5B", "8gb"), ("trl", "Qwen2.5-0.5B", "8gb")]
    assert ("ours", "Qwen3-14B", "12gb") in runs and ("ours", "Qwen3-14B", "8gb") not in runs
    assert ("ours", "Qwen3-8B", "6gb") in runs and ("trl", "Qwen3-8B", "8gb") not in runs
    assert len(set(runs)) == len(runs) == 16
    asked = lambda *more: [
        (provider, case.recipe.model, case.recipe.preset)
        for provider, case in part_memory.chosen(argparse.Namespace(**{**vars(part_memory.parsed(["--out", "x"])),
                                                                       "dry_run": False, **dict(more)}))
    ]  # fmt: skip
    assert asked() == runs
    eight = ("models", ["Qwen3-8B"]), ("presets", ["8gb"]), ("providers", ["ours"])
    assert asked(*eight) == [("ours", "Qwen3-8B", "8gb")]
    assert asked(("models", ["Qwen2.5-0.5B"]), ("presets", ["8gb"])) == runs[:2]
    # A setting that this version may not have.
    has = "attention" in part_memory.GRPOConfig.__dataclass_fields__
    found = asked(("models", ["Qwen2.5-0.5B"]), ("attention", ["sdpa"]))
    assert found == ([("ours", "Qwen2.5-0.5B", "8gb")] if has else [])


def test_without_rows_the_report_says_what_to_run():
    text = report.document([], {}, roofline=True)
    assert "Nothing has been measured on a GPU yet" in text and report.COMMAND in text
    assert "Modelled, not measured" in text


def test_the_modelled_paths_are_in_order():
    for card in roofline.CARDS.values():
        fused, cublas, torch_path = (roofline.model(card, SHAPES["gemma3-1b"], 4096, p).ms for p in report_paths())
        assert 0 < fused <= cublas <= torch_path


def report_paths():
    return [name.removeprefix("ours-") for name in OURS]


def test_profiles_differ_as_models_do():
    weight = head_weight(Shape(20000, 256), torch.float32, torch.device("cpu"))
    peaked, mixed, diffuse = (measured(inputs_of(weight, 64, name)) for name in ("peaked", "mixed", "diffuse"))
    assert 0.2 < peaked["entropy_mean"] < 1.0 < mixed["entropy_mean"] < 3.0 < diffuse["entropy_mean"]
    assert peaked["kept_mean"] < mixed["kept_mean"] < diffuse["kept_mean"]


def test_the_oracle_is_autograd(monkeypatch):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    h, ref, w, c, e = draw(5, 8).requires_grad_(), draw(5, 8), draw(5000, 8), draw(5), draw(5)
    t = torch.randint(0, 5000, (5,), generator=g)
    logp, ref_logp = torch.log_softmax(h @ w.T, -1), torch.log_softmax(ref @ w.T, -1)
    logps, kl = logp.gather(1, t[:, None])[:, 0], (logp.exp() * (logp - ref_logp)).sum(1)
    (c * logps + e * kl).sum().backward()
    # The head's tiles are float32; what is tested is the formula.
    found = oracle(h.detach(), Head(w), t, c, ref, e)
    for a, b in zip(found, (logps.detach(), kl.detach(), h.grad)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    eager = correct.errors(found, logps.detach() + 1e-3, None, h.grad)
    assert verdict({"error_logps": 1.9e-3}, eager, found, ours=True, slack=0.0) is None
    assert "error_logps" in verdict({"error_logps": 3e-3}, eager, found, ours=True, slack=0.0)
    assert "above" in verdict({"error_logps": float("nan")}, eager, found, ours=False, slack=0.0)
