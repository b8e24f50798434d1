"""Write and read a target directory: transformers' layout (the MTP block as `mtp.0.*` beside it) or DeepSeek's own.

transformers loads the whole target from either; it ignores `mtp.*`. The heads and the MTP block are read on their own, from
just the shards that hold them. A fingerprint of the weights that every drafter depends on goes into caches and checkpoints,
because a drafter made on other weights accepts next to nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from hyperdflash.settings import positive_int
from hyperdflash.targets.deepseek_v4.build import set_implementations
from hyperdflash.targets.deepseek_v4.checkpoint import Checkpoint
from hyperdflash.targets.deepseek_v4.mtp import MTPBlock
from hyperdflash.targets.deepseek_v4.official import MTP_PREFIX, head_names, mtp_state
from hyperdflash.targets.deepseek_v4.quantization import FP32_NAMES, dtype_of
from hyperdflash.targets.engine_settings import EngineSettings
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.placement import checked_device_map, input_device, is_spread

LAYER_SETTINGS = (
    "layer_types",
    "mlp_layer_types",
    "compress_rates",
    "sliding_window",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "index_topk",
    "rms_norm_eps",
    "num_experts_per_tok",
    "n_routed_experts",
    "routed_scaling_factor",
    "swiglu_limit",
    "rope_theta",
    "compress_rope_theta",
)
YARN_SETTINGS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TABLES = ("embed_tokens.weight", "lm_head.weight")  # of TargetHeads, [V, D]


@dataclass(frozen=True)
class Target:
    """A frozen target: ``model`` in eval mode without gradients, ``heads`` its own tensors, or a copy of them where the model
    is spread over devices; ``mtp`` is read from ``path`` on first use; ``tokens_per_forward`` bounds a capture's batches."""

    model: DeepseekV4ForCausalLM
    heads: TargetHeads
    fingerprint: str
    path: Path
    dtype: str
    experts: str
    tokens_per_forward: int | None = None

    @cached_property
    def mtp(self) -> MTPBlock:
        """The native MTP block; ValueError where the checkpoint has none."""
        return load_mtp(self.path, experts=self.experts, dtype=self.dtype)


def fingerprint(heads: TargetHeads) -> str:
    """16 hex digits over embedding, LM head, final norm and hc_head, rounded to bf16 (what every shipped form has in common),
    and over the settings of the layers, however config.json spells them.

    Layers that were trained without moving any of these would go unnoticed: the heads must give it without the other shards.
    The two tables are read once for each ``heads``.
    """
    tables = (heads.embed_tokens.weight, heads.lm_head.weight)
    settings = repr(_layer_settings(heads.config))
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


def _layer_settings(config: DeepseekV4Config) -> list[tuple[str, object]]:
    """Each setting in one spelling: dictionaries in the order of their keys, and YaRN's values only where YaRN is used."""
    settings = []
    for name in LAYER_SETTINGS:
        value = getattr(config, name, None)
        settings.append((name, dict(sorted(value.items())) if isinstance(value, dict) else value))
    rope = config.rope_parameters["compress"]
    if rope["rope_type"] != "default":
        settings += [(name, float(rope[name])) for name in YARN_SETTINGS if name in rope]
    return settings


def save_target(directory: Path, model: DeepseekV4ForCausalLM, mtp: MTPBlock) -> Path:
    """Write config.json and model.safetensors (matrices bf16; norms, sinks and hyper-connections fp32), atomically."""
    directory.mkdir(parents=True, exist_ok=True)

    def stored(name: str, tensor: Tensor) -> Tensor:
        keep = not tensor.is_floating_point() or any(word in name for word in FP32_NAMES)
        tensor = tensor.to(torch.int16) if name.endswith("tid2eid") else tensor  # expert ids are small
        return (tensor if keep else tensor.to(torch.bfloat16)).contiguous().clone()

    state = {name: stored(name, tensor) for name, tensor in model.state_dict().items()}
    state |= {MTP_PREFIX + name: stored(name, tensor) for name, tensor in mtp.state_dict().items()}
    partial = directory / "model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(directory / "model.safetensors")
    model.config.save_pretrained(directory)
    return directory / "model.safetensors"


