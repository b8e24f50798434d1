"""Load a target from its directory: whole, its heads alone, or its MTP block alone.

A fingerprint of the weights that every drafter depends on goes into caches and checkpoints, because a drafter trained on other
weights accepts next to nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperdflash.settings import positive_int
from hyperdflash.targets.adapter import NativeMTP, TargetConfig, adapter_of
from hyperdflash.targets.engine_settings import EngineSettings
from hyperdflash.targets.heads import TargetHeads

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """A frozen target: ``model`` in eval mode without gradients, ``heads`` its own tensors, or a copy of them where the model
    is spread over devices; ``mtp`` is read from ``path`` on first use; ``tokens_per_forward`` bounds a capture's batches."""

    model: PreTrainedModel
    heads: TargetHeads
    fingerprint: str
    path: Path
    dtype: str
    experts: str
    tokens_per_forward: int | None = None

    @cached_property
    def mtp(self) -> NativeMTP:
        """The native MTP block; ValueError where the checkpoint has none."""
        return load_mtp(self.path, experts=self.experts, dtype=self.dtype)


def fingerprint(heads: TargetHeads) -> str:
    """16 hex digits over embedding, LM head, final norm and hc_head, rounded to bf16 (what every shipped form has in common),
    and over the settings of the layers, however config.json spells them.

    Layers that were trained without moving any of these would go unnoticed: the heads must give it without the other shards.
    The two tables are read once for each ``heads``.
    """
    tables = (heads.embed_tokens.weight, heads.lm_head.weight)
    settings = repr(adapter_of(heads.config.model_type).layer_settings(heads.config))
    state = (settings, *((table.data_ptr(), table._version) for table in tables))
    before, digest = _of_tables.get(heads, (None, None))
    if before != state:
        digest = _add(hashlib.sha256(settings.encode()), tables)
        _of_tables[heads] = state, digest
    return _add(digest.copy(), (heads.norm.weight, *heads.hc_head.parameters())).hexdigest()[:16]


# heads -> (settings and place of its tables, digest of both)
_of_tables: WeakKeyDictionary[TargetHeads, tuple[tuple, hashlib._Hash]] = WeakKeyDictionary()


def _add(digest: hashlib._Hash, tensors: Iterable[Tensor]) -> hashlib._Hash:
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy())
    return digest


def read_config(path: str | Path) -> TargetConfig:
    """config.json of a target directory; ValueError with the next command where there is none. Milliseconds."""
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(
            f"target.path={path} has no config.json: run `python -m src.pretrain` to make the tiny target, "
            "or give target.path=<directory of a DeepSeek-V4 checkpoint>"
        )
    model_type = json.loads((path / "config.json").read_text()).get("model_type")
    return adapter_of(model_type, f"target.path={path}").read_config(path)


def load_heads(path: str | Path, dtype: str = "fp32") -> TargetHeads:
    """Embedding, collapse, norm and LM head alone, read from the shards that hold them: what training and replay need once
    the states are cached. The two tables stay in bf16 where the checkpoint has them so."""
    config = read_config(path)
    with torch.device("meta"):
        heads = TargetHeads(config, dtype=DTYPES[dtype])
    heads.load_state_dict(adapter_of(config.model_type).head_state(Path(path), DTYPES[dtype]), assign=True)
    return heads.requires_grad_(False).eval()


def load_mtp(path: str | Path, *, experts: str, dtype: str = "fp32") -> NativeMTP:
    """The native MTP block alone, frozen; ValueError where the checkpoint has none."""
    config = read_config(path)
    adapter = adapter_of(config.model_type)
    if "mtp" not in adapter.SUPPORTS:
        raise ValueError(f"a {config.model_type} target has no native MTP block, got target.path={path}: leave MTP methods out")
    return adapter.load_mtp(Path(path), config, experts=experts, dtype=DTYPES[dtype]).requires_grad_(False).eval()


def load_target(
    *,
    path: str | Path,
    dtype: str,
    attention: str,
    experts: str,
    mask_token_id: int | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    offload_folder: str | Path | None = None,
    tokens_per_forward: int | None = None,
    **engine: object,
) -> Target:
    """The whole target, frozen; quantized weights are dequantized to ``dtype`` while they are read.

    ``device_map`` spreads it over devices, as the adapter takes it; what it places on "disk" lies in ``offload_folder``, in
    fp32 only. ``tokens_per_forward`` is the largest batch of a capture, padding included (None: no limit). ``mask_token_id``
    belongs to the drafter and is only checked here; ``engine`` takes the keys of conf/target/engine/none.yaml, which belong to
    hyperdflash.engines.
    """
    if unknown := engine.keys() - {field.name for field in fields(EngineSettings)}:
        raise ValueError(f"target.{min(unknown)} is no setting of a target: see conf/target and conf/target/engine")
    if dtype not in DTYPES:
        raise ValueError(f"target.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if tokens_per_forward is not None:
        positive_int("target.tokens_per_forward", tokens_per_forward)
    config = read_config(path)
    if mask_token_id is not None and not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(f"target.mask_token_id must be in 0..{config.vocab_size - 1}, got {mask_token_id}")
    adapter = adapter_of(config.model_type)
    model = adapter.load_model(
        Path(path),
        config,
        dtype=DTYPES[dtype],
        attention=attention,
        experts=experts,
        device_map=device_map,
        offload_folder=offload_folder,
    )
    model.requires_grad_(False).eval()
    heads = load_heads(path, dtype).to(adapter.input_device(model)) if adapter.is_spread(model) else TargetHeads.of(model)
    return Target(model, heads, fingerprint(heads), Path(path), dtype, experts, tokens_per_forward)
