"""Host memory as a resource of its own: how much a run may put there, and whether it has room.

What lies there is page-locked, so that copies to the card are queued and nobody waits for them. Linux locks as much as
there is (RLIMIT_MEMLOCK binds mlock, not the driver's cudaHostAlloc). Windows lets a GPU use half of the memory, and
WSL half of what its virtual machine has, whose size is half of the machine's unless .wslconfig says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowvram_grpo.errors import UserError

_GIB = 2**30
# This process's Python and libraries, the pages of the checkpoint that is being read, and the system.
RESERVE = 2 * _GIB
# Of the memory, what may be page-locked where the driver is Windows'.
_LOCKABLE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Host:
    """Bytes of host memory: in all, free now, and how much may be page-locked (None: as much as there is)."""

    total_bytes: int
    free_bytes: int
    lockable_bytes: int | None = None
    system: str = "linux"

    @property
    def usable_bytes(self) -> int:
        """What a run may keep there."""
        return max(0, self.free_bytes - RESERVE)


def present(system: str) -> Host:
    """This machine's, which is a `linux`, `windows` or `wsl` one (`Device.system`). In a container its own limit
    counts."""
    import psutil  # comes with accelerate

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    if (limit := _limit()) is not None:
        total, free = min(total, limit[0]), min(free, limit[0] - limit[1])
    lockable = None if system == "linux" else int(_LOCKABLE * total)
    return Host(total, max(0, free), lockable, system)


def _limit() -> tuple[int, int] | None:
    """(bytes that this container may use, bytes that it does, what the system can take back not counted)."""
    try:
        most, now = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdigit():
        return None
    return int(most), max(0, int(now) - int(stat.get("inactive_file", 0)) - int(stat.get("active_file", 0)))


def words(need: Mapping[str, int]) -> str:
    """`4.9 GiB (weights 3.9, embedding 1.0)`."""
    parts = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in sorted(need.items(), key=lambda item: -item[1]))
    return f"{sum(need.values()) / _GIB:.1f} GiB ({parts})"


def check_host(need: Mapping[str, int], host: Host, remedy: str) -> None:
    """Before anything is loaded: a system that begins to swap is no place to train.

    Args:
        need: bytes that a run keeps in host memory, by what they are.
        remedy: what to do, as an imperative.

    Raises:
        UserError: there is not that much, or not that much may be page-locked.
    """
    size = sum(need.values())
    if not size:
        return
    if size > host.usable_bytes:
        raise UserError(
            f"The run keeps {words(need)} in host memory, of which {host.free_bytes / _GIB:.1f} GiB are free, "
            f"{RESERVE / _GIB:.0f} of them for Python and the system; close other programs, or {remedy}."
        )
    if host.lockable_bytes is not None and size > host.lockable_bytes:
        where, more = ("WSL", "give WSL more memory (.wslconfig), or ") if host.system == "wsl" else ("Windows", "")
        raise UserError(
            f"The run keeps {words(need)} in page-locked host memory, of which {where} grants half of its "
            f"{host.total_bytes / _GIB:.0f} GiB; {more}{remedy}."
        )
