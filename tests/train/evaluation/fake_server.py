"""A server with OpenAI's completions and vLLM's /tokenize over bytes, whose answers can be worked out by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTEXT = 32


def log_probability(tokens: list[int], place: int) -> float:
    """Of the token at `place` after those before it."""
    return -((tokens[place] + 3 * tokens[place - 1]) % 17 + 1) / 8


class FakeServer:
    """`complete(prompt or messages, seed)` gives the answers; `refuse` maps a path to (status, how often)."""

    def __init__(self, complete: Callable[[Any, int], str], *, echo: bool = True) -> None:
        self.complete = complete
        self.echo = echo
        self.refuse: dict[str, tuple[int, int]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(fake.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.headers.append(self.headers["Authorization"])
                self.answer(fake.post(self.path, body))

            def answer(self, told: tuple[int, Any]) -> None:
                data = json.dumps(told[1]).encode()
                self.send_response(told[0])
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def get(self, path: str) -> tuple[int, Any]:
        return (200, {"data": [{"id": "fake"}]}) if path == "/v1/models" else (404, {})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.bodies.append(body)
        status, times = self.refuse.get(path, (0, 0))
        if times:
            self.refuse[path] = (status, times - 1)
            return status, {"error": {"message": "not now"}}
        if path == "/tokenize":
            text = body["prompt"] if "prompt" in body else "".join(f"<{m['content']}>" for m in body["messages"])
            return 200, {"tokens": list(text.encode()), "max_model_len": CONTEXT}
        if path == "/detokenize":
            return 200, {"prompt": bytes(body["tokens"]).decode(errors="replace")}
        if path == "/v1/chat/completions":
            content = self.complete(body["messages"], body["seed"])
            return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]}
        if not body.get("echo"):
            return 200, {"choices": [{"text": self.complete(body["prompt"], body["seed"])}]}
        tokens = body["prompt"]
        if not self.echo or len(tokens) > CONTEXT or body["max_tokens"] != 0:
            return 400, {"error": {"message": "echo is not supported"}}
        values = [log_probability(tokens, place) if place else None for place in range(len(tokens))]
        return 200, {"choices": [{"text": "", "logprobs": {"token_logprobs": values}}]}
