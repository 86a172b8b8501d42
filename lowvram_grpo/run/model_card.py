"""The README.md beside a trained adapter: what was trained, on what, how, and how to load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lowvram_grpo import __version__
from lowvram_grpo.errors import counted
from lowvram_grpo.run.best import best_row, best_sentence
from lowvram_grpo.run.metrics import ends

# hub ids are at most `owner/name`; anything else in `base_model` makes the hub refuse the card
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Those of the training follow by themselves; the others are no settings, or secrets.
_APART = ("training", "output_dir", "resume", "plain", "origin", "not_applied", "env")
_METRICS = ["reward", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std"]


def model_card(recipe: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """Markdown with YAML front matter.

    Args:
        recipe: the resolved recipe as a flat dict; GRPOConfig's fields stand under `training`.
        metrics: the rows of metrics.jsonl.
    """
    model, places = str(recipe.get("model") or "unknown"), _places(recipe)
    data = " and ".join(f"`{_shown(place)}`" for place in places)
    adapter = bool(recipe.get("use_peft", True))
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", *(["lora"] if adapter else []), "lowvram-grpo"],
    }
    if _is_hub_id(model):
        front["base_model"] = model
    if named := [place for place in places if _is_hub_id(place)]:
        front["datasets"] = named
    training = recipe.get("training") or {}
    settings = {key: value for key, value in recipe.items() if key not in _APART}
    settings = {key: value for key, value in (settings | training).items() if value not in (None, "", [], {})}
    settings = {key: value for key, value in settings.items() if not key.endswith("_token")}  # hub_token is a secret
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---",
        f"# {f'LoRA adapter for {_shown(model)}' if adapter else _shown(model)}, trained with GRPO",
        f"Trained on {data} with [lowvram-grpo](https://pypi.org/project/lowvram-grpo/) {__version__}: group "
        f"relative policy optimization ([arXiv:2402.03300](https://arxiv.org/abs/2402.03300)) of "
        f"{'a LoRA adapter' if adapter else 'all weights'}.",
        *_results(metrics),
        "## Settings",
        _table(("setting", "value"), [(key, _cell(key, value)) for key, value in settings.items()]),
        "## Use",
        _use("adapter" if adapter else "model", _shown(model)),
    ]
    return "\n\n".join(parts) + "\n"


def _use(kind: str, base: str) -> str:
    of, comment = (
        ("AutoPeftModelForCausalLM", f"  # base: {base}") if kind == "adapter" else ("AutoModelForCausalLM", "")
    )
    imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
    if kind == "model":
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    lines = [
        *imports,
        "",
        f'model = {of}.from_pretrained("path/to/this/{kind}"){comment}',
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/{kind}")',
    ]
    return "\n".join(["```python", *lines, "```"])


def _results(metrics: list[dict[str, Any]]) -> list[str]:
    rows = [row for row in metrics if row.get("reward") is not None]
    if not rows:
        return []
    names = _METRICS + sorted({k for row in rows for k in row if k.startswith("rewards/") and k.endswith("/mean")})
    first, last = ends(rows)
    names = [name for name in names if _mean(last, name) != "-"]
    steps = f"{counted(rows[-1]['step'], 'optimizer step')}."
    if best := best_row(metrics):
        steps = f"These are the best weights by evaluation: {best_sentence(best)}\n\n{steps}"
    if not first:
        return ["## Results", steps, _table(("metric", "value"), [(name, _mean(last, name)) for name in names])]
    over = "logged row" if len(last) == 1 else f"{len(last)} logged rows"
    text = f"{steps} Means over the first and the last {over}:"
    lines = [(name, _mean(first, name), _mean(last, name)) for name in names]
    return ["## Results", text, _table(("metric", "first", "last"), lines)]


def _mean(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{sum(values) / len(values):.4g}" if values else "-"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(key: str, value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = _shown(text) if key in ("model", "data", "adapter") else text
    return " ".join(text.split()).replace("|", "\\|")


def _places(recipe: dict[str, Any]) -> list[str]:
    """Of all the data that was trained on."""
    mixture, data = recipe.get("dataset_mixture"), recipe.get("data")
    if mixture:
        return [str(entry.get("id")) for entry in mixture.get("datasets", ())]
    return [str(place) for place in data] if isinstance(data, list) else [str(data or "unknown")]


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _shown(name: str) -> str:
    """A local path loses its folders: a card is made to be published."""
    return name if _is_hub_id(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]
