"""What switch_on takes, and what it says of the rest."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

import lowvram_grpo
from lowvram_grpo.errors import UserError

PACKAGE = Path(lowvram_grpo.__file__).parent


def test_no_other_module_imports_trl():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if any(name.split(".")[0] == "trl" for name in _imported(node))
    }
    assert found == {"integrations/trl.py", "integrations/trl_head.py"}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""] if not node.level else []
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_a_missing_trl_is_one_sentence(monkeypatch):
    name = "lowvram_grpo.integrations.trl"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for module in ("trl", name):  # None: an import of it fails
        monkeypatch.setitem(sys.modules, module, None)
    del sys.modules[name]
    with pytest.raises(
        UserError, match=r"needs TRL, which cannot be imported here .* pip install 'trl==1\.16"
    ) as found:
        importlib.import_module(name)
    assert isinstance(found.value, ImportError) and "\n" not in str(found.value)


@pytest.fixture
def switch_on():
    pytest.importorskip("trl", reason="TRL is what is switched on")
    from lowvram_grpo.integrations.trl import switch_on

    return switch_on


@pytest.fixture
def trainer(tmp_path, switch_on):
    from beside_trl import trainer_of

    return trainer_of(tmp_path)


def test_another_version(trainer, switch_on, monkeypatch):
    import trl

    for version in ("1.17.0", "1.160.0", "1.1.6"):
        monkeypatch.setattr(trl, "__version__", version)
        with pytest.raises(UserError, match=f"inside of TRL 1.16, and {version} is installed"):
            switch_on(trainer)


def test_not_a_trainer_of_trl(switch_on):
    with pytest.raises(UserError, match=r"takes a GRPOTrainer of TRL, not a builtins\.int"):
        switch_on(1)


@pytest.mark.parametrize(
    ("where", "name", "value", "sentence"),
    [
        ("args", "use_vllm", True, r"another sampler \(use_vllm=True\); drop it, or pass engine=False"),
        ("trainer", "use_transformers_continuous_batching", True, "use_transformers_continuous_batching=True"),
        ("trainer", "rollout_func", print, r"another sampler \(rollout_func\)"),
        ("trainer", "_generate_single_turn", print, "a _generate_single_turn of its own"),
        ("trainer", "is_deepspeed_enabled", True, "set deepspeed off"),
        ("trainer", "is_fsdp_enabled", True, "set fsdp off"),
        ("args", "torch_compile", True, "set torch_compile off"),
    ],
)
def test_settings_at_odds(trainer, switch_on, where, name, value, sentence):
    forward = trainer.model.forward
    setattr(trainer if where == "trainer" else trainer.args, name, value)
    with pytest.raises(UserError, match=sentence):
        switch_on(trainer)
    assert trainer.model.forward == forward and not hasattr(trainer, "_lowvram_grpo")
    if "sampler" in sentence:
        switch_on(trainer, engine=False)


def test_several_processes(trainer, switch_on, monkeypatch):
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(UserError, match="made for one process, and there are 2"):
        switch_on(trainer)


def test_nothing_twice_and_nothing_at_all(trainer, switch_on):
    with pytest.raises(UserError, match="nothing to do"):
        switch_on(trainer, logps=False, engine=False)
    with pytest.raises(UserError, match="auto, sparse or dense, not 'exact'"):
        switch_on(trainer, direction="exact")
    undo = switch_on(trainer)
    with pytest.raises(UserError, match="switched on already"):
        switch_on(trainer)
    undo()
    undo = switch_on(trainer)
    undo()


def test_a_forward_that_is_not_trls(trainer, switch_on):
    trainer.model.forward = type(trainer.model).forward.__get__(trainer.model)
    with pytest.raises(UserError, match="forward of this LlamaForCausalLM is not the one that TRL"):
        switch_on(trainer)
    assert not hasattr(trainer, "_lowvram_grpo")
