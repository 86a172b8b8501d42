"""Cards that are not here, as CUDA and the driver would describe them."""

from __future__ import annotations

from lowvram_grpo.memory import devices

GIB = 2**30


def card(name, gib, free, capability=(8, 9), *, system="linux", **answers):
    """A card of `gib` GiB with `free` GiB free by CUDA; `nvml` (GiB) is the driver's opinion, CUDA's when unset."""
    nvml = answers.pop("nvml", free)
    probe = devices.Probe(
        name=name,
        index=answers.pop("index", 0),
        total=int(gib * GIB),
        cuda_free=int(free * GIB),
        capability=capability,
        nvml_free=None if nvml is None else int(nvml * GIB),
        **answers,
    )
    return devices.describe(probe, system)
