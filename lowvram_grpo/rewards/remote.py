"""A reward that a server computes: batches of completions go out as JSON, their rewards come back.

Nothing is contacted but the address that a person named: a redirect is refused. Proxies are taken from the environment,
as urllib has them.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.rewards.calls import in_thread
from lowvram_grpo.rewards.outputs import RewardFailure, Unanswered

# What may stand behind a # in the address, which no server sees: completions a request, requests at once, seconds that
# an answer may take, and how often a request that failed is sent again.
DEFAULTS = {"batch": 64, "parallel": 4, "timeout": 300.0, "retries": 4}
# Before the first of them, in seconds; twice as long before the next.
BACKOFF = 0.5
_LONGEST_WAIT = 30.0
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_NOT_SENT = ("trainer_state", "log_extra", "log_metric")
_SHOWN = 200
_LARGEST_ANSWER = 64 * 2**20


class HTTPReward:
    """The rewards that the server at `address` gives.

    It is sent `{"prompts": [...], "completions": [...], "completion_ids": [[...]], COLUMN: [...], ...}`, a value for
    each completion in every list, and answers `{"rewards": [...]}` with as many numbers, or null where its reward does
    not apply.

    Args:
        address: http:// or https://, with `#batch=16&timeout=30` behind it where `DEFAULTS` do not fit.

    Raises:
        UserError: it is no address, or has other settings than these.
    """

    def __init__(self, address: str):
        place, _, fragment = address.partition("#")
        parts = urllib.parse.urlsplit(place)
        try:
            port = parts.port
        except ValueError as error:
            raise UserError(f"the reward {address!r}: {error}; write http://host:port/path.") from error
        if not parts.hostname:
            raise UserError(f"the reward {address!r} names no host; write http://host:port/path.")
        self.address, self._settings = place, _settings(address, fragment)
        self._sent_to = f"{parts.hostname}:{port}" if port else parts.hostname
        self.__name__ = parts.path.rstrip("/").rpartition("/")[2] or parts.hostname
        self._opener = urllib.request.build_opener(_NoRedirect())

    async def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float | None]:
        """A reward a completion.

        Raises:
            RewardFailure: the server can't be reached, refuses, or answers with something else than rewards.
        """
        given = {"prompts": prompts, "completions": completions}
        given |= {key: values for key, values in columns.items() if key not in _NOT_SENT}
        size, slots = int(self._settings["batch"]), asyncio.Semaphore(int(self._settings["parallel"]))

        async def part(first: int) -> list[float | None]:
            rows = {key: values[first : first + size] for key, values in given.items()}
            async with slots:
                # Not asyncio's own threads: Python would wait for them at its end.
                sent = in_thread(f"reward-{self.__name__}", lambda: self._rewards(rows))
                return await asyncio.wrap_future(sent)

        parts = await asyncio.gather(*(part(first) for first in range(0, len(completions), size)))
        return [reward for rewards in parts for reward in rewards]

    def _rewards(self, rows: dict[str, Sequence]) -> list[float | None]:
        n, answer = len(rows["completions"]), self._answer(self._body(rows))
        try:
            found = json.loads(answer)
        except ValueError:
            raise self._failed(f"answered with what is no JSON: {_first_line(answer)}") from None
        rewards = found.get("rewards") if isinstance(found, dict) else found
        if not isinstance(rewards, list):
            raise self._failed(f'answered without a list of rewards ({{"rewards": [...]}}): {_first_line(answer)}')
        if len(rewards) != n:
            raise self._failed(f"answered with {len(rewards)} rewards for {n} completions; it must give one for each")
        return rewards

    def _body(self, rows: dict[str, Sequence]) -> bytes:
        parts = []
        for name, values in rows.items():
            try:
                parts.append(f"{json.dumps(name)}: {json.dumps(_plain(values), allow_nan=False)}")
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"the column {name!r} can't be sent to the reward {self.address} as JSON ({error}); leave it out "
                    "of the data, or store it as text."
                ) from error
        return f"{{{', '.join(parts)}}}".encode()

    def _answer(self, body: bytes) -> bytes:
        """What the server says, once it says something else than that it is busy."""
        retries = int(self._settings["retries"])
        for attempt in range(retries + 1):
            try:
                return self._sent(body)
            except _Busy as busy:
                if attempt == retries:
                    tries = f" ({retries + 1} tries)" if retries else ""
                    raise self._failed(f"{busy}{tries}", Unanswered if busy.silent else RewardFailure) from busy
                wait = BACKOFF * 2**attempt if busy.wait is None else busy.wait
                # Workers that failed together must not come back together.
                time.sleep(min(_LONGEST_WAIT, wait) * random.Random().uniform(1.0, 1.25))
        raise AssertionError  # the last attempt returns or raises

    def _sent(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.address, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._settings["timeout"]) as response:
                answer = response.read(_LARGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            line = _first_line(error.read(4096))
            said = f"answered {error.code} {error.reason}" + (f": {line}" if line else "")
            if 300 <= error.code < 400:
                to = error.headers.get("Location", "elsewhere")
                raise self._failed(f"points to {to}; name that address if it is to be asked") from error
            if error.code in _TRY_AGAIN:
                wait = _seconds(error.headers.get("Retry-After"))
                raise _Busy(said, wait, silent=error.code != 500) from error
            raise self._failed(said) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Busy(f"did not answer within {self._settings['timeout']:g} s") from error
            why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise _Busy(f"can't be reached at {self._sent_to}: {why}; is the server running?") from error
        if len(answer) > _LARGEST_ANSWER:
            raise self._failed(f"answered with more than {_LARGEST_ANSWER >> 20} MiB")
        return answer

    def _failed(self, what: str, kind: type[RewardFailure] = RewardFailure) -> RewardFailure:
        return kind(f"the reward {self.address} {what.rstrip('.')}.")


class _Busy(Exception):
    """It may go well in `wait` seconds, or in a moment. `silent`: whatever it is that is asked."""

    def __init__(self, said: str, wait: float | None = None, *, silent: bool = True):
        super().__init__(said)
        self.wait, self.silent = wait, silent


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # and so it is an HTTPError


def _settings(address: str, fragment: str) -> dict[str, float]:
    found: dict[str, float] = dict(DEFAULTS)
    for part in filter(None, fragment.split("&")):
        key, _, text = part.partition("=")
        if key not in DEFAULTS:
            raise UserError(
                f"the reward {address!r} has no setting {key!r}{did_you_mean(key, DEFAULTS)}; behind the # may stand "
                f"{', '.join(DEFAULTS)}."
            )
        try:
            found[key] = type(DEFAULTS[key])(text)
        except ValueError:
            found[key] = math.nan
        if not found[key] >= (0 if key == "retries" else 1e-3):
            raise UserError(f"the reward {address!r}: {key} is {text!r}; write a number, as in {key}={DEFAULTS[key]}.")
    return found


def _plain(value: Any) -> Any:
    """Dates as text, missing numbers as null, arrays as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _first_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[0].strip()[:_SHOWN] if lines else ""


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header; dates are taken for a moment."""
    return float(retry_after) if retry_after is not None and retry_after.isdigit() else None
