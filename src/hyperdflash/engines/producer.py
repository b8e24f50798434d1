"""Makes the producer of `target.engine`, which fills a cache from servers, once `python -m src.check_engine` has passed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hyperdflash.engines.settings import EngineSettings, require_check
from hyperdflash.engines.sglang import SGLang
from hyperdflash.engines.vllm import VLLM
from hyperdflash.targets.load import DTYPES, fingerprint, load_heads

CLIENTS = {"sglang": SGLang, "vllm": VLLM}


def make_client(target: Mapping[str, object]) -> SGLang | VLLM:
    """Returns the client of a `target` group with an engine; reads only the heads of the checkpoint at ``target.path``."""
    settings = EngineSettings.of(target)
    heads = load_heads(target["path"], str(target["dtype"]))
    return CLIENTS[settings.engine](settings, fingerprint(heads), heads.num_paths, heads.hidden_size, DTYPES[target["dtype"]])


def engine_producer(target: Mapping[str, object], checks: Path, command: str) -> SGLang | VLLM:
    """Returns the client for a capture.

    ValueError without a passed check of this engine and these weights in ``checks`` (``command`` makes it), or where the
    settings of a server corrupt states.
    """
    client = make_client(target)
    require_check(client.settings, client.fingerprint, str(target["dtype"]), checks, command)
    client.check_servers()
    return client
