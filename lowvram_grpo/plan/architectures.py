"""The configuration of whatever a person plans for, a model that is not on this machine too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.policy.hub import cached, offline_where_unreachable, way_to_the_hub
from lowvram_grpo.policy.known_models import config_dict, lookup, names, near, packaging
from lowvram_grpo.policy.load import model_config
from lowvram_grpo.policy.model_names import of_the_cache, unclear_shape
from lowvram_grpo.policy.refusals import check_kind, explained, not_a_model
from lowvram_grpo.policy.text_model import text_or_whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What a config.json says of weights that bitsandbytes has made smaller.
_STORED = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def resolve_config(model: str, **hub: Any) -> tuple[PretrainedConfig, str]:
    """The configuration of `model`, and where it comes from, for people; `hub` as for `policy.load.model_config`.

    `model` is a folder with a config.json, the file itself, a GGUF file, a name that `lookup` knows, the name of a
    model in the hub's cache, or a hub id; the hub is asked last, so that planning a model of the table works without a
    network. Where a name of the table says how its weights are stored, so does the configuration.

    Raises:
        UserError: none of these, or a name that leaves out a size.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        return model_config(str(path)), str(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise not_a_model(str(path))
    # Else transformers asks at the terminal.
    hub = {"trust_remote_code": False, **hub}
    if path.is_dir() or path.is_file():
        try:
            config = AutoConfig.from_pretrained(str(path), **hub)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise explained(str(path), error) from error
            raise UserError(f"{model!r} is not a model's configuration ({one_line(error)}).") from error
        check_kind(str(path), config)
        return text_or_whole(config), str(path)
    name = lookup(model)
    if name is not None:
        folder = cached(of_the_cache(model) or model) if packaging(model) else None
        return _packed(model, folder, hub) if folder else _of_the_table(model, name)
    model = of_the_cache(model) or model
    if doubt := unclear_shape(model):
        raise doubt
    offline_where_unreachable([model], lambda sentence: None)
    try:
        config = AutoConfig.from_pretrained(model, **hub)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise explained(model, error) from error
        raise UserError(
            f"{model!r} is no folder with a config.json, not in the table of architectures{near(model)}, and not to be "
            f"had from the hub; name a local folder, {way_to_the_hub()}, or take one of {', '.join(names())}."
        ) from error
    check_kind(model, config)
    return text_or_whole(config), f"the hub ({model})"


def _of_the_table(model: str, name: str) -> tuple[PretrainedConfig, str]:
    from transformers import AutoConfig

    config = AutoConfig.for_model(dtype="bfloat16", **config_dict(name))
    if stored := packaging(model):
        config.quantization_config = _STORED.get(stored, {"quant_method": stored})
    return config, f"the table of architectures ({name})"


def _packed(model: str, folder: str, hub: dict[str, Any]) -> tuple[PretrainedConfig, str]:
    """The configuration of a quantized model in the cache, which says what the table does not: how it is stored."""
    return model_config(folder, **{key: value for key, value in hub.items() if key != "revision"}), (
        f"this machine's cache of the hub ({model})"
    )
