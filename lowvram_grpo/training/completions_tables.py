"""log_completions, for trackers: at each log a table of what was sampled last, with TRL's columns (step, prompt,
completion, one a reward, what the rewards logged, advantage).

wandb and trackio get it as `completions` (of an evaluation `eval/completions`), whole; TensorBoard, which has no
tables, as a text with a few rows. Other trackers have nothing of the kind in transformers or TRL, and get metrics
alone.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lowvram_grpo.errors import one_line
from lowvram_grpo.run.completions import as_text

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig

TAKERS = ("wandb", "trackio", "tensorboard")
# Of an evaluation, which may have thousands of completions.
_MOST_ROWS = 256
# Where num_completions_to_print does not say how many TensorBoard gets.
_FEW = 4
_LONGEST_TEXT = 2000

Table = dict[str, list[Any]]


def table_of(
    prompts: list,
    completions: list,
    rewards: Mapping[str, list],
    advantages: list[float],
    extras: Mapping[str, list] | None = None,
) -> Table:
    """Columns of one length, all of text and numbers; the arguments are `Rollout.columns`."""
    table = {"prompt": [as_text(each) for each in prompts], "completion": [as_text(each) for each in completions]}
    table |= dict(rewards)
    table |= {name: [_cell(value) for value in values] for name, values in (extras or {}).items()}
    return table | {"advantage": list(advantages)}


def joined(before: Table, after: Table) -> Table:
    """The rows of both; None in a column that one of them lacks."""
    empty = [[None] * len(table["prompt"]) for table in (before, after)]
    names = dict.fromkeys([*before, *after])
    return {name: [*before.get(name, empty[0]), *after.get(name, empty[1])] for name in names}


def unique_prompts(table: Table) -> Table:
    """The first row of each prompt."""
    rows = list({prompt: i for i, prompt in reversed(list(enumerate(table["prompt"])))}.values())
    return {name: [values[i] for i in sorted(rows)] for name, values in table.items()}


def markdown(table: Table, rows: int) -> str:
    """The first `rows` of a table, for a reader who shows Markdown and may show HTML."""
    lines = [list(table), ["---"] * len(table), *map(list, list(zip(*table.values()))[:rows])]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


class CompletionsTables(TrainerCallback):
    """Keeps what was sampled last, and hands it to the trackers at each log of its kind; they have begun by then.

    Args:
        args: `report_to`, `log_unique_prompts` and `num_completions_to_print` are read.
        callbacks: those of the trainer; TensorBoard's has the file to write to.
        tell: hears once what a tracker does not take.
    """

    def __init__(self, args: GRPOConfig, callbacks: Iterable[TrainerCallback], tell: Callable[[str], None]):
        self._takers = [name for name in TAKERS if name in args.report_to]
        self._unique, self._few = args.log_unique_prompts, args.num_completions_to_print or _FEW
        self._callbacks, self._tell = callbacks, tell
        self._kept: dict[str, Table] = {}
        self._told: set[str] = set()

    def keep(self, mode: str, columns: dict[str, Any]) -> None:
        """`Rollout.columns` of a rollout of mode `train`, which replaces the one before, or of a batch of an
        evaluation, which comes after those before."""
        before, table = self._kept.get(mode), table_of(**columns)
        if mode == "train" or before is None:
            self._kept[mode] = table
        elif len(before["prompt"]) < _MOST_ROWS:
            self._kept[mode] = joined(before, table)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        names = (logs or {}).keys()
        mode = "eval" if any(name.startswith("eval_") for name in names) else "train" if "loss" in names else None
        table = self._kept.pop(mode, None) if mode else None
        if table is None or not state.is_world_process_zero:
            return
        table = {"step": [state.global_step] * len(table["prompt"]), **table}
        table = unique_prompts(table) if self._unique else table
        key = "completions" if mode == "train" else "eval/completions"
        for name in self._takers:
            try:
                getattr(self, f"_to_{name}")(key, table, state.global_step)
            except Exception as error:  # of somebody else's code, and no reason to end a run
                if name not in self._told:
                    self._told.add(name)
                    self._tell(f"{name} does not take a table of completions ({one_line(error)}); training goes on.")

    def _to_wandb(self, key: str, table: Table, step: int) -> None:
        wandb = sys.modules.get("wandb")  # its callback has imported it
        if wandb is None or wandb.run is None:
            return
        rows = [list(row) for row in zip(*table.values())]
        # Without a step of its own, as every row of a log: x is train/global_step.
        wandb.log({key: wandb.Table(columns=list(table), data=rows, allow_mixed_types=True), "train/global_step": step})

    def _to_trackio(self, key: str, table: Table, step: int) -> None:
        trackio = sys.modules.get("trackio")
        if trackio is None:
            return
        import pandas

        trackio.log({key: trackio.Table(dataframe=pandas.DataFrame(table)), "train/global_step": step})

    def _to_tensorboard(self, key: str, table: Table, step: int) -> None:
        for callback in self._callbacks:
            if type(callback).__name__ == "TensorBoardCallback" and callback.tb_writer is not None:
                callback.tb_writer.add_text(key, markdown(table, self._few), step)


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, default=str)


def _plain(value: Any) -> str:
    """A cell of Markdown: nothing that was sampled is a link, a tag or a border."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " ..."
    escaped = "".join(f"&#{ord(c)};" if c in "|`*_[]\\~" else c for c in html.escape(text))
    return escaped.replace("\r", "").replace("\n", "<br>")
