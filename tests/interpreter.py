"""Triton's interpreter without what it does again at every call."""

from __future__ import annotations

import types
from typing import Any

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:
    interpreter = None


def patch_once() -> None:
    """The interpreter puts its own functions into triton.language for every call of every function, and takes them out
    again: half of its time. Where nothing is compiled in the process, they may stay."""
    if interpreter is None or getattr(interpreter._patch_lang, "stays", False):
        return
    patch, done = interpreter._patch_lang, set()

    def once(fn: Any) -> types.SimpleNamespace:
        languages = frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
        if languages not in done:
            patch(fn)
            done.add(languages)
        return types.SimpleNamespace(restore=lambda: None)

    once.stays = True
    interpreter._patch_lang = once
