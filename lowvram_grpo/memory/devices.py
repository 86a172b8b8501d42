"""What there is to train on: kind, name, memory that is really free, and what the silicon can do.

`probe` asks, `describe` judges, `choose` takes one; only `probe` needs a card.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowvram_grpo.memory import nvml

# The CUDA build that every card from Turing to Blackwell runs.
_CUDA_INDEX = "https://download.pytorch.org/whl/cu128"
_OLDEST = (7, 5)  # Turing, the first that this build still runs on
# A CUDA context of one process takes 0.2 to 0.5 GiB; a larger difference between two opinions has another cause.
_LARGEST_CONTEXT = 2**30


@dataclass(frozen=True)
class Probe:
    """Raw answers about one CUDA card, in bytes.

    Attributes:
        cuda_free: `mem_get_info`, which makes this process's CUDA context and so leaves it out.
        nvml_free: the driver's own count, taken just before; None where it did not answer.
        held: what torch's allocator of this process held on the card at that moment.
        display, uuid: as in `nvml.Card`.
    """

    name: str
    index: int
    total: int
    cuda_free: int
    capability: tuple[int, int]
    nvml_free: int | None = None
    display: bool | None = None
    integrated: bool = False
    held: int = 0
    uuid: str = ""


@dataclass(frozen=True)
class Device:
    """A training device.

    Attributes:
        kind: `cuda` or `cpu`.
        total_bytes, free_bytes: memory of the card; of the host for a CPU. Free is the smaller of what CUDA and the
            driver say: `mem_get_info` can leave other processes out on Windows.
        capability: CUDA compute capability (major, minor), None on a CPU.
        bf16: bfloat16 in hardware.
        system: `linux`, `windows` or `wsl` (the driver below WSL is Windows').
        display: a screen is lit on this card; None where nobody knows.
        integrated: it has no memory of its own and takes the host's.
        cuda_free_bytes, nvml_free_bytes: the two opinions; None where there is none.
        context_bytes: this process's CUDA context, where it could be told from other use, else 0.
        held_bytes: what torch's allocator of this process holds; neither is in `free_bytes`.
        uuid: as CUDA_VISIBLE_DEVICES takes it, or empty.
    """

    kind: str
    name: str
    index: int
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None
    bf16: bool
    system: str = "linux"
    display: bool | None = None
    integrated: bool = False
    cuda_free_bytes: int | None = None
    nvml_free_bytes: int | None = None
    context_bytes: int = 0
    held_bytes: int = 0
    uuid: str = ""


@dataclass(frozen=True)
class Choice:
    """The device that is taken, why, and what a person should know about it; the last two are sentences."""

    device: Device
    reason: str
    notices: tuple[str, ...] = ()


def describe(probe: Probe, system: str) -> Device:
    """The device behind raw answers.

    bf16 means compute capability 8 or more: `torch.cuda.is_bf16_supported` also says yes to emulation.
    """
    opinions = [probe.cuda_free, *([] if probe.nvml_free is None else [probe.nvml_free])]
    context = 0
    # The driver counted before the context was there, CUDA after. On Windows the two differ for other reasons too.
    if system == "linux" and probe.nvml_free is not None and not probe.integrated:
        difference = probe.nvml_free - probe.cuda_free
        context = difference if 0 < difference <= _LARGEST_CONTEXT else 0
    return Device(
        "cuda", probe.name, probe.index, probe.total, min(opinions), probe.capability, probe.capability[0] >= 8,
        system, probe.display, probe.integrated, probe.cuda_free, probe.nvml_free, context, probe.held, probe.uuid,
    )  # fmt: skip


def detect(index: int | None = None) -> Device:
    """The CUDA device `index`, the one that `choose` takes when unset, or the CPU."""
    import torch

    if index is not None and torch.cuda.is_available():
        return describe(probe(index, nvml.cards()), operating_system())
    return choose(detect_all()).device


def detect_all() -> list[Device]:
    """Every CUDA device that this process sees, in CUDA's order; the CPU where it sees none.

    Asking a card for its free memory makes a CUDA context there.
    """
    import torch

    system = operating_system()
    if not torch.cuda.is_available():
        total, free = _host_memory()
        return [Device("cpu", "CPU", 0, total, free, None, False, system)]
    known = nvml.cards()
    return [describe(probe(index, known), system) for index in range(torch.cuda.device_count())]


def probe(index: int, known: Sequence[nvml.Card]) -> Probe:
    """Ask CUDA about its device `index`; `known` is what the driver said just before."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    uuid = f"GPU-{getattr(properties, 'uuid', '')}"
    card = next((card for card in known if card.uuid == uuid), None)
    held = torch.cuda.memory_reserved(index)
    free, total = torch.cuda.mem_get_info(index)
    return Probe(
        name=properties.name,
        index=index,
        total=total,
        cuda_free=free,
        capability=(properties.major, properties.minor),
        nvml_free=card.free_bytes if card else None,
        display=card.display if card else None,
        integrated=bool(getattr(properties, "is_integrated", False)),
        held=held,
        uuid=uuid if card else "",
    )


def choose(devices: Sequence[Device], environ: Mapping[str, str] = os.environ) -> Choice:
    """One of `devices`: the one that LOCAL_RANK or CUDA_VISIBLE_DEVICES names, else the usable one with the most free
    memory (a card of its own before an integrated one)."""
    count = len(devices)
    if devices[0].kind == "cpu":
        return Choice(devices[0], "there is no CUDA device")
    rank = environ.get("LOCAL_RANK", "")
    if count == 1:
        taken, reason = devices[0], "the only one that is visible"
    elif rank.isdigit():
        taken, reason = devices[int(rank) % count], f"LOCAL_RANK is {rank}"
    elif environ.get("CUDA_VISIBLE_DEVICES"):
        taken, reason = devices[0], "the first of CUDA_VISIBLE_DEVICES"
    else:
        taken = max(devices, key=lambda d: (_usable(d), not d.integrated, d.free_bytes, -d.index))
        reason = "the most free memory"
    notices = []
    if count > 1:
        notices.append(
            f"{count} GPUs are visible and one is used, {taken.name} (cuda:{taken.index}, {reason}); training on "
            "several with accelerate or torchrun is not supported yet, CUDA_VISIBLE_DEVICES chooses another."
        )
    if not _usable(taken):
        major, minor = taken.capability or (0, 0)
        notices.append(
            f"{taken.name} is older than Turing (compute capability {major}.{minor}); current CUDA builds of torch no "
            "longer run on it."
        )
    return Choice(taken, reason, tuple(notices))


def pin_card(environ: dict[str, str] | os._Environ = os.environ) -> str | None:
    """Point CUDA_VISIBLE_DEVICES at the card with the most free memory, and return a sentence about it.

    transformers always trains on the first visible card. So where there are several and nobody has named one, this
    must be called before anything asks CUDA how many there are; afterwards CUDA no longer reads the variable. Does
    nothing, and returns None, where a card or a rank is named or the driver knows fewer than two.
    """
    if environ.get("LOCAL_RANK") or "CUDA_VISIBLE_DEVICES" in environ:
        return None
    known = [card for card in nvml.cards() if card.free_bytes is not None]
    if len(known) < 2:
        return None
    taken = max(known, key=lambda card: (card.capability is None or card.capability >= _OLDEST, card.free_bytes or 0))
    environ["CUDA_VISIBLE_DEVICES"] = taken.uuid
    gib = (taken.free_bytes or 0) / 2**30
    return (
        f"{len(known)} GPUs are there and one is used, {taken.name} (the most free memory, {gib:.1f} GiB); training on "
        "several with accelerate or torchrun is not supported yet, CUDA_VISIBLE_DEVICES chooses another."
    )


def growing_segments(environ: dict[str, str] | os._Environ = os.environ) -> None:
    """Let PyTorch's allocator grow its segments, unless somebody has set it up: rollouts and training passes ask for
    blocks of different sizes. Must be called before torch is imported. Windows does not have it, and under WSL the
    first allocation can fail with it (pytorch #192330)."""
    if operating_system() == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environ.keys():
        environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def operating_system(platform_name: str = sys.platform, release: str | None = None) -> str:
    """`windows`, `wsl` or `linux` (which any other system counts as)."""
    if platform_name == "win32":
        return "windows"
    return "wsl" if "microsoft" in (_kernel() if release is None else release).lower() else "linux"


def _kernel() -> str:
    try:
        return Path("/proc/version").read_text(encoding="utf-8")
    except OSError:
        return platform.release()


def _usable(device: Device) -> bool:
    return device.capability is not None and device.capability >= _OLDEST


def _host_memory() -> tuple[int, int]:
    """(total, available) bytes of host memory."""
    import psutil  # comes with accelerate

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def nvidia_card_without_cuda_torch() -> str | None:
    """The name of an NVIDIA card that is in this machine while the installed torch has no CUDA in it, else None."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return None
    return _nvidia_card()


def _nvidia_card() -> str | None:
    """The first NVIDIA card that the driver knows, without torch."""
    if known := nvml.cards():
        return known[0].name
    gpus = Path("/proc/driver/nvidia/gpus")
    return "NVIDIA GPU" if gpus.is_dir() and any(gpus.iterdir()) else None


def cuda_install_line() -> str:
    """The line that replaces a CPU-only torch with a CUDA build, for this Python."""
    python = "py" if sys.platform == "win32" else "python"
    return f"{python} -m pip install --force-reinstall torch --index-url {_CUDA_INDEX}"
