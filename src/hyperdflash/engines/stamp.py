"""The stamp that a check of an engine leaves: without a passing one, nothing is captured through it."""

from __future__ import annotations

import json
from pathlib import Path

from hyperdflash.targets.engine_settings import EngineSettings


def stamp_path(directory: Path, engine: str, fingerprint: str, dtype: str) -> Path:
    """One stamp an engine, weights and dtype in ``directory``, that of all checks, whatever cache is filled."""
    return directory / f"{engine}-{fingerprint}-{dtype}.json"


def require_check(settings: EngineSettings, fingerprint: str, dtype: str, directory: Path, command: str) -> None:
    """ValueError with ``command``, which makes the stamp in ``directory``, unless it is there, passed, and covers every server;
    said loudly if skipped."""
    if settings.check == "skip":
        print(f"target.check=skip: nobody has compared the states of {settings.engine} with {fingerprint}", flush=True)
        return
    path = stamp_path(directory, settings.engine, fingerprint, dtype)
    if not path.exists():
        raise ValueError(
            f"the states of {settings.engine} were never compared with target {fingerprint} ({dtype}; no {path}): "
            f"run `{command}` first, or set target.check=skip"
        )
    stamp = json.loads(path.read_text())
    if not stamp["passed"]:
        raise ValueError(f"{path} says that {stamp['verdict']}: mend the server and run `{command}` again")
    if unknown := sorted(set(settings.servers) - set(stamp["servers"])):
        raise ValueError(f"{unknown[0]} was not among the servers that {path} covers: run `{command}` again")
