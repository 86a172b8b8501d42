"""GRPO for the GPU people already own. The public names are TRL's: `GRPOConfig`, `GRPOTrainer`.

Importing this package loads neither torch nor transformers; the first use of a public name does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowvram_grpo.errors import UserError
    from lowvram_grpo.kernels.linear_logps import linear_logps
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.training.trainer import GRPOTrainer

__version__ = "0.1.0"

# In a bare checkout (nothing installed) `kernels/` and `presets/` lie beside the package; a wheel maps them into it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

_PUBLIC = {
    "GRPOConfig": "lowvram_grpo.recipe.config",
    "GRPOTrainer": "lowvram_grpo.training.trainer",
    "UserError": "lowvram_grpo.errors",
    "linear_logps": "lowvram_grpo.kernels.linear_logps",
}
__all__ = ["GRPOConfig", "GRPOTrainer", "UserError", "__version__", "linear_logps"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
