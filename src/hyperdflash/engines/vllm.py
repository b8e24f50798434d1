"""Reads target states from vLLM servers: the safetensors files that the hidden-states connector writes.

    pip install ./plugins/vllm                      # in vLLM's environment: four auxiliary layers = the residual's four paths
    HYPERDFLASH_PRE_HC_HEAD=1 vllm serve DeepSeek-V4-Flash -tp 4 --port 8000 --no-enable-chunked-prefill \\
        --speculative-config '{"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config":
            {"hf_config": {"eagle_aux_hidden_state_layer_ids": [40, 41, 42, 43]}}}' \\
        --kv-transfer-config '{"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": "/dev/shm/hidden_states"}}'

The answer to POST /v1/completions names the file in ``kv_transfer_params.hidden_states_path``. It holds ``hidden_states``
[T, 4, D] and ``token_ids`` [T]. The server writes it in place under an exclusive lock on ``<file>.lock``, so the client takes a
shared lock first, reads only a whole file, and removes it. vLLM 0.26 does not start this way on
V4 (it overcounts the cache: pull request 53074).
"""

import fcntl
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hyperdflash.engines.client import EngineClient
from hyperdflash.engines.servers import BadAnswer, Unavailable, request_json, served_models

POLL_S = 0.02


class VLLM(EngineClient):
    """The client of vLLM's OpenAI API and of the files that its connector writes."""

    def _check(self, server: str) -> str:
        return served_model(server, self.settings.timeout_s)

    def _files(self, server: str, input_ids: Tensor) -> tuple[dict, Path, dict[str, Tensor]]:
        """Returns the answer, the path of its file and the file's tensors; the file is gone then."""
        body = {"model": self.checked(server), "prompt": input_ids.tolist(), "max_tokens": 1, "temperature": 0}
        answer = request_json(f"{server}/v1/completions", self.settings.timeout_s, body | {"return_token_ids": True})
        path = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
        if not path:
            raise BadAnswer("it names no file of states (start it with extract_hidden_states and ExampleHiddenStatesConnector)")
        path = self.settings.states_dir / Path(path).name if self.settings.states_dir else Path(path)
        return answer, path, read_finished(path, self.settings.timeout_s)

    def _next_token(self, server: str, input_ids: Tensor) -> int:
        answer, _, _ = self._files(server, input_ids)
        return int(answer["choices"][0]["token_ids"][0])

    def _residual(self, server: str, input_ids: Tensor) -> tuple[Sequence[int], Tensor]:
        _, path, tensors = self._files(server, input_ids)
        try:
            return tensors["token_ids"].tolist(), tensors["hidden_states"]
        except KeyError as error:
            raise BadAnswer(f"{path} has no tensor {error}") from None


def served_model(server: str, timeout_s: float) -> str:
    models = served_models(f"{server}/v1", timeout_s)
    if not models:
        raise Unavailable(f"{server} serves no model")
    return next(iter(models))


def read_finished(path: Path, timeout_s: float) -> dict[str, Tensor]:
    """Waits for the writer, reads all tensors, and removes the file and its lock; Unavailable after ``timeout_s``, BadAnswer
    for a file without states, which stays.

    A file in the making does not load: safetensors compares its length with the header.
    """
    lock = path.with_name(path.name + ".lock")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() <= deadline:
        with suppress(FileNotFoundError, SafetensorError):
            if _is_unlocked(lock):
                tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
                if "hidden_states" not in tensors:
                    raise BadAnswer(f"{path} has no tensor 'hidden_states'")
                path.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
                return tensors
        time.sleep(POLL_S)
    state = "is half-written" if path.exists() else "has not appeared"
    raise Unavailable(f"{path} {state} after {timeout_s:g} s (is target.states_dir the server's shared_storage_path?)")


def _is_unlocked(lock: Path) -> bool:
    """Tells whether the writer has released the lock, or made none (use_synchronization_lock=false)."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
