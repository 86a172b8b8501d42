"""Predicted beside measured: the meters, the rows, the picture, and the command on a CPU."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from lowvram_grpo.bench import measure, memory, plots, savers
from lowvram_grpo.bench.models import EOS, random_model, word_prompts, word_tokenizer
from lowvram_grpo.bench.rows import Rows
from lowvram_grpo.cli.app import app
from lowvram_grpo.errors import UserError
from lowvram_grpo.memory import devices
from lowvram_grpo.memory.guard import Guard
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.run import jsonl

MIB = 2**20
MODEL = str(Path(measure.__file__).parents[1] / "demo" / "model")
# What a CPU can hold against its ledger: nothing quantized, nothing that stays with the host.
FLAGS = {
    "max_prompt_length": 16, "max_completion_length": 12, "quantization": "none", "head_dtype": "dense",
    "embedding_offload": "false", "optim": "adamw_torch", "prompts_per_step": 2,
}  # fmt: skip


class Allocator:
    """What torch.cuda's memory statistics would say."""

    def __init__(self):
        self.live = self.peak = 0

    def take(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)

    def seen(self):
        return self.peak, 2 * self.peak

    def forget(self):
        self.peak = self.live


def test_a_phase_neither_counts_the_phase_inside_it_nor_loses_its_own_peak():
    card = Allocator()
    peaks = measure.Peaks(card.seen, card.forget)
    with peaks.phase("forward"):
        card.take(50)
        card.take(-40)
        with peaks.phase("backward"):
            card.take(20)
            card.take(-25)
        card.take(10)
        card.take(-15)
    card.take(7)
    peaks.book()
    # 10 are held when backward begins; 5 of 15 after it.
    assert peaks.phases == {"forward": (50, 100), "backward": (30, 60), measure.ELSEWHERE: (7, 14)}


def test_a_phase_that_fails_is_closed_with_what_it_took():
    card = Allocator()
    peaks = measure.Peaks(card.seen, card.forget)
    with pytest.raises(RuntimeError), peaks.phase("rollout"):
        card.take(9)
        raise RuntimeError
    with peaks.phase("rollout"):
        card.take(-9)
        card.take(3)
    peaks.book()
    assert peaks.phases == {"rollout": (9, 18), measure.ELSEWHERE: (9, 18)}


