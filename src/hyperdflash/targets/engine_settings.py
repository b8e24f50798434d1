"""The keys that `target.engine=...` adds to a target (conf/target/engine/none.yaml), checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from hyperdflash.settings import one_of, positive_int, positive_number

ENGINES = ("sglang", "vllm")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """``engine`` and its ``servers`` (base URLs); ``states_dir`` where vLLM's files are seen from here, None: as the server
    names them; ``concurrency`` requests a server at a time; ``timeout_s`` of a request and of a file; ``attempts`` a sequence,
    ``backoff_s`` after the first failed one, then doubled."""

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
                "start the servers first (docstring of targets/engines)"
            )
        for name in ("concurrency", "attempts"):
            positive_int(f"target.{name}", getattr(self, name))
        for name in ("timeout_s", "backoff_s"):
            positive_number(f"target.{name}", getattr(self, name))
        if self.states_dir is not None and self.engine != "vllm":
            raise ValueError(f"target.states_dir belongs to target.engine=vllm, got target.engine={self.engine}: leave it out")

    @classmethod
    def of(cls, target: Mapping[str, object]) -> Self:
        """From the `target` group of a configuration; keys that say how to load the target are left out."""
        given = {f.name: target[f.name] for f in fields(cls) if f.name in target}
        given["servers"] = tuple(str(url).rstrip("/") for url in given.get("servers") or ())
        given["states_dir"] = Path(str(given["states_dir"])) if given.get("states_dir") is not None else None
        return cls(**given)
