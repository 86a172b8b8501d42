"""A training run through a vLLM server, and what a person reads when the server is not as it should be."""

from __future__ import annotations

import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from fake_vllm import FakeVLLM, serving
from peft import LoraConfig, get_peft_model

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.rollout.adapter_versions import AdapterVersions
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.rollout.vllm import VLLMServer, check_vllm
from lowvram_grpo.rollout.vllm_base import prompt_seed
from lowvram_grpo.rollout.vllm_client import VLLMClient, allowed_rank, same_model, server_command

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def train(config, dataset, tokenizer, model):
    """A trainer whose completions come from `fake`, having trained."""

    def run(fake, peft_config=LORA, **settings):
        with serving(fake.answer) as url:
            args = config(
                use_vllm=True, vllm_mode="server", vllm_server_base_url=url, vllm_server_model=fake.name,
                vllm_server_timeout=20, **settings,
            )  # fmt: skip
            trainer = GRPOTrainer(
                model, digit_share, args, dataset, processing_class=tokenizer, observer=Quiet(), peft_config=peft_config
            )
            trainer.train()
        return trainer

    return run


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"num_iterations": 2, "max_steps": 4, "loss_type": "dapo"}],
    ids=["one step a rollout", "two"],
)
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_a_run_through_a_server_trains_on_its_tokens_and_sends_each_adapter_once(train, settings, mode, tmp_path):
    fake = FakeVLLM(make_model)
    trainer = train(fake, vllm_importance_sampling_mode=mode, **settings)
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(rows) == trainer.args.max_steps
    for row in rows:
        if "sampling/importance_sampling_ratio/mean" in row:  # a rollout's first step
            assert row["sampling/sampling_logp_difference/max"] < 1e-4
            for kind in ("min", "mean", "max"):
                assert row[f"sampling/importance_sampling_ratio/{kind}"] == pytest.approx(1.0, abs=1e-3)
            assert row["sampling/corrected_share"] == 0.0
    assert any(row["grad_norm"] > 0 for row in rows)

    # Two rollouts on two states of the adapter: each has a name of its own and lies in the folder for it.
    loads, unloads = fake.asked("/v1/load_lora_adapter"), fake.asked("/v1/unload_lora_adapter")
    names = [load["lora_name"] for load in loads]
    assert len(names) == len(set(names)) == 2 and [unload["lora_name"] for unload in unloads] == names[:1]
    folder = (tmp_path / "run" / "vllm_adapter").resolve()
    assert [load["lora_path"] for load in loads] == [str(folder / name) for name in names]
    assert [path.name for path in folder.iterdir()] == names[1:]  # the one before is gone
    used = [body["model"] for body in fake.asked("/v1/completions") if body["max_tokens"] > 1]
    assert used == [names[0]] * 2 + [names[1]] * 2


def test_the_adapter_the_server_has_is_the_one_that_was_trained(train):
    fake = FakeVLLM(make_model)
    trainer = train(fake, max_steps=2)
    [served] = fake.adapters.values()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base, theirs, ours = (m.eval()(ids).logits for m in (make_model(), served, trainer.model))
    assert not torch.allclose(base, theirs, atol=1e-4)  # one step old
    assert not torch.allclose(theirs, ours, atol=1e-4)  # which is one step newer


def test_every_sampling_argument_is_spelled_out(train):
    fake = FakeVLLM(make_model)
    trainer = train(
        fake, max_steps=1, top_p=0.9, top_k=7, min_p=0.05, repetition_penalty=1.1,
        generation_kwargs={"min_new_tokens": 2, "presence_penalty": 0.5},
    )  # fmt: skip
    sent = fake.asked("/v1/completions")[-1]
    assert any("not judged" in text for text in trainer.observer.said)
    expected = {
        "temperature": 1.0, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.1, "n": 4,
        "presence_penalty": 0.5, "frequency_penalty": 0.0, "max_tokens": 6, "min_tokens": 2, "stop_token_ids": [1],
        "return_token_ids": True, "stream": False, "logprobs": 0,
    }  # fmt: skip
    assert expected.items() <= sent.items()
    assert sent["prompt"] and all(isinstance(token, int) for token in sent["prompt"])


def test_evaluation_on_the_same_weights_sends_no_adapter(train, dataset):
    fake = FakeVLLM(make_model)
    trainer = train(fake, max_steps=1)
    before = len(fake.asked("/v1/load_lora_adapter"))
    with serving(fake.answer) as url:
        trainer.collector.engine.client.url = url
        for _ in range(2):
            trainer.evaluate(dataset.select(range(3)))
    assert len(fake.asked("/v1/load_lora_adapter")) == before + 1  # that of the step, once


