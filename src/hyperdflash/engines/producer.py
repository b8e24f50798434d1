"""Makes the producer of `target.engine`, which fills a cache from servers, once `python -m src.check_engine` has passed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hyperdflash.engines.client import EngineClient, EngineSettings
from hyperdflash.engines.sglang import SGLang
from hyperdflash.engines.vllm import VLLM
from hyperdflash.targets.load import DTYPES, fingerprint, load_heads

CLIENTS = {"sglang": SGLang, "vllm": VLLM}


def make_client(target: Mapping[str, object]) -> EngineClient:
    """Returns the client of a `target` group with an engine; reads only the heads of the checkpoint at ``target.path``."""
    settings = EngineSettings.of(target)
    heads = load_heads(target["path"], str(target["dtype"]))
    return CLIENTS[settings.engine](settings, fingerprint(heads), heads.num_paths, heads.hidden_size, DTYPES[target["dtype"]])


def stamp_path(directory: Path, engine: str, fingerprint: str, dtype: str) -> Path:
    """Returns the path of the stamp of a check of an engine, weights and dtype in ``directory``, the folder of all checks."""
    return directory / f"{engine}-{fingerprint}-{dtype}.json"


def engine_producer(target: Mapping[str, object], checks: Path, command: str) -> EngineClient:
    """Returns the client for a capture.

    ValueError unless ``checks`` has the stamp of a passed check of these weights on every server (``command`` makes it), or
    where the settings of a server corrupt states. ``target.check=skip`` prints a warning instead of looking for the stamp.
    """
    client = make_client(target)
    settings, path = client.settings, stamp_path(checks, str(target["engine"]), client.fingerprint, str(target["dtype"]))
    if settings.check == "skip":
        print(f"target.check=skip: no comparison of {settings.engine} with target {client.fingerprint}", flush=True)
    elif not path.exists():
        raise ValueError(
            f"the states of {settings.engine} were never compared with target {client.fingerprint} (no {path}): "
            f"run `{command}` first, or set target.check=skip"
        )
    else:
        stamp = json.loads(path.read_text())
        if not stamp["passed"]:
            raise ValueError(f"{path} says that {stamp['verdict']}: repair the server and run `{command}` again")
        if unknown := sorted(set(settings.servers) - set(stamp["servers"])):
            raise ValueError(f"{path} does not cover {unknown[0]}: run `{command}` again")
    client.check_servers()
    return client
