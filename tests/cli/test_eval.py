"""`lowvram-grpo eval`: the numbers on the screen, in JSON and on disk, and mistakes in one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

import pytest

from lowvram_grpo.cli import app
from lowvram_grpo.jobs.evaluation import pass_at_k

DEMO = Path(app.__file__).parents[1] / "demo"
TASK = ("-m", DEMO / "model", "-d", DEMO / "prompts.jsonl", "-r", "accuracy", "--use-cpu", "--max-completion-length", 8)


def call(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of `lowvram-grpo`."""
    monkeypatch.setattr(sys, "argv", ["lowvram-grpo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


def sentence(result):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    return lines[0]


def found(monkeypatch, capsys, *arguments):
    code, out, err = call(monkeypatch, capsys, "eval", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)  # nothing else may stand on stdout


def rows_of(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A run of the demo's model and data, with a learning rate that breaks it: the base must then be better."""
    options = (
        "--output-dir", tmp_path / "run", "--max-steps", 2, "--num-generations", 4, "--prompts-per-step", 2,
        "--learning-rate", 0.2, "--warmup-steps", 0, "--optim", "adamw_torch", "--save-strategy", "no",
        "--cold-start", "off", "--temperature", 1, "--loss-type", "dapo", "--no-signal-check",
    )  # fmt: skip
    code, _, err = call(monkeypatch, capsys, "train", *TASK, *options)
    assert code == 0, err
    return tmp_path / "run"


def test_every_number_follows_from_the_completions_on_disk(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    result = found(monkeypatch, capsys, *TASK, "--limit", 9, "-n", 6, "--k", "1,3", "--out", out)
    assert json.loads((out / "eval.json").read_text(encoding="utf-8")) == result
    rows = rows_of(out)
    assert [r["prompt_index"] for r in rows] == [*range(9), *(i for i in range(9) for _ in range(6))]
    greedy, sampled = rows[:9], rows[9:]
    assert {r["pass"] for r in greedy} == {"greedy"} and {r["policy"] for r in rows} == {"model"}
    passes = result["policies"]["model"]
    metrics = passes["greedy"]["metrics"]
    assert metrics["rewards/accuracy"]["mean"] == pytest.approx(fmean(r["rewards"]["accuracy"] for r in greedy))
    assert metrics["truncated"]["mean"] == pytest.approx(fmean(r["truncated"] for r in greedy))
    metrics = passes["sampled"]["metrics"]
    groups = [[r["reward"] for r in sampled[6 * i : 6 * i + 6]] for i in range(9)]
    assert metrics["frac_reward_zero_std"]["mean"] == pytest.approx(fmean(len(set(g)) == 1 for g in groups))
    assert metrics["pass@3"]["mean"] == pytest.approx(fmean(pass_at_k(6, sum(g), 3) for g in map(ints, groups)))
    assert metrics["pass@1"]["mean"] == pytest.approx(metrics["reward"]["mean"], abs=1e-6)
    assert metrics["length"]["mean"] == pytest.approx(fmean(r["tokens"] for r in sampled))
    assert 0 < metrics["reward"]["mean"] < 1 and "pass@8" not in metrics
    settings = result["settings"]
    assert (settings["threshold"], settings["prompts"], settings["samples"]) == (1.0, 9, 6)
    assert {"torch", "transformers", "python"} <= result["versions"].keys()


def ints(values):
    return [int(value) for value in values]


def test_the_same_seed_gives_the_same_numbers(monkeypatch, capsys):
    task = (*TASK, "--limit", 6, "-n", 4, "--no-greedy")
    first, waves, other = (
        found(monkeypatch, capsys, *task, *extra)["policies"]["model"]["sampled"]["metrics"]
        for extra in ((), ("--rollout-batch-size", 2), ("--seed", 7))
    )
    assert first == waves != other


def test_passes_can_be_left_out(monkeypatch, capsys):
    only = lambda *extra: found(monkeypatch, capsys, *TASK, "--limit", 2, *extra)["policies"]["model"].keys()
    assert only("-n", 0) == {"greedy"} and only("-n", 2, "--no-greedy") == {"sampled"}


def test_the_screen_says_what_the_numbers_mean(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "eval", *TASK, "--limit", 4, "-n", 4)
    assert code == 0, err
    for word in ("greedy, 4 prompts", "4 prompts x 4 completions", "accuracy", "pass@4", "dead groups", "truncated"):
        assert word in out
    assert "pass@8" not in out and "±" in out
    said = " ".join(err.split())
    assert (
        "95 %" in said
        and "passes with a total reward of 1 or more" in said
        and "full marks from every" in said
        and "elsewhere" not in said
    )


def test_rewards_between_nothing_and_full_marks_ask_for_a_threshold(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def brevity(completions, **kwargs):\n    return [3 / (1 + len(c)) for c in completions]\n", encoding="utf-8"
    )
    task = ("eval", *TASK, "-r", "label:2", "-r", f"{tmp_path / 'mine.py'}:brevity", "--limit", 3, "-n", 0)
    said = " ".join(call(monkeypatch, capsys, *task)[2].split())
    assert "reward of 12 or more" in said and "(accuracy 1, label 5, brevity 1): say with --threshold" in said
    said = " ".join(call(monkeypatch, capsys, *task, "--threshold", 3)[2].split())
    assert "reward of 3 or more (--threshold)" in said and "elsewhere" not in said


def test_a_run_is_compared_with_its_base(monkeypatch, capsys, run, tmp_path):
    """Model, data and rewards are the run's; the base's numbers are those of an evaluation of the base alone."""
    few = ("--limit", 10, "-n", 4)
    result = found(monkeypatch, capsys, "--adapter", run, "--compare-base", *few, "--out", tmp_path / "out")
    base, adapter = (result["policies"][name] for name in ("base", "adapter"))
    alone = found(monkeypatch, capsys, *TASK, *few)["policies"]["model"]
    for kind in ("greedy", "sampled"):
        assert base[kind]["metrics"] == alone[kind]["metrics"]
        ours, theirs = (p[kind]["metrics"]["reward"]["mean"] for p in (adapter, base))
        assert result["difference"][kind]["reward"]["mean"] == pytest.approx(ours - theirs, abs=1e-6)
    assert adapter["sampled"]["metrics"] != base["sampled"]["metrics"]
    assert result["difference"]["sampled"]["reward"]["high"] < 0
    assert {r["policy"] for r in rows_of(tmp_path / "out")} == {"base", "adapter"}
    code, out, err = call(monkeypatch, capsys, "eval", "-a", run, "--compare-base", *few)
    assert code == 0 and "difference" in out and "paired" in err


def test_the_test_split_is_taken_where_there_is_one(monkeypatch, capsys, tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {
        name: Dataset.from_dict({"prompt": ["1+1="] * n, "answer": ["2"] * n})
        for name, n in (("train", 5), ("test", 3))
    }
    DatasetDict(parts).save_to_disk(tmp_path / "data")
    task = (*TASK, "-d", tmp_path / "data", "-n", 0)
    assert found(monkeypatch, capsys, *task)["settings"]["prompts"] == 3
    assert found(monkeypatch, capsys, *task, "--split", "train[:4]")["settings"]["prompts"] == 4


def test_data_given_by_hand_is_not_cut_to_the_runs_split(monkeypatch, capsys, run, tmp_path):
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text(encoding="utf-8") + '\neval_split = "train[:3]"\n', encoding="utf-8")
    assert found(monkeypatch, capsys, "-a", run, "-n", 0)["settings"]["prompts"] == 3
    data = tmp_path / "other.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 5, encoding="utf-8")
    assert found(monkeypatch, capsys, "-a", run, "-n", 0, "-d", data)["settings"]["prompts"] == 5


def test_columns_tell_template_and_rewards(monkeypatch, capsys, tmp_path):
    data = tmp_path / "qa.jsonl"
    data.write_text('{"prompt": "1+1=", "solution": "2"}\n', encoding="utf-8")
    task = ("-m", DEMO / "model", "-d", data, "--use-cpu", "--chat-template", "plain", "-n", 0)
    code, out, err = call(
        monkeypatch,
        capsys,
        "eval",
        *task,
        "--system-prompt",
        "",
        "--max-completion-length",
        4,
        "--max-prompt-length",
        44,
    )
    assert code == 0, err
    assert "template r1" in " ".join(err.split()) and "format" in out and "reward of 2 or more" in err


@pytest.mark.parametrize(
    "extra,words",
    [
        (("--k", "1,16"), ["pass@16", "8 samples", "--samples"]),
        (("--k", "0"), ["pass@0"]),
        (("--k", "one"), ["--k is 'one'"]),
        (("--k", "2", "-n", "0"), ["pass@2", "0 samples"]),
        (("-n", "0", "--no-greedy"), ["--samples is 0"]),
        (("--limit", "0"), ["--limit is 0"]),
        (("--temperature", "0"), ["--temperature is 0", "--samples 0"]),
        (("--top-p", "2"), ["top_p is 2"]),
        (("--compare-base",), ["--compare-base", "--adapter"]),
        (("--split", "tset"), ["no split 'tset'"]),
        (("-d", "/no/such.jsonl"), ["/no/such.jsonl", "does not exist"]),
        (("-r", "acuracy"), ["acuracy", "accuracy"]),
        (("--max-completion-length", "47"), ["48 positions", "--max-completion-length"]),
        (("--answer-column", "gold"), ["gold"]),
        (("--adapter", "/no/such/run"), ["/no/such/run"]),
        (("--limt", "3"), ["--limt"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_one_clear_sentence_before_the_model_is_loaded(monkeypatch, capsys, extra, words):
    def load(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("lowvram_grpo.policy.load.load_causal_lm", load)
    text = sentence(call(monkeypatch, capsys, "eval", *TASK, *extra))
    for word in words:
        assert word in text, text


def test_what_is_missing_is_named(monkeypatch, capsys, tmp_path):
    assert "No data given" in sentence(call(monkeypatch, capsys, "eval", "-m", DEMO / "model", "--use-cpu"))
    assert "No model given" in sentence(call(monkeypatch, capsys, "eval", "-d", DEMO / "prompts.jsonl"))
    bare, empty = tmp_path / "bare.jsonl", tmp_path / "empty.jsonl"
    bare.write_text('{"prompt": "1+1="}\n', encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    task = ("eval", "-m", DEMO / "model", "--use-cpu")
    assert "No reward given" in sentence(call(monkeypatch, capsys, *task, "-d", bare))
    assert "empty" in sentence(call(monkeypatch, capsys, *task, "-d", empty))


def test_an_evaluation_is_not_overwritten(monkeypatch, capsys, tmp_path):
    task = ("eval", *TASK, "--limit", 1, "-n", 0, "--out", tmp_path / "out")
    assert call(monkeypatch, capsys, *task)[0] == 0
    assert "holds an evaluation already" in sentence(call(monkeypatch, capsys, *task))


def test_memory_that_runs_out_makes_waves_smaller(monkeypatch, capsys):
    import torch

    from lowvram_grpo.memory.guard import Guard
    from lowvram_grpo.rollout.engine import RolloutEngine

    inner, rows = RolloutEngine.generate, []

    def full(self, *args, **kwargs):
        rows.append(self.rows)
        if len(rows) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return inner(self, *args, **kwargs)

    task = (*TASK, "--limit", 3, "-n", 4, "--no-greedy")
    expected = found(monkeypatch, capsys, *task)["policies"]["model"]["sampled"]["metrics"]
    monkeypatch.setattr(RolloutEngine, "generate", full)
    init = Guard.__init__
    monkeypatch.setattr(Guard, "__init__", lambda self, *a, **k: init(self, *a, **{**k, "active": True}))
    code, out, err = call(monkeypatch, capsys, "eval", *task, "--json")
    assert code == 0, err
    assert json.loads(out)["policies"]["model"]["sampled"]["metrics"] == expected
    assert rows[:4] == [None, 8, 4, 2] and "sampling 2 completions at once" in " ".join(err.split())
