"""`lowvram-grpo doctor`: what is installed, what is missing, and the line that mends it."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from lowvram_grpo.run.quiet import hush

if TYPE_CHECKING:
    from lowvram_grpo.memory.devices import Device


def doctor() -> None:
    """Say what is installed, what is missing, and which line mends it."""
    raise typer.Exit(start())


def start() -> int:
    """Print the table; 0 if a run can start here, 1 if something is in its way."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("", "found", ""):
        table.add_column(column)
    table.add_row("Python", platform.python_version(), platform.platform())
    problems = _packages(table)
    if not problems:
        hush()
        problems = _device(table)
    console.print(table)
    for sentence in problems:
        console.print(f"[red]problem:[/red] {sentence}", soft_wrap=True)
    if not problems:
        console.print("[green]ready.[/green]")
    return 1 if problems else 0


def _packages(table: Table) -> list[str]:
    """A row for each dependency of this package, with its version range; the missing and the misfitting."""
    try:
        wanted_here = requires("lowvram-grpo") or []
    except PackageNotFoundError:  # a bare checkout
        return [f"lowvram-grpo is not installed; run `{_pip()} install -e .` in its folder."]
    problems = []
    for requirement in map(Requirement, wanted_here):
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "xformers" if extra else ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            table.add_row(requirement.name, found, "")
        elif extra:
            table.add_row(requirement.name, "-", "optional")
        else:
            table.add_row(requirement.name, found or "missing", f"needs {requirement.specifier}")
            wanted = f'"{requirement.name}{requirement.specifier}"'
            problems.append(f"{requirement.name} is {found or 'missing'}; run `{_pip()} install {wanted}`.")
    return problems


def _device(table: Table) -> list[str]:
    from lowvram_grpo.memory import devices

    found = devices.detect_all()
    choice = devices.choose(found)
    for device in found:
        _describe(table, device, f"taken: {choice.reason}" if device is choice.device and len(found) > 1 else "")
    table.add_row("vocabulary sweep", *_sweep())
    table.add_row("attention", *_attention())
    table.add_row("rewards that run programs", *_sandbox())
    for sentence in choice.notices:
        table.add_row("note", "", sentence)
    card = devices.nvidia_card_without_cuda_torch()
    if card:
        return [f"there is an {card}, but torch is a CPU-only build; run `{devices.cuda_install_line()}`."]
    return []


def _describe(table: Table, device: Device, note: str) -> None:
    """The rows of one device: what it is, its memory by every opinion, what of it is ours, and the preset for that."""
    from lowvram_grpo.memory.budget import budget, gib
    from lowvram_grpo.recipe import preset

    table.add_row("device", device.name if device.kind == "cpu" else f"cuda:{device.index} {device.name}", note)
    if device.capability is not None:
        major, minor = device.capability
        table.add_row("capability", f"sm_{major}{minor}", "bfloat16" if device.bf16 else "no bfloat16: float16 is used")
    opinions = [("CUDA", device.cuda_free_bytes), ("the driver", device.nvml_free_bytes)]
    said = ", ".join(f"{gib(size)} by {who}" for who, size in opinions if size is not None)
    table.add_row("memory", gib(device.total_bytes), f"free: {said or gib(device.free_bytes)}")
    ours, picked = budget(device), preset.choose(device)
    table.add_row("budget", gib(ours.usable_bytes), ours.reason)
    table.add_row("preset", picked.name, f"what `--preset auto` takes here: {picked.reason}")
    for sentence in (*ours.notices, *picked.notices):
        table.add_row("note", "", sentence)


def _sandbox() -> tuple[str, str]:
    """Whether rewards that run programs can confine them here, and by what."""
    from lowvram_grpo.rewards import sandbox

    return ("-", reason) if (reason := sandbox.why_not()) else ("sandbox", sandbox.describe())


def _sweep() -> tuple[str, str]:
    """Which path log-probs and loss take here, and why; for hidden states of Qwen2.5-0.5B's width and Qwen2.5-7B's."""
    import torch

    from lowvram_grpo.policy.load import compute_dtype
    from lowvram_grpo.training.loss import choose_kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small, large = (choose_kernels("auto", device, compute_dtype(device), width).reason for width in (896, 3584))
    what, _, why = small.partition(": ")
    return what, why if small == large else f"{why}; from a hidden size of 2049 {large.partition(': ')[0]}"


def _attention() -> tuple[str, str]:
    """What attends in layouts of ours with `attention: auto`, and why."""
    import torch

    from lowvram_grpo.policy.attention_choice import described
    from lowvram_grpo.policy.load import compute_dtype

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return described(device, compute_dtype(device))


def _pip() -> str:
    return "py -m pip" if sys.platform == "win32" else "python -m pip"
