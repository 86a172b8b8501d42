"""Host memory: what there is, what may be page-locked, and the sentence where a run keeps more."""

from __future__ import annotations

import types

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory import cards, nvml, ram
from lowvram_grpo.memory.host import locked_size
from lowvram_grpo.memory.ledger import Ledger, held_on_host

GIB = 2**30
NEED = {"weights": 5 * GIB, "embedding": GIB}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what the system says of its memory, and where a container's limits are."""
    import psutil

    monkeypatch.setattr(ram, "_CGROUP", tmp_path)

    def memory(total, free):
        found = types.SimpleNamespace(total=int(total * GIB), available=int(free * GIB))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
        return tmp_path

    return memory


def test_linux_locks_what_there_is_and_windows_half(machine):
    machine(16, 12)
    linux, windows, wsl = map(ram.present, ("linux", "windows", "wsl"))
    assert linux == ram.Host(16 * GIB, 12 * GIB) and linux.usable_bytes == 10 * GIB
    assert windows.lockable_bytes == wsl.lockable_bytes == 8 * GIB


def test_a_containers_limit_counts_without_what_it_has_read(machine):
    folder = machine(64, 60)
    (folder / "memory.max").write_text(f"{8 * GIB}\n")
    (folder / "memory.current").write_text(f"{3 * GIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\nactive_file {GIB}\n")
    assert ram.present("linux") == ram.Host(8 * GIB, 7 * GIB)
    (folder / "memory.max").write_text("max\n")
    assert ram.present("linux").total_bytes == 64 * GIB


def test_what_fits_says_nothing():
    ram.check_host(NEED, ram.Host(16 * GIB, 9 * GIB), "do something")
    ram.check_host({}, ram.Host(GIB, 0), "do something")


@pytest.mark.parametrize(
    "host,said",
    [
        (
            ram.Host(16 * GIB, 7 * GIB),
            r"keeps 6\.0 GiB \(weights 5\.0, embedding 1\.0\) in host memory, of which 7\.0 GiB",
        ),
        (ram.Host(10 * GIB, 9 * GIB, 5 * GIB, "windows"), "Windows grants half of its 10 GiB; do something"),
        (ram.Host(10 * GIB, 9 * GIB, 5 * GIB, "wsl"), r"WSL grants half .* give WSL more memory \(\.wslconfig\)"),
    ],
)
def test_where_it_is_short_one_sentence_names_the_way_out(host, said):
    with pytest.raises(UserError, match=said) as caught:
        ram.check_host(NEED, host, "do something")
    assert "do something." in str(caught.value)


def test_a_ledger_counts_the_host_apart_and_what_page_locked_pieces_take():
    with Ledger() as plain:
        end = held_on_host("weights", 5)
        held_on_host("weights", 7)
        end()
        held_on_host("weights", 1)
        held_on_host("embedding", 9, locked=False)
    assert plain.host == {"weights": 12, "embedding": 9} and not plain.live and not plain.phases
    with Ledger(locked=locked_size) as locked:
        held_on_host("weights", 5)
        held_on_host("embedding", 9, locked=False)
    assert locked.host == {"weights": 8, "embedding": 9}
    held_on_host("weights", 5)()  # nobody counts


def test_the_bus_is_the_drivers_where_it_says_so():
    cells = "GPU-aaaa, RTX 4060, 8188, 7000, Enabled, 8.9"
    first, second = nvml.parse(f"{cells}, 3, 8\n{cells}, [N/A], 16\n")
    assert first.pcie == (3, 8) and second.pcie is None
    assert cards.typical(8).bus == pytest.approx(12e9) and "assumed" in cards.typical(8).bus_name
    there = cards.typical(8)._replace(pcie=first.pcie, index=0)
    assert there.bus == pytest.approx(6e9, rel=0.01) and there.bus_name == "PCIe 3.0 x8"
