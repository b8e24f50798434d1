"""What the clients of serving engines share: the options of ``target.engine``, the pool of servers, checks of every answer.
Shapes: see contracts.py. The pool requests a failed answer again, from another server if there is one, and never caches it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from hyperdflash.contracts import ENGINES
from hyperdflash.engines.servers import BadAnswer, ServerPool, Servers
from hyperdflash.settings import one_of

# Root mean square of a token's residual. V4's first tokens are large; the bounds only catch states that are no residual.
RMS_RANGE = (1e-6, 1e6)


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Servers):
    """``engine`` and its servers (conf/target/engine/none.yaml). ``states_dir`` is the folder of vLLM's files here (None: the
    server's path). ``timeout_s`` also bounds the wait for a file."""

    engine: str
    states_dir: Path | None = None
    wanted: ClassVar[str] = "target.engine needs target.servers=[http://host:port,...]"
    prefix: ClassVar[str] = "target."

    def __post_init__(self):
        one_of("target.engine", self.engine, ENGINES)
        super().__post_init__()
        if self.states_dir is not None and self.engine != "vllm":
            raise ValueError(f"target.states_dir belongs to target.engine=vllm, got target.engine={self.engine}: leave it out")

    @classmethod
    def of(cls, target: Mapping[str, object]) -> Self:
        """Reads the `target` group of a configuration; ignores the keys that load a target."""
        given = {f.name: target[f.name] for f in fields(cls) if f.name in target}
        given["servers"] = tuple(str(url).rstrip("/") for url in given.get("servers") or ())
        given["states_dir"] = Path(str(given["states_dir"])) if given.get("states_dir") is not None else None
        return cls(**given)


@dataclass
class EngineClient:
    """A producer (hyperdflash.targets.producer) of the residual before hc_head.

    ``num_paths`` M, ``hidden_size`` D and ``dtype`` are the target's; ``fingerprint`` is that of the local heads, which
    checks/engine_states.py compares with the servers. A subclass speaks one engine's protocol by three methods:

        _check(server)                  what requests need to know of a server; ValueError where it cannot serve states
        _residual(server, input_ids)    the ids that the engine reports (or None), its states [T, M * D] or [T, M, D]
        _next_token(server, input_ids)  the engine's own greedy next token
    """

    settings: EngineSettings
    fingerprint: str
    num_paths: int
    hidden_size: int
    dtype: torch.dtype

    def __post_init__(self):
        self._pool = ServerPool(self.settings)
        self._known: dict[str, object] = {}  # by server, what `_check` returned

    @property
    def where(self) -> str:
        return f"{self.settings.engine} {', '.join(self.settings.servers)}"

    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        """Sends one request per sequence. Engines choose their batches, so equal lists need not give equal last bits."""
        if layer_ids:
            raise ValueError(
                f"{self.settings.engine} returns only the last residual, not the outputs of layers {list(layer_ids)}: capture "
                "these in process (target.engine=null), or train with conditioning=pre_hc_head"
            )
        return {None: torch.cat(self._pool.map(self._one, sequences))}

    def next_tokens(self, sequences: Sequence[Tensor]) -> list[int]:
        return self._pool.map(self._next_token, sequences)

    def checked(self, server: str) -> object:
        """Returns what `_check` found; ValueError for a server that is not reachable or not set up for states."""
        if server not in self._known:
            self._known[server] = self._check(server)
        return self._known[server]

    def _one(self, server: str, input_ids: Tensor) -> Tensor:
        """[T] -> [T, M, D]"""
        echoed, states = self._residual(server, input_ids)
        if echoed is not None:
            check_ids(echoed, input_ids)
        return residual_of(states, len(input_ids), self.num_paths, self.hidden_size).to(self.dtype)


def check_ids(echoed: Sequence[int], sequence: Tensor) -> None:
    """Compares the token ids that an engine reports with the request's; BadAnswer where they differ."""
    sent = sequence.tolist()
    if list(echoed) != sent:
        pairs = enumerate(zip(echoed, sent, strict=False))
        wrong = next((i for i, (a, b) in pairs if a != b), min(len(echoed), len(sent)))
        raise BadAnswer(f"it ran other tokens than were sent, first at position {wrong}")


def residual_of(states: Tensor, num_tokens: int, num_paths: int, hidden_size: int) -> Tensor:
    """Returns received states [T, M * D] or [T, M, D] as [T, M, D]; BadAnswer where they cannot be the residual."""
    width = num_paths * hidden_size
    if len(states) != num_tokens:
        raise BadAnswer(
            f"it returned states of {len(states)} tokens where {num_tokens} were sent "
            "(prefix cache or chunked prefill drop rows: start the server without them)"
        )
    if states.shape[1:] not in ((width,), (num_paths, hidden_size)):
        raise BadAnswer(
            f"it returned states of shape {list(states.shape[1:])} per token, wanted {num_paths} paths x {hidden_size}: "
            f"the residual before hc_head, {width} numbers per token, not a normed, averaged or collapsed state"
        )
    if not bool(torch.isfinite(states).all()):
        row = int((~torch.isfinite(states).flatten(1).all(dim=1)).nonzero()[0])
        raise BadAnswer(f"it returned NaN or infinity, first at position {row}")
    rms = states.float().flatten(1).square().mean(dim=1).sqrt()
    low, high = RMS_RANGE
    for row in ((rms < low) | (rms > high)).nonzero().flatten().tolist()[:1]:
        raise BadAnswer(
            f"it returned a state of size {rms[row]:.1e} (root mean square) at position {row}, wanted {low:g} to {high:g}"
        )
    return states.reshape(num_tokens, num_paths, hidden_size)
