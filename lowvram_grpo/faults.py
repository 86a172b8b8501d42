"""What the world does to a run, in one sentence: full disks, missing packages, hubs out of reach, cards that fail, and
settings that another library refuses.

Most mistakes are looked for where they can be made and raise a UserError there. This is the boundary behind those
checks: what was not foreseen at its place is told apart here by its kind, and named with what was being done and with
the settings that led there. Anything else is a bug of ours, and stays one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lowvram_grpo.errors import UserError, flag_of, one_line, why_unwritten

_OURS = str(Path(__file__).parent)

# A function of another library in whose frames an error arises -> the settings that it reads.
_READ_BY: dict[str, tuple[str, ...]] = {
    "get_optimizer_cls_and_kwargs": ("optim", "optim_args", "optim_target_modules"),
    "create_optimizer": ("optim", "optim_args", "optim_target_modules"),
    "get_scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs"),
    "create_scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs"),
    "init_hf_repo": ("push_to_hub", "hub_model_id"),
    "push_to_hub": ("push_to_hub", "hub_model_id"),
    "_determine_best_metric": ("metric_for_best_model",),
    "get_reporting_integration_callbacks": ("report_to",),
    "create_accelerator_and_postprocess": ("accelerator_config", "deepspeed", "fsdp"),
    "get_peft_model": ("lora_target_modules", "lora_r"),
    "generate": ("generation_kwargs",),
    "apply_chat_template": ("chat_template", "chat_template_kwargs"),
    "checkpoint": ("gradient_checkpointing_kwargs",),
}  # fmt: skip

# Settings whose names stand in all kinds of messages.
_COMMON = {"model", "data", "split", "reward", "template", "preset", "plain", "seed", "adapter", "dtype", "config"}

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EFBIG: "a file would be larger than this system allows",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "too many files are open",
    errno.ENAMETOOLONG: "the path is too long",
    **({errno.EDQUOT: "the disk quota is used up"} if hasattr(errno, "EDQUOT") else {}),
}
_FREE_SPACE = "free some space, or choose another --output-dir"
# Pieces of messages, in lower case -> what they mean, and what helps.
_MACHINE: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("defaultcpuallocator", "not enough memory: you tried to", "std::bad_alloc", "paging file is too small"),
        "this machine's own memory (not the GPU's) ran out; close other programs, take a smaller model, lower "
        "rollout_batch_size or per_device_train_batch_size, or switch the savers off that keep things in host memory",
    ),
    (
        ("device-side assert",),
        "the GPU stopped at an impossible index or probability; look for token ids beyond the model's embedding, or "
        "set CUDA_LAUNCH_BLOCKING=1 to see which operation it was",
    ),
    (
        ("probability tensor contains", "invalid multinomial"),
        "the model's probabilities are NaN or infinite; lower learning_rate, set max_grad_norm, or leave float16 for "
        "bfloat16 or float32",
    ),
    (
        ("no kernel image is available", "is not defined for option 'gpu-name'", "requires .target sm_"),
        "this build of PyTorch or Triton does not know the GPU; `lowvram-grpo doctor` names the line that installs one "
        "that does",
    ),
    (
        ("driver version is insufficient", "nvidia driver on your system is too old", "no cuda gpus are available",
         "cuda driver initialization failed", "cuda unknown error", "cuda initialization"),
        "the NVIDIA driver does not fit this PyTorch, or sees no GPU; `lowvram-grpo doctor` says what is there",
    ),
    (
        ("illegal memory access", "unspecified launch failure", "cuda error: misaligned", "has fallen off the bus",
         "uncorrectable ecc"),
        "the GPU failed; run it again with --fused-loss off and CUDA_LAUNCH_BLOCKING=1, and report what you find",
    ),
    (
        ("dll load failed", "glibcxx_", "cannot open shared object file"),
        "a compiled library can't be loaded; install Microsoft's Visual C++ redistributable (Windows) or reinstall the "
        "package in a fresh environment, and look at `lowvram-grpo doctor`",
    ),
)  # fmt: skip


@contextlib.contextmanager
def boundary(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Around a whole job: what `explain` knows leaves it as a UserError, everything else as it is.

    Args:
        settings: what a person set, by name.
    """
    try:
        yield
    except UserError:
        raise
    except BrokenPipeError as error:
        if _nobody_reads():
            raise SystemExit(141) from error  # `| head`: as a shell names what SIGPIPE ended
        raise UserError(
            f"A program that this one writes to (a logger, a helper of a reward) has ended ({one_line(error)}); see "
            "what ended it, or do without it."
        ) from error
    except Exception as error:
        known = explain(error, settings=settings or {})
        if known is None:
            raise
        raise known from error


