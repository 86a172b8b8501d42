"""The reference of all weights, streamed from host memory: long copies show a stream that does not wait for another."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import make_model

from lowvram_grpo.policy.reference import Reference
from lowvram_grpo.training.scoring import score

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# tests/masked_cuda, on a CPU, has no streams.
LAYERS, HIDDEN, PROMPT, COMPLETION = (3, 64, 8, 16) if "MASKED_CC" in os.environ else (12, 1024, 128, 384)


@pytest.mark.parametrize("tied", [True, False])
def test_a_streamed_reference_scores_as_a_resident_one(tied):
    model = make_model(
        hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, max_position_embeddings=1024,
        tie_word_embeddings=tied,
    ).cuda()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    prompt, completion = (torch.randint(3, 41, (4, n), generator=generator).cuda() for n in (PROMPT, COMPLETION))
    batch = prompt, torch.ones_like(prompt), completion, torch.ones_like(completion)
    lengths = {"prompt_lengths": [PROMPT] * 4, "completion_lengths": [COMPLETION] * 4}
    found = []
    for offload in (False, True):
        reference = Reference(model, offload=offload)
        assert reference.offloaded is offload
        with torch.no_grad():
            for _ in range(3 if offload else 1):  # the second and third time through slots that were used before
                with reference.active() as visiting:
                    found.append(score(visiting, *batch, temperature=0.9, workspace_mib=8, **lengths).logps.cpu())
    for again in found[1:]:
        torch.testing.assert_close(again, found[0], rtol=1e-4, atol=1e-4)
