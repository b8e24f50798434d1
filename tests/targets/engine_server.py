"""Serving engines over loopback: a tiny target behind SGLang's and vLLM's API, with faults on demand.

    with SGLangServer(target) as server:      server.url, server.requests (paths), server.faults (a list, used up in order)
        server.faults += ["500", "stall", ...]

A fault spoils one answer: ``500``, ``429``, ``400`` (status), ``stall`` (no answer for ``stall_s``), ``hang up``, ``no json``,
``short`` (a row lacks), ``nan``, ``huge``, ``zero``, ``wide`` / ``collapsed`` (width), ``other ids`` (the echoed tokens are
permuted) and ``half`` (vLLM: a file that is never finished). ``spoil`` changes the states of every answer.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from hyperdflash.decoding.loop import FirstToken, speculate
from hyperdflash.drafting.proposer import Autoregressive, Proposer
from hyperdflash.targets.load import Target
from hyperdflash.targets.producer import InProcess
from hyperdflash.targets.session import TargetSession

FORWARD = threading.Lock()  # servers share a target here, and it is tapped by one forward at a time
STATES_FAULTS: dict[str, Callable[[Tensor], Tensor]] = {  # [T, W] -> what goes out
    "short": lambda rows: rows[:-1],
    "nan": lambda rows: rows.masked_fill(torch.arange(len(rows))[:, None] == 1, float("nan")),
    "huge": lambda rows: rows * 1e9,
    "zero": lambda rows: rows * 0,
    "wide": lambda rows: torch.cat([rows, rows], dim=1),
    "collapsed": lambda rows: rows[:, : rows.shape[1] // 4],
}


class EngineServer:
    """One engine on a free port of the loopback interface; forwards are serialised, as on one machine."""

    def __init__(self, target: Target, *, drafter: Proposer | None = None, stop_ids: tuple[int, ...] = ()):
        self.target, self.drafter, self.stop_ids = target, drafter or Autoregressive(), set(stop_ids)
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.bodies: list[dict] = []
        self.spoil: Callable[[Tensor], Tensor] = lambda states: states
        self.stall_s = 1.0
        self.busy = threading.Lock()

    def __enter__(self):
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                engine.requests.append(self.path)
                self.answer(engine.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                engine.requests.append(self.path)
                engine.bodies.append(body)
                fault = engine.faults.pop(0) if engine.faults else None
                if fault in ("400", "429", "500"):
                    return self.answer(f"it is {fault}", int(fault))
                if fault == "stall":
                    time.sleep(engine.stall_s)
                if fault == "hang up":
                    return self.connection.close()
                if fault == "no json":
                    return self.answer("<html>busy</html>")
                if body.get("stream"):
                    self.send_response(200)
                    self.end_headers()
                    for event in engine.stream(body):
                        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                        self.wfile.flush()
                    return self.wfile.write(b"data: [DONE]\n\n")
                self.answer(engine.post(body, fault))

            def answer(self, content: dict | str | None, status: int = 200):
                if content is None:
                    status, content = 404, "not found"
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def get(self, path: str) -> dict | str | None:
        raise NotImplementedError

    def post(self, body: dict, fault: str | None) -> dict:
        raise NotImplementedError

    def stream(self, body: dict) -> Iterator[dict]:
        raise NotImplementedError

    @torch.inference_mode()
    def states_and_next(self, input_ids: list[int]) -> tuple[Tensor, int]:
        """([T, M, D], the greedy next token)."""
        with self.busy, FORWARD:
            states = InProcess(self.target).states([torch.tensor(input_ids)])[None]
        heads = self.target.heads
        return self.spoil(states), int(heads.logits(heads.collapse(states[None, -1:]))[0, 0].argmax())

    def rounds(self, prompt_ids: list[int], max_new_tokens: int) -> Iterator[tuple[list[int], int | None, int]]:
        """(new tokens, drafts accepted, drafts tried) a step; the prefill's token first, with None accepted."""
        with self.busy, TargetSession(self.target.model, self.drafter.layer_ids) as session:
            for event in speculate(session, self.drafter, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=self.stop_ids):
                if isinstance(event, FirstToken):
                    yield [event.token_id], None, 0
                else:
                    yield list(event.emitted), event.accepted, len(event.drafted)

    def ended_by(self, ids: list[int]) -> str:
        return "stop" if ids and ids[-1] in self.stop_ids else "length"


def rows_with(states: Tensor, fault: str | None) -> Tensor:
    """[T, M, D] -> [T, W], spoiled."""
    return STATES_FAULTS.get(fault, lambda rows: rows)(states.flatten(1))


