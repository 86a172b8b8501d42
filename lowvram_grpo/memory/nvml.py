"""What NVIDIA's driver says about the cards, without CUDA: through pynvml, else through nvidia-smi, which reads the
same library and comes with every driver.

NVML lists every card in PCI order; CUDA only those of CUDA_VISIBLE_DEVICES, the fastest first. So cards are told apart
by their UUID.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

_FIELDS = ("uuid", "name", "memory.total", "memory.free", "display_active", "compute_cap")
_BUS_FIELDS = ("pcie.link.gen.max", "pcie.link.width.max")
_SECONDS = 10.0  # a driver that wakes up takes one or two


@dataclass(frozen=True)
class Card:
    """A card as the driver knows it.

    Attributes:
        uuid: as CUDA_VISIBLE_DEVICES takes it, `GPU-...`.
        total_bytes, free_bytes: None where the driver does not say (memory shared with the host).
        display: a screen is lit on this card; None where the driver does not say.
        capability: CUDA compute capability; None where the driver does not say.
        pcie: the most that card and board can do: generation of PCI Express, and lanes. (Now it may be asleep.)
    """

    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None
    display: bool | None
    capability: tuple[int, int] | None
    pcie: tuple[int, int] | None = None


def cards() -> list[Card]:
    """Every NVIDIA card of this machine; empty where there is no driver, or it does not answer."""
    try:
        import pynvml
    except ImportError:
        return _from_smi()
    try:
        return _from_library(pynvml)
    except Exception:  # a second opinion: without it there is still CUDA's
        return _from_smi()


def parse(table: str) -> list[Card]:
    """The cards in nvidia-smi's csv of `_FIELDS`, and of `_BUS_FIELDS` if they are there, without header and units
    (MiB)."""
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) in (len(_FIELDS), len(_FIELDS) + len(_BUS_FIELDS)):
            uuid, name, total, free, display, capability, *bus = cells
            lit = {"enabled": True, "disabled": False}.get(display.lower())
            major, _, minor = capability.partition(".")
            known = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
            pcie = (int(bus[0]), int(bus[1])) if bus and all(cell.isdigit() for cell in bus) else None
            found.append(Card(uuid, name, _mib(total), _mib(free), lit, known, pcie))
    return found


def _mib(text: str) -> int | None:
    return int(text) * 2**20 if text.isdigit() else None  # `[N/A]` on a card without memory of its own


def _from_smi() -> list[Card]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    for fields in ((*_FIELDS, *_BUS_FIELDS), _FIELDS):
        try:
            answer = subprocess.run(
                [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
                capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=_SECONDS, check=True,
            )  # fmt: skip
        except subprocess.CalledProcessError:  # a driver that does not know one of them
            continue
        except (OSError, subprocess.SubprocessError):
            return []
        return parse(answer.stdout)
    return []


def _from_library(nvml) -> list[Card]:
    nvml.nvmlInit()
    try:
        return [_card(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(int(nvml.nvmlDeviceGetCount()))]
    finally:
        nvml.nvmlShutdown()


def _card(nvml, handle) -> Card:
    def ask(function, *arguments):
        try:
            return function(*arguments)
        except nvml.NVMLError:  # not supported on this card
            return None

    memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    display = ask(nvml.nvmlDeviceGetDisplayActive, handle)
    capability = ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    names = ("nvmlDeviceGetMaxPcieLinkGeneration", "nvmlDeviceGetMaxPcieLinkWidth")
    bus = [ask(getattr(nvml, name), handle) for name in names if hasattr(nvml, name)]
    uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
    return Card(
        _text(uuid),
        _text(name),
        None if memory is None else int(memory.total),
        None if memory is None else int(memory.free),
        None if display is None else bool(display),
        None if capability is None else tuple(capability),
        (int(bus[0]), int(bus[1])) if len(bus) == 2 and all(bus) else None,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
