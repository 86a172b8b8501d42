"""What doctor says about cards that are not here."""

from __future__ import annotations

from fake_cards import card
from rich.console import Console
from rich.table import Table

from lowvram_grpo.cli import doctor
from lowvram_grpo.memory import devices


def said(monkeypatch, *cards):
    monkeypatch.setattr(devices, "detect_all", lambda: list(cards))
    monkeypatch.setattr(doctor, "_sweep", lambda: ("kernels", "here"))
    monkeypatch.setattr(doctor, "_attention", lambda: ("sdpa", "here"))
    for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    table, console = Table(box=None), Console(width=250, record=True)
    for column in ("", "found", ""):
        table.add_column(column)
    assert doctor._device(table) == []
    console.print(table)
    return console.export_text()


def test_doctor_shows_both_opinions_the_budget_and_the_preset(monkeypatch):
    text = said(monkeypatch, card("RTX 2060", 5.8, 5.3, (7, 5), nvml=5.1, system="windows", display=True))
    for words in ("cuda:0 RTX 2060", "sm_75", "float16 is used", "5.8 GiB", "5.3 GiB by CUDA, 5.1 GiB by the driver",
                  "4.5 GiB", "576 MiB are left for the desktop on Windows", "6gb"):  # fmt: skip
        assert words in text
    assert "taken" not in text


def test_doctor_lists_every_card_and_which_is_taken(monkeypatch):
    text = said(monkeypatch, card("small", 8, 7.5, index=0), card("large", 12, 9.5, index=1))
    assert "cuda:0 small" in text and "2 GPUs are visible and one is used" in text
    assert [line.split()[1:3] for line in text.splitlines() if "taken: " in line] == [["cuda:1", "large"]]
    assert "2.5 GiB of large are taken by other programs" in text
