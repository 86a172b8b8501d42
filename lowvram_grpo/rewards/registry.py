"""From what a person writes after `--reward` to a function or a reward model. Loads no torch."""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lowvram_grpo.data.textfile import utf8_source
from lowvram_grpo.errors import Terminated, UserError, did_you_mean
from lowvram_grpo.rewards.builtin import BUILTIN, FULL_MARKS, OPEN_R1, SYNONYMS, builtin, refuse
from lowvram_grpo.rewards.settings import RewardSettings

# Built-in rewards that read a reference, a text or a number.
COMPARING = {"accuracy", "content", "accuracy_reward", "reasoning_accuracy", "len", "length", "cosine"}

TEMPLATE_REWARDS: dict[str | None, list[str]] = {
    "tldr": ["label", "label_strict", "content"],
    "tldr-zh": ["label", "label_strict", "content"],
    "r1": ["accuracy", "format"],
    None: [],
}

# Packages whose reward functions are built in.
_ORIGINALS = ("trl", "open_r1")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class RewardSpec(NamedTuple):
    """`target[:function][:weight]`, taken apart; target is a name, a file, a module or a model."""

    target: str
    function: str | None
    weight: float


def parse_spec(spec: str) -> RewardSpec:
    r"""Take `spec` apart at its colons, that of a Windows drive (`C:\`) left alone. The weight is 1 when not given."""
    if is_address(spec):
        return _address_spec(spec.strip())
    head, weight = spec.strip(), 1.0
    before, colon, last = head.rpartition(":")
    if colon and _NUMBER.fullmatch(last):
        head, weight = before, float(last)
    target, colon, function = head.rpartition(":")
    if not colon or (len(target) == 1 and function[:1] in ("\\", "/")):
        return RewardSpec(head, None, weight)
    return RewardSpec(target, function, weight)


def is_address(spec: str) -> bool:
    """Whether a reward is computed by a server, by its beginning."""
    return re.match(r"https?://", spec.strip(), re.IGNORECASE) is not None


def _address_spec(spec: str) -> RewardSpec:
    """A port is no weight: the number of `http://host:8000` is one, that of `http://host:8000:2` or
    `http://host/score:2` is not."""
    begin = spec.index("://") + 3
    host = re.match(r"(\[[^\]]*\]|[^/?#:]*)(:\d+)?", spec[begin:])
    end = begin + (host.end() if host else 0)
    before, colon, last = spec[end:].rpartition(":")
    if colon and _NUMBER.fullmatch(last):
        return RewardSpec(spec[:end] + before, None, float(last))
    return RewardSpec(spec, None, 1.0)


def resolve_reward(spec: str, settings: RewardSettings | None = None) -> tuple[Callable | str, float]:
    """A reward function, or the folder or hub id of a reward model (as str), and its weight.

    Args:
        spec: a built-in's name, `path/file.py:function`, `package.module:function` (or with a dot, as TRL's scripts
            take it), `http://host:port/path`, or a sequence-classification model (a folder, or a hub id with a slash);
            each may end in `:weight`.
        settings: parameters of built-in rewards; None is their defaults.

    Raises:
        UserError: nothing stands behind `spec`; the sentence names what was looked for and what was found.
    """
    target, function, weight = parse_spec(spec)
    if is_address(target):
        from lowvram_grpo.rewards.remote import HTTPReward  # here: with it comes torch

        return HTTPReward(target), weight
    if function is None:
        return _named(target, settings), weight
    if is_builtin(target):
        raise UserError(f"the weight {function!r} of the reward {target!r} is not a number; write e.g. {target}:0.5.")
    if _is_elsewhere(target, function):
        return _named(function, settings), weight
    module = load_file(target) if target.endswith(".py") else _load_module(target, spec)
    return _function_of(module, function, target), weight


def is_builtin(name: str) -> bool:
    """Whether a reward of that name is built in, under its own name or one of TRL's and Open R1's for it."""
    return SYNONYMS.get(name, name) in BUILTIN


def as_open_r1(spec: str) -> str:
    """What a recipe of Open R1 means by a reward: its own functions where names of ours are the same."""
    target = parse_spec(spec).target
    return f"{OPEN_R1.get(target, target)}{spec.strip()[len(target) :]}"


def is_model(spec: str) -> bool:
    """Whether a reward is a model of its own, by its name."""
    target, function, _ = parse_spec(spec)
    named = is_builtin(target) or is_address(target) or target.endswith(".py")
    return function is None and not named and (bool(re.search(r"[/\\]", target)) or Path(target).is_dir())


