"""log_completions_hub_repo: what was sampled, as a dataset on the hub that grows while a run trains.

A parquet table a log, with TRL's columns (step, prompt, completion, one a reward, what the rewards logged, advantage),
lies in `output_dir/completions`; a thread commits those that are new at most every two minutes, and the rest at the
end. What goes wrong there is said once, and the files are tried again with the next ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lowvram_grpo.errors import CantWrite, UserError, counted, one_line

if TYPE_CHECKING:
    import pyarrow

    from lowvram_grpo.recipe.config import GRPOConfig

# Seconds between two commits, of which the hub takes some hundred an hour.
_EVERY = 120.0
_CARD = """\
---
tags:
- lowvram-grpo
- completions
---

# Sampled completions

Written by lowvram-grpo while it trained{model}: a table a log, a row a completion.
"""


def upload_of(args: GRPOConfig, notice: Callable[[str], None]) -> CompletionsUpload | None:
    """What a configuration asks for, with its repository made.

    Raises:
        UserError: it can't be made.
    """
    if args.log_completions_hub_repo is None:
        return None
    import huggingface_hub

    api = huggingface_hub.HfApi(token=args.hub_token)
    try:
        made = api.create_repo(
            args.log_completions_hub_repo, repo_type="dataset", private=args.hub_private_repo, exist_ok=True
        )
    except Exception as error:  # whatever a network can do
        raise UserError(
            f"log_completions_hub_repo {args.log_completions_hub_repo!r} can't be made ({one_line(error)}); check its "
            "name and what the token may do, or drop it: completions.jsonl has them all."
        ) from error
    model = f" {args.hub_model_id}" if args.hub_model_id else ""
    return CompletionsUpload(
        Path(args.output_dir) / "completions", made.repo_id, api, notice, card=_CARD.format(model=model)
    )


class CompletionsUpload(TrainerCallback):
    """Keeps the rows that it is given until the next log, and the tables until they are on the hub.

    Args:
        folder: of the tables.
        repo: `namespace/name` of a dataset that is there.
        api: a `huggingface_hub.HfApi`.
        notice: tells a person; only called by the thread that trains.
        card: text of the README.md, which goes along with the first tables.
        every: seconds between two commits.
    """

    def __init__(
        self, folder: Path, repo: str, api: Any, notice: Callable[[str], None], *, card: str, every: float = _EVERY
    ):
        self._folder, self._repo, self._api, self._notice, self._every = folder, repo, api, notice, every
        self._columns: dict[str, list] = {}
        self._waiting: dict[str, Path | bytes] = {"README.md": card.encode()}
        self._thread = ThreadPoolExecutor(1, "completions-upload")
        self._commit: Future | None = None
        self._sent: dict[str, Path | bytes] = {}
        self._last, self._told = float("-inf"), False

    def write(
        self,
        step: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Mapping[str, Sequence[float | None]],
        advantages: Sequence[float],
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """n rows for the next table, as `CompletionsLog.write` takes them."""
        rows = {"step": [step] * len(prompts), "prompt": prompts, "completion": completions}
        rows |= {**rewards, **(extras or {}), "advantage": advantages}
        before = max(map(len, self._columns.values()), default=0)
        for name in dict.fromkeys([*self._columns, *rows]):
            column = self._columns.setdefault(name, [None] * before)
            column += rows.get(name, [None] * len(prompts))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """A table, where this is a row of the training, and a commit, where one is due.

        Raises:
            CantWrite: the disk is full, or forbids it.
        """
        if self._columns and {"loss", "train_runtime"} & (logs or {}).keys():
            self._write_table(f"completions_{state.global_step:05d}.parquet")
        self._settle(wait=False)
        now = time.monotonic()
        if self._commit is None and self._tables_left and now - self._last >= self._every:
            self._last = now
            self._start()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Wait for the commit that is under way, and commit the rest."""
        self._settle(wait=True)
        if self._columns:
            self._write_table(f"completions_{state.global_step:05d}.parquet")
        if self._tables_left:
            self._start()
            self._settle(wait=True)
        if self._tables_left:
            self._notice(
                f"{counted(self._tables_left, 'table')} of completions did not reach {self._repo}; `hf upload "
                f"--repo-type dataset {self._repo} {self._folder} data` brings them there."
            )

    @property
    def _tables_left(self) -> int:
        return sum(isinstance(file, Path) for file in self._waiting.values())

    def _write_table(self, name: str) -> None:
        from pyarrow import parquet

        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            parquet.write_table(_table(self._columns), path)
        except OSError as error:
            raise CantWrite(path, error) from error
        self._columns = {}
        self._waiting[f"data/{name}"] = path

    def _start(self) -> None:
        from huggingface_hub import CommitOperationAdd

        self._sent, self._waiting = self._waiting, {}
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in self._sent.items()]
        self._commit = self._thread.submit(
            self._api.create_commit, self._repo, files, repo_type="dataset", commit_message="Sampled completions"
        )

    def _settle(self, *, wait: bool) -> None:
        """What has become of the commit under way, if it is done; files that did not arrive wait again."""
        if self._commit is None or not (wait or self._commit.done()):
            return
        commit, self._commit = self._commit, None
        if (error := commit.exception()) is None:
            return
        self._waiting = {**self._sent, **self._waiting}
        if not self._told:
            self._notice(
                f"the completions can't be written to {self._repo} ({one_line(error)}); training goes on, and they are "
                "tried again."
            )
        self._told = True


def _table(columns: Mapping[str, list]) -> pyarrow.Table:
    import pyarrow

    def array(values: list) -> pyarrow.Array:
        try:
            return pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):
            # Of several types, which rewards may log.
            return pyarrow.array([None if value is None else json.dumps(value, default=str) for value in values])

    return pyarrow.table({name: array(values) for name, values in columns.items()})
