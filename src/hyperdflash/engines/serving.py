"""Requests and times one answer of a running engine, and reads its server's counters of speculation.

    first token     from the request to the first chunk: includes prefill, queue and network
    decoding        from the first chunk to the last, ``len(ids) - len(first chunk)`` tokens
    rounds          verification steps: vLLM's counters before and after the request (the server must have no other client),
                    SGLang's ``meta_info`` of the answer. Engines also count accepted drafts behind the end of the text

Metric names: vLLM ``vllm:spec_decode_num_drafts_total``, ``..._num_accepted_tokens_per_pos_total{position}``; SGLang
``spec_verify_ct`` and ``spec_accept_histogram`` (entry j: steps that accepted j drafts), in newer releases also named
``spec_correct_drafts_histogram``.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hyperdflash.engines.servers import Unavailable, request_text, stream_json
from hyperdflash.engines.vllm import served_model

SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>[^}]*)\})?[ \t]+(?P<value>\S+)", re.MULTILINE)
POSITION = re.compile(r'position="(\d+)"')
SETTLE_S = 2.0  # vLLM's counters can lag behind the last chunk
Chunk = tuple[list[int], str | None]  # new token ids, and the reason of the end in the last chunk


@dataclass(frozen=True)
class Served:
    """One answer: token ``ids``; ``after_first`` tokens arrived behind the first chunk, in ``decode_s`` seconds. ``rounds``
    counts verification steps (0 without speculation) and ``accepted`` their accepted drafts; entry k of ``survived`` counts the
    rounds that accepted more than k drafts."""

    ids: list[int]
    ended_by: Literal["stop", "length"]
    first_s: float
    decode_s: float
    after_first: int
    rounds: int = 0
    accepted: int = 0
    survived: tuple[int, ...] = ()


def ask(
    engine: str,
    server: str,
    prompt_ids: Sequence[int],
    timeout_s: float,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float,
    top_p: float,
    seed: int,
) -> Served:
    """Streams one answer from a server of ``engine`` (sglang or vllm); ``temperature`` 0 is greedy."""
    sampling = {"temperature": temperature, "top_p": top_p, "stop_token_ids": list(stop_ids)}
    if engine == "sglang":  # takes no seed per request: the server draws at temperature > 0
        body = {"input_ids": list(prompt_ids), "sampling_params": {"max_new_tokens": max_new_tokens, **sampling}}
        return _ask_sglang(server, {"stream": True, **body}, timeout_s)
    body = {"model": served_model(server, timeout_s), "prompt": list(prompt_ids), "return_token_ids": True, **sampling}
    return _ask_vllm(server, {"stream": True, "max_tokens": max_new_tokens, "seed": seed, **body}, timeout_s)


def _ask_sglang(server: str, body: dict, timeout_s: float) -> Served:
    """Streams POST /generate."""
    meta: dict = {}

    def chunks() -> Iterator[Chunk]:
        nonlocal meta
        so_far = 0
        for event in stream_json(f"{server}/generate", body, timeout_s):
            meta, ids = event.get("meta_info", {}), event.get("output_ids")
            if ids is None:
                raise Unavailable(f"{server} returned no output_ids")
            new = ids[so_far:] if len(ids) == meta.get("completion_tokens") else ids  # newer servers can send increments
            so_far += len(new)
            yield new, (meta.get("finish_reason") or {}).get("type")

    served = _timed(chunks(), server)
    rounds = int(meta.get("spec_verify_ct") or 0)
    histogram = meta.get("spec_accept_histogram") or meta.get("spec_correct_drafts_histogram")
    if not rounds:
        return served
    if not histogram:
        raise ValueError(f"{server} drafts and reports no spec_accept_histogram: use an SGLang that counts accepted drafts")
    survived = tuple(sum(histogram[k:]) for k in range(1, len(histogram)))
    return replace(served, rounds=rounds, accepted=sum(survived), survived=survived)


def _ask_vllm(server: str, body: dict, timeout_s: float) -> Served:
    """Streams POST /v1/completions between two readings of /metrics."""

    def chunks() -> Iterator[Chunk]:
        for event in stream_json(f"{server}/v1/completions", body, timeout_s):
            for choice in event.get("choices", ()):
                if choice.get("token_ids") is None:
                    raise Unavailable(f"{server} returned no token_ids: use a vLLM that supports return_token_ids")
                yield choice["token_ids"], choice.get("finish_reason")

    before = counters(server, timeout_s)
    served = _timed(chunks(), server)
    emitted, deadline = served.after_first, time.monotonic() + SETTLE_S
    while True:
        after = counters(server, timeout_s)
        drafts = after["drafts"] - before["drafts"]
        survived = tuple(b - a for a, b in zip(before["accepted"], after["accepted"], strict=True))
        if not survived:
            return served
        if emitted <= drafts + sum(survived) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    if drafts + sum(survived) > emitted + 2 * (len(survived) + 1):  # a last round can pass the end of the text
        raise ValueError(
            f"{server} counted {drafts} drafts with {sum(survived)} accepted tokens while it answered {emitted}: another "
            "client uses it; acceptance comes from its counters, so reserve the server for this evaluation and run it again"
        )
    plain = max(emitted - drafts - sum(survived), 0)  # steps without a draft gain one token each
    return replace(served, rounds=drafts + plain, accepted=sum(survived), survived=survived)


def counters(server: str, timeout_s: float) -> dict:
    """Returns vLLM's counters, summed over engines: ``drafts``, and ``accepted`` per slot ([] without speculation)."""
    drafts, accepted = 0.0, Counter()
    for found in SAMPLE.finditer(request_text(f"{server}/metrics", timeout_s).decode()):
        if found["name"] == "vllm:spec_decode_num_drafts_total":
            drafts += float(found["value"])
        elif found["name"] == "vllm:spec_decode_num_accepted_tokens_per_pos_total":
            accepted[int(POSITION.search(found["labels"])[1])] += float(found["value"])
    return {"drafts": int(drafts), "accepted": [int(accepted[i]) for i in sorted(accepted)]}


def _timed(chunks: Iterable[Chunk], server: str) -> Served:
    """Receives an answer and measures the seconds to its first chunk and from there to its last token."""
    started = first_at = last_at = time.perf_counter()
    ids: list[int] = []
    first, reason = 0, None
    for new, finished in chunks:
        if new:
            last_at = time.perf_counter()
            if not ids:
                first, first_at = len(new), last_at
            ids += new
        reason = finished or reason
    if not ids or reason not in ("stop", "length"):
        raise Unavailable(f"{server} broke off after {len(ids)} tokens (finish reason {reason})")
    return Served(ids, reason, first_at - started, last_at - first_at, len(ids) - first)
