"""What there is to train on, on machines that this one is not."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from fake_cards import GIB, card

from lowvram_grpo.memory import devices, nvml


def pretend_cuda(monkeypatch, *cards, known=()):
    """torch.cuda with these (name, capability, free, total, uuid), and the driver's cards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: cards[index][2:4])

    def properties(index):
        name, (major, minor), _, _, uuid = cards[index]
        return types.SimpleNamespace(name=name, major=major, minor=minor, uuid=uuid, is_integrated=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(nvml, "cards", lambda: list(known))


@pytest.mark.parametrize("capability,bf16", [((7, 5), False), ((8, 6), True), ((8, 9), True), ((12, 0), True)])
def test_bf16_is_what_the_silicon_has(capability, bf16):
    assert card("card", 8, 7, capability).bf16 is bf16


def test_free_memory_is_the_smaller_of_two_opinions():
    assert card("card", 8, 7, nvml=6).free_bytes == 6 * GIB
    assert card("card", 8, 6, nvml=7).free_bytes == 6 * GIB
    assert card("card", 8, 7, nvml=None).free_bytes == 7 * GIB


def test_the_context_is_what_the_driver_counted_before_it_was_there():
    assert card("card", 8, 7, nvml=7.25).context_bytes == GIB // 4
    # Three ways to be unsure: somebody else took it, Windows counts otherwise, no second opinion.
    assert card("card", 8, 5, nvml=7).context_bytes == 0
    assert card("card", 8, 7, nvml=7.25, system="windows").context_bytes == 0
    assert card("card", 8, 7, nvml=None).context_bytes == 0


def test_the_driver_is_asked_about_the_card_that_cuda_means(monkeypatch):
    # As under CUDA_VISIBLE_DEVICES=1: CUDA's device 0 is not the driver's.
    known = [
        nvml.Card("GPU-aaaa", "a", 8 * GIB, GIB, True, None),
        nvml.Card("GPU-bbbb", "b", 8 * GIB, 5 * GIB, False, None),
    ]
    pretend_cuda(monkeypatch, ("b", (8, 6), 6 * GIB, 8 * GIB, "bbbb"), known=known)
    [device] = devices.detect_all()
    assert (device.free_bytes, device.display, device.uuid) == (5 * GIB, False, "GPU-bbbb")
    assert devices.detect() == devices.detect(0) == device


def test_a_card_that_the_driver_does_not_list(monkeypatch):
    pretend_cuda(monkeypatch, ("slice", (9, 0), 6 * GIB, 8 * GIB, "cccc"))
    [device] = devices.detect_all()
    assert (device.free_bytes, device.nvml_free_bytes, device.display, device.uuid) == (6 * GIB, None, None, "")


def test_this_machine():
    device = devices.detect()
    assert device.kind in ("cpu", "cuda") and 0 < device.free_bytes <= device.total_bytes


@pytest.mark.parametrize(
    "platform,release,system",
    [
        ("win32", "10", "windows"),
        ("linux", "Linux version 6.6.87.2-microsoft-standard-WSL2", "wsl"),
        ("linux", "Linux version 4.4.0-19041-Microsoft", "wsl"),
        ("linux", "Linux version 6.8.0-45-generic", "linux"),
    ],
)
def test_wsl_is_told_from_linux(platform, release, system):
    assert devices.operating_system(platform, release) == system


TWO = [card("small", 8, 7.4, index=0), card("large", 12, 11.2, index=1)]


@pytest.mark.parametrize(
    "environ,name,reason",
    [
        ({}, "large", "most free memory"),
        ({"LOCAL_RANK": "0"}, "small", "LOCAL_RANK is 0"),
        ({"LOCAL_RANK": "3"}, "large", "LOCAL_RANK is 3"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "small", "first of CUDA_VISIBLE_DEVICES"),
    ],
)
def test_one_of_two_cards_is_taken_and_said(environ, name, reason):
    choice = devices.choose(TWO, environ)
    assert choice.device.name == name and reason in choice.reason
    [notice] = choice.notices
    assert name in notice and "not supported yet" in notice and "CUDA_VISIBLE_DEVICES" in notice


def test_a_card_that_torch_still_runs_on_comes_before_a_larger_one_and_before_an_integrated_one():
    pascal = card("GTX 1080 Ti", 11, 10.8, (6, 1), index=1)
    shared = card("Thor", 120, 100, (11, 0), index=2, integrated=True)
    assert devices.choose([TWO[0], pascal, shared], {}).device is TWO[0]
    alone = devices.choose([pascal], {})
    assert alone.reason == "the only one that is visible" and "older than Turing" in alone.notices[0]


def smi_of(monkeypatch, text):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(nvml.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(nvml.subprocess, "run", lambda *a, **k: types.SimpleNamespace(stdout=text))


SMI = """GPU-aaaa, NVIDIA GeForce RTX 4060, 8188, 7000, Enabled, 8.9
GPU-bbbb, NVIDIA GeForce RTX 3060, 12288, 11900, Disabled, 8.6
GPU-cccc, NVIDIA GeForce GTX TITAN X, 12288, 12100, Disabled, 5.2
"""


def test_nvidia_smi_is_the_driver_where_there_is_no_pynvml(monkeypatch):
    smi_of(monkeypatch, SMI + "GPU-dddd, NVIDIA Thor, [N/A], [N/A], [N/A], 11.0\n")
    first, second, _, last = nvml.cards()
    assert first == nvml.Card("GPU-aaaa", "NVIDIA GeForce RTX 4060", 8188 << 20, 7000 << 20, True, (8, 9))
    assert second.display is False
    assert (last.total_bytes, last.free_bytes, last.display) == (None, None, None)


def test_pynvml_is_asked_first_and_what_it_does_not_know_is_none(monkeypatch):
    class NVMLError(Exception):
        pass

    def unknown(handle):
        raise NVMLError

    library = types.SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetUUID=lambda handle: b"GPU-aaaa",
        nvmlDeviceGetName=lambda handle: "card", nvmlDeviceGetDisplayActive=unknown,
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(total=8, free=5),
        nvmlDeviceGetCudaComputeCapability=lambda handle: [8, 6],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert nvml.cards() == [nvml.Card("GPU-aaaa", "card", 8, 5, None, (8, 6))]


def test_the_freest_card_that_runs_is_pinned_before_cuda_starts(monkeypatch):
    smi_of(monkeypatch, SMI)
    environ = {}
    assert "RTX 3060" in devices.pin_card(environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}


@pytest.mark.parametrize("environ", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "0"}, {"LOCAL_RANK": "0"}])
def test_a_card_that_is_named_stays(monkeypatch, environ):
    smi_of(monkeypatch, SMI)
    before = dict(environ)
    assert devices.pin_card(environ) is None and environ == before


def test_one_card_needs_no_pin(monkeypatch):
    smi_of(monkeypatch, SMI.splitlines()[0])
    environ = {}
    assert devices.pin_card(environ) is None and environ == {}


def test_an_nvidia_card_beside_a_cpu_only_torch(monkeypatch):
    smi_of(monkeypatch, SMI)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert devices.nvidia_card_without_cuda_torch() == "NVIDIA GeForce RTX 4060"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert devices.nvidia_card_without_cuda_torch() is None
    assert "--index-url" in devices.cuda_install_line()
