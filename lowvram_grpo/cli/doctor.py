"""`lowvram-grpo doctor`: what is installed, what is missing, and the line that mends it."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from lowvram_grpo.cli.quiet import hush


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
    from lowvram_grpo.memory.devices import cuda_install_line, detect, nvidia_card_without_cuda_torch
    from lowvram_grpo.preset import pick

    device = detect()
    gib = f"{device.free_bytes / 2**30:.1f} of {device.total_bytes / 2**30:.1f} GiB free"
    table.add_row("device", device.name, gib)
    if device.capability is not None:
        major, minor = device.capability
        table.add_row("capability", f"sm_{major}{minor}", "bfloat16" if device.bf16 else "no bfloat16: float16 is used")
    table.add_row("preset", pick(), "what `--preset auto` takes here")
    table.add_row("vocabulary sweep", *_sweep())
    card = nvidia_card_without_cuda_torch()
    if card:
        return [f"there is an {card}, but torch is a CPU-only build; run `{cuda_install_line()}`."]
    return []


def _sweep() -> tuple[str, str]:
    """Which path log-probs and loss take here, and why; for hidden states of Qwen2.5-0.5B's width and Qwen2.5-7B's."""
    import torch

    from lowvram_grpo.loss import choose_kernels
    from lowvram_grpo.policy.load import compute_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small, large = (choose_kernels("auto", device, compute_dtype(device), width).reason for width in (896, 3584))
    what, _, why = small.partition(": ")
    return what, why if small == large else f"{why}; from a hidden size of 2049 {large.partition(': ')[0]}"


def _pip() -> str:
    return "py -m pip" if sys.platform == "win32" else "python -m pip"
