"""The hub, its cache on this machine, and whether it can be reached at all."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

# Seconds; a name that is not resolved fails at once, and a firewall that drops packets should not take much longer.
_PATIENCE = 3.0
# Whether it was we who went offline, and not a person's variable.
_cut_off = False


def cached(model: str) -> str | None:
    """The folder of a hub id in the local cache, None without one; the network is not asked."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, local_files_only=True)
    except (OSError, ValueError):
        return None


def kept(name: str) -> list[str]:
    """The ids of the models in the local cache that are called `name` (in any case), whoever owns them: those whose
    configuration is there. The network is not asked, and no weights are looked at."""
    from huggingface_hub import constants

    found = []
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        model = "/".join(folder.name.split("--")[1:])
        if model.rsplit("/", 1)[-1].lower() == name.lower() and any(folder.glob("snapshots/*/config.json")):
            found.append(model)
    return found


def only_the_cache() -> bool:
    """Whether the hub is not asked, by a person's choice or since it did not answer."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def way_to_the_hub() -> str:
    """What would let a model be fetched that was not found, for the end of a sentence."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _cut_off:
        return "unset HF_HUB_OFFLINE, with which only the cache is looked at"
    return "set HF_ENDPOINT to a mirror"


def out_of_reach() -> str:
    """Why nothing can be sent to the hub, as a clause; empty where it answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _cut_off:
        return "HF_HUB_OFFLINE is set"
    return "" if not _cut_off and _answers(constants.ENDPOINT) else "the hub can't be reached"


def offline_where_unreachable(places: list[str | None], tell: Callable[[str], None]) -> None:
    """Use the cache alone where `places` (of models, adapters, data) has a hub id and the hub does not answer: else its
    client tries each file six times, which takes minutes for a model that is all there.

    Args:
        tell: hears of it.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not any(place and not os.path.exists(place) for place in places):
        return
    if _answers(constants.ENDPOINT):
        return
    global _cut_off
    _cut_off = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    tell(f"{constants.ENDPOINT} can't be reached: only this machine's cache of it is used.")


def _answers(endpoint: str) -> bool:
    """Whether a connection can be made; assumed where a proxy stands between."""
    url = urlsplit(endpoint)
    if url.scheme in getproxies() or not url.hostname:
        return True
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), _PATIENCE).close()
    except OSError:
        return False
    return True
