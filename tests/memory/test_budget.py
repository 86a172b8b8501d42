"""How much of a card is ours, and the preset for that, over cards that are not here."""

from __future__ import annotations

import itertools

import pytest
from fake_cards import GIB, card

from lowvram_grpo.memory import devices
from lowvram_grpo.memory.budget import LINUX_DESKTOP_RESERVE, LINUX_RESERVE, budget
from lowvram_grpo.recipe import preset

WINDOWS_8GB = card("RTX 4060", 7.996, 7.0, system="windows", display=True)

# Total as CUDA tells it, a little below what is printed on the box; free as on a machine at work.
CARDS = [
    # Turing: no bfloat16
    (card("GTX 1650", 3.81, 3.7, (7, 5)), "4gb"),
    (card("GTX 1660", 5.80, 5.7, (7, 5)), "6gb"),
    (card("RTX 2060", 5.80, 5.0, (7, 5), system="windows", display=True), "6gb"),
    (card("T4", 14.56, 14.4, (7, 5)), "16gb"),
    # Ampere
    (card("RTX 3050 laptop", 4.0, 3.2, (8, 6), system="windows", display=True), "4gb"),
    (card("RTX 3070 laptop", 8.0, 7.2, (8, 6)), "8gb"),
    (card("RTX 3080", 9.78, 9.5, (8, 6)), "8gb"),
    (card("RTX 3060", 11.99, 11.6, (8, 6)), "12gb"),
    (card("RTX 3090", 23.69, 23.2, (8, 6)), "24gb"),
    # Ada
    (card("RTX 4060", 7.996, 7.6), "8gb"),
    (card("RTX 4060", 7.996, 7.2, display=True), "8gb"),
    (WINDOWS_8GB, "8gb"),
    (card("RTX 4060", 7.996, 6.5, system="windows", display=True), "8gb"),
    (card("RTX 4060", 7.996, 6.9, nvml=6.6, system="wsl"), "8gb"),
    (card("RTX 4060", 7.996, 7.0, nvml=None, system="windows"), "8gb"),
    (card("RTX 4070", 11.99, 10.9, system="windows", display=True), "12gb"),
    (card("RTX 4060 Ti", 16.0, 14.8, system="windows", display=True), "16gb"),
    (card("RTX 4090", 23.99, 22.6, system="windows", display=True), "24gb"),
    # Blackwell
    (card("RTX 5060", 7.96, 7.5, (12, 0)), "8gb"),
    (card("RTX 5090", 31.84, 31.3, (12, 0)), "24gb"),
    # Somebody else is there
    (card("RTX 3090", 23.69, 12.0, (8, 6)), "12gb"),
    (card("RTX 4090", 23.99, 15.0), "16gb"),
    (card("RTX 4060", 7.996, 4.0), "4gb"),
    # Memory of the host; no card
    (card("Thor", 122.8, 100.0, (11, 0), nvml=None, integrated=True), "24gb"),
    (card("Orin Nano", 7.4, 5.5, (8, 7), nvml=None, integrated=True), "4gb"),
    (devices.Device("cpu", "CPU", 0, 64 * GIB, 32 * GIB, None, False), "cpu"),
]


@pytest.mark.parametrize("device,name", CARDS, ids=lambda value: getattr(value, "name", value))
def test_the_preset_follows_what_is_ours_of_the_card(device, name):
    assert preset.pick(device) == name
    assert preset.choose(device, budget(device)).name == name
    assert device.bf16 is (device.capability is not None and device.capability >= (8, 0))


def test_of_two_cards_the_freer_one_is_what_the_preset_is_for(monkeypatch):
    both = [card("small", 8, 7.5, index=0), card("large", 12, 11.5, index=1)]
    monkeypatch.setattr(devices, "detect_all", lambda: both)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert preset.pick() == "12gb"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert preset.pick() == "8gb"


def test_an_empty_card_never_gets_the_next_size_and_a_working_one_never_the_smaller():
    """Between the most that a card of one size can have and what the next leaves on a Windows desktop is room."""
    sizes = [4, 6, 8, 12, 16, 24]
    for size, larger in itertools.pairwise(sizes):
        assert preset.pick(card("empty", size, size)) == f"{size}gb"
        desktop = card("desktop", larger, larger * 0.997 - 1.3, system="windows", display=True)
        assert preset.pick(desktop) == (f"{larger}gb")


def test_less_than_the_smallest_preset_is_said():
    picked = preset.choose(card("GTX 1630", 2.0, 1.9, (7, 5)))
    assert picked.name == "4gb" and "smallest preset" in picked.notices[0]
    assert preset.choose(card("RTX 4060", 8, 7.5)).notices == ()


def test_an_8gb_card_on_a_windows_desktop_keeps_something_for_the_desktop():
    windows = budget(WINDOWS_8GB)
    assert 6.3 * GIB <= windows.usable_bytes <= 6.5 * GIB
    assert "Windows" in windows.reason and windows.notices == ()
    wsl = budget(card("RTX 4060", 7.996, 7.0, system="wsl"))
    assert wsl.usable_bytes == windows.usable_bytes and "WSL" in wsl.reason


def test_where_no_screen_is_lit_less_is_kept():
    dark = budget(card("card", 8, 7.0, system="windows", display=False))
    assert dark.usable_bytes > budget(WINDOWS_8GB).usable_bytes
    linux = [budget(card("card", 8, 7.0, display=lit)).reserve_bytes for lit in (False, True, None)]
    assert linux == [LINUX_RESERVE, LINUX_DESKTOP_RESERVE, LINUX_RESERVE]


def test_on_windows_more_is_kept_where_nobody_checks_cuda():
    alone = budget(card("card", 8, 7.0, system="windows", nvml=None))
    assert alone.usable_bytes < budget(WINDOWS_8GB).usable_bytes and "nvidia-smi" in alone.notices[0]


def test_what_this_process_holds_already_is_ours():
    before = budget(card("card", 8, 7.0, nvml=7.25))
    assert before.usable_bytes == 7.25 * GIB - LINUX_RESERVE
    assert before.allocator_bytes == 7.0 * GIB - LINUX_RESERVE
    # With two GiB taken and the context no longer told apart, the allocator's share is what it was.
    after = budget(card("card", 8, 5.0, nvml=5.0, held=2 * GIB))
    assert after.allocator_bytes == before.allocator_bytes and after.usable_bytes < before.usable_bytes


def test_the_cap_only_lowers():
    device = card("card", 8, 7.0)
    assert budget(device, 6.0).usable_bytes == 6 * GIB and "vram_gib" in budget(device, 6.0).reason
    assert budget(device, 9.0) == budget(device)
    assert preset.pick(device, budget(device, 4.5)) == "6gb"


def test_a_full_card_has_no_negative_budget_and_is_named():
    full = budget(card("RTX 4060", 8, 0.05))
    assert full.usable_bytes == 0 and full.allocator_bytes == 0
    assert "other programs" in full.notices[0]


def test_an_integrated_gpu_is_warned_about():
    shared = budget(card("Orin", 7.4, 5.5, nvml=None, integrated=True))
    assert shared.usable_bytes == 3.5 * GIB and "shares the host's" in shared.notices[0]