class SGLangServer(EngineServer):
    """/generate and /get_server_info; ``info`` are the server's settings."""

    def __init__(self, *arguments, echo: bool = False, histogram: bool = True, **keywords):
        super().__init__(*arguments, **keywords)
        self.echo, self.histogram, self.info_path = echo, histogram, "/get_server_info"
        self.info = {
            "chunked_prefill_size": -1,
            "enable_mixed_chunk": False,
            "disable_radix_cache": True,
            "enable_return_hidden_states": True,
            "speculative_num_steps": self.drafter.num_slots or None,
            "internal_states": [{"avg_spec_accept_length": 1.0}],
        }

    def get(self, path):
        return self.info if path == self.info_path else None

    def post(self, body, fault):
        ids = body["input_ids"]
        states, token = self.states_and_next(ids)
        meta = {"prompt_tokens": len(ids), "completion_tokens": 1}
        if body.get("return_hidden_states"):
            meta["hidden_states"] = [rows_with(states, fault).tolist()]
        if self.echo:
            echoed = ids[::-1] if fault == "other ids" else ids
            meta["input_token_logprobs"] = [[None, i, None] for i in echoed]
        return {"output_ids": [token], "meta_info": meta}

    def stream(self, body):
        sampling = body["sampling_params"]
        ids, verified, histogram, correct = [], 0, [0] * (self.drafter.num_slots + 1), 0
        for new, accepted, _ in self.rounds(body["input_ids"], sampling["max_new_tokens"]):
            ids += new
            meta = {"completion_tokens": len(ids), "prompt_tokens": len(body["input_ids"]), "finish_reason": None}
            if accepted is not None:
                verified, correct = verified + 1, correct + accepted
                histogram[accepted] += 1
            if self.drafter.num_slots:
                meta |= {"spec_verify_ct": verified, "spec_accept_token_num": correct}
                if self.histogram:
                    meta["spec_accept_histogram"] = list(histogram)
            yield {"output_ids": list(ids), "meta_info": meta}
        yield {"output_ids": list(ids), "meta_info": {**meta, "finish_reason": {"type": self.ended_by(ids)}}}


class VLLMServer(EngineServer):
    """/v1/completions, /v1/models and /metrics; its connector writes ``folder``/<request>.safetensors in place under a lock."""

    def __init__(self, *arguments, folder: Path, write_s: float = 0.0, **keywords):
        super().__init__(*arguments, **keywords)
        self.folder, self.write_s, self.count = folder, write_s, 0
        self.drafts, self.drafted = 0, 0
        self.accepted = [0] * self.drafter.num_slots

    def get(self, path):
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "tiny-v4"}]}
        if path == "/metrics":
            labels = 'engine="0",model_name="tiny-v4"'
            lines = [
                "# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.",
                f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(self.drafts)}",
                f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.78e+09",
                f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} {float(self.drafted)}",
                f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} {float(sum(self.accepted))}",
            ]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{i}"}} {float(n)}'
                for i, n in enumerate(self.accepted)
            ]
            return "\n".join(lines if self.accepted else lines[:1]) + "\n"
        return None

    def post(self, body, fault):
        assert body["model"] == "tiny-v4"
        ids = body["prompt"]
        states, token = self.states_and_next(ids)
        self.count += 1
        path = self.folder / f"cmpl-{self.http.server_port}-{self.count}-0.safetensors"
        rows = rows_with(states, fault)
        paths = states.shape[1] if fault != "collapsed" else 1
        written = {
            "hidden_states": rows.view(len(rows), paths, -1).contiguous(),
            "token_ids": torch.tensor(ids[::-1] if fault == "other ids" else ids),
        }
        locked = threading.Event()
        threading.Thread(target=self.write, args=(path, written, fault, locked), daemon=True).start()
        locked.wait()
        return {
            "choices": [{"text": "", "token_ids": [token], "finish_reason": "length"}],
            "kv_transfer_params": {"hidden_states_path": str(path)},
        }

    def write(self, path: Path, tensors: dict[str, Tensor], fault: str | None, locked: threading.Event) -> None:
        lock = path.with_name(path.name + ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        locked.set()
        if self.write_s or fault == "half":  # a reader that does not wait finds half a file
            whole = save(tensors)
            path.write_bytes(whole[: len(whole) // 2])
            time.sleep(self.write_s)
        if fault != "half":
            save_file(tensors, path)
        lock.close()

    def stream(self, body):
        ids: list[int] = []
        for new, accepted, tried in self.rounds(body["prompt"], body["max_tokens"]):
            ids += new
            if tried:
                self.drafts, self.drafted = self.drafts + 1, self.drafted + tried
                for position in range(accepted):
                    self.accepted[position] += 1
            yield {"choices": [{"text": "", "token_ids": new, "finish_reason": None}]}
        yield {"choices": [{"text": "", "token_ids": [], "finish_reason": self.ended_by(ids)}]}
