"""The settings that `target.engine=...` adds to a target (conf/target/engine/none.yaml), and the stamp of a passed check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from hyperdflash.contracts import ENGINES
from hyperdflash.settings import one_of, positive_int, positive_number


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """``engine`` and its ``servers`` (base URLs), with ``concurrency`` open requests per server.

    ``states_dir`` is the folder of vLLM's files on this machine (None: the path that the server names). ``timeout_s`` bounds a
    request and the wait for a file; ``attempts`` per sequence; ``backoff_s`` waits after the first failure, then doubled.
    """

    engine: str
    servers: tuple[str, ...]
    states_dir: Path | None = None
    check: str = "required"
    concurrency: int = 4
    timeout_s: float = 600.0
    attempts: int = 4
    backoff_s: float = 1.0

    def __post_init__(self):
        one_of("target.engine", self.engine, ENGINES)
        one_of("target.check", self.check, ("required", "skip"))
        if not self.servers or not all(isinstance(s, str) and s.startswith(("http://", "https://")) for s in self.servers):
            raise ValueError(
                f"target.engine={self.engine} needs target.servers=[http://host:port,...], got {list(self.servers)}: "
                "start the servers first (docstring of hyperdflash.engines)"
            )
        for name in ("concurrency", "attempts"):
            positive_int(f"target.{name}", getattr(self, name))
        for name in ("timeout_s", "backoff_s"):
            positive_number(f"target.{name}", getattr(self, name))
        if self.states_dir is not None and self.engine != "vllm":
            raise ValueError(f"target.states_dir belongs to target.engine=vllm, got target.engine={self.engine}: leave it out")

    @classmethod
    def of(cls, target: Mapping[str, object]) -> Self:
        """Reads the `target` group of a configuration; ignores the keys that load a target."""
        given = {f.name: target[f.name] for f in fields(cls) if f.name in target}
        given["servers"] = tuple(str(url).rstrip("/") for url in given.get("servers") or ())
        given["states_dir"] = Path(str(given["states_dir"])) if given.get("states_dir") is not None else None
        return cls(**given)


def stamp_path(directory: Path, engine: str, fingerprint: str, dtype: str) -> Path:
    """Returns the path of the stamp of an engine, weights and dtype in ``directory``, the folder of all checks."""
    return directory / f"{engine}-{fingerprint}-{dtype}.json"


def require_check(settings: EngineSettings, fingerprint: str, dtype: str, directory: Path, command: str) -> None:
    """Raises ValueError unless the stamp is in ``directory``, has passed and covers every server; ``command`` makes the stamp.

    With ``check=skip`` it prints a warning instead.
    """
    if settings.check == "skip":
        print(f"target.check=skip: the states of {settings.engine} are not compared with {fingerprint}", flush=True)
        return
    path = stamp_path(directory, settings.engine, fingerprint, dtype)
    if not path.exists():
        raise ValueError(
            f"the states of {settings.engine} were never compared with target {fingerprint} ({dtype}; no {path}): "
            f"run `{command}` first, or set target.check=skip"
        )
    stamp = json.loads(path.read_text())
    if not stamp["passed"]:
        raise ValueError(f"{path} says that {stamp['verdict']}: repair the server and run `{command}` again")
    if unknown := sorted(set(settings.servers) - set(stamp["servers"])):
        raise ValueError(f"{path} does not cover {unknown[0]}: run `{command}` again")
