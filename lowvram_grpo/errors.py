"""What a person gets instead of a traceback."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A mistake or a missing thing outside this program: one clear sentence that names the cause and the fix. A
    ValueError, since that is what a script that came from TRL catches.

    The command line prints it without a traceback and exits with code 2.
    """


class UnknownSetting(UserError, TypeError):
    """A name that is no setting. A TypeError too, since that is what a class that does not know an argument raises."""


class WrongType(UserError, TypeError):
    """An argument of another type than it can have: a TypeError, too, as in TRL."""


# Errors of the operating system that say that a file can't be written here, or not any more.
_UNWRITABLE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENOENT")
    if hasattr(errno, name)
}
# The same from writers that are not Python's: safetensors and tokenizers (Rust), torch.save.
# EPERM, EIO, EACCES, EFBIG, ENOSPC, EROFS, EDQUOT, and Windows' full disk: a file that is missing is one that was read.
_RUST = re.compile(r"([^:]+) \(os error (?:1|5|13|27|28|30|112|122)\)")
_TORCH = ("pytorchstreamwriter", "inline_container", "iostream error", "file write failed")
# What CUDA, its libraries and Triton say in a RuntimeError when an allocation of their own fails. cuBLAS says that it
# is not initialized where there was no memory for its handle.
_OUT_OF_MEMORY = (
    "out of memory", "cublas_status_alloc_failed", "cublas_status_not_initialized", "cudnn_status_alloc_failed",
)  # fmt: skip


class CantWrite(UserError):
    """A file of a run can't be written: the disk is full, or forbids it."""

    def __init__(self, path: str | Path, error: BaseException):
        why = why_unwritten(error) or one_line(error)
        gone = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR)
        mend = "was the folder moved or deleted?" if gone else "free some space there, or see to its permissions."
        super().__init__(f"Can't write {path} ({why}); {mend}")


def why_unwritten(error: BaseException) -> str | None:
    """The reason, in a few words, of an error that says that a file could not be written; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error) if error.errno in _UNWRITABLE else None
    if rust := _RUST.search(str(error)):
        return rust[1].strip()
    if any(sign in str(error).lower() for sign in _TORCH):
        return "the disk took a part of it only"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory: PyTorch's own error, or what a library below it says instead."""
    import torch  # here: whoever only wants a sentence need not wait for it

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


class Stopped(Exception):
    """A signal ended a run at the end of its step, with a checkpoint. The command line exits with `code`, as a shell
    names a process that the signal killed."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.code = 128 + signum


class Terminated(SystemExit):
    """A signal that ends the process now. A SystemExit, so that it leaves the live view and runs what is to run at the
    end; a class of its own, since code of other people's may raise the other one."""


def counted(number: int, noun: str) -> str:
    """`1 reference`, `2 references`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def some(names: Iterable[str]) -> str:
    """Three names at most, quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def flag_of(setting: str) -> str:
    """`--lora-r` for `lora_r`."""
    return f"--{setting.replace('_', '-')}"


def one_line(error: Exception) -> str:
    """The whole message of another library's error as one line of at most 300 characters, without its full stop."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
