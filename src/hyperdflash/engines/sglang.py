"""Reads target states from SGLang servers: POST /generate with ``return_hidden_states``.

    python -m sglang.launch_server --model-path DeepSeek-V4-Flash --tp 4 --port 30000 --enable-return-hidden-states \\
        --chunked-prefill-size -1 --disable-radix-cache

On DeepSeek-V4 the hidden states are the residual before hc_head, [T, M * D] (reported for 0.5.14; `python -m src.check_engine`
measures it). Three settings lose or mix rows, so the client refuses a server with one of them by name: chunked prefill (drops
middle chunks), mixed batches, and the prefix cache (a hit returns only the rest of the prompt).

SGLang sends 16,384 numbers per token as JSON, and the client reads 128 tokens as 43 MB in 0.45 s of one core: one process reads
about 280 tokens/s whatever ``target.concurrency`` is, and several processes share the work (cache=stream, cache.captures=16).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hyperdflash.engines.client import EngineClient
from hyperdflash.engines.servers import BadAnswer, Refused, request_json


def server_info(server: str, timeout_s: float) -> dict:
    """Returns settings and state of a server from either of the two paths that SGLang's releases use."""
    for path in ("get_server_info", "server_info"):
        try:
            return request_json(f"{server}/{path}", timeout_s)
        except Refused as error:
            refused = error
    raise ValueError(f"{refused}: is this an SGLang server?")


def check_flags(server: str, info: dict) -> None:
    """Raises ValueError, with the flag that the server needs, where its settings corrupt states."""
    chunk = info.get("chunked_prefill_size")
    no_states = not info.get("enable_return_hidden_states", True)
    for is_wrong, setting, flag in (
        (not isinstance(chunk, int) or chunk > 0, f"chunked_prefill_size={chunk}", "with --chunked-prefill-size -1"),
        (info.get("enable_mixed_chunk"), "enable_mixed_chunk=True", "without --enable-mixed-chunk"),
        (not info.get("disable_radix_cache"), "disable_radix_cache=False", "with --disable-radix-cache"),
        (no_states, "enable_return_hidden_states=False", "with --enable-return-hidden-states"),
    ):
        if is_wrong:
            raise ValueError(f"{server} runs with {setting}, which loses or mixes states: start it {flag}")


class SGLang(EngineClient):
    """The client of SGLang's native API."""

    def _check(self, server: str) -> bool:
        check_flags(server, server_info(server, self.settings.timeout_s))
        return True

    def _generate(self, server: str, input_ids: Tensor, **more: object) -> dict:
        body = {"input_ids": input_ids.tolist(), "sampling_params": {"max_new_tokens": 1, "temperature": 0}, **more}
        return request_json(f"{server}/generate", self.settings.timeout_s, body)

    def _next_token(self, server: str, input_ids: Tensor) -> int:
        return int(self._generate(server, input_ids)["output_ids"][0])

    def _residual(self, server: str, input_ids: Tensor) -> tuple[Sequence[int] | None, Tensor]:
        self.checked(server)
        meta = self._generate(server, input_ids, return_hidden_states=True).get("meta_info", {})
        if "prompt_tokens" in meta and meta["prompt_tokens"] != len(input_ids):
            raise BadAnswer(f"it ran {meta['prompt_tokens']} tokens where {len(input_ids)} were sent")
        echoed = meta.get("input_token_logprobs")  # [[log probability, id, text], ...]; only some servers send it
        return [entry[1] for entry in echoed] if echoed else None, rows_of(meta.get("hidden_states"))


def rows_of(hidden_states: object) -> Tensor:
    """Returns the prompt's rows, the first entry of ``meta_info.hidden_states``, as [T, W] fp32; later entries are decoded."""
    if not isinstance(hidden_states, list) or not hidden_states:
        raise BadAnswer("it returned no hidden_states (start it with --enable-return-hidden-states)")
    first = hidden_states[0]
    rows = first if isinstance(first, list) and first and isinstance(first[0], list) else hidden_states
    try:
        return torch.from_numpy(np.array(rows, dtype=np.float32))  # 7 times faster than torch.tensor on lists
    except (ValueError, TypeError) as error:
        raise BadAnswer(f"its hidden_states are no table of numbers ({error})") from None
