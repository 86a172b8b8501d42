"""`lowvram-grpo report`: the curves of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Run directory, as the training printed it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write; RUN/report.png if unset.")
    ] = None,
) -> None:
    """Draw the curves of a run (reward, KL, lengths, dead groups) as a PNG."""
    from lowvram_grpo.run.report import plot

    typer.echo(str(plot(run, output)))
