"""Which checkpoints are whole."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lowvram_grpo.errors import CantWrite, UserError, why_unwritten
from lowvram_grpo.run.checkpoints import CUT_OFF, MANIFEST, STATE, damage, replace_text, seal


@pytest.fixture(params=[True, False], ids=["sealed", "without a manifest"])
def checkpoint(request, tmp_path):
    save_file({"a": torch.ones(64)}, tmp_path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"b": torch.ones(64)}, tmp_path / name)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / STATE).write_text(json.dumps({"global_step": 4}), encoding="utf-8")
    if request.param:
        seal(tmp_path)
    assert damage(tmp_path) is None
    return tmp_path


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kept", [0, 30, -7])
def test_a_file_without_its_end(checkpoint, name, kept):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:kept])
    assert name in damage(checkpoint)


def test_what_the_manifest_alone_can_tell(checkpoint):
    if not (checkpoint / MANIFEST).is_file():
        pytest.skip("without a manifest nobody knows")
    path = checkpoint / "optimizer.pt"
    data = bytearray(path.read_bytes())
    whole = bytes(data)
    data[200:240] = bytes(40)  # a hole, as a power cut leaves it
    path.write_bytes(data)
    assert damage(checkpoint) == "the content of its optimizer.pt has changed"
    path.unlink()
    assert damage(checkpoint) == "its optimizer.pt is missing"
    path.write_bytes(whole)
    (checkpoint / "adapter_config.json").write_text('{"edited": 1}', encoding="utf-8")
    assert damage(checkpoint) is None  # people may edit what is text
    (checkpoint / MANIFEST).write_bytes(b"")
    assert MANIFEST in damage(checkpoint)


@pytest.mark.parametrize("state", [None, "", "{", "[]", "{}"])
def test_one_that_was_not_finished(checkpoint, state):
    if state is None:
        (checkpoint / STATE).unlink()
    else:
        (checkpoint / STATE).write_text(state, encoding="utf-8")
    assert damage(checkpoint) == CUT_OFF


@pytest.mark.parametrize(
    "error,words",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(27, "File too large"), "File too large"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "a part of it only"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (Exception("File too large (os error 27)"), "File too large"),
        (KeyError("optimizer"), None),
        (ConnectionError("no route to the hub"), None),
        (RuntimeError("CUDA error: device-side assert triggered"), None),
    ],
)
def test_which_errors_are_a_full_disk(error, words):
    why = why_unwritten(error)
    assert (why is None) if words is None else (words in why)
    assert isinstance(CantWrite("a", error), UserError)


def test_a_text_is_replaced_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "recipe.toml"
    replace_text(path, "a = 1\n")
    assert path.read_bytes() == b"a = 1\n"

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CantWrite, match=r"recipe\.toml \(No space left"):
        replace_text(path, "a = 2\n")
    assert path.read_bytes() == b"a = 1\n" and [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]