def fake_cuda(monkeypatch, *, total, nvml_free, context, free, reserved, card):
    device = devices.Device(
        "cuda", "Card", 0, total, nvml_free - context, (8, 6), True, context_bytes=context, nvml_free_bytes=nvml_free
    )
    monkeypatch.setattr(devices, "detect", lambda index=None: device)
    fractions = []
    for name, value in {
        "set_device": lambda device: None,
        "max_memory_allocated": lambda: card.seen()[0],
        "max_memory_reserved": lambda: card.seen()[1],
        "memory_reserved": lambda: reserved,
        "reset_peak_memory_stats": card.forget,
        "mem_get_info": lambda: (free, total),
        "set_per_process_memory_fraction": fractions.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fractions


def test_the_cap_leaves_room_for_the_context_and_the_context_is_what_the_card_lost(monkeypatch):
    card = Allocator()
    fractions = fake_cuda(
        monkeypatch, total=8000 * MIB, nvml_free=7600 * MIB, context=300 * MIB, free=2000 * MIB, reserved=5200 * MIB,
        card=card,
    )  # fmt: skip
    meter = measure.OnDevice(6300 * MIB)
    meter.limit()
    with meter.phase("load"):
        card.take(100 * MIB)
    found = meter.found()
    assert fractions == [0.75] and found["cap_mib"] == 6000
    # Lazily loaded modules made it grow from 300.
    assert found["context_mib"] == 400 and found["context_known"]
    assert found["phases_mib"]["load"] == {"allocated": 100, "reserved": 200} and found["peak_reserved_mib"] == 200


def test_a_guard_is_watched_phase_by_phase():
    seen = []

    @contextmanager
    def watch(name):
        seen.append(name)
        yield
        seen.append(f"/{name}")

    guard = Guard({}, lambda key, value: None, tell=lambda *a: None, limits="")
    guard.watch = watch

    def work():
        with guard.phase("backward"):
            return 3

    assert guard.run("forward", work) == 3
    assert seen == ["forward", "backward", "/backward", "/forward"]


def test_running_out_of_memory_is_known_in_all_its_forms():
    assert measure.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not measure.ran_out(UserError("No model given.")) and not measure.ran_out(ValueError("memory"))
    guard = Guard({}, lambda key, value: None, tell=lambda *a: None, limits="nothing", active=False)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(UserError) as caught:
        guard.run("rollout", fail)
    assert measure.ran_out(caught.value)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_random_model_is_as_peaked_as_a_trained_one(quantization):
    config = AutoConfig.for_model(
        "qwen3", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=3000, tie_word_embeddings=False,
    )  # fmt: skip
    model = random_model(config, quantization=quantization, dtype=torch.float32, device=torch.device("cpu"))
    assert not any(p.is_meta for p in model.parameters()) and model.generation_config.eos_token_id == EOS
    with torch.no_grad():
        logits = model(torch.randint(3, 3000, (4, 16), generator=torch.Generator().manual_seed(0))).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert 0.2 < entropy.mean() < 3.0  # plain random weights: 8.0
    assert attach_lora(model, lora()) is not None
    first, other = model.get_input_embeddings().weight[0], model.get_input_embeddings().weight[1]
    assert not torch.equal(first, other)


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def test_prompts_have_exactly_so_many_tokens():
    tokenizer = word_tokenizer(50)
    prompts = word_prompts(3, 7, 50)
    assert len(set(prompts)) == 3
    assert all(len(ids) == 7 and min(ids) >= 3 for ids in tokenizer(prompts)["input_ids"])


def case(**flags):
    (found,) = memory.cases([MODEL], ["8gb"], {**FLAGS, **flags})
    return found


@pytest.fixture(scope="module")
def plan():
    return memory.planned(case())


@pytest.fixture
def on_card(monkeypatch, plan):
    """Sets what the process that measures answers; plans are not made anew."""
    monkeypatch.setattr(memory, "planned", lambda *args, **kwargs: plan)
    return lambda answer: monkeypatch.setattr(measure, "apart", answer)


def fake_rows(tmp_path):
    shared = {"gpu": "Card", "capability": "8.6", "memory_gib": 8.0, "commit": "c0ffee", "dry_run": False}
    return Rows(tmp_path / "memory.jsonl", False, shared=shared, part="memory")


def seen(**extra):
    return {
        "fits": True, "context_mib": 350.0, "context_known": True, "peak_allocated_mib": 40.0,
        "peak_reserved_mib": 46.0, "step_s": [2.0, 1.0],
        "phases_mib": {"load": {"allocated": 10.0, "reserved": 12.0}, "rollout": {"allocated": 40.0, "reserved": 46.0}},
        **extra,
    }  # fmt: skip


def test_a_measured_row_says_what_it_means_for_the_overheads(tmp_path, on_card):
    on_card(lambda *args: seen())
    (row,) = memory.run([case()], fake_rows(tmp_path), device="cuda")
    assert row["total_mib"] == 396.0
    lasting = sum(row["predicted_parts_mib"]["rollout"].get(name, 0) for name in memory.LASTING)
    assert row["fragmentation"] == pytest.approx(6 / (40 - lasting), abs=1e-4)
    highest = max(memory.ledgered(row, name) for name in row["predicted_mib"])
    assert row["unseen_mib"] == pytest.approx(40 - highest, abs=0.1)
    assert memory.measured_mib(row, "rollout") == 390.0 and memory.measured_mib(row, "score") is None


def test_a_row_that_is_there_is_not_measured_again_and_one_that_failed_is(tmp_path, on_card):
    answers = iter([{"fits": None, "error": "stopped after 3 s", "again": True}, seen(), AssertionError])
    asked = []

    def apart(*args):
        asked.append(args)
        return next(answers)

    on_card(apart)
    for tries in (1, 2, 2):
        memory.run([case()], fake_rows(tmp_path), device="cuda")
        assert len(asked) == tries
    memory.run([case()], fake_rows(tmp_path), device="none")
    last = jsonl.read(tmp_path / "memory.jsonl")[-1]
    assert len(asked) == 2 and last["predicted_only"] and "total_mib" not in last


def test_a_row_says_that_memory_ran_out_and_compares_nothing(tmp_path, on_card):
    full = {"fits": False, "out_of_memory": True, "error": "UserError: Out of GPU memory in the rollout phase"}
    on_card(lambda *args: seen(**full))
    (row,) = memory.run([case()], fake_rows(tmp_path), device="cuda")
    assert not row["fits"] and "total_mib" not in row and "rollout" in row["error"]


def test_a_budget_larger_than_the_card_is_not_measured(tmp_path, on_card):
    on_card(None)
    (wanted,) = memory.cases([MODEL], ["24gb"], FLAGS)
    (row,) = memory.run([wanted], fake_rows(tmp_path), device="cuda")
    assert row["predicted_only"] and "8.0 GiB" in row["error"]


def test_a_measurement_that_hangs_is_stopped(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text("import time; time.sleep(60)", encoding="utf-8")
    started = time.monotonic()
    row = measure.apart(case().recipe, 0, 1, "cpu", 1.0, [str(script)])
    assert time.monotonic() - started < 20 and row["again"] and "stopped" in row["error"]
    script.write_text("raise SystemExit('no card')", encoding="utf-8")
    row = measure.apart(case().recipe, 0, 1, "cpu", 60.0, [str(script)])
    assert row["fits"] is None and "no card" in row["trace"]


def test_bars_add_up_to_what_was_predicted(tmp_path, on_card):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    on_card(lambda *args: seen())
    (row,) = memory.run([case()], fake_rows(tmp_path), device="cuda")
    axis = Figure().subplots()
    plots._panel(axis, row)
    for at, size in enumerate(row["predicted_mib"].values()):
        bars = [bar for bar in axis.patches if round(bar.get_x() + bar.get_width() / 2) == at]
        assert sum(bar.get_height() for bar in bars) == pytest.approx(size / 1024, abs=5e-4)
    assert [line.get_label() for line in axis.lines].count("measured") == 2
    (drawn,) = plots.draw([row], tmp_path)
    assert drawn.name == "memory-8gb.png" and drawn.read_bytes().startswith(b"\x89PNG")


def test_savers_save_where_the_ladder_says(monkeypatch):
    rungs = savers.ladder_of("8gb")
    monkeypatch.setattr(savers, "ladder_of", lambda name: [r for r in rungs if r.value == 1])
    monkeypatch.setattr(savers, "_WITHOUT", {"gradient_checkpointing": False})
    entries = {entry["saver"]: entry for entry in savers.table(case(embedding_offload="true", optim="adamw_8bit"))}
    waves = entries["rollout_batch_size=1"]["saved_mib"]
    assert waves["rollout"] > 0 and not waves["backward"] and not waves["load"]
    micro = entries["per_device_train_batch_size=1"]["saved_mib"]
    assert micro["backward"] > 0 and not micro["rollout"]
    assert entries["gradient_checkpointing=true"]["in_preset"]
    assert entries["gradient_checkpointing=true"]["saved_mib"]["forward"] > 0


@pytest.mark.slow
def test_the_command_measures_what_it_predicts_on_a_cpu(tmp_path):
    flags = [part for key, value in FLAGS.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    call = ["bench", "memory", "--device", "cpu", "--preset", "8gb", "-m", MODEL, "--steps", "2", "-o", str(tmp_path)]
    done = CliRunner().invoke(app, [*call, *flags])
    assert done.exit_code == 0, done.output
    (row,) = jsonl.read(tmp_path / "memory.jsonl")
    assert row["fits"] and row["dry_run"] and row["completion_length"] == 12 and "error" not in row
    # Real tensors against meta tensors, phase by phase: the prediction's own test, by way of the whole trainer.
    for name, size in row["predicted_mib"].items():
        assert memory.measured_mib(row, name) == pytest.approx(size, rel=0.03, abs=0.1), name
    assert (tmp_path / "memory-8gb.png").is_file()
    again = CliRunner().invoke(app, [*call, *flags, "--json"])
    assert json.loads(again.stdout)[0]["utc"] == row["utc"] and len(jsonl.read(tmp_path / "memory.jsonl")) == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--preset", "cpu"], "is for no card"),
        (["--preset", "9gb"], "There is no preset"),
        (["--steps", "0"], "--steps is 0"),
        (["--max-promt-length", "3"], "did you mean"),
    ],
)
def test_a_mistake_is_named(flags, sentence, tmp_path):
    done = CliRunner().invoke(app, ["bench", "memory", "-m", MODEL, "-o", str(tmp_path), *flags])
    assert isinstance(done.exception, UserError) and sentence in str(done.exception)
