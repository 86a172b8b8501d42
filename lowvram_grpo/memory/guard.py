"""What an out-of-memory error says to a person: which phase, and which setting makes it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowvram_grpo.errors import UserError


@contextmanager
def naming_oom(phase: str, setting: str) -> Iterator[None]:
    """Turn a CUDA out-of-memory error inside the block into one sentence.

    Raises:
        UserError: instead of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = str(error).split(". ")[1] if ". " in str(error) else str(error)
        raise UserError(
            f"Out of GPU memory during {phase} ({asked}); lower {setting}, max_completion_length or num_generations, "
            "or use --quantization nf4."
        ) from error
