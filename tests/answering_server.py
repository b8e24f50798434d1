"""A loopback server that speaks the OpenAI completions protocol and misbehaves on purpose."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hyperdflash.stable_hash import content_hash

FAULTS = ("500", "429", "stall", "garbage", "cut", "crossed", "short", "abort", "no choices", "not ids")


class AnsweringServer(ThreadingHTTPServer):
    """``answer`` maps prompt ids to answer ids; ``fault(prompt, attempt)`` names what goes wrong with a request or None;
    ``gives_ids`` False makes it a server that gives text alone. ``asked`` counts requests a prompt."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[Sequence[int]], list[int]], model: str = "m"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.model, self.says_model = answer, model, model
        self.fault: Callable[[tuple[int, ...], int], str | None] = lambda prompt, attempt: None
        self.gives_ids = True
        self.max_model_len: int | None = None
        self.delay_s = 0.0
        self.adds_tokens = 0
        self.asked: Counter[tuple[int, ...]] = Counter()
        self.bodies: list[dict] = []
        self.faults: Counter[str] = Counter()
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that went away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: AnsweringServer

    def do_GET(self):
        self._send(
            json.dumps(
                {"object": "list", "data": [{"id": self.server.model, "max_model_len": self.server.max_model_len}]}
            ).encode()
        )

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = tuple(body["prompt"])
        with server.lock:
            server.asked[prompt] += 1
            server.bodies.append(body)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            fault = server.fault(prompt, server.asked[prompt])
            server.faults[fault] += 1
        # the later a prompt comes, the sooner it may be answered
        time.sleep(server.delay_s * int(content_hash(repr(prompt))[:2], 16) / 256)
        with server.lock:
            server.busy -= 1
        self._answer(body, prompt, fault)

    def _answer(self, body: dict, prompt: tuple[int, ...], fault: str | None) -> None:
        server = self.server
        ids = server.answer(prompt)[: body["max_tokens"]]
        choice = {"index": 0, "finish_reason": "stop" if len(ids) < body["max_tokens"] else "length", "text": ""}
        usage = {"prompt_tokens": len(prompt) + server.adds_tokens, "completion_tokens": len(ids)}
        if server.gives_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": list(prompt)}
        if fault == "crossed":
            choice["prompt_token_ids"] = list(prompt[::-1])
            choice["token_ids"] = [7, 7]
            usage["completion_tokens"] = 2
        elif fault == "short":
            choice["token_ids"] = [*ids[:-2], ids[-1]]
        elif fault == "abort":
            choice |= {"finish_reason": "abort", "token_ids": ids[:1]}
            usage["completion_tokens"] = 1
        elif fault == "not ids":
            choice["token_ids"] = ["a", 10**6]
        found = {"model": server.says_model, "choices": [] if fault == "no choices" else [choice], "usage": usage}
        data = json.dumps(found).encode()
        if fault == "stall":
            time.sleep(3)
        elif fault == "garbage":
            data = b"<html>\xff busy"
        elif fault in ("500", "429", "400", "404"):
            self.send_error(int(fault), "on purpose")
            return
        self._send(data, cut=fault == "cut")

    def _send(self, data: bytes, cut: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)

    def log_message(self, *_):
        pass
