"""Where memory is left the plan climbs: in the order of speed, below a margin, and never past what a person set."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from lowvram_grpo.cli.app import app
from lowvram_grpo.memory import cards, overheads
from lowvram_grpo.memory.ladder import Rung, next_rung
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.plan import four_bit
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.plan.climb import EACH, MARGIN, RAISES, WORTH, Climber
from lowvram_grpo.plan.paper import ladder_for, paper_config, setting
from lowvram_grpo.plan.planner import GIB, Planner
from lowvram_grpo.plan.prediction import Prediction
from lowvram_grpo.plan.speed import Choice, Speed, shape_of
from lowvram_grpo.policy.trials import wanted
from lowvram_grpo.recipe import preset as presets
from lowvram_grpo.recipe.resolve import resolve
from lowvram_grpo.training.rehearsal import workload
from tests.conftest import make_model

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B")
SIZES = (6, 8, 12, 16, 24)
# What is the same whatever is raised.
STEP = ("completions_per_rollout", "num_generations", "updates_per_rollout", "num_iterations")


def recipe_for(model: str = "Qwen2.5-0.5B", preset: str = "8gb", **flags):
    return resolve({"model": model, "preset": preset, **flags})


class Told(Planner):
    """Predicts by a formula, at once: weights, a cache, and what a micro-batch's tokens keep."""

    off = 1.0  # by which a prediction is above the formula where nothing is recomputed

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.shape, self.asked = shape_of(config), []

    def predict(self, recipe, *, exact=False):
        args = paper_config(recipe)
        self.asked.append(recipe)
        plan, shape = args.batch_plan(), self.shape
        weights = shape.weights * {"none": 2, "nf4": 0.516}[recipe.quantization]
        weights += shape.table * {"dense": 2, "int8": 1.03, "nf4": 0.53}[args.head_dtype]
        weights += 0 if args.embedding_offload or shape.tied else 2 * shape.table
        rows = min(args.rollout_batch_size or plan.completions_per_rollout, plan.completions_per_rollout)
        cache = 2.0 * shape.keys * (rows * 256 + -(-rows // 8) * 512)
        tokens = -(-plan.micro_batch_size // 8) * 512 + plan.micro_batch_size * 256
        read = sum((n + k) * count for (n, k), count in shape.linears.items())
        kept = tokens * (read * 0.35 if args.gradient_checkpointing else read * 3.3 * self.off)
        load = int(weights + 0.45 * GIB)
        parts = {"rollout": {"KV cache": int(cache)}, "backward": {"activations": int(kept)}}
        return Prediction({"load": load, "rollout": load + int(cache), "backward": load + int(kept)}, {}, parts)


def told(model: str, **given) -> Told:
    config, _ = resolve_config(model)
    return Told(config, **{"card": cards.typical(8), **given})


def planned(planner: Planner, model: str, gib: float, **flags):
    recipe = recipe_for(model, f"{gib}gb", **flags)
    return recipe, planner.plan(recipe, presets.card_budget(gib), advise=False)


def speed_of(planner: Told, recipe) -> float:
    args = paper_config(recipe)
    plan = args.batch_plan()
    rows = min(args.rollout_batch_size or plan.completions_per_rollout, plan.completions_per_rollout)
    choice = Choice(
        recipe.quantization, args.head_dtype, args.embedding_offload, rows, plan.micro_batch_size,
        args.gradient_checkpointing, args.workspace_mib,
    )  # fmt: skip
    kernel = {"int8_kernel": wanted("int8_head", args.fused_ops)}
    return Speed(planner.shape, workload(args, planner.config), args, planner.card, "bfloat16", **kernel).step(choice)


def test_a_small_model_uses_the_card(capsys):
    """Real predictions: 1.1 GiB of 6.3 before there were climbs."""
    app(["plan", "--model", "Qwen2.5-0.5B", "--vram", "8"], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    words = ("climbed from the preset", "modelled by counts for RTX 4060, not measured", "nf4 -> none",
             "per_device_train_batch_size 4 -> 16", "no weight is dequantized")  # fmt: skip
    assert [each for each in words if each not in said] == []


@pytest.mark.parametrize("model", MODELS)
def test_a_larger_card_is_never_slower_and_no_plan_comes_near_the_budget(model):
    # A preset of 24 GB begins with a 16-bit base, which is what such a card is fast enough for.
    planner, times, quantizations, heads = told(model, card=cards.typical(24)), [], [], []
    for gib in SIZES:
        recipe, plan = planned(planner, model, gib)
        if not plan.fits:
            assert not plan.climbs
            continue
        assert not plan.climbs or plan.prediction.peak <= MARGIN * plan.budget
        assert plan.prediction.peak == planner.predict(plan.recipe).peak
        before, after = (paper_config(r).batch_plan() for r in (recipe, plan.recipe))
        assert all(getattr(before, name) == getattr(after, name) for name in STEP)
        assert after.micro_batch_size <= after.completions_per_rollout // after.updates_per_rollout
        for climb in plan.climbs:
            lowered = climb.rung.key.endswith("batch_size") and climb.rung.value < climb.before
            # What rounds less, or makes room for another climb, need not buy time by itself.
            assert lowered or climb.rung.key == "quantization" or climb.share > 0.9 * EACH, climb
        times.append(speed_of(planner, plan.recipe))
        quantizations.append(plan.recipe.quantization)
        heads.append(setting(plan.recipe, "head_dtype"))
    # What buys less than a per cent is left; a preset whose head is not rounded reads twice as much of it.
    pairs = zip(itertools.pairwise(times), itertools.pairwise(heads))
    assert all(larger <= (1.02 if a == b else 1.15) * smaller for (smaller, larger), (a, b) in pairs)
    assert quantizations == sorted(quantizations)  # nf4 before none
    assert times[-1] < times[0]


def test_every_climb_buys_something_and_the_dearest_comes_first():
    planner = told("Qwen2.5-1.5B")
    recipe, plan = planned(planner, "Qwen2.5-1.5B", 12)
    assert len(plan.climbs) > 1 and plan.time < 1 - WORTH
    assert plan.time == pytest.approx(speed_of(planner, plan.recipe) / speed_of(planner, recipe))
    shares = [climb.share for climb in plan.climbs]
    assert shares == sorted(shares, reverse=True)
    for climb in plan.climbs:
        assert setting(plan.recipe, climb.rung.key) == climb.rung.value != climb.before
        assert plan.recipe.origin[climb.rung.key] == "memory plan" and climb.words and climb.reason
    assert plan.as_json()["climbs"] == list(map(str, plan.climbs))


@pytest.mark.parametrize("key", RAISES)
def test_what_a_person_set_is_not_raised(key):
    value = {"quantization": "nf4", "head_dtype": "int8", "gradient_checkpointing": True, "embedding_offload": True,
             "workspace_mib": 32, "rollout_batch_size": 8, "per_device_train_batch_size": 2}[key]  # fmt: skip
    _, plan = planned(told("Qwen2.5-0.5B"), "Qwen2.5-0.5B", 24, **{key: value})
    assert setting(plan.recipe, key) == value
    assert key not in [climb.rung.key for climb in plan.climbs]


def test_a_run_that_is_resumed_keeps_its_base(tmp_path):
    """What stands in a run's recipe was set: a resumed run is not planned, and if it were it would stay as it is."""
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_for().to_toml(), encoding="utf-8")
    recipe = resolve({}, file)
    plan = told("Qwen2.5-0.5B").plan(recipe, 6 * GIB)
    assert recipe.quantization == plan.recipe.quantization == "nf4" and not plan.climbs


@pytest.mark.parametrize(
    "given,flags",
    [
        ({"device": "cpu"}, {}),
        ({"card": None}, {}),
        ({}, {"memory_plan": "savers"}),
        ({}, {"use_vllm": True, "vllm_mode": "colocate"}),
    ],
    ids=["cpu", "no card", "savers", "vLLM beside us"],
)
def test_where_memory_is_not_ours_to_fill_nothing_rises(given, flags):
    recipe, plan = planned(told("Qwen2.5-0.5B", **given), "Qwen2.5-0.5B", 8, **flags)
    assert plan.fits and not plan.climbs and plan.recipe == recipe


def test_a_given_adapter_keeps_its_base(tmp_path):
    _, plan = planned(told("Qwen2.5-0.5B"), "Qwen2.5-0.5B", 8, adapter=str(tmp_path))
    assert plan.climbs and plan.recipe.quantization == "nf4" and setting(plan.recipe, "head_dtype") == "int8"


def test_a_step_counted_in_micro_batches_stays_the_same_step():
    flags = {"gradient_accumulation_steps": 16, "steps_per_generation": 32}
    recipe, plan = planned(told("Qwen2.5-0.5B"), "Qwen2.5-0.5B", 8, **flags)
    before, after = (paper_config(r).batch_plan() for r in (recipe, plan.recipe))
    assert "per_device_train_batch_size" in [climb.rung.key for climb in plan.climbs]
    assert before.micro_batch_size < after.micro_batch_size
    assert all(getattr(before, name) == getattr(after, name) for name in STEP)


def test_what_a_plan_went_down_for_does_not_go_up_again():
    planner = told("Qwen2.5-0.5B")
    recipe = recipe_for()
    climber = Climber(planner.config, planner.card, "bfloat16", None, planner.predict)
    raised = {}
    for taken in ((), (Rung("quantization", "nf4"), Rung("per_device_train_batch_size", 4))):
        found = climber.climb(recipe, planner.predict(recipe), 24 * GIB, taken)
        raised[len(taken)] = {climb.rung.key for climb in found.climbs}
    assert {"quantization", "per_device_train_batch_size"} <= raised[0]
    assert raised[2] and not {"quantization", "per_device_train_batch_size"} & raised[2]


def test_a_guess_that_was_wrong_costs_a_prediction_and_no_memory():
    class Surprising(Told):
        off = 1.6

    config, _ = resolve_config("Qwen2.5-0.5B")
    planner = Surprising(config, card=cards.typical(8))
    _, plan = planned(planner, "Qwen2.5-0.5B", 12)
    _, easy = planned(told("Qwen2.5-0.5B"), "Qwen2.5-0.5B", 12)
    assert not setting(easy.recipe, "gradient_checkpointing")
    assert plan.climbs and plan.prediction.peak <= MARGIN * plan.budget
    assert len(planner.asked) <= 8


def test_the_guard_comes_back_by_the_way_that_the_plan_went():
    _, plan = planned(told("Qwen2.5-0.5B"), "Qwen2.5-0.5B", 24, per_device_train_batch_size=None)
    recipe = plan.recipe
    assert not setting(recipe, "gradient_checkpointing")
    ladder = ladder_for(recipe)
    keys = ("rollout_batch_size", "per_device_train_batch_size", "gradient_checkpointing", "activation_offload",
            "mlp_tile", "workspace_mib", "optimizer_offload")  # fmt: skip
    settings = {key: setting(recipe, key) for key in keys} | {"per_device_train_batch_size": 32}
    ladder = ladder_for(_with(recipe, per_device_train_batch_size=32))
    taken = []
    for _ in range(4):
        rung = next_rung("backward", settings, ladder)
        settings[rung.key] = rung.value
        taken.append(str(rung))
    assert taken == ["per_device_train_batch_size=16", "gradient_checkpointing=true", "per_device_train_batch_size=8",
                     "per_device_train_batch_size=4"]  # fmt: skip
    # Whoever switched recomputation off gets it too, before anything is offloaded.
    assert str(next_rung("forward", {**settings, "gradient_checkpointing": False,
                                     "per_device_train_batch_size": 1})) == "gradient_checkpointing=true"  # fmt: skip


def _with(recipe, **changed):
    from lowvram_grpo.plan.paper import with_setting

    for key, value in changed.items():
        recipe = with_setting(recipe, key, value)
    return recipe


def test_more_rows_wait_less_and_copies_cost():
    config, _ = resolve_config("Qwen2.5-1.5B")
    args = paper_config(recipe_for("Qwen2.5-1.5B"))
    speed = Speed(shape_of(config), workload(args, config), args, cards.typical(8), "bfloat16")
    base = Choice("none", "dense", False, 4, 4, True, 64)
    rollouts = [speed.rollout(base._replace(rollout_batch_size=rows)) for rows in (1, 2, 4, 8, 16, 32)]
    assert rollouts == sorted(rollouts, reverse=True)
    nf4 = base._replace(quantization="nf4")
    assert speed.decode(1, nf4) < speed.decode(1, base)  # a quarter of the bytes
    assert speed.decode(256, nf4) > speed.decode(256, base)  # copies
    updates = [speed.update(base._replace(per_device_train_batch_size=n)) for n in (1, 4, 8, 32)]
    assert updates == sorted(updates, reverse=True)
    assert speed.update(base._replace(gradient_checkpointing=False)) < speed.update(base) < speed.update(nf4)
    int8 = base._replace(head_dtype="int8")
    assert speed.decode(8, base) < speed.decode(8, int8)
    speed.int8_kernel = True  # one byte a weight
    assert speed.decode(8, int8) < speed.decode(8, base)


def test_entropies_of_several_micro_batches_come_first():
    config, _ = resolve_config("Qwen2.5-1.5B")

    def seconds(rows, **flags):
        args = paper_config(recipe_for("Qwen2.5-1.5B", **flags))
        speed = Speed(shape_of(config), workload(args, config), args, cards.typical(8), "bfloat16")
        whole = Choice("none", "dense", False, 4, speed.per_update, True, 64)
        return speed.update(whole if rows is None else whole._replace(per_device_train_batch_size=rows))

    # One forward pass more, of four passes' work.
    assert 1.15 < seconds(4, top_entropy_quantile=0.5) / seconds(4) < 1.3
    assert seconds(None, top_entropy_quantile=0.5) == seconds(None)


@pytest.fixture
def bitsandbytes_says(monkeypatch):
    """Puts a rule in the place of bitsandbytes' own, whose module needs a CUDA build."""

    def put(rule):
        four_bit.packed.cache_clear()
        module = SimpleNamespace(_gemm_4bit_use_custom_cuda=rule) if rule else SimpleNamespace()
        monkeypatch.setitem(sys.modules, "bitsandbytes.backends.cuda.ops", module)
        import bitsandbytes.backends.cuda as package

        monkeypatch.setattr(package, "ops", module, raising=False)

    yield put
    four_bit.packed.cache_clear()


def test_bitsandbytes_is_asked_for_the_card_that_is_there(bitsandbytes_says):
    here, asked = cards.typical(8)._replace(index=1), []

    def rule(device, dtype, m, n, k):
        asked.append((device, dtype, m, n, k))
        return m <= 6

    bitsandbytes_says(rule)
    assert [four_bit.packed(here, "float16", rows, 896, 4864) for rows in (4, 6, 7)] == [True, True, False]
    assert asked[0] == (1, torch.float16, 6, 896, 4864)
    assert four_bit.moved(here, "float16", 7, 896, 4864) == four_bit.COPIED
    assert four_bit.moved(here, "float16", 4, 896, 4864) == four_bit.PACKED
    assert four_bit.PACKED < four_bit.moved(here, "float16", 5, 896, 4864) < four_bit.COPIED

    def broken(*args):
        raise TypeError("another signature")

    for gone in (broken, None):
        bitsandbytes_says(gone)
        assert four_bit.packed(here, "float16", 8, 4864, 896) and not four_bit.packed(here, "float16", 600, 896, 896)


def test_before_the_kernel_there_was_one_row(monkeypatch):
    four_bit.packed.cache_clear()
    monkeypatch.setattr(four_bit, "_has_kernel", lambda: False)
    assert [four_bit.packed(cards.typical(8), "bfloat16", rows, 4096, 4096) for rows in (1, 2)] == [True, False]
    four_bit.packed.cache_clear()


def test_the_copy_inside_an_operator_is_counted():
    import bitsandbytes  # noqa: F401

    n, k = 512, 256
    x = torch.empty(16, k, dtype=torch.bfloat16, device="meta")
    packed = torch.empty(n * k // 2, 1, dtype=torch.uint8, device="meta")
    absmax = torch.empty(n * k // 64, device="meta")
    seen = []
    for rows in (16, 4):
        with Ledger(hidden=four_bit.hidden_copy(None, "bfloat16")) as ledger:
            torch.ops.bitsandbytes.gemm_4bit.default(x[:rows], packed, [n, k], absmax, 64, "nf4")
        seen.append(ledger.peak - rows * n * 2)
        assert not ledger.live  # the copy is let go
    assert seen == [n * k * 2 + n * k // 64 * 4, 0]


def test_what_graphs_keep_is_counted():
    config = make_model().config
    layers = config.num_hidden_layers * overheads.CUDA.graph_layer
    flags = {"max_prompt_length": 64, "max_completion_length": 32}
    found, few = (Planner(config).predict(recipe_for(rollout_batch_size=rows, **flags)) for rows in (32, 2))
    assert found.parts["rollout"]["CUDA graphs"] == 6 * layers  # 32, 16, 8, 4, 2 and 1 rows
    assert few.parts["rollout"]["CUDA graphs"] == 2 * layers
    assert "CUDA graphs" not in found.parts["backward"]
    one = overheads.CUDA.context + overheads.CUDA.cublas
    assert found.parts["load"]["CUDA context"] == one
    assert found.parts["backward"]["CUDA context"] == one + overheads.CUDA.cublas
    hopper = overheads.on("cuda", cards.Card("H100", 132, 1.8, 3350, (9, 0)))
    assert hopper.cublas > 32 * overheads.MIB and overheads.on("cuda", cards.typical(8)) is overheads.CUDA


def test_a_card_says_what_it_can_do_and_a_typical_one_fills_the_gaps(monkeypatch):
    said = SimpleNamespace(name="Card", multi_processor_count=46, major=8, minor=6, clock_rate=1_725_000,
                           memory_clock_rate=7_001_000, memory_bus_width=256)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: said)
    card = cards.present(3, 8)
    assert card.index == 3
    assert (card.gbs, card.flops) == pytest.approx((448, 40.6e12), rel=0.01)
    del said.memory_clock_rate, said.clock_rate
    gaps = cards.present(3, 8)
    assert (gaps.gbs, gaps.ghz, gaps.multiprocessors) == (cards.typical(8).gbs, cards.typical(8).ghz, 46)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: 1 / 0)
    assert cards.present(0, 8) == cards.typical(7.99) != cards.typical(24)
    assert cards.typical(2) == cards.typical(4)


def test_beside_a_reward_model_there_is_a_climb_as_its_bytes_are_counted():
    for reward in (["accuracy", "mine.py:f:0.5"], ["accuracy", "someone/judge:2"]):
        _, plan = planned(told("Qwen2.5-0.5B"), "Qwen2.5-0.5B", 8, reward=reward)
        assert plan.climbs


def test_a_climb_that_fails_leaves_the_plan(monkeypatch):
    def fails(*_):
        raise AttributeError("a model of another kind")

    monkeypatch.setattr("lowvram_grpo.plan.climb.shape_of", fails)
    planner = told("Qwen2.5-0.5B")
    _, plan = planned(planner, "Qwen2.5-0.5B", 8)
    assert plan.fits and not plan.climbs
