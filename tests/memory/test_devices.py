"""What there is to train on, on machines that this one is not."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from lowvram_grpo.memory import devices


def pretend_cuda(monkeypatch, *, capability, free, total, nvml):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, total))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "card")
    monkeypatch.setattr(devices, "_nvml_free", lambda index: nvml)


@pytest.mark.parametrize("capability,bf16", [((7, 5), False), ((8, 6), True), ((8, 9), True), ((12, 0), True)])
def test_bf16_is_what_the_silicon_has(monkeypatch, capability, bf16):
    pretend_cuda(monkeypatch, capability=capability, free=5, total=8, nvml=None)
    assert devices.detect().bf16 is bf16


def test_free_memory_is_the_smaller_of_two_opinions(monkeypatch):
    pretend_cuda(monkeypatch, capability=(8, 6), free=7 << 30, total=8 << 30, nvml=6 << 30)
    assert devices.detect().free_bytes == 6 << 30
    pretend_cuda(monkeypatch, capability=(8, 6), free=7 << 30, total=8 << 30, nvml=None)
    assert devices.detect().free_bytes == 7 << 30


def test_nvml_is_asked_about_the_card_that_cuda_means(monkeypatch):
    free = {"GPU-aaaa": 1 << 30, "GPU-bbbb": 5 << 30}
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(free=free[handle])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    # As under CUDA_VISIBLE_DEVICES=1: CUDA's device 0 is not NVML's.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="bbbb"))
    assert devices._nvml_free(0) == 5 << 30


def test_this_machine():
    device = devices.detect()
    assert device.kind in ("cpu", "cuda") and 0 < device.free_bytes <= device.total_bytes


def test_an_nvidia_card_beside_a_cpu_only_torch(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA GeForce RTX 4060\n")
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(devices.subprocess, "run", lambda *a, **k: answer)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert devices.nvidia_card_without_cuda_torch() == "NVIDIA GeForce RTX 4060"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert devices.nvidia_card_without_cuda_torch() is None
    assert "--index-url" in devices.cuda_install_line()
