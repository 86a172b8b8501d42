"""What `--model` means, in every command alike: a path, an id on the hub, a name of the table, or the name of a model
that this machine's cache of the hub has.

A name that could mean several models is a question with the candidates, never a guess: a run is hours of somebody's
card. What a name was taken for is said, and whether that is a base model or a tuned one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.hub import kept, offline_where_unreachable, only_the_cache
from lowvram_grpo.policy.known_models import (
    is_bare,
    is_tuned,
    lookup,
    meaning,
    packaging,
    repository,
    shortened,
    siblings,
    unpacked,
)

# Owners that publish other people's weights as they are, under the same name; of others' uploads of that name nobody
# knows what was done to them.
_MIRRORS = ("unsloth",)
_SHOWN = 6


def named(model: str, tell: Callable[[str], None]) -> str:
    """Where the model that `--model` means is: a folder or file that exists, a repository of the hub, or `model`
    itself, a hub id or a mistake. The hub is asked for nothing but whether it answers, and only where the cache does
    not have what is meant.

    Args:
        model: as a person wrote it, or the absolute path that was made of it.
        tell: hears what a name stands for, and that a folder of that name goes first.

    Raises:
        UserError: it could mean several models.
    """
    tail = os.path.basename(model)
    if os.path.exists(model):
        if (place := repository(tail)) and os.path.abspath(model) == os.path.join(os.getcwd(), tail):
            tell(f"model: {tail} is the folder {os.path.abspath(model)}, not {place} on the hub.")
        return model
    if not is_bare(model):
        return model
    if place := repository(model):
        return _fetched_or_kept(model, place, tell)
    if place := of_the_cache(model):
        tell(f"model: {model} is {place} in this machine's cache of the hub.")
        return place
    if doubt := question(model):
        raise doubt
    return model


def told_of_shape(model: str, tell: Callable[[str], None]) -> None:
    """Say what a name stands for where no more is needed than the model's shape, which all that it may mean share."""
    if os.path.exists(model) or not is_bare(model):
        named(model, tell)
    elif place := repository(model):
        tell(f"model: {model} is {place} on the hub{_kind(place)}.")
    elif (place := of_the_cache(model)) and not lookup(model):
        tell(f"model: {model} is {place} in this machine's cache of the hub.")
    elif (meant := meaning(model)) and not packaging(model):
        tell(f"model: {model} is planned as {lookup(model)}; train, chat and eval ask for one of {_or(meant.others)}.")


def of_the_cache(model: str) -> str | None:
    """The one model of the hub's cache that is called so, for a name without an owner; None where it has none.

    Raises:
        UserError: it has several.
    """
    found = kept(model) if is_bare(model) else []
    if len(found) > 1:
        raise UserError(f"{model!r} could mean {_or(found)}, which are in this machine's cache of the hub; name one.")
    return found[0] if found else None


def question(model: str) -> UserError | None:
    """Which model is meant, asked in one sentence, where a name of the table leaves it open; None where it does not.

    A name that stands for one shape of several tunings is a question here, and none for a plan (`unclear_shape`).
    """
    meant = meaning(model)
    if meant is None:
        return unclear_shape(model)
    if meant.place is not None:
        return None
    if stored := packaging(model):
        bare, kind = unpacked(model), f" with --quantization {stored}" if stored in ("nf4", "int8") else ""
        return UserError(
            f"{model!r} does not say whose packaging of {bare} is meant; name its owner, as in unsloth/{model}, or "
            f"pass --model {bare}{kind}."
        )
    if len(meant.others) == 1:
        return UserError(f"There is no {model!r}; did you mean {_tail(meant.others[0])}?")
    listed = _or([f"{_tail(place)} ({_word(place)})" for place in meant.others])
    return UserError(f"{model!r} could mean {listed}; name one of them in full.")


def unclear_shape(model: str) -> UserError | None:
    """The question for a name that leaves out a size or a version (`qwen2.5`, `gemma-4`, `qwen3:30b`), or None."""
    found = shortened(model)
    if not found:
        return None
    if len(found) == 1:
        return UserError(f"{model!r} is no model's whole name; did you mean {found[0]}?")
    return UserError(f"{model!r} could mean {_or(found)}; name one of them in full.")


def _fetched_or_kept(model: str, place: str, tell: Callable[[str], None]) -> str:
    """`place`, or its like in the cache where only that can be had."""
    if place not in kept(_tail(place)):
        offline_where_unreachable([place], tell)
        if only_the_cache() and (other := _mirror(place)):
            tell(
                f"model: {model} is {place}{_kind(place)}; it is not in this machine's cache of the hub, so "
                f"{other} is taken, which is the same."
            )
            return other
    tell(f"model: {model} is {place} on the hub{_kind(place)}.")
    return place


def _mirror(place: str) -> str | None:
    """What the cache has instead of `place`, whose name it has: the same weights under another owner.

    Raises:
        UserError: what it has may be another model.
    """
    found = kept(_tail(place))
    if same := [other for other in found if other.split("/")[0] in _MIRRORS]:
        return same[0]
    if found:
        raise UserError(
            f"{place} is not in this machine's cache of the hub, which can't be asked now; the cache has {_or(found)}, "
            "whose weights may be others: pass that as --model if it is what you mean."
        )
    return None


def _kind(place: str) -> str:
    """Whether a repository holds a base model or a tuned one, and what the other is called, as an apposition."""
    tuned = is_tuned(place)
    others = [other for other in siblings(place) if is_tuned(other) != tuned]
    if tuned:
        return ", a tuned model" + (f" ({others[0]} is its base)" if others else "")
    return ", a base model" + (f" ({_or(others)} {'is' if len(others) == 1 else 'are'} tuned)" if others else "")


def _word(place: str) -> str:
    return "tuned" if is_tuned(place) else "base"


def _or(names: list[str]) -> str:
    """`a, b or c`, the first few of them."""
    shown = names[:_SHOWN]
    if len(names) > len(shown):
        return f"{', '.join(shown)} or {len(names) - len(shown)} more"
    return f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]


def _tail(place: str) -> str:
    return place.rsplit("/", 1)[-1]
