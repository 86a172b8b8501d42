"""What the compile gate found, kept from run to run and from checkout to checkout.

An entry is one small JSON file, named by a hash of all that its kernel is compiled from, so a changed kernel has
another name and an old entry is never asked for again. LOWVRAM_GATE_CACHE names the folder (empty: nothing is kept);
without it, it is `lowvram-grpo/compile-gate` of XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache. Files appear whole or not at
all, so several processes may share it; an entry that can't be read is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "LOWVRAM_GATE_CACHE"
UNUSED_SECONDS = 90 * 86_400


def folder() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return Path(base or Path.home() / ".cache") / "lowvram-grpo" / "compile-gate"


def key_of(source: Any, target: Any, options: dict[str, Any], measured_by: bytes) -> str:
    """Of a triton ASTSource, a GPUTarget and options for `triton.compile`.

    Triton's hashes, that its own cache is keyed by, hold the source of the kernel and of every function it calls, the
    constants it reads, its signature and constants, ptxas and libdevice. `measured_by` is what reads the binary.
    """
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend

    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    environment = sorted(get_cache_invalidating_env_vars().items())
    parts = (triton.__version__, source.hash(), backend.hash(), parsed.hash(), environment, measured_by)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read(key: str) -> dict[str, int] | None:
    path = _path(key)
    if path is None:
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        found = entry["found"]
        if entry["key"] != key or not all(type(value) is int for value in found.values()):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    with suppress(OSError):
        os.utime(path)  # in use: `prune` leaves it
    return found


def write(key: str, found: dict[str, int]) -> None:
    """A folder that can't be written to keeps nothing."""
    path = _path(key)
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as temporary:
            json.dump({"key": key, "found": found}, temporary)
        try:
            os.replace(temporary.name, path)
        except OSError:
            os.unlink(temporary.name)


def prune() -> None:
    """Remove what nobody has asked for in three months."""
    at = folder()
    oldest = time.time() - UNUSED_SECONDS
    for path in at.glob("*/*") if at else ():
        with suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def _path(key: str) -> Path | None:
    at = folder()
    return at and at / key[:2] / f"{key}.json"
