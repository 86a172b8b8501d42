"""Options that `lowvram-grpo chat` and `lowvram-grpo eval` share: what is sampled from, and the sampler's filters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Model = Annotated[str | None, typer.Option("--model", "-m", help="As for train; default the run's.")]
Adapter = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Run directory, checkpoint or adapter folder, or hub id.")
]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens that have this much of the mass.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the most likely one.")]
Penalty = Annotated[float, typer.Option(help="Above 1 discourages tokens already seen.")]
Quantization = Annotated[str | None, typer.Option("--quantization", "-q", help="none, int8 or nf4.")]
ChatTemplate = Annotated[str | None, typer.Option(help="`plain` (base models) or a .jinja file.")]


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {key: value for key, value in options.items() if value is not None}


def filters_of(*values: float) -> dict[str, float]:
    """Under the names of `Sampling`."""
    return dict(zip(("temperature", "top_p", "top_k", "min_p", "repetition_penalty"), values))
