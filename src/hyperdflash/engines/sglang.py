"""Target states from running SGLang servers: POST /generate with ``return_hidden_states``.

    python -m sglang.launch_server --model-path DeepSeek-V4-Flash --tp 4 --port 30000 --enable-return-hidden-states \\
        --chunked-prefill-size -1 --disable-radix-cache

On DeepSeek-V4 the hidden states are the residual before hc_head, [T, M * D] (reported for 0.5.14; `python -m src.check_engine`
finds out). Three settings would give other rows than were asked for, so a server with one of them is refused by name:
chunked prefill (middle chunks are dropped), mixed batches, and the prefix cache (a hit returns the rest of the prompt only).

SGLang documents no binary form of this answer: 16,384 numbers a token come as JSON, about 12 times slower than the server's
forward (reported). At our end 128 tokens are 43 MB and 0.45 s of one core, so one process takes in about 280 tokens/s whatever
``target.concurrency`` is: start `python -m src.capture` several times (cache.captures=16 does, for cache=stream), the processes
share the work; or take vLLM, whose files are read as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hyperdflash.engines.answers import BadAnswer, check_ids, residual_of
from hyperdflash.engines.http import Refused, get_json, post_json
from hyperdflash.engines.pool import ServerPool
from hyperdflash.targets.engine_settings import EngineSettings


def server_info(server: str, timeout_s: float) -> dict:
    """Settings and state of a server; the path was renamed, both are tried."""
    try:
        return get_json(f"{server}/get_server_info", timeout_s)
    except Refused:
        pass
    try:
        return get_json(f"{server}/server_info", timeout_s)
    except Refused as error:
        raise ValueError(f"{error}: is this an SGLang server?") from None


def check_flags(server: str, info: dict) -> None:
    """ValueError with the flag to start the server with, where its settings would spoil the states."""
    chunk = info.get("chunked_prefill_size")
    if not isinstance(chunk, int) or chunk > 0:
        _refuse(server, "cuts prompts into chunks", f"chunked_prefill_size={chunk}", "with --chunked-prefill-size -1")
    if info.get("enable_mixed_chunk"):
        _refuse(server, "mixes prefill and decoding in a batch", "enable_mixed_chunk=True", "without --enable-mixed-chunk")
    if not info.get("disable_radix_cache"):
        _refuse(server, "keeps prompts in a prefix cache", "disable_radix_cache=False", "with --disable-radix-cache")
    if not info.get("enable_return_hidden_states", True):
        _refuse(server, "returns no states", "enable_return_hidden_states=False", "with --enable-return-hidden-states")


def _refuse(server: str, what: str, setting: str, flag: str) -> None:
    raise ValueError(f"{server} {what} ({setting}), which loses or mixes up states: start it {flag}")


@dataclass
class SGLang:
    """A producer (targets.producer) of the residual before hc_head. ``num_paths`` M, ``hidden_size`` D and ``dtype`` are the
    target's; ``fingerprint`` is that of the heads beside us, which check_engine compared the servers with."""

    settings: EngineSettings
    fingerprint: str
    num_paths: int
    hidden_size: int
    dtype: torch.dtype
    _checked: set[str] = field(default_factory=set)

    def __post_init__(self):
        self._pool = ServerPool(self.settings)

    @property
    def where(self) -> str:
        return f"sglang {', '.join(self.settings.servers)}"

    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        """One request a sequence; engines pick their batches, so the same list need not give the same last bits again."""
        if layer_ids:
            raise ValueError(
                f"SGLang returns the last residual only, not the outputs of layers {list(layer_ids)}: capture these in process "
                "(target.engine=null), or train with conditioning=pre_hc_head"
            )
        return {None: torch.cat(self._pool.map(self._one, sequences))}

    def next_tokens(self, sequences: Sequence[Tensor]) -> list[int]:
        """The engine's own greedy next token after each sequence."""
        return self._pool.map(lambda server, ids: int(self._generate(server, ids)["output_ids"][0]), sequences)

    def check_servers(self) -> None:
        """Every server reachable and its flags right; ValueError naming the first that is not."""
        for server in self.settings.servers:
            self._check(server)

    def _check(self, server: str) -> None:
        if server not in self._checked:
            check_flags(server, server_info(server, self.settings.timeout_s))
            self._checked.add(server)

    def _generate(self, server: str, input_ids: Tensor, **more: object) -> dict:
        body = {"input_ids": input_ids.tolist(), "sampling_params": {"max_new_tokens": 1, "temperature": 0}, **more}
        return post_json(f"{server}/generate", body, self.settings.timeout_s)

    def _one(self, server: str, input_ids: Tensor) -> Tensor:
        """[T] -> [T, M, D]"""
        self._check(server)
        meta = self._generate(server, input_ids, return_hidden_states=True).get("meta_info", {})
        if "prompt_tokens" in meta and meta["prompt_tokens"] != len(input_ids):
            raise BadAnswer(f"it ran {meta['prompt_tokens']} tokens where {len(input_ids)} were sent")
        if echoed := meta.get("input_token_logprobs"):  # [[log probability, id, text], ...]; only some servers send it
            check_ids([entry[1] for entry in echoed], input_ids)
        states = rows_of(meta.get("hidden_states"))
        return residual_of(states, len(input_ids), self.num_paths, self.hidden_size).to(self.dtype)


def rows_of(hidden_states: object) -> Tensor:
    """``meta_info.hidden_states`` -> [T, W] fp32: the prompt's rows come as the first entry, decoded tokens' rows after it."""
    if not isinstance(hidden_states, list) or not hidden_states:
        raise BadAnswer("it gave no hidden_states (start it with --enable-return-hidden-states)")
    first = hidden_states[0]
    rows = first if isinstance(first, list) and first and isinstance(first[0], list) else hidden_states
    try:
        return torch.from_numpy(np.array(rows, dtype=np.float32))  # 7 times faster than torch.tensor on lists
    except (ValueError, TypeError) as error:
        raise BadAnswer(f"its hidden_states are no table of numbers ({error})") from None
