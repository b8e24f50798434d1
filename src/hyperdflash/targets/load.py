"""Loads a target from its directory: all of it, its heads, or its MTP block.

Caches and checkpoints hold a fingerprint of the weights that every drafter depends on, because a drafter trained on other
weights has almost no accepted drafts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperdflash.settings import one_of, positive_int
from hyperdflash.targets.adapter import NativeMTP, TargetConfig, adapter_of
from hyperdflash.targets.heads import TargetHeads

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Settings of hyperdflash.engines that stand in the same group of a configuration.
ENGINE_KEYS = {"engine", "servers", "states_dir", "concurrency", "timeout_s", "attempts", "backoff_s"}


@dataclass(frozen=True)
class Target:
    """A frozen target: ``model`` in eval mode without gradients; ``heads`` share its tensors, or are a copy where the model is
    spread over devices; ``tokens_per_forward`` bounds the batches of a capture."""

    model: PreTrainedModel
    heads: TargetHeads
    fingerprint: str
    path: Path
    dtype: str
    experts: str
    tokens_per_forward: int | None = None

    @cached_property
    def mtp(self) -> NativeMTP:
        """The native MTP block, read from ``path`` on first use; ValueError where the checkpoint has none."""
        return load_mtp(self.path, experts=self.experts, dtype=self.dtype)


def fingerprint(heads: TargetHeads) -> str:
    """Returns 16 hexadecimal digits of the hash of embedding, LM head, final norm and hc_head, rounded to bf16 (which every
    shipped format shares), and of the layers' settings, so that the heads suffice. The two tables are read once per ``heads``.
    """
    tables = (heads.embed_tokens.weight, heads.lm_head.weight)
    settings = repr(adapter_of(heads.config.model_type).layer_settings(heads.config))
    state = (settings, *((table.data_ptr(), table._version) for table in tables))
    before, digest = _of_tables.get(heads, (None, None))
    if before != state:
        digest = _add(hashlib.sha256(settings.encode()), tables)
        _of_tables[heads] = state, digest
    return _add(digest.copy(), (heads.norm.weight, *heads.hc_head.parameters())).hexdigest()[:16]


# heads -> (settings and address of its tables, digest of both)
_of_tables: WeakKeyDictionary[TargetHeads, tuple[tuple, hashlib._Hash]] = WeakKeyDictionary()


def _add(digest: hashlib._Hash, tensors: Iterable[Tensor]) -> hashlib._Hash:
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy())
    return digest


def read_config(path: str | Path) -> TargetConfig:
    """Reads config.json of a target directory in milliseconds; ValueError with the next command where there is none."""
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(
            f"target.path={path} has no config.json: run `python -m src.pretrain` to make the tiny target, "
            "or give target.path=<directory of a DeepSeek-V4 checkpoint>"
        )
    model_type = json.loads((path / "config.json").read_text()).get("model_type")
    return adapter_of(model_type, f"target.path={path}").read_config(path)


def load_heads(path: str | Path, dtype: str = "fp32") -> TargetHeads:
    """Loads embedding, collapse, norm and LM head from the shards that hold them; a table in bf16 stays in bf16."""
    config = read_config(path)
    with torch.device("meta"):
        heads = TargetHeads(config, dtype=DTYPES[dtype])
    heads.load_state_dict(adapter_of(config.model_type).head_state(Path(path), DTYPES[dtype]), assign=True)
    return heads.requires_grad_(False).eval()


def load_mtp(path: str | Path, *, experts: str, dtype: str = "fp32") -> NativeMTP:
    """Loads the native MTP block, frozen; ValueError where the checkpoint has none."""
    config = read_config(path)
    mtp = adapter_of(config.model_type).load_mtp(Path(path), config, experts=experts, dtype=DTYPES[dtype])
    return mtp.requires_grad_(False).eval()


def check_mtp(path: str | Path) -> None:
    """Raises ValueError where the checkpoint has no native MTP block; reads no weight."""
    adapter_of(read_config(path).model_type).check_mtp(Path(path))


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
    """Loads the whole target, frozen, and dequantizes quantized weights to ``dtype`` on reading.

    ``device_map`` spreads it over devices (the adapter defines the values); modules on "disk" are in ``offload_folder``, fp32
    only. ``tokens_per_forward`` is the largest batch of a capture, padding included (None: no limit). ``mask_token_id`` belongs
    to the drafter and is only checked here; ``engine`` takes the keys of conf/target/engine/none.yaml for hyperdflash.engines.
    """
    if unknown := engine.keys() - ENGINE_KEYS:
        raise ValueError(f"target.{min(unknown)} is no setting of a target: see conf/target and conf/target/engine")
    one_of("target.dtype", dtype, tuple(DTYPES))
    if tokens_per_forward is not None:
        positive_int("target.tokens_per_forward", tokens_per_forward)
    config = read_config(path)
    if mask_token_id is not None and not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(f"target.mask_token_id must be in 0..{config.vocab_size - 1}, got {mask_token_id}")
    adapter = adapter_of(config.model_type)
    how = {"dtype": DTYPES[dtype], "attention": attention, "experts": experts}
    model = adapter.load_model(Path(path), config, **how, device_map=device_map, offload_folder=offload_folder)
    model.requires_grad_(False).eval()
    heads = load_heads(path, dtype).to(adapter.input_device(model)) if adapter.is_spread(model) else TargetHeads.of(model)
    return Target(model, heads, fingerprint(heads), Path(path), dtype, experts, tokens_per_forward)
