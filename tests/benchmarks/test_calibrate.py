"""Rows become proposals, in both directions, and never a change by themselves."""

from __future__ import annotations

import subprocess
import sys

import calibrate
import constants
import crashes
import pytest
import report

CARD = {"gpu": "Card", "capability": "9.0", "commit": "c0ffee00" * 5, "dry_run": False, "process": "1-1"}
NAMES = {one.name: one for one in constants.CONSTANTS}


def said(name, rows, now=None):
    """(value, evidence) proposed from `rows`, for a source that says `now`."""
    constant = NAMES[name]
    found = constant.propose(constants.measured(rows), now if now is not None else constant.now())
    return found and found.value


def memory(**extra):
    return {
        **CARD, "part": "memory", "fits": True, "total_mib": 6000.0, "predicted_peak_mib": 5900.0, "context_mib": 400.0,
        "context_known": True, "fragmentation": 0.08, "unseen_mib": 9.0, "setup": "", **extra,
    }  # fmt: skip


def kernel(provider, width, ms, **extra):
    return {
        **CARD, "part": "kernels", "op": "train", "provider": provider, "width": width, "ms": ms, "shape": str(width),
        "rows": 4096, "dtype": "bfloat16", "profile": "peaked", "gate": "passed", **extra,
    }  # fmt: skip


def widths(*ratios):
    """Pairs of rows; a ratio above 1 says that the fused path is faster."""
    return [row for width, ratio in ratios for row in (kernel("ours-fused", width, 1.0),
                                                       kernel("ours-cublas", width, ratio))]  # fmt: skip


def knob(name, seconds):
    return [{**CARD, "part": "knobs", "op": name, "model": "m", "value": v, "seconds": s, "peak_mib": 1.0}
            for v, s in seconds.items()]  # fmt: skip


def op(kind, fused, eager):
    case = {**CARD, "part": "decode_ops", "op": kind, "shape": "a", "rows": 8, "dtype": "bfloat16"}
    return [{**case, "provider": "fused", "us": fused}, {**case, "provider": "eager", "us": eager}]


@pytest.mark.parametrize("constant", constants.CONSTANTS, ids=lambda one: one.name)
def test_every_constant_is_found_where_the_table_says(constant):
    assert constant.file is None or constant.now() is not None


def test_overheads_follow_the_largest_that_was_seen():
    name = "CUDA context, MiB"
    assert said(name, [memory(context_mib=512.0), memory(context_mib=433.0)], "400") == "520"
    assert said(name, [memory(context_mib=251.0)], "400") == "260"
    assert said(name, [memory(context_mib=391.0)], "400") == "400"
    assert said(name, [memory(context_mib=512.0, context_known=False)], "400") is None
    assert said("fragmentation", [memory(fragmentation=0.113), memory(fragmentation=0.02)], "0.08") == "0.12"
    assert said("fragmentation", [memory(fragmentation=0.021)], "0.08") == "0.03"
    assert said("cublas, MiB", [memory(unseen_mib=34.2)], "9") == "35"
    assert said("cublas, MiB", [memory(unseen_mib=11.0)], "9") == "9"
    assert said("overheads measured", [memory()], "False") == "True"


def test_the_fused_path_goes_as_far_as_it_wins():
    name = "FUSED_MAX_WIDTH"
    assert said(name, widths((896, 2.0), (2048, 1.2), (3072, 0.9)), "2048") == "2048"
    assert said(name, widths((896, 2.0), (2048, 1.2), (3072, 1.1), (4096, 0.9)), "2048") == "3072"
    assert said(name, widths((896, 2.0), (1536, 0.9), (2048, 1.2)), "2048") == "896"
    assert said(name, widths((896, 0.9)), "2048") == "0"
    assert said(name, widths((896, 2.0), (2048, 1.2)), "2560") == "2560"
    failed = [kernel("ours-fused", 896, 0.1, gate="failed"), kernel("ours-cublas", 896, 1.0)]
    assert said(name, failed, "2048") is None


def test_a_kind_is_switched_on_where_it_is_faster_in_every_case():
    rows = [*op("rope", 1.0, 2.0), *op("swiglu", 3.0, 2.0), *op("int8_head", 1.0, 4.0)]
    assert said("fused_ops auto", rows, "()") == '("rope", "int8_head")'
    assert said("fused_ops auto", rows, '("swiglu", "other")') == '("other", "rope", "int8_head")'
    assert said("fused_ops auto", op("swiglu", 3.0, 2.0), '("swiglu",)') == "()"
    # One card's loss counts.
    slower = [{**row, "gpu": "Other"} for row in op("rope", 3.0, 2.0)]
    assert said("fused_ops auto", [*rows, *slower], "()") == '("int8_head",)'


