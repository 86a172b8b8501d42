"""The first signal asks for a checkpoint, the second is obeyed at once."""

from __future__ import annotations

import signal

import pytest
from transformers import TrainerControl

from lowvram_grpo.run.interrupt import StopAfterStep


@pytest.mark.parametrize("signum, at_once", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_first_signal_saves_and_the_second_stops(signum, at_once):
    said: list[str] = []
    interrupt, control = StopAfterStep(said.append), TrainerControl()
    before = signal.getsignal(signum)
    with interrupt.armed():
        interrupt.on_train_begin(None, None, control)
        interrupt.on_step_end(None, None, control)
        assert not control.should_save and not control.should_training_stop
        signal.raise_signal(signum)
        interrupt.on_step_end(None, None, control)
        assert control.should_save and control.should_training_stop
        assert interrupt.requested == signum and "with a checkpoint" in said[0]
        with pytest.raises(at_once) as stop:
            signal.raise_signal(signum)
    assert at_once is KeyboardInterrupt or stop.value.code == 143
    assert signal.getsignal(signum) is before and len(said) == 1


def test_before_the_first_step_there_is_nothing_to_wait_for():
    """A cold start may take minutes."""
    said: list[str] = []
    interrupt = StopAfterStep(said.append)
    with interrupt.armed(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert interrupt.requested is None and said == ["stopped before the first step: there is nothing to keep."]
