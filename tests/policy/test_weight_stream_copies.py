"""When layers are copied to their slots, and copies that fail."""

from __future__ import annotations

import pytest
import torch
from passes import micro_batch, training_pass
from streamed_policies import assert_same_bits, loaded, policy, saved_model

from lowvram_grpo.policy import window


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


def test_a_layer_is_copied_once_a_pass_and_backwards_on_the_way_back(saved, monkeypatch):
    model = policy(loaded(saved, "float32"), 5)
    model.train()
    copied, fetch = [], window.Window._fetch

    def spy(self, i):
        before = self._held[i % 2]
        fetch(self, i)
        copied.extend([i] if before != i else [])

    monkeypatch.setattr(window.Window, "_fetch", spy)
    loss = model(input_ids=micro_batch()[0]).logits.square().mean()
    assert copied == [2, 3, 4]  # the first two have been there since the start
    loss.backward()
    assert copied == [2, 3, 4, 2, 1, 0]  # the last two still were
    copied.clear()
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=micro_batch()[0])
    # Behind the last layers, those come that the next pass begins with.
    assert copied == [2, 3, 4, 1, 0] * 2


@pytest.mark.parametrize("where", ["forward", "backward", "scoring"])
def test_a_copy_that_fails_is_an_error_and_the_next_pass_is_right(saved, where, monkeypatch):
    """Each copy of a pass in turn; whatever is copied instead would be another layer's weights."""
    expected = training_pass(policy(loaded(saved, "nf4")))
    model = policy(loaded(saved, "nf4", weight_offload=5), 5)
    training_pass(model)
    copies, fetch = Failing(monkeypatch), 0
    while True:
        fetch += 1
        copies.arm(fetch, only_back=where == "backward")
        try:
            if where == "scoring":
                with torch.no_grad():
                    model(input_ids=micro_batch()[0])
            else:
                training_pass(model)
        except torch.OutOfMemoryError:
            pass
        failed = copies.failed
        copies.disarm()
        assert_same_bits(training_pass(model), expected)
        if not failed:
            break
    assert fetch > 3


class Failing:
    """Has the n-th copy into a slot from now on raise, half done."""

    def __init__(self, monkeypatch):
        self.left, self.failed, self.only_back = None, False, False
        fetch = window.Window._fetch

        def failing(inner, i):
            if inner._held[i % 2] != i and self.left is not None:
                in_backward = torch._C._current_graph_task_id() != -1
                self.left -= in_backward or not self.only_back
                if self.left == 0:
                    self.left, self.failed, copy = None, True, torch.Tensor.copy_

                    def broken(to, source, *args, **kwargs):
                        copy(to[: len(to) // 2], source[: len(to) // 2])
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(torch.Tensor, "copy_", broken)
                        return fetch(inner, i)
            return fetch(inner, i)

        monkeypatch.setattr(window.Window, "_fetch", failing)

    def arm(self, n, only_back):
        self.left, self.failed, self.only_back = n, False, only_back

    def disarm(self):
        self.left = None
