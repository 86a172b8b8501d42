"""What there is to train on: kind, name, memory that is really free, and what the silicon can do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# The CUDA build that every card from Turing to Blackwell runs.
_CUDA_INDEX = "https://download.pytorch.org/whl/cu128"


@dataclass(frozen=True)
class Device:
    """A training device.

    Attributes:
        kind: `cuda` or `cpu`.
        total_bytes, free_bytes: memory of the card; of the host for a CPU.
        capability: CUDA compute capability (major, minor), None on a CPU.
        bf16: bfloat16 in hardware.
    """

    kind: str
    name: str
    index: int
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None
    bf16: bool


def detect(index: int = 0) -> Device:
    """The CUDA device `index`, or the CPU.

    Free memory is the smaller of what CUDA and NVML say: `mem_get_info` can leave other processes out on Windows.
    bf16 means compute capability 8 or more: `torch.cuda.is_bf16_supported` also says yes to emulation.
    """
    import torch

    if not torch.cuda.is_available():
        total, free = _host_memory()
        return Device("cpu", "CPU", 0, total, free, None, False)
    free, total = torch.cuda.mem_get_info(index)
    nvml = _nvml_free(index)
    capability = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return Device("cuda", name, index, total, free if nvml is None else min(free, nvml), capability, capability[0] >= 8)


def _nvml_free(index: int) -> int | None:
    """Free bytes of CUDA device `index` by NVML, None where it is not installed or fails.

    Found by UUID: NVML counts every card in PCI order, CUDA only those in CUDA_VISIBLE_DEVICES, the fastest first.
    """
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except Exception:  # NVML is a second opinion: without it there is still the first
        return None


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
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        try:
            found = subprocess.run(
                [tool, "--query-gpu=name", "--format=csv,noheader"],
                capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=10, check=True,
            ).stdout.strip()  # fmt: skip
            if found:
                return found.splitlines()[0]
        except (OSError, subprocess.SubprocessError):
            pass
    gpus = Path("/proc/driver/nvidia/gpus")
    return "NVIDIA GPU" if gpus.is_dir() and any(gpus.iterdir()) else None


def cuda_install_line() -> str:
    """The line that replaces a CPU-only torch with a CUDA build, for this Python."""
    python = "py" if sys.platform == "win32" else "python"
    return f"{python} -m pip install --force-reinstall torch --index-url {_CUDA_INDEX}"
