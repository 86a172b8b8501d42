"""`--push-to-hub` on the command line, against a server of one's own that speaks the hub's protocol."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from test_errors import sentence, train


class Server(ThreadingHTTPServer):
    """Keeps commits: a list of (branch, message, {path: bytes}). `refuses` are parts of paths that get an error."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits, self.asked, self.refuses = [], [], ()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._handle()

    def do_POST(self):
        self._handle()

    def _handle(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if any(part in self.path for part in self.server.refuses):
            return self._answer({"error": "down for maintenance"}, 418)
        if self.path.endswith("/whoami-v2"):
            return self._answer({"name": "me", "type": "user", "auth": {}})
        if self.path.endswith("/repos/create"):
            name = f"me/{json.loads(body)['name']}"
            return self._answer({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._answer({"files": files})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines() if line]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
                     if line["key"] == "file"}  # fmt: skip
            self.server.commits.append((self.path.rpartition("/")[2], lines[0]["value"]["summary"], files))
            url = f"http://{self.headers['Host']}/me/x/commit/0123456789012345678901234567890123456789"
            return self._answer({"commitUrl": url, "commitOid": "0123456789012345678901234567890123456789"})
        return self._answer({})

    def _answer(self, value, code=200):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{found.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield found
    found.shutdown()
    found.server_close()


PUSHED = {"push_to_hub": "true", "hub_model_id": "policy", "hub_token": "hf_abcdefgh", "save_steps": "1",
          "log_completions": "true", "hub_always_push": "true"}  # fmt: skip


def test_an_adapter_reaches_the_hub(monkeypatch, capsys, job, server, tmp_path):
    code, out, err = train(monkeypatch, capsys, job, **PUSHED, max_steps="2")
    assert code == 0, err
    assert f"pushed to http://127.0.0.1:{server.server_port}/me/policy" in out
    messages = [message for _, message, _ in server.commits]
    assert messages == ["Training in progress, step 1", "Training in progress, step 2", "Trained for 2 steps"]
    assert {auth for path, auth in server.asked if "/commit/" in path} == {"Bearer hf_abcdefgh"}
    left = {path.name: path.read_bytes() for path in (tmp_path / "run" / "adapter").iterdir()}
    assert server.commits[-1][2] == left
    for _, _, files in server.commits:
        assert {"README.md", "adapter_model.safetensors", "tokenizer.json"} <= files.keys() <= left.keys()
        assert b"trained with GRPO" in files["README.md"]
        assert not any(b"hf_abcdefgh" in data for data in files.values())


def test_a_hub_that_goes_down_loses_no_run(monkeypatch, capsys, job, server, tmp_path):
    server.refuses = ("/commit/",)
    code, out, err = train(monkeypatch, capsys, job, **PUSHED, max_steps="2")
    assert code == 0 and out.count("nothing was pushed to the hub") == 3, err
    assert f"`hf upload me/policy {tmp_path / 'run' / 'adapter'} .`" in out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_hub_that_is_down_is_known_before_a_model_is_loaded(monkeypatch, capsys, job, server):
    server.refuses = ("/whoami-v2",)
    assert "push_to_hub can't reach the hub" in sentence(train(monkeypatch, capsys, job, **PUSHED))
