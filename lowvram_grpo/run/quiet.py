"""Keep library chatter off a person's screen; what matters is said by our own notices."""

from __future__ import annotations

import logging
import os
import warnings


def hush() -> None:
    """Call before torch and transformers are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads spin at barriers by default: beside any other busy process a step took up to fifty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(peft|torch|transformers)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
