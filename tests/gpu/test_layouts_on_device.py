"""A layout's indices go to the device without the host waiting for it, and a pass by it waits for nothing."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from lowvram_grpo.memory.host import upload
from lowvram_grpo.policy.attention import AttentionParams, ranges
from lowvram_grpo.policy.shared_prefix import PrefixLayout
from lowvram_grpo.rollout.attention import PrefillLayout
from lowvram_grpo.rollout.cache import GroupCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CARD = torch.device("cuda", 0)
PROMPTS, COMPLETIONS, GROUPS = [5, 5, 5, 3, 3], [4, 7, 1, 6, 2], [3, 2]


@pytest.fixture
def waiting_is_an_error():
    was = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(was)


def tokens(length, *heads):
    return [torch.randn(1, n, length, 8, device=CARD, dtype=torch.float16, requires_grad=True) for n in heads]


@pytest.mark.parametrize("window", [None, 3])
def test_a_training_layout_waits_for_nothing(waiting_is_an_error, window):
    layout = PrefixLayout(PROMPTS, COMPLETIONS, GROUPS, width=12, prompt_width=5, device=CARD)
    assert layout.pack(torch.ones(5, 12, dtype=torch.long, device=CARD)).shape == (1, layout.length)
    for _ in range(2):
        out = layout.attend(0, *tokens(layout.length, 4, 2, 2), AttentionParams(0.3, 0.0, window, None))
        out.sum().backward()


@pytest.mark.parametrize("window", [None, 3])
def test_a_prefill_waits_for_nothing(waiting_is_an_error, window):
    layout = PrefillLayout(GroupCache(2, 7, 1, 1), [4, 7], [1, 0])
    assert layout.positions(CARD).shape == (1, 11)
    with torch.no_grad():
        layout.attend(0, *tokens(11, 4, 2, 2), AttentionParams(0.3, 0.0, window, None))


def test_an_upload_arrives_whole_where_the_host_runs_ahead():
    """The pinned block of each is free again at once, and must not be given out before it was read."""
    with suppress(AttributeError):  # a device that only plays one
        torch.cuda._sleep(20_000_000)
    sent = [upload([ranges([(i, 1000)])], CARD)[0] for i in range(20)]
    assert [part[[0, -1]].tolist() for part in sent] == [[i, i + 999] for i in range(20)]
