"""A language model small enough to train in a test, made from nothing: no network, no files in the repository."""

from __future__ import annotations

import gc
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For processes that tests start, too: tiny operations gain nothing from threads, and lose minutes to them on a machine
# that is shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton looks when a kernel is decorated, so whichever test imports one first. Set it to 0 to test on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from lowvram_grpo.run.observer import Observer
from tests.interpreter import patch_once

torch.set_num_threads(1)
if os.environ["TRITON_INTERPRET"] == "1":
    patch_once()

# Whose tests take longest: begun with, so that no process is left alone with one of them at the end.
LONG = (
    "masked_cuda/test_on_cc_86.py", "masked_cuda/test_on_cc_90.py", "masked_cuda/test_on_cc_75.py",
    "kernels/test_gate.py", "cli/test_kill.py", "benchmarks/test_benchmarks.py",
    "training/test_trl_steps.py",
)  # fmt: skip
# Each holds PyTorch and transformers.
MOST_PROCESSES = 8

WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789abcdefghijklmnopqrstuvwxyz"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def pytest_xdist_auto_num_workers(config):
    """Processes of `-n auto`, which pyproject.toml asks for: none but pytest's own where paths are named, on a GPU (a
    masked one, too) and without capture, which are the ways to look at a few tests closely."""
    on_a_card = os.environ["TRITON_INTERPRET"] == "0" or "MASKED_CC" in os.environ
    if on_a_card or config.args_source != config.ArgsSource.TESTPATHS or config.option.capture == "no":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 else min(cores, MOST_PROCESSES)


def pytest_collection_modifyitems(items):
    paths = {item.path for item in items}
    place = {path: next((i for i, name in enumerate(LONG) if path.match(name)), len(LONG)) for path in paths}
    items.sort(key=lambda item: place[item.path])


def pytest_collection_finish():
    # What was imported is no garbage, and a trainer collects several times a run: most of a short one's time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_garbage(request):
    """While a model is trained, all of its class compute rotary positions by our function (policy/rotary.py). Tests of
    the policy recompute passes of models that are not trained themselves: should another test's model be collected
    between, the recomputation would go another way."""
    if request.path.parent.name != "policy":
        yield
        return
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make_tokenizer(chat: bool = False):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int = 0, **overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 41,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def model_dir(tmp_path):
    """A saved tiny model with its tokenizer, as a user would have one on disk."""
    folder = tmp_path / "tiny-model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def dataset():
    from datasets import Dataset

    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts = [" ".join(letters[(i + j) % 26] for j in range(1 + i % 5)) for i in range(12)]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(i % 10) for i in range(12)]})


def digit_share(completions, **kwargs):
    """Reward: the share of digits in the completion. Dense, so that groups differ."""
    return [sum(w.isdigit() for w in c.split()) / max(len(c.split()), 1) for c in completions]


class Quiet(Observer):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.said: list[str] = []

    def notice(self, text):
        self.said.append(text)


@pytest.fixture
def config(tmp_path):
    from lowvram_grpo import GRPOConfig

    def make(**overrides):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "num_generations": 4,
            "prompts_per_step": 2,
            "per_device_train_batch_size": 8,
            "max_completion_length": 6,
            "temperature": 1.0,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }
        return GRPOConfig(**{**settings, **overrides})

    return make


@pytest.fixture
def job(tmp_path, model_dir):
    """A job that would run from the command line: flags as a dict."""
    rows = [{"prompt": "a b c", "answer": "1"}, {"prompt": "d e", "answer": "2"}] * 4
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "rewards.py").write_text(
        "def digits(completions, **kwargs):\n"
        "    return [sum(w.isdigit() for w in c.split()) / 8 for c in completions]\n"
        "def raises(completions, **kwargs):\n    raise KeyError('oops')\n"
        "def short(completions, **kwargs):\n    return [1.0]\n"
        "def nan(completions, **kwargs):\n    return [float('nan')] * len(completions)\n"
        "calls = []\n"
        "def later(completions, **kwargs):\n"
        "    calls.append(1)\n"
        "    return digits(completions) if len(calls) < 3 else [1.0]\n",
        encoding="utf-8",
    )
    return {
        "--model": model_dir, "--data": str(data), "--reward": f"{tmp_path / 'rewards.py'}:digits",
        "--output-dir": str(tmp_path / "run"), "--max-steps": "1", "--num-generations": "4",
        "--max-completion-length": "4", "--use-cpu": "true",
    }  # fmt: skip
