"""The benchmark of a decode step's small operations runs without a GPU, and says what may be switched on."""

from __future__ import annotations

import json

import bench_decode_ops as bench
import pytest
import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted


@pytest.mark.skipif(not (HAS_TRITON and interpreted()), reason="needs Triton's interpreter")
def test_the_dry_run_measures_nothing_and_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    call = ["--out", str(out), "--dry-run"]
    bench.main(call)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {(row["op"], row["provider"]) for row in rows} == {
        (op, provider) for op in bench.OPS for provider in bench.PROVIDERS.get(op, ("eager", "fused"))
    }
    assert all(row["dry_run"] and row["gate"] == "passed" and row["us"] > 0 for row in rows)
    bench.main(call)
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(rows)
    assert "(dry run)" in capsys.readouterr().out


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    monkeypatch.setattr(bench.layer_ops, "swiglu_triton", lambda gate, up: gate * up)
    o = bench.parse(["--out", "unused", "--dry-run"])
    row = bench.measure("swiglu", "fused", bench.SHAPES["dry"], 2, torch.float16, o)
    assert row["gate"] == "failed" and "error" in row["gate_reason"] and "us" not in row


def test_only_what_is_faster_in_every_case_may_be_switched_on():
    def rows(op, fused, eager, shape="a"):
        case = {"op": op, "shape": shape, "rows": 8, "dtype": "float16"}
        return [{**case, "provider": "fused", **fused}, {**case, "provider": "eager", "us": eager}]

    found = [
        *rows("rope", {"us": 1.0}, 2.0), *rows("rms_norm", {"us": 1.0}, 2.0), *rows("head_norm", {"us": 3.0}, 2.0),
        *rows("swiglu", {"us": 1.0}, 2.0), *rows("swiglu", {"error": "no"}, 2.0, "b"),
    ]  # fmt: skip
    assert bench.faster(found) == {"rope": True, "rms_norm": False, "swiglu": False}