def test_a_server_that_drifts_is_reported_and_corrected(train):
    fake = FakeVLLM(make_model, drift=0.05)
    trainer = train(fake, max_steps=1, vllm_importance_sampling_mode="token_truncate",
                    vllm_importance_sampling_clip_max=1.02)  # fmt: skip
    row = trainer.state.log_history[0]
    assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(0.05, abs=1e-3)
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.02)
    assert row["sampling/raw_importance_sampling_ratio/mean"] == pytest.approx(1.0513, abs=1e-3)
    assert row["sampling/corrected_share"] == 1.0
    assert any("differ by 5.0e-02 nats" in text for text in trainer.observer.said)


def test_without_correction_ratios_are_only_logged(train):
    trainer = train(FakeVLLM(make_model, drift=0.05), max_steps=1, vllm_importance_sampling_correction=False)
    assert trainer.learner.correction is None
    assert trainer.state.log_history[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0513, abs=1e-3)


def test_another_model_behind_the_same_name_fails_the_self_test(train):
    with pytest.raises(UserError, match="vLLM does not run the model that is trained"):
        train(FakeVLLM(lambda: make_model(seed=3)), max_steps=1)


# One prompt at a time, without a trainer


@pytest.fixture
def server(model, tmp_path):
    """A VLLMServer on what answers at `url`."""

    def make(url, *, timeout=5.0, lora=LORA, served=None, server_folder=None, **at):
        sampling = Sampling(**{"max_new_tokens": 6, "eos_ids": (1,), "pad_id": 0, **at})
        versions = AdapterVersions(get_peft_model(model, lora), tmp_path / "adapters")
        client = VLLMClient(url, timeout, server_command("tiny", versions.rank))
        return VLLMServer(sampling, versions, client, served=served or {}, server_folder=server_folder)

    return make


def test_groups_are_adjacent_in_order_and_repeat_for_a_seed(server):
    prompts, ends = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], (1, 9, 17, 25)
    with serving(FakeVLLM(make_model).answer) as url:
        engine = server(url, max_new_tokens=12, eos_ids=ends)
        batch, again, other = (engine.generate(prompts, 3, seed=s) for s in (4, 4, 5))
        first = engine.generate(prompts, 1, seed=4)
    assert batch.completion_ids[::3] == first.completion_ids  # whatever order a server answers in
    assert batch.prompt_ids == [prompt for prompt in prompts for _ in range(3)]
    assert batch.completion_ids == again.completion_ids != other.completion_ids
    assert len({tuple(ids) for ids in batch.completion_ids}) > 6
    for ids, logps, cut in zip(batch.completion_ids, batch.sampling_per_token_logps, batch.truncated):
        assert len(ids) == len(logps) and logps.dtype == torch.float32
        assert cut == (ids[-1] not in ends) and not set(ends) & set(ids[:-1])
    assert any(batch.truncated) and not all(batch.truncated)


def test_seeds_of_a_group_do_not_meet_those_of_the_next_prompt():
    seeds = [prompt_seed(step, prompt) for step in range(20) for prompt in range(50)]
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert min(b - a for a, b in zip(sorted(seeds), sorted(seeds)[1:])) > 10_000


def test_the_server_gets_its_own_name_of_the_folder(server):
    fake = FakeVLLM(make_model)
    with serving(fake.answer) as url, pytest.raises(UserError, match="vllm_adapter_server_dir"):
        server(url, server_folder="/mnt/c/adapters/").generate([[5]], 2, seed=0)
    [load] = fake.asked("/v1/load_lora_adapter")
    assert load["lora_path"] == f"/mnt/c/adapters/{load['lora_name']}"


@pytest.mark.parametrize(
    "fake, at, sentence",
    [
        ({"runtime": False}, {}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"lora": False}, {}, "started without LoRA"),
        ({"max_rank": 2}, {}, "smaller rank than 4"),
        ({"processed": False}, {"temperature": 0.7}, "log-probs before the temperature"),
        ({"silent": ("token_ids",)}, {}, "0.10.2 or later"),
        ({"silent": ("logprobs",)}, {}, "0.10.2 or later"),
        ({"max_len": 8}, {}, "refused a prompt .400.: This model's maximum context length is 8 tokens"),
        ({"drift": -20.0}, {}, "logits in place of log-probs"),
        ({"drift": float("nan")}, {}, "no numbers"),
        ({}, {"extra": {"no_repeat_ngram_size": 2}}, "generation_kwargs no_repeat_ngram_size"),
    ],
    ids=lambda x: str(x) if not isinstance(x, dict) else ",".join(x) or "-",
)
def test_a_server_that_was_started_otherwise(server, fake, at, sentence):
    with serving(FakeVLLM(make_model, **fake).answer) as url, pytest.raises(UserError, match=sentence) as error:
        server(url, **at).generate([[5, 6, 7]], 2, seed=0)
    assert str(error.value).count(". ") == 0  # one sentence


