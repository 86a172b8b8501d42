"""How much of a device is ours: free memory, less what has to stay free for others."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_grpo.memory.devices import Device
from lowvram_grpo.memory.overheads import CUDA

_MIB, _GIB = 2**20, 2**30

# Nothing else is on the card: only what the driver rounds up and a neighbour's first kilobytes.
LINUX_RESERVE = 128 * _MIB
# A desktop draws on the card, and another window takes another hundred MiB; it fails loudly, so little is enough.
LINUX_DESKTOP_RESERVE = 256 * _MIB
# Windows (and WSL above it): the desktop grows while a run lasts, and the driver then pages our memory to the host
# instead of failing, eight times slower. A browser or an editor that is opened takes about this much.
WINDOWS_DESKTOP_RESERVE = 576 * _MIB
# No screen on this card, but the same driver and the same paging.
WINDOWS_RESERVE = 256 * _MIB
# CUDA alone can leave other processes out on Windows, and nobody contradicted it.
WINDOWS_BLIND_RESERVE = 768 * _MIB
# Integrated GPU: what we take is gone for the system itself, this process's Python included.
SHARED_RESERVE = 2 * _GIB
# CPU: the system and this process's Python.
HOST_RESERVE = _GIB
# Taken by others beyond this is worth a word: a Windows desktop alone takes about one GiB.
_MUCH = 1.5 * _GIB


@dataclass(frozen=True)
class Budget:
    """What this process may use of a device.

    Attributes:
        usable_bytes: in total, the CUDA context and what torch already holds included.
        reserve_bytes: what is left free for others.
        context_bytes: the part of `usable_bytes` that the CUDA context has taken already, where it is known. Where it
            is not (0), `usable_bytes` is too small by the context, never too large.
        reason: why so much, as a phrase.
        notices: sentences for people.
    """

    usable_bytes: int
    reserve_bytes: int
    context_bytes: int = 0
    reason: str = ""
    notices: tuple[str, ...] = ()

    @property
    def allocator_bytes(self) -> int:
        """What torch's caching allocator may hold: the context is not its own."""
        return self.usable_bytes - self.context_bytes


def budget(device: Device, cap_gib: float | None = None) -> Budget:
    """What this process may use of `device`: free memory, and what it has taken already, less a reserve.

    `Device.free_bytes` was read with this process's CUDA context in place (reading it makes one), so the context is
    added back as far as it could be told apart. `cap_gib` (GRPOConfig.vram_gib) only ever lowers the result.
    """
    reserve, reason, notices = _reserve(device)
    ours = device.context_bytes + device.held_bytes
    usable = max(min(device.free_bytes + ours - reserve, device.total_bytes), 0)
    others = device.total_bytes - device.free_bytes - ours
    if device.kind == "cuda" and not device.integrated and others > _MUCH:
        notices.append(
            f"{gib(others)} of {device.name} are taken by other programs; closing them (nvidia-smi lists them) gives "
            "that much more to train with."
        )
    if cap_gib is not None and cap_gib * _GIB < usable:
        # Our own cap counts the context, known or not.
        usable, reason = int(cap_gib * _GIB), f"vram_gib is {cap_gib:g}"
        context = device.context_bytes or (CUDA.context if device.kind == "cuda" else 0)
    else:
        context = device.context_bytes
    return Budget(usable, reserve, min(context, usable), reason, tuple(notices))


def gib(size: int) -> str:
    """`6.4 GiB`."""
    return f"{size / _GIB:.1f} GiB"


def _reserve(device: Device) -> tuple[int, str, list[str]]:
    """(bytes to leave, the reason as a phrase, notices)."""
    if device.kind == "cpu":
        return HOST_RESERVE, f"{gib(HOST_RESERVE)} stay with the system", []
    if device.integrated:
        notice = f"{device.name} has no memory of its own and shares the host's, where what a run takes is missing."
        return SHARED_RESERVE, f"{gib(SHARED_RESERVE)} of the shared memory stay with the system", [notice]
    if device.system not in ("windows", "wsl"):
        if device.display:
            return LINUX_DESKTOP_RESERVE, f"{_mib(LINUX_DESKTOP_RESERVE)} are left for the desktop", []
        return LINUX_RESERVE, f"{_mib(LINUX_RESERVE)} are left as a margin", []
    where = "Windows" if device.system == "windows" else "WSL (its driver is Windows')"
    if device.nvml_free_bytes is None:
        notice = (
            f"Only CUDA says how much of {device.name} is free, which on {where} can leave other programs out; more is "
            "kept back for that (nvidia-smi was not found)."
        )
        return (
            WINDOWS_BLIND_RESERVE,
            f"{_mib(WINDOWS_BLIND_RESERVE)} are left on {where}, unseen use included",
            [notice],
        )
    if device.display is False:
        return WINDOWS_RESERVE, f"{_mib(WINDOWS_RESERVE)} are left on {where}, which pages instead of failing", []
    return (
        WINDOWS_DESKTOP_RESERVE,
        f"{_mib(WINDOWS_DESKTOP_RESERVE)} are left for the desktop on {where}, which pages instead of failing",
        [],
    )


def _mib(size: int) -> str:
    return f"{size // _MIB} MiB"