def _nobody_reads() -> bool:
    """Whether standard output is the pipe that broke. Asked of the system: what could not be written is gone from the
    buffer, and another flush would succeed."""
    import select

    try:
        poll, out = select.poll(), sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # Windows; no file behind it
        return False
    poll.register(out, 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    # What is left in the buffer would raise again when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return True


def note_phase(error: BaseException | None, phase: str) -> None:
    """Remember what was being done when `error` arose; the innermost note counts."""
    if error is not None and phase and not getattr(error, "_phase", ""):
        error._phase = phase


def while_doing(error: BaseException) -> str:
    """` while ...` for what `note_phase` remembered of `error`; empty where it remembered nothing."""
    phase = getattr(error, "_phase", "")
    return f" while {phase}" if phase else ""


def explain(error: Exception, *, settings: Mapping[str, Any]) -> UserError | None:
    """One sentence for an error that is nobody's bug: the machine's, the hub's, or another library's word on a setting.

    Args:
        settings: what a person set; those that led to the error are named.

    Returns:
        None where it looks like a bug of this program.
    """
    while_ = while_doing(error)
    chain = list(_chain(error))
    for reason in (_of_the_disk, _of_the_machine):
        for link in chain:
            if sentence := reason(link, while_):
                return UserError(sentence if sentence.endswith("?") else f"{sentence}.")
    found = suspects(chain, settings)
    named = f" It comes from {', '.join(flag_of(key) for key in found[:3])}." if found else ""
    for reason in (_of_the_hub, _of_a_package):
        for link in chain:
            if sentence := reason(link, while_):
                return UserError(f"{sentence}.{named}")
    if not _raised_by_a_library(error) or not (found or isinstance(error, (ValueError, NotImplementedError))):
        return None
    advice = "change or drop it" if len(found) == 1 else "change or drop one of them" if found else "see --debug"
    said = f"{_library(error)} stopped{while_}: {type(error).__name__}: {one_line(error)}"
    return UserError(f"{said}.{named.rstrip('.')}; {advice}." if found else f"{said}; {advice}.")


def suspects(chain: list[BaseException], settings: Mapping[str, Any]) -> list[str]:
    """The settings that the errors of `chain` name, by key or value, or that the functions they passed through read."""
    text = " ".join(str(link) for link in chain).lower()
    frames = {frame.name for link in chain for frame in traceback.extract_tb(link.__traceback__)}
    read = {key for function in frames & _READ_BY.keys() for key in _READ_BY[function]}
    return [key for key, value in settings.items() if key in read or _in(key, text) or _mentioned(value, text)]


def _in(key: str, text: str) -> bool:
    return key not in _COMMON and re.search(rf"(?<![a-z0-9_]){re.escape(key)}(?![a-z0-9_])", text) is not None


def _mentioned(value: Any, text: str) -> bool:
    """Whether a word of at least five letters that a person wrote stands in a message: `galore_adamw` in `install
    galore_torch`. Paths are no words: they stand in most messages."""
    if not isinstance(value, str) or "/" in value or "\\" in value:
        return False
    words = [word for word in re.split(r"[^a-z0-9]+", value.lower()) if len(word) >= 5]
    return any(re.search(rf"(?<![a-z0-9]){re.escape(word)}", text) for word in words)


# Python's own words for a mistake in a program.
_MISTAKES = (NameError, AttributeError, TypeError, KeyError, IndexError, AssertionError)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or during."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        # What a mistake of ours happened to be raised in the handling of is not its reason.
        alone = link.__suppress_context__ or isinstance(link, _MISTAKES)
        link = link.__cause__ or (None if alone else link.__context__)


def _of_the_disk(error: BaseException, while_: str) -> str | None:
    if isinstance(error, OSError) and error.errno in _DISK:
        place = f" ({error.filename})" if error.filename else ""
        return f"Can't write or read a file{while_}: {_DISK[error.errno]}{place}; {_FREE_SPACE}"
    if isinstance(error, PermissionError):
        return (
            f"The system refuses access to {error.filename or 'a file'}{while_} ({error.strerror or error}); change "
            "its permissions, close the program that holds it, or choose another place"
        )
    if isinstance(error, OSError) and getattr(error, "winerror", None) in (206, 1314):
        return f"Windows refuses a path{while_} ({error}); choose a short --output-dir, and HF_HOME, on a local disk"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"The system answers {error.strerror!r} for {error.filename}{while_}; was it moved, deleted or replaced?"
    # torch, safetensors and tokenizers write through code of their own, and lose the errno on the way.
    if not isinstance(error, OSError) and (why := why_unwritten(error)):
        return f"A file can't be written{while_} ({why}); is the disk full? If so, {_FREE_SPACE}"
    return None


def _of_the_machine(error: BaseException, while_: str) -> str | None:
    if isinstance(error, MemoryError):
        return f"Stopped{while_}: {_MACHINE[0][1]}"
    if not isinstance(error, (RuntimeError, OSError, ImportError)):
        return None
    text = str(error).lower()
    if "out of memory" in text:
        return (
            f"GPU memory ran out{while_} ({one_line(error)}); `lowvram-grpo plan` says what fits; lower "
            "max_completion_length, max_prompt_length or num_generations, or close what else uses the GPU"
        )
    for signs, meaning in _MACHINE:
        if any(sign in text for sign in signs):
            return f"Stopped{while_}: {meaning} ({one_line(error)})"
    return None


def _of_the_hub(error: BaseException, while_: str) -> str | None:
    """huggingface_hub has raised errors of requests and of httpx over the years: known by module and name."""
    origin = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    refused = {"huggingface_hub.GatedRepoError", "huggingface_hub.RepositoryNotFoundError"}
    away = {
        "huggingface_hub.LocalEntryNotFoundError", "huggingface_hub.OfflineModeIsEnabled", "requests.ConnectionError",
        "requests.Timeout", "httpx.ConnectError", "httpx.TimeoutException", "httpx.NetworkError",
        "huggingface_hub.HfHubHTTPError", "requests.HTTPError", "httpx.HTTPStatusError", "httpx.ProxyError",
        "builtins.ConnectionError", "huggingface_hub.LocalTokenNotFoundError",
    }  # fmt: skip
    if origin & refused:
        return (
            f"The hub refuses{while_} ({one_line(error)}); check the name, ask for access, or log in: `hf auth login`"
        )
    if origin & away:
        if not any(kind.startswith("huggingface_hub") for kind in origin) and not _passed(error, "huggingface_hub"):
            return f"A server can't be reached{while_} ({one_line(error)}); check the network, and its address"
        return (
            f"The hub can't be used{while_} ({one_line(error)}); check the network, log in with `hf auth login`, set "
            "HF_ENDPOINT to a mirror, or drop what asks for it"
        )
    return None


def _passed(error: BaseException, package: str) -> bool:
    """Whether an error went through code of `package`."""
    return any(package in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _of_a_package(error: BaseException, while_: str) -> str | None:
    if not isinstance(error, ImportError):
        return None
    missing = (getattr(error, "name", None) or "").split(".")[0]
    if missing == "lowvram_grpo":
        return None
    install = f"; `pip install {missing}`" if re.fullmatch(r"[A-Za-z0-9_-]+", missing) else ""
    return f"A package is missing or broken{while_} ({one_line(error)}){install}"


def _innermost(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _raised_by_a_library(error: BaseException) -> bool:
    file = _innermost(error)
    return "site-packages" in file and not file.startswith(_OURS)


def _library(error: BaseException) -> str:
    return re.split(r"[\\/]", _innermost(error).rpartition("site-packages")[2].strip("\\/"))[0].removesuffix(".py")


def report_of(error: BaseException, packages: tuple[str, ...] = ("torch", "transformers", "peft")) -> str:
    """What a bug report needs: versions and the traceback."""
    import platform

    loaded: list[ModuleType] = [sys.modules[name] for name in packages if name in sys.modules]
    versions = ", ".join(f"{module.__name__} {getattr(module, '__version__', '?')}" for module in loaded)
    head = (
        f"lowvram-grpo: {' '.join(sys.argv[1:])}\nPython {platform.python_version()}, {platform.platform()}, {versions}"
    )
    return f"{head}\n\n{''.join(traceback.format_exception(type(error), error, error.__traceback__))}"
