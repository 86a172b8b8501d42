"""What cannot be loaded as a model to train or sample, and what to give instead: a sentence for each kind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError, one_line, some
from lowvram_grpo.policy.hub import cached, way_to_the_hub
from lowvram_grpo.policy.known_models import near, repositories
from lowvram_grpo.policy.text_model import language_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
# What tokenizers are made from; tokenizer_config.json alone says only how.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    "tekken.json", "*.tiktoken", "*.spm",
)  # fmt: skip


def explained(model: str, error: Exception, wanted: str = "model") -> UserError:
    """One sentence for whatever from_pretrained threw about `model`, a folder, a file or a hub id; `wanted` of it was
    the model or its tokenizer."""
    text = str(error)
    if isinstance(error, ImportError):
        other = ", or pass --attn-implementation sdpa" if "attention" in text.lower() else ""
        return UserError(f"{model!r} needs a package that is missing ({one_line(error)}); install it{other}.")
    if "trust_remote_code" in text:
        return UserError(
            f"{model!r} brings custom code, which runs only if you say so: read it, then pass --trust-remote-code."
        )
    if os.path.isfile(model):
        return UserError(f"The file {model!r} does not hold a loadable {wanted}: {one_line(error)}.")
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, _CONFIG)):
            return not_a_model(model)
        return UserError(f"The folder {model!r} does not hold a loadable {wanted}: {one_line(error)}.")
    return _not_on_the_hub(model, error, wanted)


def _not_on_the_hub(model: str, error: Exception, wanted: str) -> UserError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RevisionNotFoundError

    cause = error.__cause__
    for unwritten in (error, cause):
        if isinstance(unwritten, OSError) and unwritten.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            return UserError(
                f"The files of {model!r} can't be written to the hub's cache, {constants.HF_HUB_CACHE} "
                f"({unwritten.strerror}); set HF_HOME to a folder that can be written to and has room."
            )
    if isinstance(cause, RevisionNotFoundError):
        return UserError(f"{model!r} has no such revision ({one_line(error)}); check --model-revision.")
    folder = cached(model)
    if folder and not os.path.isfile(os.path.join(folder, _CONFIG)):
        return not_a_model(folder, model)
    if isinstance(cause, GatedRepoError) or "gated repo" in str(error):
        return UserError(
            f"The hub gives {model!r} only to accounts that have accepted its terms; accept them on its page, then "
            "run `hf auth login`."
        )
    found = isinstance(error, ValueError) and not isinstance(error, (HFValidationError, UnicodeError))
    if folder or found:
        return UserError(f"The {wanted} of {model!r} on the hub can't be loaded: {one_line(error)}.")
    known = repositories(model)
    hint = f" (by name there are {', '.join(known)})" if known else "" if "/" in model else near(model)
    return UserError(
        f"Model {model!r} is neither a local folder nor reachable on the hub, nor in this machine's cache of it{hint}; "
        f"check the name, pass a local folder, or {way_to_the_hub()}."
    )


def not_a_model(folder: str, name: str | None = None) -> UserError:
    """What a folder without a config.json is instead, and how to say that. `name`: what a person calls it."""
    place, name = Path(folder), name or folder
    if (place / "recipe.toml").is_file():
        base = adapter_base(str(place / "adapter"))
        return UserError(
            f"{name!r} is a run, not a model: chat and eval take it as --adapter {name}; train takes --resume {name} "
            f"to go on with it, or --adapter {place / 'adapter'} with --model {base or 'its base model'} to start from "
            "what it learned."
        )
    if (place / _ADAPTER).is_file():
        base = adapter_base(folder)
        return UserError(
            f"{name!r} holds an adapter, not a model; pass --adapter {name} with --model {base or 'its base model'}."
        )
    if files := sorted(path.name for path in place.glob("*.gguf")):
        shown = f"{name.rstrip('/')}/{files[0]}"
        which = f"name the file, as in --model {shown}" if len(files) == 1 else f"name one of them, as in {shown}"
        return UserError(f"{name!r} holds {'a GGUF file' if len(files) == 1 else 'GGUF files'}; {which}.")
    inside = sorted(place.glob("*/config.json")) or sorted(place.glob("snapshots/*/config.json"))
    remedy = "name the folder that the model was saved in."
    if inside:
        some_of = "did you mean" if len(inside) == 1 else f"of its {len(inside)} folders that hold one, did you mean"
        remedy = f"{some_of} {inside[-1].parent}?"
    return UserError(f"The folder {name!r} holds no model, as it has no {_CONFIG}; {remedy}")


def beside_a_model(model: str, folder: str) -> UserError:
    """For an adapter in the folder of a whole model, called `model`: which is meant cannot be known."""
    base = adapter_base(folder)
    elsewhere = base and os.path.abspath(base) != os.path.abspath(folder) and base != model
    start = f"pass --adapter {model} with --model {base}, or " if elsewhere else ""
    return UserError(
        f"{model!r} holds an adapter beside a model; {start}keep the two in folders of their own, and name them as "
        "--adapter and --model."
    )


def adapter_base(folder: str) -> str | None:
    """The model that the adapter in `folder` was made for, as its configuration says."""
    try:
        text = Path(folder, _ADAPTER).read_text(encoding="utf-8")
        return json.loads(text).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None


def check_kind(model: str, config: PretrainedConfig) -> None:
    """Whether a model of this configuration writes text on from the left, as GRPO needs it.

    So does the language model inside of a multimodal one, where transformers has a class for it alone.

    Raises:
        UserError: it does not; the sentence says what it is.
    """
    from transformers.models.auto import modeling_auto as auto

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) or language_model(config) is not None:
        return
    kind, declared = config.model_type, [str(name) for name in config.architectures or []]
    tasks = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
    task = next((task for task in tasks for name in declared if name.endswith(f"For{task}")), None)
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder model"
    elif task:
        what = {"SequenceClassification": "a classifier or reward model", "MaskedLM": "a masked language model"}.get(
            task, "a model for another task"
        )
        what += f" ({declared[0]})"
    elif kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", True) is False:
        what = "an encoder, as embedding models are"
    elif type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    elif kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        what = "a vision-language model"
    else:
        what = f"no causal language model (its model_type is {kind!r})"
    raise UserError(f"{model!r} is {what}, and GRPO here trains decoder-only language models; give one of those.")


def check_vocabulary(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether a tokenizer has a vocabulary: for some kinds transformers makes an empty one where the files are missing.

    Raises:
        UserError: it has none.
    """
    try:
        words = tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}
    except NotImplementedError:  # a tokenizer of a model's own code
        return
    if not words - {"▁"}:  # a unigram model's own, which is never without it
        raise no_tokenizer(model)


