"""Reads target states from vLLM servers: the safetensors files that the hidden-states connector writes.

    pip install ./plugins/vllm                      # in vLLM's environment: four auxiliary layers = the residual's four paths
    HYPERDFLASH_PRE_HC_HEAD=1 vllm serve DeepSeek-V4-Flash -tp 4 --port 8000 --no-enable-chunked-prefill \\
        --speculative-config '{"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config":
            {"hf_config": {"eagle_aux_hidden_state_layer_ids": [40, 41, 42, 43]}}}' \\
        --kv-transfer-config '{"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": "/dev/shm/hidden_states"}}'

The answer to POST /v1/completions names the file in ``kv_transfer_params.hidden_states_path``. It holds ``hidden_states``
[T, 4, D] and ``token_ids`` [T]. The server writes it in place under an exclusive lock on ``<file>.lock``, so the client takes a
shared lock first, reads only a file whose header agrees with its size, and removes it. vLLM 0.26 does not start this way on
V4 (it overcounts the cache: pull request 53074).
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hyperdflash.engines.answers import BadAnswer, check_ids, residual_of
from hyperdflash.engines.http import Unavailable, get_json, post_json
from hyperdflash.engines.pool import ServerPool
from hyperdflash.engines.settings import EngineSettings

POLL_S = 0.02


@dataclass
class VLLM:
    """A producer (hyperdflash.targets.producer) of the residual before hc_head; the fields are those of SGLang's client."""

    settings: EngineSettings
    fingerprint: str
    num_paths: int
    hidden_size: int
    dtype: torch.dtype
    _models: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self._pool = ServerPool(self.settings)

    @property
    def where(self) -> str:
        return f"vllm {', '.join(self.settings.servers)}"

    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        """Sends one request per sequence. Engines choose their batches, so equal lists need not give equal last bits."""
        if layer_ids:
            raise ValueError(
                f"vLLM's files hold only the last residual, not the outputs of layers {list(layer_ids)}: capture these in "
                "process (target.engine=null), or train with conditioning=pre_hc_head"
            )
        return {None: torch.cat(self._pool.map(self._one, sequences))}

    def next_tokens(self, sequences: Sequence[Tensor]) -> list[int]:
        """Returns the engine's own greedy next token of each sequence."""

        def one(server: str, input_ids: Tensor) -> int:
            answer = self._complete(server, input_ids)
            read_finished(self._path(answer), self.settings.timeout_s)  # waits for the file in order to remove it
            return int(answer["choices"][0]["token_ids"][0])

        return self._pool.map(one, sequences)

    def check_servers(self) -> None:
        """Raises ValueError for the first server that is not reachable or serves no model."""
        for server in self.settings.servers:
            self._model(server)

    def _model(self, server: str) -> str:
        if server not in self._models:
            self._models[server] = served_model(server, self.settings.timeout_s)
        return self._models[server]

    def _complete(self, server: str, input_ids: Tensor) -> dict:
        body = {
            "model": self._model(server),
            "prompt": input_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
        }
        return post_json(f"{server}/v1/completions", body, self.settings.timeout_s)

    def _path(self, answer: dict) -> Path:
        named = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
        if not named:
            raise BadAnswer(
                "it names no file of states (start it with method extract_hidden_states and ExampleHiddenStatesConnector)"
            )
        return self.settings.states_dir / Path(named).name if self.settings.states_dir else Path(named)

    def _one(self, server: str, input_ids: Tensor) -> Tensor:
        """[T] -> [T, M, D]"""
        path = self._path(self._complete(server, input_ids))
        tensors = read_finished(path, self.settings.timeout_s)
        try:
            check_ids(tensors["token_ids"].tolist(), input_ids)
            states = residual_of(tensors["hidden_states"], len(input_ids), self.num_paths, self.hidden_size)
        except KeyError as error:
            raise BadAnswer(f"{path} has no tensor {error}") from None
        return states.to(self.dtype)


def served_model(server: str, timeout_s: float) -> str:
    """Returns the name of the model that an OpenAI-compatible server serves."""
    models = get_json(f"{server}/v1/models", timeout_s).get("data") or []
    if not models:
        raise Unavailable(f"{server} serves no model")
    return models[0]["id"]


def read_finished(path: Path, timeout_s: float) -> dict[str, Tensor]:
    """Waits for the writer, reads all tensors, and removes the file and its lock; Unavailable after ``timeout_s``."""
    lock = path.with_name(path.name + ".lock")
    deadline = time.monotonic() + timeout_s
    while not (_unlocked(lock) and is_complete(path)):
        if time.monotonic() > deadline:
            state = "is half-written" if path.exists() else "has not appeared"
            raise Unavailable(f"{path} {state} after {timeout_s:g} s (is target.states_dir the server's shared_storage_path?)")
        time.sleep(POLL_S)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    return tensors


def _unlocked(lock: Path) -> bool:
    """Tells whether the writer has released the lock, or made none (use_synchronization_lock=false)."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def is_complete(path: Path) -> bool:
    """Tells whether the file has the length that its header states: 8 bytes, the header, the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 + length:
                return False
            header = json.loads(file.read(length))
    except (FileNotFoundError, ValueError):
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(ends) and size == 8 + length + max(ends)
