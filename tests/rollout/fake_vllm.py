"""A vLLM server as its documentation describes it, in a thread, on a model small enough for tests.

It draws from the model itself, one forward pass a token, so that its ids and log-probs are real.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel


class FakeVLLM:
    """State of a server.

    Args:
        make_base: makes the base model, anew for each adapter.
        processed: --logprobs-mode processed_logprobs; else raw_logprobs.
        lora, runtime, max_rank: --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING, --max-lora-rank.
        drift: nats taken off each log-prob that is reported.
        silent: fields left out of a choice, as an older version does.
    """

    def __init__(
        self, make_base, *, name="tiny", processed=True, lora=True, runtime=True, max_rank=64, max_len=128, drift=0.0,
        silent=(),
    ):  # fmt: skip
        self.make_base, self.name, self.processed, self.lora, self.runtime = make_base, name, processed, lora, runtime
        self.max_rank, self.max_len, self.drift, self.silent = max_rank, max_len, drift, silent
        self.adapters: dict[str, PeftModel] = {}
        self.calls: list[tuple[str, dict]] = []
        self.lock, self.hold = threading.Lock(), 0.0

    def answer(self, path: str, body: dict | None) -> tuple[int, object]:
        if path == "/v1/models":
            base = {"id": self.name, "root": self.name, "parent": None, "max_model_len": self.max_len}
            return 200, {"object": "list", "data": [base, *({"id": n, "parent": self.name} for n in self.adapters)]}
        self.calls.append((path, body))
        threading.Event().wait(self.hold)
        if path == "/v1/completions":
            return self.complete(body)
        if path.endswith("lora_adapter") and self.runtime:
            return self.load(body) if "unload" not in path else self.unload(body)
        return 404, {"detail": "Not Found"}

    def load(self, body: dict) -> tuple[int, object]:
        name, folder = body["lora_name"], Path(body["lora_path"])
        if not self.lora:
            return refusal(
                500, "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA."
            )
        if name in self.adapters:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_config.json").is_file():
            return refusal(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        if rank > self.max_rank:
            return refusal(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        self.adapters[name] = PeftModel.from_pretrained(self.make_base(), folder).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict) -> tuple[int, object]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, "Success"

    def complete(self, body: dict) -> tuple[int, object]:
        model = self.adapters.get(body["model"])
        if model is None:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > self.max_len:
            return refusal(400, f"This model's maximum context length is {self.max_len} tokens.")
        with self.lock, torch.no_grad():
            choices = [self.draw(model, body, i) for i in range(body["n"])]
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    def draw(self, model, body: dict, index: int) -> dict:
        generator = torch.Generator().manual_seed(body["seed"] + index)
        ids, logps, top, reason = [], [], [], "length"
        while len(ids) < body["max_tokens"] and reason == "length":
            logits = model(torch.tensor([body["prompt"] + ids])).logits[0, -1].float()
            hot = (logits / body["temperature"]).log_softmax(0)
            token = int(torch.multinomial(hot.exp(), 1, generator=generator))
            reported = (hot if self.processed else logits.log_softmax(0)) - self.drift
            ids.append(token)
            logps.append(float(reported[token]))
            best = reported.topk(body["logprobs"]).indices.tolist()  # behind the sampled one
            top.append({f"token {i}": float(reported[i]) for i in [token, *best]})
            if token in body["stop_token_ids"]:
                reason = "stop"
        choice = {
            "index": index, "text": "not to be read", "finish_reason": reason, "token_ids": ids,
            "logprobs": {"tokens": ["?"] * len(ids), "token_logprobs": logps, "top_logprobs": top},
        }  # fmt: skip
        return {key: value for key, value in choice.items() if key not in self.silent}

    def asked(self, path: str) -> list[dict]:
        return [body for called, body in self.calls if called == path]


def refusal(status: int, message: str) -> tuple[int, object]:
    return status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


@contextmanager
def serving(answer):
    """The address of a server whose answers are `answer(path, body) -> (status, object)`."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self, body):
            status, found = answer(self.path, body)
            raw = (found if isinstance(found, str) else json.dumps(found)).encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self):
            self.respond(None)

        def do_POST(self):
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