def test_raw_log_probs_will_do_at_temperature_one(server):
    with serving(FakeVLLM(make_model, processed=False).answer) as url:
        assert len(server(url).generate([[5, 6, 7]], 2, seed=0).completion_ids) == 2


def test_prompts_that_are_too_long_are_refused_before_they_are_sent(server):
    fake = FakeVLLM(make_model)
    with serving(fake.answer) as url, pytest.raises(UserError, match=r"exceed the 8 tokens .* --max-model-len"):
        server(url, served={"max_model_len": 8}).generate([[5] * 3], 2, seed=0)
    assert not fake.calls


def test_a_server_that_does_not_answer_in_time(server):
    fake = FakeVLLM(make_model)
    with serving(fake.answer) as url:
        engine = server(url, timeout=0.3)
        fake.hold = 1.0
        with pytest.raises(UserError, match=r"within 0.3 s; raise vllm_server_timeout"):
            engine.generate([[5]], 2, seed=0)


def test_a_server_that_is_gone_and_one_that_takes_its_place(server):
    with serving(FakeVLLM(make_model).answer) as url:
        engine = server(url)
        before = engine.generate([[5]], 2, seed=0)
    with pytest.raises(UserError, match="no longer answers"):
        engine.generate([[5]], 2, seed=0)
    with serving(FakeVLLM(make_model).answer) as url:
        engine.client.url = url
        assert engine.generate([[5]], 2, seed=0).completion_ids == before.completion_ids


def test_no_server_at_all_and_something_else_in_its_place():
    client = lambda url: VLLMClient(url, 0.2, server_command("org/Tiny-0.1B", 12))
    with pytest.raises(UserError, match=r"No vLLM server answers .*vllm serve org/Tiny-0.1B .*--max-lora-rank 16"):
        client("http://127.0.0.1:9").base_model("org/Tiny-0.1B", None)
    with serving(lambda path, body: (200, "hello")) as url, pytest.raises(UserError, match="no vLLM server"):
        client(url).base_model("org/Tiny-0.1B", None)
    with serving(lambda path, body: (401, {"error": "Unauthorized"})) as url, pytest.raises(UserError, match="API_KEY"):
        client(url).base_model("org/Tiny-0.1B", None)


def test_a_server_that_comes_up_late_is_waited_for():
    answers = iter([(503, "loading"), FakeVLLM(make_model, name="org/Tiny").answer("/v1/models", None)])
    with serving(lambda path, body: next(answers)) as url:
        assert VLLMClient(url, 5.0, "").base_model("/models/tiny", None)["max_model_len"] == 128


def test_the_served_model_is_the_one_that_is_trained():
    fake = FakeVLLM(make_model, name="org/Tiny-0.1B")
    fake.adapters["org/other"] = None  # an adapter is no base model
    with serving(fake.answer) as url:
        client = VLLMClient(f"{url}/v1/", 1.0, "")
        assert client.url == url
        assert client.base_model("C:\\models\\tiny-0.1b", None)["id"] == fake.name
        assert client.base_model("other", fake.name)["id"] == fake.name
        with pytest.raises(UserError, match=r"serves org/Tiny-0.1B, not org/other; .*vllm_server_model"):
            client.base_model("org/other", None)
    assert same_model("a/b", "b") and not same_model("", "b") and not same_model("a/b", "a/c")
    assert [allowed_rank(r) for r in (1, 8, 9, 64, 1000)] == [8, 8, 16, 64, 1000]
    assert VLLMClient("0.0.0.0:8000", 1.0, "").url == "http://127.0.0.1:8000"


def test_only_plain_lora_adapters_are_sent(model):
    with pytest.raises(UserError, match="all weights are trained"):
        AdapterVersions(model, "unused")
    dora = LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="this one has use_dora"):
        AdapterVersions(get_peft_model(model, dora), "unused")


