"""The stamp that a check of an engine leaves beside the cache: without a passing one, nothing is captured through it."""

from __future__ import annotations

import json
from pathlib import Path

from src.target.engines.settings import EngineSettings


def stamp_path(cache_directory: Path, engine: str, fingerprint: str, dtype: str) -> Path:
    """One stamp an engine, weights and dtype, beside the caches of all modes."""
    return cache_directory.parent / "engine_checks" / f"{engine}-{fingerprint}-{dtype}.json"


def require_check(settings: EngineSettings, fingerprint: str, dtype: str, cache_directory: Path) -> None:
    """ValueError with the next command unless the stamp is there, passed, and covers every server; said loudly if skipped."""
    if settings.check == "skip":
        print(f"target.check=skip: nobody has compared the states of {settings.engine} with {fingerprint}", flush=True)
        return
    servers = ",".join(settings.servers)
    command = f"python -m src.check_engine target.engine={settings.engine} target.servers=[{servers}]"
    path = stamp_path(cache_directory, settings.engine, fingerprint, dtype)
    if not path.exists():
        raise ValueError(
            f"the states of {settings.engine} were never compared with target {fingerprint} ({dtype}; no {path}): "
            f"run `{command}` with the same target first, or set target.check=skip"
        )
    stamp = json.loads(path.read_text())
    if not stamp["passed"]:
        raise ValueError(f"{path} says that {stamp['verdict']}: mend the server and run `{command}` again")
    if unknown := sorted(set(settings.servers) - set(stamp["servers"])):
        raise ValueError(f"{unknown[0]} was not among the servers that {path} covers: run `{command}` again")
