"""push_to_hub: asked for before a model is loaded, and what fails later ends no run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError, one_line

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig


# What needs the hub, and what is there to do without it.
_ASKED = {
    "push_to_hub": "or drop push_to_hub: a finished adapter can be uploaded later with `hf upload`",
    "log_completions_hub_repo": "or drop log_completions_hub_repo: completions.jsonl has them all",
}


def check_hub(args: GRPOConfig) -> None:
    """Whether what `push_to_hub` and `log_completions_hub_repo` need is there: the network, a token that is known, a
    name that is one.

    Raises:
        UserError: it is not.
    """
    setting = next((name for name in _ASKED if getattr(args, name)), None)
    if setting is None:
        return
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    otherwise = _ASKED[setting]
    if huggingface_hub.constants.is_offline_mode():
        raise UserError(f"{setting} needs the hub, and HF_HUB_OFFLINE is set; unset it, {otherwise}.")
    token = args.hub_token or huggingface_hub.get_token()
    if token is None:
        raise UserError(f"{setting} needs a token of the hub; run `hf auth login`, or set HF_TOKEN, {otherwise}.")
    for name in ("hub_model_id", "log_completions_hub_repo"):
        try:
            if getattr(args, name) is not None:
                validate_repo_id(getattr(args, name))
        except HFValidationError as error:
            raise UserError(f"{name} is {getattr(args, name)!r}, which can't be one ({one_line(error)}).") from error
    try:
        huggingface_hub.HfApi().whoami(token=token)
    except Exception as error:  # whatever a network can do
        raise UserError(f"{setting} can't reach the hub ({one_line(error)}); check network and token, {otherwise}.") \
            from error  # fmt: skip


class HubPushes:
    """The part of transformers.Trainer that talks to the hub; to be named before it among a class's bases. Uses
    `self.observer`."""

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # whatever a network can do
            raise UserError(
                f"push_to_hub can't make the repository ({one_line(error)}); check hub_model_id and what the token "
                "may do, or drop push_to_hub."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._or_said(super()._push_from_checkpoint, checkpoint_folder)

    def _finish_current_push(self) -> None:
        self._or_said(super()._finish_current_push)
        under_way = getattr(self, "push_in_progress", None)
        for job in [] if under_way is None else under_way.jobs:
            self._or_said(job.result)  # which raises what went wrong in the background

    def _or_said(self, push: Callable, *args: Any) -> None:
        try:
            push(*args)
        except Exception as error:
            self.observer.notice(f"nothing was pushed to the hub ({one_line(error)}); what was saved is complete here.")
