"""Every field of GRPOConfig with its group, type, default and what it does here, for `--help-all` and docs/fields.md:

python -m lowvram_grpo.recipe.field_table > docs/fields.md
"""

from __future__ import annotations

import re
import typing
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from lowvram_grpo.recipe.config import GRPOConfig
from lowvram_grpo.recipe.notices import INERT_FIELDS
from lowvram_grpo.recipe.resolve import job_types, training_types
from lowvram_grpo.recipe.settings import REFUSED_FIELDS
from lowvram_grpo.rewards.settings import RewardSettings

INHERITED = "transformers.TrainingArguments"
REWARDS = "Parameters of built-in rewards"
# The first field of each group, in the order in which GRPOConfig declares them.
_GROUPS = {
    "model_init_kwargs": "Model and data",
    "prompts_per_step": "Batch",
    "temperature": "Sampling",
    "use_vllm": "vLLM",
    "learning_rate": "Objective",
    "mask_truncated_completions": "What counts, and the reference",
    "fused_loss": "Memory and safety",
    "logging_steps": "Logging",
    "gradient_checkpointing": INHERITED,
}
_OURS = "(ours) "
# TRL 1.16's defaults, where they are others.
TRL_DEFAULTS: dict[str, Any] = {
    "max_completion_length": 512,
    "temperature": 1.0,
    "beta": 0.0,
    "loss_type": "dapo",
    "logging_steps": 10,
}
# Names that TRL 1.16 and transformers 5 do not have any more.
EARLIER = (
    "max_prompt_length", "vllm_guided_decoding_regex", "vllm_device", "vllm_dtype", "vllm_max_model_len",
    "vllm_enable_prefix_caching", "warmup_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A field for a person.

    Attributes:
        group: `INHERITED` for those of TrainingArguments.
        kind: what to write, as in `type_name`.
        default: as text.
        text: what it is.
        ours: no field of TRL.
    """

    name: str
    group: str
    kind: str
    default: str
    text: str
    ours: bool

    @property
    def inert(self) -> str | None:
        """Why it does nothing; None where it does something."""
        return INERT_FIELDS.get(self.name)

    @property
    def refused(self) -> str | None:
        return REFUSED_FIELDS.get(self.name)


def entries() -> list[Entry]:
    """All fields that a script, a recipe and the command line can set: GRPOConfig's own first, as it declares them."""
    types, by_name = training_types(), {field.name: field for field in fields(GRPOConfig)}
    groups, group = {}, INHERITED
    for name in GRPOConfig.__annotations__:
        groups[name] = group = _GROUPS.get(name, group)
    return [
        _entry(by_name[name], groups.get(name, INHERITED), types[name])
        for name in dict.fromkeys([*groups, *by_name])
        if name in types
    ]


def reward_entries() -> list[Entry]:
    """Parameters of built-in rewards: keys of a recipe and flags, but no fields of GRPOConfig."""
    types = job_types()
    return [_entry(field, REWARDS, types[field.name]) for field in fields(RewardSettings)]


def _entry(field: Field, group: str, hint: Any) -> Entry:
    text = field.metadata.get("help", "")
    ours = text.startswith(_OURS)
    if group == INHERITED:
        text = first_sentence(text)
    return Entry(
        field.name,
        group,
        type_name(hint),
        default_text(field),
        re.sub(r"\s*\(no effect[^)]*\)", "", text.removeprefix(_OURS)),
        ours,
    )


def type_name(hint: Any) -> str:
    """What to write after the flag: `int`, `text|bool`, `json` for a table. An enum is text; None goes unsaid."""
    options = typing.get_args(hint) if typing.get_origin(hint) is not list else ()
    kinds = [typing.get_origin(option) or option for option in options or (hint,)]
    known = {bool: "bool", int: "int", float: "float", str: "text", list: "list", dict: "json"}
    names = [known[kind] for kind in kinds if kind in known]
    if "list" in names or "json" in names:
        names = [name for name in names if name != "text"]  # how either is written on a command line
    return "|".join(names) or "text"


def first_sentence(text: str) -> str:
    """Up to the full stop that a capital follows; argparse's %% is a %."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`(])", " ".join(text.split()), maxsplit=1)[0].replace("%%", "%")


def default_text(field: Field) -> str:
    return value_text(field.default_factory() if field.default_factory is not MISSING else field.default)


def value_text(value: Any) -> str:
    """`on`, `unset`, `1e-06`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "unset" if value in (None, "", [], {}) else str(getattr(value, "value", value))


_INTRO = """\
# The fields of GRPOConfig

This page is made from the code: `python -m lowvram_grpo.recipe.field_table > docs/fields.md`.

Each is an argument of `GRPOConfig`, a key of a recipe file and a flag of `lowvram-grpo train` (`num_generations` is
`--num-generations`). What has no effect is accepted and says so on screen when it is set, so that a script runs
unchanged; what is refused says why and what to do instead. [trl.md](trl.md) has what differs beyond a field.
"""
_TRLS = """
## TRL's

Those of TRL 1.16; its default stands in brackets where it is another one.

| field | default | here | |
|---|---|---|---|
"""
_OWN = """
## Our own

| field | default | |
|---|---|---|
"""
_REWARDS = f"""
## {REWARDS}

Keys of a recipe file and flags; in a script they are arguments of the functions in `lowvram_grpo.rewards`
([rewards.md](rewards.md)).

| name | default | |
|---|---|---|
"""
_EARLIER = """
## Names of earlier versions

Of TRL before 1.16 and transformers 4.

| field | default | here | |
|---|---|---|---|
"""
_INHERITED = """
## transformers' TrainingArguments

All of them are fields, and do what they do in transformers but for these:

| field | here |
|---|---|
"""


def page() -> str:
    """docs/fields.md."""
    known = entries()
    own = [each for each in known if each.ours]
    earlier = [each for each in known if each.name in EARLIER]
    declared = [each for each in known if each.name in GRPOConfig.__annotations__]
    trls = [each for each in declared if not each.ours and each.name not in EARLIER]
    # Whatever this version of transformers has of them.
    others = sorted({*INERT_FIELDS, *REFUSED_FIELDS} - GRPOConfig.__annotations__.keys())
    return "".join(
        [
            _INTRO, _TRLS, *map(_full_row, trls), _OWN, *(_row(f"`{e.name}`", e.default, e.text) for e in own),
            _REWARDS, *(_row(f"`{e.name}`", e.default, e.text) for e in reward_entries()),
            _EARLIER, *map(_full_row, earlier), _INHERITED, *(_row(f"`{name}`", _status(name)) for name in others),
        ]
    )  # fmt: skip


def _full_row(entry: Entry) -> str:
    default = entry.default
    if entry.name in TRL_DEFAULTS:
        default += f" ({value_text(TRL_DEFAULTS[entry.name])})"
    return _row(f"`{entry.name}`", default, _status(entry.name), entry.text)


def _status(name: str) -> str:
    if name in REFUSED_FIELDS:
        return f"refused: {REFUSED_FIELDS[name]}"
    return f"no effect: {INERT_FIELDS[name]}" if name in INERT_FIELDS else "works"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"


if __name__ == "__main__":
    print(page(), end="")
