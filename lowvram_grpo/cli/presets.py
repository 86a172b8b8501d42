"""`lowvram-grpo presets`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lowvram_grpo.cli.quiet import hush


def start(name: str | None) -> None:
    """List all presets, or the settings of one."""
    hush()
    from lowvram_grpo import preset

    console = Console(highlight=False)
    if name is not None:
        chosen = preset.load(name)
        console.print(f"[bold]{chosen.name}[/bold]  {chosen.summary}")
        for key, value in chosen.settings.items():
            console.print(f"  {key} = {value!r}")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("preset", "card", "what it is"):
        table.add_column(column)
    for found in map(preset.load, preset.names()):
        table.add_row(found.name, f"{found.vram_gib:g} GB" if found.vram_gib else "CPU", found.summary)
    console.print(table)