def lacks_vocabulary(model: str) -> bool:
    """Whether nothing that a tokenizer could be made from lies in a local or cached folder."""
    folder = model if os.path.isdir(model) else cached(model)
    return bool(folder) and not any(next(Path(folder).glob(name), None) for name in _VOCABULARIES)


def no_tokenizer(model: str) -> UserError:
    return UserError(
        f"{model!r} has no tokenizer files; copy tokenizer.json and tokenizer_config.json (and chat_template.jinja, "
        "where there is one) into it from the model that it was made from."
    )


def check_rows(model: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Whether each token has a row in the embedding. More rows than tokens are usual; a token without one would end the
    run when it is first met, on a GPU with a device-side assert.

    Raises:
        UserError: tokens have none.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not rows:
        return
    beyond = {token: index for token, index in _vocabulary(tokenizer).items() if index >= rows}
    if beyond:
        shown = some(sorted(beyond, key=beyond.__getitem__))
        raise UserError(
            f"The tokenizer of {model!r} has tokens that the model has no embedding for ({shown}; ids go up to "
            f"{max(beyond.values())}, and there are {rows} rows); resize the model with "
            "model.resize_token_embeddings(len(tokenizer)) and save it, or take the tokenizer it was trained with."
        )


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    try:
        return tokenizer.get_vocab()
    except (AttributeError, NotImplementedError):
        return {}
