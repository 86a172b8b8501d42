"""`lowvram-grpo bench`: what is predicted, beside what this machine measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowvram_grpo.cli.flags import MORE_FLAGS, parse_extra
from lowvram_grpo.errors import UserError

if TYPE_CHECKING:
    from lowvram_grpo.bench.memory import Case

app = typer.Typer(help="Measure this machine, and hold it against what was predicted.", no_args_is_help=True)
ROWS = "memory.jsonl"


@app.command(context_settings=MORE_FLAGS)
def memory(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Well-known names, folders or hub ids, separated by commas.")
    ] = None,
    preset: Annotated[str, typer.Option(help="all, or presets separated by commas.")] = "all",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each measurement.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu (the ledger counts) or none (predictions).")] = "auto",
    limit: Annotated[float, typer.Option(help="Seconds that one measurement may take.")] = 900.0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of rows and plots.")] = Path("runs/bench-memory"),
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Recipe file, TOML or YAML.")] = None,
    savers: Annotated[bool, typer.Option("--savers", help="What each memory saver saves, instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Peak GPU memory of a training step, predicted and, with a GPU, measured under the preset's hard cap.

    Takes the flags of train. Rows are appended to OUT/memory.jsonl; what is there already is not measured again.
    """
    from lowvram_grpo.run.quiet import hush

    hush()
    from lowvram_grpo.bench.memory import MODELS, cards, cases

    if steps < 1:
        raise UserError(f"--steps is {steps}; it must be 1 or more.")
    models = _listed(model) or list(MODELS)
    names = cards() if preset == "all" else _listed(preset)
    wanted = cases(models, names, parse_extra(context.args), config)
    if savers:
        _savers(wanted, as_json)
    else:
        _rows(wanted, out, device, steps, limit, as_json)


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _rows(wanted: list[Case], out: Path, device: str, steps: int, limit: float, as_json: bool) -> None:
    import json

    from lowvram_grpo.bench import plots
    from lowvram_grpo.bench.memory import resolve_device, run
    from lowvram_grpo.bench.rows import Rows, provenance_apart

    on = resolve_device(device)
    rows = Rows(out / ROWS, on != "cuda", shared=provenance_apart(on != "cuda"), part="memory")
    tell = (lambda row: None) if as_json else lambda row: print(sentence(row), flush=True)
    found = run(wanted, rows, device=on, steps=steps, limit=limit, tell=tell)
    drawn = plots.draw(found, out)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    show(found)
    print(f"rows: {out / ROWS}; plots: {', '.join(map(str, drawn))}")


def _savers(wanted: list[Case], as_json: bool) -> None:
    import json

    from rich.console import Console
    from rich.table import Table

    from lowvram_grpo.bench.savers import table
    from lowvram_grpo.memory.ladder import PHASES

    found = [entry for case in wanted for entry in table(case)]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console(highlight=False)
    for case in wanted:
        own = [entry for entry in found if (entry["model"], entry["preset"]) == (case.recipe.model, case.recipe.preset)]
        shown = Table(box=None, pad_edge=False, collapse_padding=True, title_justify="left",
                      title=f"{Path(case.recipe.model).name}, preset {case.recipe.preset}")  # fmt: skip
        for column in ("saver", *PHASES, "peak"):
            shown.add_column(column.replace("optimizer", "optim."), justify="left" if column == "saver" else "right")
        for entry in own:
            sizes = [*entry["saved_mib"].values(), entry["peak_saved_mib"]]
            shown.add_row(entry["saver"] + "*" * entry["in_preset"], *(f"{size:,.0f}" for size in sizes))
        console.print(shown)
    console.print(
        "Predicted MiB that each saver alone takes off the peak of each phase, all other settings being the preset's "
        "(*: the preset has it)."
    )


def sentence(row: dict[str, Any]) -> str:
    """One row, while the others are still to come."""
    start = f"{Path(row['model']).name} under {row['preset']}: predicted {row['predicted_peak_mib'] / 1024:.2f} GiB"
    if row.get("predicted_only"):
        return f"{start}, not measured"
    if row["fits"] is None:
        return f"{start}, failed ({row.get('error')})"
    if not row["fits"]:
        return f"{start}, ran out of memory ({row.get('error')})"
    whole = row.get("total_mib") or row["peak_allocated_mib"]
    return f"{start}, {'measured' if row.get('total_mib') else 'counted'} {whole / 1024:.2f} GiB"


def show(rows: list[dict[str, Any]]) -> None:
    """All rows, and the phases of those that were measured; of a single prediction too."""
    from rich.console import Console
    from rich.table import Table

    from lowvram_grpo.bench.memory import measured_mib

    console = Console(highlight=False)
    whole = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("model", "preset", "budget", "predicted", "in", "fits", "measured", "tokens/s", "s a step"):
        whole.add_column(column, justify="left" if column in ("model", "preset", "in", "fits") else "right")
    for row in rows:
        total, seconds = row.get("total_mib"), row.get("step_s")
        seen = "out of memory" if row["fits"] is False else _number(total and total / 1024, 2)
        whole.add_row(
            Path(row["model"]).name, row["preset"], f"{row['cap_gib']:.1f}", f"{row['predicted_peak_mib'] / 1024:.2f}",
            row["predicted_peak_phase"], "yes" if row["fits_predicted"] else "[red]no[/red]", seen,
            _number(row.get("tokens_per_second"), 0), _number(seconds and seconds[-1], 1),
        )  # fmt: skip
    console.print(whole)
    console.print("GiB, CUDA context included. Measured: the most that the allocator had reserved, and the context.")
    for row in rows:
        if not row.get("phases_mib") and len(rows) > 1:
            continue
        parts = Table(box=None, pad_edge=False, title_justify="left",
                      title=f"{Path(row['model']).name} under {row['preset']}")  # fmt: skip
        for column in ("phase", "predicted MiB", "measured MiB", "difference"):
            parts.add_column(column, justify="left" if column == "phase" else "right")
        for name in dict.fromkeys([*row["predicted_mib"], *(row.get("phases_mib") or {})]):
            said, seen = row["predicted_mib"].get(name), measured_mib(row, name)
            parts.add_row(
                name, _number(said, 0), _number(seen, 0),
                "" if said is None or seen is None else f"{seen - said:+,.0f} ({seen / said - 1:+.1%})",
            )  # fmt: skip
        console.print(parts)
        said, seen = row.get("predicted_host_mib") or {}, row.get("host_mib") or {}
        if said or seen:
            console.print(f"host memory, apart: predicted {_host(said)}; measured {_host(seen) if seen else 'nothing'}")


def _host(sizes: dict[str, float]) -> str:
    """`171 MiB (weights 120, activations 51)`."""
    parts = ", ".join(f"{name} {size:,.1f}" for name, size in sizes.items())
    return f"{sum(sizes.values()):,.1f} MiB ({parts})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