def read_config(path: str | Path) -> DeepseekV4Config:
    """config.json of a target directory, in DeepSeek's spelling or transformers' own; ValueError with the next command where
    there is none. Milliseconds."""
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(
            f"target.path={path} has no config.json: run `python -m src.pretrain` to make the tiny target, "
            "or give target.path=<directory of a DeepSeek-V4 checkpoint>"
        )
    values, _ = DeepseekV4Config.get_config_dict(path)
    if values.get("model_type") != "deepseek_v4":
        raise ValueError(
            f"target.path={path} holds a {values.get('model_type')} model, wanted deepseek_v4: give another target.path"
        )
    real = {field.name for field in fields(DeepseekV4Config) if "float" in str(field.type)}  # 10 and 10.0 are one setting
    return DeepseekV4Config.from_dict({name: float(v) if name in real and type(v) is int else v for name, v in values.items()})


def load_heads(path: str | Path, dtype: str = "fp32") -> TargetHeads:
    """Embedding, hc_head, norm and LM head alone: what training and replay need once the states are cached. The two tables
    stay in bf16 where the checkpoint has them so, whatever ``dtype`` they are read in."""
    config, checkpoint = read_config(path), Checkpoint(path)
    with torch.device("meta"):
        heads = TargetHeads(config, dtype=DTYPES[dtype])

    def weight(own: str, name: str) -> Tensor:
        as_stored = own in TABLES and checkpoint.tensor(name).dtype == torch.bfloat16
        return checkpoint.weight(name, torch.bfloat16 if as_stored else dtype_of(own, DTYPES[dtype]))

    state = {own: weight(own, name) for own, name in head_names(checkpoint).items()}
    heads.load_state_dict(state, assign=True)
    return heads.requires_grad_(False).eval()


def load_mtp(path: str | Path, *, experts: str, dtype: str = "fp32") -> MTPBlock:
    """The native MTP block alone, frozen; its attention is transformers' eager one (chains bring masks of their own)."""
    config = read_config(path)
    config._attn_implementation, config._experts_implementation = "eager", experts
    with torch.device("meta"):
        mtp = MTPBlock(config)
    mtp.rotary_emb = DeepseekV4RotaryEmbedding(mtp.config)  # computed, not stored, and fp32 whatever the weights are
    mtp.load_state_dict(mtp_state(Checkpoint(path), config.n_routed_experts, DTYPES[dtype]), assign=True)
    return mtp.requires_grad_(False).eval()


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
    """The whole target, frozen; FP8 and FP4 weights are dequantised to ``dtype`` while they are read.

    ``device_map`` spreads it over devices: "even" (targets.placement), or what transformers takes ("auto", a dictionary);
    what it places on "disk" lies in ``offload_folder``, in fp32 only. ``tokens_per_forward`` is the largest batch of a capture,
    padding included (None: what it is given). ``mask_token_id`` belongs to the drafter and is only checked here; ``engine``
    takes the keys of conf/target/engine/none.yaml, which belong to hyperdflash.engines.
    """
    if unknown := engine.keys() - {field.name for field in fields(EngineSettings)}:
        raise ValueError(f"target.{min(unknown)} is no setting of a target: see conf/target and conf/target/engine")
    if dtype not in DTYPES:
        raise ValueError(f"target.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if tokens_per_forward is not None:
        positive_int("target.tokens_per_forward", tokens_per_forward)
    if offload_folder is not None and dtype != "fp32":
        raise ValueError(
            f"target.offload_folder wants target.dtype=fp32, got {dtype}: transformers writes what it offloads in one dtype, "
            "and hyper-connections rounded to bf16 give other states"
        )
    config = read_config(path)
    device_map = checked_device_map(device_map, config.num_hidden_layers)
    if mask_token_id is not None and not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(f"target.mask_token_id must be in 0..{config.vocab_size - 1}, got {mask_token_id}")
    Checkpoint(path).check_complete()
    if quantized := getattr(config, "quantization_config", None):
        config.quantization_config = {**quantized, "dequantize": True}
    placement = {"device_map": device_map, "offload_folder": offload_folder}
    try:
        model = DeepseekV4ForCausalLM.from_pretrained(path, config=config, dtype=DTYPES[dtype], **placement)
    except ValueError as error:
        if "offload_folder" not in str(error):
            raise
        raise ValueError(
            f"target.device_map={device_map} does not fit these devices and leaves part of the target for the disk: give more "
            "devices, or let a server run the target (target/engine)"
        ) from error
    if quantized and dtype == "fp32":  # transformers leaves what was stored as BF16 in BF16
        model.float()
    set_implementations(model, attention=attention, experts=experts)
    model.requires_grad_(False).eval()
    heads = load_heads(path, dtype).to(input_device(model)) if is_spread(model) else TargetHeads.of(model)
    return Target(model, heads, fingerprint(heads), Path(path), dtype, experts, tokens_per_forward)
