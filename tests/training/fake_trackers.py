"""wandb, trackio and tensorboardX as packages that record what they are told, for an environment without them.

As far as transformers' callbacks and ours ask; real ones were tried by hand (docs/LOG.md).
"""

from __future__ import annotations

from pathlib import Path

_WANDB = """
import os
calls, run, config, refuses = [], None, {}, None

class _Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)

config = _Config()

class _Run:
    def __init__(self, id):
        self.id, self.name, self.summary = id, "named", {}
    def _label(self, code):
        pass

def init(**kwargs):
    global run
    if refuses:
        raise RuntimeError(refuses)
    run = _Run(os.environ.get("WANDB_RUN_ID") or f"new{len(calls)}")
    calls.append(("init", {**kwargs, "id": run.id, "resume": os.environ.get("WANDB_RESUME")}))

def define_metric(*args, **kwargs):
    pass

def termwarn(*args, **kwargs):
    pass

def log(row):
    if refuses:
        raise RuntimeError(refuses)
    calls.append(("log", row))

class Table:
    def __init__(self, columns, data, allow_mixed_types=False):
        self.columns, self.data = columns, data
"""
_TRACKIO = """
calls, config = [], {}
__version__ = "0.43.0"

class _Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)

config = _Config()

class _Space:
    def get(self):
        return None

class context_vars:
    current_space_id = current_project = _Space()

def init(**kwargs):
    calls.append(("init", kwargs))

def log(row):
    calls.append(("log", row))

def finish():
    calls.append(("finish", {}))

class Table:
    def __init__(self, dataframe):
        self.dataframe = dataframe
"""
_TENSORBOARD = """
calls = []

class SummaryWriter:
    def __init__(self, log_dir=None, purge_step=None):
        calls.append(("open", log_dir, purge_step))
        import os
        os.makedirs(log_dir, exist_ok=True)
    def add_text(self, name, text, step=None):
        calls.append(("text", name, text, step))
    def add_scalar(self, name, value, step):
        calls.append(("scalar", name, value, step))
    def flush(self):
        pass
    def close(self):
        pass
"""
FILES = {
    "wandb/__init__.py": _WANDB,
    "wandb/sdk/__init__.py": "",
    "wandb/sdk/lib/__init__.py": "",
    "wandb/sdk/lib/config_util.py": "class ConfigError(Exception): pass\n",
    "trackio/__init__.py": _TRACKIO,
    "tensorboardX/__init__.py": _TENSORBOARD,
}
NAMES = {name.split("/")[0] for name in FILES}


def install(folder: Path) -> None:
    """Into a folder that comes first on sys.path."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
