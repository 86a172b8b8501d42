"""`train --model Qwen2.5-0.5B --data ./dataset/tldr` as it stands: a hub that answers, then the cache it has left."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import make_model, make_tokenizer

MODEL, SHA = "Qwen/Qwen2.5-0.5B", "0123456789" * 4
LINE = ["train", "--model", "Qwen2.5-0.5B", "--data", "./dataset/tldr"]
SMALL = ["--max-steps", "1", "--num-generations", "2", "--max-completion-length", "2", "--cold-start", "off", "--plain"]


class _Hub(BaseHTTPRequestHandler):
    """One repository, as the hub's client asks for it."""

    folder: Path
    asked: list[str]

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        resolved, about = f"/{MODEL}/resolve/", f"/api/models/{MODEL}"
        if path.startswith(about) and "/tree/" not in path:
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            return self._send(200, json.dumps({"id": MODEL, "sha": SHA, "siblings": files}).encode(), body)
        file = self.folder / path.rsplit("/", 1)[-1]
        if path.startswith(resolved) and file.is_file():
            return self._send(200, file.read_bytes(), body)
        error = "EntryNotFound" if path.startswith((resolved, about)) else "RepoNotFound"
        return self._send(404, b"", body, {"X-Error-Code": error})

    def _send(self, code: int, content: bytes, body: bool, more: dict | None = None) -> None:
        self.send_response(code)
        about = {"Content-Length": str(len(content)), "X-Repo-Commit": SHA, **(more or {})}
        about["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    make_model().save_pretrained(tmp_path / "published")
    make_tokenizer(chat=True).save_pretrained(tmp_path / "published")
    handler = type("Hub", (_Hub,), {"folder": tmp_path / "published", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_line_trains_from_a_hub_and_then_without_it(hub, tmp_path):
    from datasets import Dataset

    posts = {"prompt": ["a b c", "d e"] * 2, "completion": ["1", "2"] * 2}
    Dataset.from_dict(posts).save_to_disk(tmp_path / "dataset" / "tldr")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home"), "no_proxy": "*",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", "from lowvram_grpo.cli.app import main; main()", *LINE, *SMALL]

    def run(name: str) -> str:
        done = subprocess.run(
            [*command, "-o", name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / name / "adapter" / "adapter_config.json").is_file()
        return " ".join((done.stdout + done.stderr).split())

    said = run("online")
    assert f"model: Qwen2.5-0.5B is {MODEL} on the hub, a base model" in said
    assert f"/{MODEL}/resolve/main/model.safetensors" in {
        path.partition("?")[0] for path in hub.RequestHandlerClass.asked
    }
    hub.shutdown()
    hub.server_close()
    said = run("offline")
    assert f"model: Qwen2.5-0.5B is {MODEL} on the hub, a base model" in said
    assert "can't be reached: only this machine's cache of it is used" in said
