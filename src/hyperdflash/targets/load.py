"""Loads a target from its directory: all of it, its heads, or its MTP block. Caches and checkpoints hold a fingerprint of the
weights that every drafter depends on, because a drafter trained on other weights has almost no accepted drafts."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from xxhash import xxh3_64_intdigest

from hyperdflash.files import REFETCH, read_json, reading, runs_dir
from hyperdflash.leases import exclusive
from hyperdflash.record import write_json
from hyperdflash.settings import one_of, positive_int
from hyperdflash.targets.adapter import NativeMTP, TargetConfig, adapter_of
from hyperdflash.targets.heads import TargetHeads

KEPT_BYTES = 2**30  # size of a checkpoint's weights from which their digest is kept
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


def fingerprint(heads: TargetHeads, keep: bool = False) -> str:
    """Returns 16 hexadecimal digits that the target's weights and settings decide, the same for every layout and format of a
    checkpoint: the hash of embedding, LM head, final norm and hc_head, rounded to bf16 (which every shipped format shares), the
    layers' settings and `layers_digest`. The two tables are read once per ``heads``. ``keep`` lets the heads suffice later.
    """
    tables = (heads.embed_tokens.weight, heads.lm_head.weight)
    settings = repr(adapter_of(heads.config.model_type).layer_settings(heads.config))
    state = (settings, *((table.data_ptr(), table._version) for table in tables))
    before, digest = _of_tables.get(heads, (None, None))
    if before != state:
        digest = _add(hashlib.sha256(settings.encode()), tables)
        _of_tables[heads] = state, digest
    digest = _add(digest.copy(), (heads.norm.weight, *heads.hc_head.parameters()))
    digest.update(heads.layers_digest(digest.hexdigest()[:16], keep).encode())
    return digest.hexdigest()[:16]


# heads -> (settings and address of its tables, digest of both)
_of_tables: WeakKeyDictionary[TargetHeads, tuple] = WeakKeyDictionary()


def _add(digest: "hashlib._Hash", tensors: Iterable[Tensor]) -> "hashlib._Hash":
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy())
    return digest


def layers_digest(path: str | Path, heads: str, keep: bool) -> str:
    """Returns 16 hexadecimal digits over the layers' weights of the checkpoint in ``path``, whatever their layout and format.

    It reads vectors whole and the first 512 columns of every matrix, which is all of a tiny target's weights in 0.1 s and a few
    minutes of reading for 284B parameters. So one process computes it from KEPT_BYTES on, and keeps it, as ``keep`` does, in
    <runs>/fingerprints/<heads>-<digest>.json; ``heads`` is the heads' digest. A checkpoint of the heads alone has that of the
    only such file; ValueError without one.
    """
    path, folder = Path(path), runs_dir() / "fingerprints"
    files = adapter_of(read_config(path).model_type).weight_files(path)
    large = files is not None and sum(size for size, _ in files.values()) >= KEPT_BYTES
    with exclusive(folder, f"leases/{heads}") if large else nullcontext():
        found = ((record.stem.rpartition("-")[2], record) for record in folder.glob(f"{heads}-*.json"))
        known = {digest: record for digest, record in found if re.fullmatch("[0-9a-f]{16}", digest)}
        if files is None:
            if len(known) != 1:
                raise ValueError(
                    f"target.path={path} has not all shards, its fingerprint covers all weights, and {len(known)} files "
                    f"{folder / heads}-*.json know it: complete the checkpoint, or copy that file from where it is complete"
                )
            return min(known)
        if large:
            for digest, record in known.items():
                if read_json(record, "remove it", "files")["files"] == files:
                    return digest
            print(f"reading the weights of {path} for their fingerprint, once", flush=True)
        digest = _layers_digest(path, json.dumps(files))
        if large or (keep and digest not in known):
            write_json(folder / f"{heads}-{digest}.json", {"path": str(path.resolve()), "files": files})
    return digest


@lru_cache(maxsize=8)
def _layers_digest(path: Path, files: str) -> str:
    """Sums a hash of every row and its layer's number: layouts differ in names, order and the stacking of matrices alone."""
    total = 0
    for name, tensor in adapter_of(read_config(path).model_type).layer_weights(path):
        layer = re.search(r"layers\.(\d+)\.", name)
        rows = (tensor + 0.0).reshape(-1, tensor.shape[-1] if tensor.ndim else 1).numpy()  # FP4 has two zeros
        total += sum(xxh3_64_intdigest(row, int(layer[1]) + 1 if layer else 0) for row in rows)
    return f"{total % 2**64:016x}"


def read_config(path: str | Path) -> TargetConfig:
    """Reads config.json of a target directory in milliseconds; ValueError with the next command where there is none."""
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(
            f"target.path={path} has no config.json: run `python -m src.pretrain` to make the tiny target, "
            "or give target.path=<directory of a DeepSeek-V4 checkpoint>"
        )
    model_type = read_json(path / "config.json", REFETCH).get("model_type")
    adapter = adapter_of(model_type, f"target.path={path}")
    with reading(path / "config.json", REFETCH):
        return adapter.read_config(path)


def load_heads(path: str | Path, dtype: str = "fp32") -> TargetHeads:
    """Loads embedding, collapse, norm and LM head from the shards that hold them; a table in bf16 stays in bf16."""
    config = read_config(path)
    with torch.device("meta"):
        heads = TargetHeads(config, dtype=DTYPES[dtype])
    heads.load_state_dict(adapter_of(config.model_type).head_state(Path(path), DTYPES[dtype]), assign=True)
    heads.layers_digest = partial(layers_digest, path)
    return _finite(heads, path).requires_grad_(False).eval()


def _finite(module: nn.Module, path: str | Path) -> nn.Module:
    """Returns ``module``; ValueError for a weight from ``path`` that is NaN or infinite."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{path} has NaN or infinity in {name}: {REFETCH}")
    return module


def load_mtp(path: str | Path, *, experts: str, dtype: str = "fp32") -> NativeMTP:
    """Loads the native MTP block, frozen; ValueError where the checkpoint has none."""
    config = read_config(path)
    mtp = adapter_of(config.model_type).load_mtp(Path(path), config, experts=experts, dtype=DTYPES[dtype])
    return _finite(mtp, path).requires_grad_(False).eval()


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
    heads.layers_digest = partial(layers_digest, path)
    return Target(model, heads, fingerprint(heads), Path(path), dtype, experts, tokens_per_forward)
