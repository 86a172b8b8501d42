"""Rewards over HTTP, against servers of this test on 127.0.0.1."""

from __future__ import annotations

import datetime
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards import remote
from lowvram_grpo.rewards.registry import is_model, resolve_reward
from lowvram_grpo.rewards.runner import RewardRunner
from lowvram_grpo.rewards.signatures import check_columns, names_before_loading

ROWS = 5


@contextmanager
def serving(answer):
    """Base address of a server whose POSTs `answer(body) -> (code, headers, bytes)` answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, headers, content = answer(body)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def rewards(values):
    return 200, {}, json.dumps({"rewards": values}).encode()


def ask(*specs, columns=None, **settings):
    texts = ["x" * (i + 1) for i in range(ROWS)]
    return RewardRunner(list(specs), **settings)(["p"] * ROWS, texts, [[i] for i in range(ROWS)], columns or {}, None)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)


def test_batches_go_out_with_columns_and_none_comes_back():
    bodies = []

    def answer(body):
        bodies.append(body)
        return rewards([None if len(c) == 2 else len(c) for c in body["completions"]])

    day = datetime.date(2026, 1, 2)
    columns = {"answer": ["a"] * ROWS, "score": [float("nan")] * ROWS, "day": [day] * ROWS}
    with serving(answer) as base:
        result = ask(f"{base}/score#batch=2", columns=columns)
    assert result.per_func[:, 0].nan_to_num(-1).tolist() == [1, -1, 3, 4, 5]
    assert sorted(len(body["completions"]) for body in bodies) == [1, 2, 2]
    body = next(body for body in bodies if body["completions"][0] == "x")
    assert body == {
        "prompts": ["p", "p"], "completions": ["x", "xx"], "completion_ids": [[0], [1]], "answer": ["a", "a"],
        "score": [None, None], "day": ["2026-01-02"] * 2,
    }  # fmt: skip


def test_a_bare_list_will_do_and_servers_are_asked_at_the_same_time():
    met = threading.Barrier(2, timeout=10)

    def answer(body):
        met.wait()
        return 200, {}, b"[1, 2, 3, 4, 5]"

    with serving(answer) as one, serving(answer) as other:
        runner = RewardRunner([resolve_reward(f"{one}/first")[0], resolve_reward(f"{other}")[0]])
        assert runner.names == ["first", "127.0.0.1"]
        assert runner(["p"] * 5, ["c"] * 5, [[1]] * 5, {}).total.tolist() == [2, 4, 6, 8, 10]


def test_it_is_asked_again_while_it_is_busy():
    codes = [503, 429, 500]

    def answer(body):
        return (codes.pop(0), {"Retry-After": "0"}, b"later") if codes else rewards([1] * ROWS)

    with serving(answer) as base:
        assert ask(f"{base}/score").total.tolist() == [1] * ROWS
    assert not codes


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((422, {}, b"bad request body\nmore"), "answered 422 Unprocessable .*: bad request body."),
        ((500, {}, b"Traceback"), "answered 500 Internal Server Error: Traceback .2 tries."),
        ((302, {"Location": "http://elsewhere/"}, b""), "points to http://elsewhere/; name that address"),
        ((307, {"Location": "http://elsewhere/"}, b""), "points to http://elsewhere/; name that address"),
        ((200, {}, b"<html>"), "answered with what is no JSON: <html>"),
        ((200, {}, b'{"scores": []}'), "answered without a list of rewards .*: {.scores"),
        ((200, {}, b'{"rewards": [1]}'), f"answered with 1 rewards for {ROWS} completions"),
        ((200, {}, b'{"rewards": [1, 2, NaN, 3, 4]}'), "'score' gave nan for row 2"),
        ((200, {}, b'{"rewards": [1, 2, "3", 3, 4]}'), "'score' gave '3' for row 2"),
    ],
)
def test_bad_answers_are_named(answer, message):
    with serving(lambda body: answer) as base, pytest.raises(UserError, match=message) as caught:
        ask(f"{base}/score#retries=1")
    assert "gave" in message or f"{base}/score" in str(caught.value)


def test_nobody_there_and_no_answer():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"can't be reached at 127.0.0.1:{port}: .*refused.*2 tries"):
            ask(f"http://127.0.0.1:{port}/score#retries=1")
        taken.listen()  # and never answers
        with pytest.raises(UserError, match=r"did not answer within 0.2 s\."):
            ask(f"http://127.0.0.1:{port}/score#retries=0&timeout=0.2")
        started = time.monotonic()
        with pytest.raises(UserError, match=r"did not finish within 0.3 s"):
            ask(f"http://127.0.0.1:{port}/score", timeout=0.3)
        assert time.monotonic() - started < 5


def test_with_errors_none_a_bad_completion_costs_itself_and_silence_the_batch():
    asked = []

    def answer(body):
        asked.append(len(body["completions"]))
        return (422, {}, b"no") if "xx" in body["completions"] else rewards([1] * len(body["completions"]))

    with serving(answer) as base:
        result = ask(f"{base}/score#retries=0", errors="none")
    assert result.per_func[:, 0].isnan().tolist() == [False, True, False, False, False]
    assert asked[0] == ROWS and sorted(asked[1:]) == [1] * ROWS
    with serving(lambda body: asked.append(0) or (503, {}, b"")) as base:
        asked.clear()
        assert ask(f"{base}/score#retries=1", errors="none").per_func.isnan().all()
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http:///score", "names no host"),
        ("http://a:port/", "write http://host:port/path"),
        ("http://a/#bath=3", r"no setting 'bath' \(did you mean 'batch'"),
        ("http://a/#batch=many", "batch is 'many'; write a number"),
        ("http://a/#batch=0", "batch is '0'; write a number"),
    ],
)
def test_addresses_that_are_none(address, message):
    with pytest.raises(UserError, match=message):
        resolve_reward(address)


def test_a_column_that_is_no_json_is_named():
    with pytest.raises(UserError, match=r"the column 'image' can't be sent to the reward http://127.0.0.1:1/ as JSON"):
        ask("http://127.0.0.1:1/", columns={"image": [object()] * ROWS}, errors="none")


def test_an_address_is_no_model_and_needs_no_column():
    assert not is_model("http://localhost:8000/score:0.5")
    assert names_before_loading(["http://localhost:8000/score#batch=3"])[0] == ["score"]
    check_columns(["http://localhost:8000/score"], [])


def test_the_server_of_the_docs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(# server\.py\n.*?)```", page, re.DOTALL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "server.py").write_text(source.replace("8000", str(port)), encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(tmp_path / "server.py")], stderr=subprocess.DEVNULL)
    try:
        # It takes a moment to start; being refused is tried again.
        result = ask(f"http://127.0.0.1:{port}/score#retries=12", columns={"answer": ["xx"] * ROWS})
    finally:
        process.kill()
        process.wait()
    assert result.total.tolist() == [0, 1, 1, 1, 1]