def test_knobs_are_turned_for_a_gain_that_counts():
    rows = knob("prefill_tokens", {1024: 1.0, 512: 1.3, 2048: 0.8})
    assert said("PREFILL_TOKENS", rows, "1024") == "2048"
    assert said("PREFILL_TOKENS", knob("prefill_tokens", {1024: 1.0, 512: 0.99}), "1024") == "1024"
    assert said("PREFILL_TOKENS", rows, "7") is None  # what is there has not been measured
    assert said("look_every", knob("look_every", {8: 1.0, 4: 0.9, 16: 1.1}), "8") == "4"


def test_attention_follows_whole_steps():
    step = lambda name, s, **extra: memory(model="m", setup=f"attention={name}", step_s=[9.0, s], **extra)
    assert said("attention auto", [step("sdpa", 2.0), step("xformers", 1.5)]) == "xformers"
    assert "attention auto: xformers\n" in calibrate.page([step("sdpa", 2.0), step("xformers", 1.5)])
    assert said("attention auto", [step("sdpa", 2.0), step("xformers", 1.99)]) == "sdpa"
    beside = {"profile": "beside others"}
    assert said("attention auto", [step("sdpa", 2.0, **beside), step("xformers", 1.0, **beside)]) is None


def test_rows_of_a_kernel_that_is_gone_cost_no_other_its_proposal():
    assert '"rope"' in said("fused_ops auto", [*op("was_there", 1.0, 2.0), *op("rope", 1.0, 2.0)], "()")


def test_whole_steps_stand_beside_the_kernels():
    step = lambda name, s: memory(model="m", setup=f"device=cuda fused_ops={name}", step_s=[9.0, s])
    page = calibrate.page([*op("rope", 1.0, 2.0), step("off", 3.0), step("auto", 2.0), step("on", 4.0)])
    assert "fused_ops auto is 1.50 x off" in page and "fused_ops on is 0.75 x off" in page


@pytest.mark.parametrize("script", [calibrate, crashes, report], ids=lambda script: script.__name__)
def test_rows_that_are_not_there_are_no_empty_answer(script, tmp_path, monkeypatch, capsys):
    option = ["--to", str(tmp_path / "page"), "--results"] if script is report else []
    monkeypatch.setattr(sys, "argv", [script.__name__, *option, str(tmp_path / "mistyped")])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "mistyped" in capsys.readouterr().err


def test_dry_rows_and_a_cpu_propose_nothing(tmp_path):
    dry = [{**row, "dry_run": True} for row in [memory(context_mib=900.0), *widths((896, 0.5))]]
    cpu = [{**row, "gpu": "cpu"} for row in [memory(context_mib=900.0), *widths((896, 0.5))]]
    for rows in ([], dry, cpu):
        assert calibrate.page(constants.measured(rows)).startswith("nothing to propose")


def test_the_diff_applies_and_changes_what_it_says(tmp_path):
    rows = [memory(context_mib=612.0), *op("rope", 1.0, 2.0), *op("int8_head", 1.0, 2.0),
            *op("swiglu", 3.0, 2.0), *widths((896, 2.0), (1536, 0.5))]  # fmt: skip
    files = {one.file for one in constants.CONSTANTS if one.file}
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((constants.ROOT / file).read_text(encoding="utf-8"), encoding="utf-8")
    before = {file: (tmp_path / file).read_text(encoding="utf-8") for file in files}
    page = calibrate.page(rows, tmp_path)
    assert {file: (tmp_path / file).read_text(encoding="utf-8") for file in files} == before
    assert "CUDA context, MiB: " in page and "-> 620" in page and "Card at c0ffee00" in page
    (tmp_path / "proposed.diff").write_text(page[page.index("--- a/") :], encoding="utf-8")
    subprocess.run(["git", "apply", "proposed.diff"], cwd=tmp_path, check=True)
    found = {one.name: one.now(tmp_path) for one in constants.CONSTANTS}
    assert found["CUDA context, MiB"] == "620" and found["FUSED_MAX_WIDTH"] == "896"
    assert '"rope"' in found["fused_ops auto"] and '"swiglu"' not in found["fused_ops auto"]
    for file in files:
        compile((tmp_path / file).read_text(encoding="utf-8"), file, "exec")
    assert "nothing to propose: every constant" in calibrate.page(rows, tmp_path)
