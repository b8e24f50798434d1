"""`target.engine` -> the producer that fills a cache from running servers, once `python -m src.check_engine` has passed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hyperdflash.engines.sglang import SGLang
from hyperdflash.engines.stamp import require_check
from hyperdflash.engines.vllm import VLLM
from hyperdflash.targets.engine_settings import EngineSettings
from hyperdflash.targets.load import DTYPES, fingerprint, load_heads

CLIENTS = {"sglang": SGLang, "vllm": VLLM}


def make_client(target: Mapping[str, object]) -> SGLang | VLLM:
    """The client of a `target` group with an engine; of the checkpoint at ``target.path`` only the heads are read."""
    settings = EngineSettings.of(target)
    heads = load_heads(target["path"], str(target["dtype"]))
    return CLIENTS[settings.engine](settings, fingerprint(heads), heads.num_paths, heads.hidden_size, DTYPES[target["dtype"]])


def engine_producer(target: Mapping[str, object], checks: Path, command: str) -> SGLang | VLLM:
    """``make_client`` for a capture: refused without a passing check of this engine and these weights below ``checks``, which
    ``command`` makes, or with a server whose settings spoil states."""
    client = make_client(target)
    require_check(client.settings, client.fingerprint, str(target["dtype"]), checks, command)
    client.check_servers()
    return client
