"""push_to_hub: asked for before a model is loaded; what is pushed is the model (or its adapter), its tokenizer and a
card, and with hub_strategy checkpoint or all_checkpoints what a run goes on from. What fails ends no run.

transformers uploads all of output_dir, which is where a run keeps what it has sampled. Here a folder of its own is made
of what goes out; uploads run one after another in the background.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import HubStrategy

from lowvram_grpo.errors import UserError, one_line

if TYPE_CHECKING:
    from concurrent.futures import Future

    from lowvram_grpo.recipe.config import GRPOConfig


# What needs the hub, and what is there to do without it.
_ASKED = {
    "push_to_hub": "or drop push_to_hub: a finished adapter can be uploaded later with `hf upload`",
    "log_completions_hub_repo": "or drop log_completions_hub_repo: completions.jsonl has them all",
}
STAGED = ".push"
# Of a checkpoint: what a model is loaded from.
_MODEL = ("adapter_config.json", "adapter_model.*", "config.json", "generation_config.json", "model.safetensors",
          "model-*.safetensors", "model.safetensors.index.json")  # fmt: skip
# Of a checkpoint that is to be gone on from, what stays here: sampled tokens, and settings with a token of the hub in
# them. It goes out before it is sealed, so there is no manifest to miss them.
_NOT_OF_A_CHECKPOINT = ("rollout.pt", "training_args.bin")


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
    `self.observer`.

    Attributes:
        card: makes the text of the README.md; None: `create_model_card` writes it.
        api: a `huggingface_hub.HfApi`, made at the first use.
    """

    card: Callable[[], str] | None = None
    api: Any = None
    _pushes: list[tuple[Future, Path]] = []  # in progress; replaced, never added to in place

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The repository, and the branch `hub_revision` in it.

        Raises:
            UserError: they can't be made.
        """
        import huggingface_hub

        args = self.args
        self.api = huggingface_hub.HfApi(token=token or args.hub_token)
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        try:
            private = args.hub_private_repo if private is None else private
            self.hub_model_id = self.api.create_repo(name, private=private, exist_ok=True).repo_id
            if args.hub_revision:
                self.api.create_branch(self.hub_model_id, branch=args.hub_revision, exist_ok=True)
        except Exception as error:  # whatever a network can do
            raise UserError(
                f"push_to_hub can't make the repository ({one_line(error)}); check hub_model_id and what the token "
                "may do, or drop push_to_hub."
            ) from error
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers': saves the model in output_dir, and uploads it with its card, for which `kwargs` are.

        Returns:
            the commit, or with `blocking` False its future; None where it failed, which is said.
        """
        return self._or_said(self._push_now, commit_message, blocking, token, revision, private, kwargs)

    def _push_now(self, message, blocking, token, revision, private, of_the_card) -> Any:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None or token is not None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        folder = self._staged(Path(self.args.output_dir), "model", of_the_card)
        self._finish_current_push()
        upload = self._upload(folder, message, revision)
        return self._awaited(upload) if blocking else upload

    def push_folder(self, folder: Path, message: str) -> None:
        """Upload what a run has left, and wait for it; where that fails, say so, and how to do it by hand."""
        self._finish_current_push()

        def push() -> None:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            staged = Path(self.args.output_dir) / STAGED / "model"
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(folder, staged, copy_function=_link)
            self._awaited(self._upload(staged, message))
            self.observer.notice(f"pushed to {self.api.endpoint}/{self.hub_model_id}")

        revision = f" --revision {self.args.hub_revision}" if self.args.hub_revision else ""
        self._or_said(push, remedy=f"; `hf upload {self.hub_model_id} {folder} .{revision}` does it later")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        self._settle()
        if self._pushes and not args.hub_always_push:
            return
        self._or_said(self._push_checkpoint, Path(checkpoint_folder))

    def _push_checkpoint(self, checkpoint: Path) -> None:
        args, step = self.args, self.state.global_step
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {step}"
        self._upload(self._staged(checkpoint, f"step-{step}", {}), message)
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            whole = Path(args.output_dir) / STAGED / checkpoint.name
            shutil.rmtree(whole, ignore_errors=True)
            stays = shutil.ignore_patterns(*_NOT_OF_A_CHECKPOINT)
            shutil.copytree(checkpoint, whole, ignore=stays, copy_function=_link)
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            self._upload(whole, f"{message}, checkpoint", place=place)

    def _staged(self, source: Path, name: str, of_the_card: dict[str, Any]) -> Path:
        """A folder of what goes out: the weights of `source`, the tokenizer and the card. Files are the same on the
        disk, so that one that is deleted meanwhile is still there to be uploaded."""
        folder = Path(self.args.output_dir) / STAGED / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # peft has an adapter of another name than `default` in a folder of its own.
        for place in dict.fromkeys((source, source / (self.policy_adapter or "."))):
            for file in _files(place, _MODEL):
                _link(file, folder / file.name)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.card is not None:
            (folder / "README.md").write_text(self.card(), encoding="utf-8")
        else:
            named = {"model_name": (self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1]}
            self.create_model_card(**{**named, **of_the_card})
            shutil.copyfile(Path(self.args.output_dir) / "README.md", folder / "README.md")
        return folder

    def _upload(self, folder: Path, message: str | None, revision: str | None = None, place: str | None = None):
        """In the background, after those that are under way; the folder goes when it is done."""
        upload = self.api.run_as_future(
            self.api.upload_folder,
            repo_id=self.hub_model_id,
            folder_path=folder,
            path_in_repo=place,
            commit_message=message,
            revision=revision or self.args.hub_revision,
        )
        self._pushes = [*self._pushes, (upload, folder)]
        return upload

    def _awaited(self, upload: Future) -> Any:
        """What became of an upload, behind which is cleared up."""
        upload.exception()
        folder = next(folder for each, folder in self._pushes if each is upload)
        self._pushes = [push for push in self._pushes if push[0] is not upload]
        shutil.rmtree(folder if self._pushes else folder.parent, ignore_errors=True)
        return upload.result()

    def _settle(self) -> None:
        """Say what has gone wrong in the background."""
        for upload, _ in self._pushes:
            if upload.done():
                self._or_said(self._awaited, upload)

    def _finish_current_push(self) -> None:
        """Wait for what is under way."""
        for upload, _ in self._pushes:
            self._or_said(self._awaited, upload)

    def _or_said(self, push: Callable, *args: Any, remedy: str = "; what was saved is complete here") -> Any:
        try:
            return push(*args)
        except Exception as error:
            self.observer.notice(f"nothing was pushed to the hub ({one_line(error)}){remedy}.")
            return None


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file())


def _link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without, or another one
        shutil.copy2(source, target)
