"""vLLM's OpenAI-compatible server over plain HTTP, and what its refusals mean for a person.

What is sent and read is vLLM's documented API ("OpenAI-Compatible Server", "LoRA Adapters"), 0.10.2 or later.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from typing import Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from lowvram_grpo.errors import UserError

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def allowed_rank(rank: int) -> int:
    """The least max_lora_rank of vLLM that has room for adapters of this rank."""
    return next((allowed for allowed in _RANKS if allowed >= rank), rank)


def server_command(model: str, rank: int) -> str:
    """How to start a server for a base model and adapters of this rank."""
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {model} --enable-lora --max-lora-rank {allowed_rank(rank)} "
        "--logprobs-mode processed_logprobs"
    )


def same_model(ours: str, theirs: str) -> bool:
    """Whether two names (hub ids, folders of either system) end in the same word."""
    last = lambda name: name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()
    return bool(ours and theirs) and last(ours) == last(theirs)


class VLLMClient:
    """One server.

    Args:
        base_url: `http://host:port`, with or without `/v1`.
        timeout: seconds to wait for the server to come up, and for each answer.
        command: how to start it, for error sentences.
    """

    def __init__(self, base_url: str, timeout: float, command: str):
        url = base_url if "://" in base_url else f"http://{base_url}"
        # 0.0.0.0 is where a server listens; as a destination Windows does not know it.
        self.url = url.rstrip("/").removesuffix("/v1").replace("://0.0.0.0", "://127.0.0.1")
        self.timeout, self.command = timeout, command
        local = urlsplit(self.url).hostname in _LOOPBACK
        self._opener = request.build_opener(*[request.ProxyHandler({})] * local)

    # HTTP

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and answer (JSON, or text where it is none) of a POST of `body`, or of a GET.

        Raises:
            UserError: no answer.
        """
        try:
            return self._exchange(path, body, self.timeout)
        except TimeoutError as error:
            raise UserError(
                f"The vLLM server at {self.url} has not answered {path} within {self.timeout:g} s; raise "
                "vllm_server_timeout, or lower max_completion_length."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"The vLLM server at {self.url} no longer answers ({error}); see what it said last, restart it, and go "
                "on with --resume."
            ) from error

    def _exchange(self, path: str, body: dict[str, Any] | None, timeout: float) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode("utf-8")
        call = request.Request(self.url + path, data, headers)
        try:
            with self._opener.open(call, timeout=timeout) as answer:
                return answer.status, _parsed(answer.read())
        except HTTPError as error:
            return error.code, _parsed(error.read())
        except URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TimeoutError(str(error.reason)) from error
            raise

    # The server

    def wait(self) -> list[dict[str, Any]]:
        """What the server serves (`id`, `root`, `parent`, `max_model_len`), as soon as it answers.

        Raises:
            UserError: nothing answers in time, or something else than vLLM does.
        """
        deadline, status, answer = time.monotonic() + self.timeout, None, None
        while True:
            left = deadline - time.monotonic()
            try:
                status, answer = self._exchange("/v1/models", None, max(left, 0.1))
            except (OSError, http.client.HTTPException):
                status = None
            if status == 200 and isinstance(answer, dict) and isinstance(answer.get("data"), list):
                return answer["data"]
            if status in (401, 403):
                raise UserError(
                    f"The vLLM server at {self.url} asks for an API key; put the one it was started with into the "
                    "environment variable VLLM_API_KEY."
                )
            if time.monotonic() + 0.5 >= deadline:
                break
            time.sleep(0.5)
        if status is not None:
            raise UserError(
                f"What answers at {self.url} is no vLLM server (/v1/models gave {status}); correct "
                f"vllm_server_base_url, or start one there: {self.command}."
            )
        raise UserError(
            f"No vLLM server answers at {self.url} (waited {self.timeout:g} s); start it with `{self.command}`, point "
            "vllm_server_base_url at it, or set use_vllm to false: the built-in engine needs no server."
        )

    def base_model(self, ours: str, named: str | None) -> dict[str, Any]:
        """The entry of the base model that is trained here: that which is called `named`, or else `ours`.

        Raises:
            UserError: the server serves others.
        """
        served = [model for model in self.wait() if not model.get("parent")]
        for model in served:
            names = (model.get("id", ""), model.get("root") or "")
            if (named in names) if named else any(same_model(ours, name) for name in names):
                return model
        have = ", ".join(str(model.get("id")) for model in served) or "nothing"
        wanted = named or ours or "the model that is trained"
        raise UserError(
            f"The vLLM server at {self.url} serves {have}, not {wanted}; start it with the model that is trained, or, "
            "if it is the same under another name, say that name in vllm_server_model."
        )

    def load_adapter(self, name: str, path: str, rank: int) -> None:
        """Make the server read the adapter in `path`.

        Raises:
            UserError: it may not, cannot, or does not find it.
        """
        status, answer = self.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if status == 200:
            return
        message = _message(answer)
        text = message.lower()
        if status in (404, 405) and text in ("not found", "method not allowed", ""):
            raise UserError(
                f"The vLLM server at {self.url} does not take adapters while it runs; start it with the environment "
                f"variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: {self.command}."
            )
        if "lora is not enabled" in text or "enable-lora" in text or "enable_lora" in text:
            raise UserError(f"The vLLM server at {self.url} was started without LoRA; start it with {self.command}.")
        if "max_lora_rank" in text:
            raise UserError(
                f"The vLLM server at {self.url} was started for adapters of a smaller rank than {rank}; start it with "
                f"{self.command}."
            )
        if "no adapter found" in text or "no such file" in text or "does not exist" in text:
            raise UserError(
                f"The vLLM server at {self.url} finds no adapter in {path}; put vllm_adapter_dir where both can read, "
                "and say in vllm_adapter_server_dir what the server calls it."
            )
        raise UserError(f"The vLLM server at {self.url} refused the adapter in {path}: {message[:300]}.")

    def unload_adapter(self, name: str) -> None:
        """Let go of an adapter; one that is gone already is no error."""
        self.ask("/v1/unload_lora_adapter", {"lora_name": name})

    def complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of /v1/completions, in order.

        Raises:
            UserError: the server refuses, or is too old to say which tokens it drew.
        """
        status, answer = self.ask("/v1/completions", body)
        if status != 200:
            raise UserError(f"The vLLM server at {self.url} refused a prompt ({status}): {_message(answer)[:300]}.")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if any(choice.get("token_ids") is None or not choice.get("logprobs") for choice in choices):
            raise UserError(
                f"The vLLM server at {self.url} does not return token ids with their log-probs; upgrade it to vLLM "
                "0.10.2 or later."
            )
        return choices


def _parsed(raw: bytes) -> Any:
    text = raw.decode("utf-8", errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _message(answer: Any) -> str:
    """What an error answer says: {"error": {"message"}} or {"message"} of vLLM, {"detail"} of FastAPI, or text."""
    if isinstance(answer, dict):
        inner = answer.get("error", answer)
        answer = inner.get("message", inner.get("detail", "")) if isinstance(inner, dict) else inner
    return " ".join(str(answer).split()).rstrip(".")