def test_an_adapter_is_written_again_when_a_weight_changes_and_not_before(model, tmp_path):
    policy = get_peft_model(model, LORA, adapter_name="mine")
    versions = AdapterVersions(policy, tmp_path)
    first = versions.renew()
    assert (first.folder / "adapter_model.safetensors").is_file() and first.folder.name == "mine"
    assert versions.renew() is None
    next(p for n, p in policy.named_parameters() if "lora_B" in n).data.view(-1)[3] += 1e-6  # as a fused optimizer
    second = versions.renew()
    assert second.number == 2 and second.name != first.name and first.folder.is_dir()
    versions.remove(first)
    assert [path.name for path in tmp_path.iterdir()] == [second.name]


# In this process


def test_where_vllm_cannot_be_had_one_sentence_says_what_else(config, monkeypatch, dataset, tokenizer, model):
    monkeypatch.setattr("lowvram_grpo.rollout.vllm.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed; run `pip install vllm`"):
        GRPOTrainer(model, digit_share, config(use_vllm=True), dataset, processing_class=tokenizer)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match=r"does not run on Windows; set use_vllm to false.*WSL2"):
        check_vllm(config(use_vllm=True))
    check_vllm(config(use_vllm=True, vllm_mode="server"))  # is only HTTP


class FakeLLM:
    """vllm.LLM on the fake server's model."""

    made: dict = {}

    def __init__(self, **kwargs):
        FakeLLM.made = kwargs
        if kwargs["gpu_memory_utilization"] > 0.9:
            raise ValueError("Free memory on device is less than desired.\nDecrease it.")
        self.fake, self.awake, self.naps = FakeVLLM(make_model), not kwargs["enable_sleep_mode"], 0
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=kwargs["max_model_len"] or 128))

    def sleep(self, level):
        assert level == 1  # level 2 would throw the base away, which nobody sends again
        self.awake, self.naps = False, self.naps + 1

    def wake_up(self):
        self.awake = True

    def generate(self, prompts, params, lora_request, use_tqdm):
        assert self.awake
        if lora_request.name not in self.fake.adapters:
            self.fake.load({"lora_name": lora_request.name, "lora_path": lora_request.path})
        outputs = []
        for prompt, at in zip(prompts, params):
            body = {"model": lora_request.name, "prompt": prompt["prompt_token_ids"], **at}
            _, answer = self.fake.complete(body)
            outputs.append(SimpleNamespace(outputs=[self.output(c) for c in reversed(answer["choices"])]))
        return outputs

    def output(self, choice):
        steps = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"])
        logprobs = [{token: SimpleNamespace(logprob=p)} for token, p in steps]
        return SimpleNamespace(
            token_ids=tuple(choice["token_ids"]), logprobs=logprobs, finish_reason=choice["finish_reason"]
        )


@pytest.fixture
def installed(monkeypatch):
    vllm, lora, requests = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.__spec__ = SimpleNamespace()
    vllm.LLM, vllm.SamplingParams = FakeLLM, dict
    requests.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)
    for module in (vllm, lora, requests):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("sleeps", [False, True])
def test_a_run_with_vllm_in_this_process(installed, config, dataset, tokenizer, model, sleeps):
    args = config(use_vllm=True, temperature=0.7, max_prompt_length=20, vllm_enable_sleep_mode=sleeps)
    trainer = GRPOTrainer(
        model, digit_share, args, dataset, processing_class=tokenizer, observer=Quiet(), peft_config=LORA
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2 and all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)
    llm = trainer.collector.engine.llm
    assert len(llm.fake.adapters) == 2 and llm.naps == (3 if sleeps else 0)
    made = {"enable_lora": True, "max_lora_rank": 8, "gpu_memory_utilization": 0.3, "max_model_len": 26}
    assert {**made, "logprobs_mode": "processed_logprobs"}.items() <= FakeLLM.made.items()


def test_vllm_that_does_not_start_says_what_to_change(installed, config, dataset, tokenizer, model):
    args = config(use_vllm=True, vllm_gpu_memory_utilization=0.95)
    with pytest.raises(UserError, match=r"Free memory .* Decrease it.; change vllm_gpu_memory_utilization"):
        GRPOTrainer(model, digit_share, args, dataset, processing_class=tokenizer, peft_config=LORA)


def test_what_is_sent_is_json(server):
    fake = FakeVLLM(make_model)
    with serving(fake.answer) as url:
        server(url, temperature=0.7).generate([[5]], 2, seed=2**62)
    assert json.dumps(fake.calls)