def full_marks(reward: Callable | str) -> float:
    """What the best completion gets from a resolved reward, as far as is known: 1 for what is not built in."""
    if (by_settings := getattr(reward, "full_marks", None)) is not None:
        return float(by_settings)
    return next((FULL_MARKS.get(name, 1.0) for name, function in BUILTIN.items() if function is reward), 1.0)


def _named(target: str, settings: RewardSettings | None) -> Callable | str:
    name = SYNONYMS.get(target, target)
    if name in BUILTIN:
        return builtin(name, settings)
    refuse(target)
    if target.endswith(".py"):
        names = ", ".join(public_functions(load_file(target))) or "none"
        raise UserError(f"the reward file {target!r} needs a function: write {target}:NAME (functions found: {names}).")
    if Path(target).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", target):
        return target
    if "/" in target or "\\" in target:
        raise UserError(f"the reward model folder {target!r} does not exist (looked from {os.getcwd()}).")
    module, dot, function = target.rpartition(".")
    if _is_elsewhere(module, function):
        return _named(function, settings)
    if dot and re.fullmatch(r"\w+(\.\w+)*", target):
        return _function_of(_load_module(module, target), function, module)
    raise UserError(
        f"unknown reward {target!r}{did_you_mean(target, [*BUILTIN, *SYNONYMS])}; built-in: {', '.join(BUILTIN)}; "
        "your own: path/to/file.py:function, package.module:function, or the folder or hub id of a reward model."
    )


def _is_elsewhere(module: str, function: str) -> bool:
    """Whether a name is that of a built-in's original, `trl.rewards.think_format_reward`, and that is not installed."""
    root = module.partition(".")[0]
    known = root in _ORIGINALS and module.startswith(f"{root}.rewards") and is_builtin(function)
    return known and importlib.util.find_spec(root) is None


def load_file(path: str, what: str = "reward") -> ModuleType:
    """The module of a file, loaded once for all of its functions and anew when the file has changed.

    Args:
        what: it holds, for people.

    Raises:
        UserError: there is no such file, or it does not import.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"the {what} file {path!r} does not exist (looked for {file}).")
    version = hashlib.sha256(f"{file}:{file.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"lowvram_grpo_reward_{file.stem}_{version}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _Source(name, str(file))
    module_spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert module_spec is not None  # None is for files that no loader is known for
    module = importlib.util.module_from_spec(module_spec)
    _importable_from(file.parent)
    # Registered first: dataclasses and pickle look a class's module up there.
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"the {what} file {path!r} does not import: {type(error).__name__}: {error}.") from error
    return module


class _Source(importlib.machinery.SourceFileLoader):
    """Reads what Notepad calls Unicode, too; Python alone takes only UTF-8 and what a file declares."""

    def get_data(self, path: str) -> bytes:
        content = super().get_data(path)
        return utf8_source(content) if path == self.path else content


def _load_module(name: str, spec: str) -> ModuleType:
    if file := re.match(r"(.+\.py:\w+)$", name):  # behind the function only a weight can stand
        raise UserError(f"the weight of the reward {spec!r} is not a number; write e.g. {file[1]}:0.5.")
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise UserError(f"the reward {spec!r} is none of NAME, path/file.py:function, package.module:function, MODEL.")
    _importable_from(Path.cwd())
    try:
        return importlib.import_module(name)
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        hint = did_you_mean(name, BUILTIN) if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(
            f"the reward {spec!r}: module {name!r} does not import: {type(error).__name__}: {error}{hint}."
        ) from error


def _importable_from(folder: Path) -> None:
    # A reward may import its neighbours, as under `python file.py`; last, so that it shadows nothing installed.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _function_of(module: ModuleType, function: str, target: str) -> Callable:
    found = getattr(module, function, None)
    if callable(found) and not inspect.isclass(found):
        return found
    names = public_functions(module)
    raise UserError(
        f"the reward {target!r} has no function {function!r}{did_you_mean(function, names)}; "
        f"functions found: {', '.join(names) or 'none'}."
    )


def public_functions(module: ModuleType) -> list[str]:
    """Names of those that the module itself defines."""
    own = inspect.getmembers(module, lambda m: inspect.isfunction(m) and m.__module__ == module.__name__)
    return [name for name, _ in own if not name.startswith("_")]
