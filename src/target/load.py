"""Write and read a target directory: transformers' config.json and model.safetensors, with the MTP block as `mtp.0.*`.

`from_pretrained` ignores `mtp.*`, so one file serves both. A fingerprint of the weights that every drafter depends on goes
into caches and checkpoints, because a drafter made on other weights accepts next to nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from src.target.build import set_implementations
from src.target.heads import TargetHeads
from src.target.mtp import MTPBlock

MTP_PREFIX = "mtp.0."
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
FP32_NAMES = ("hc", "norm", "sinks", "position_bias", "e_score_correction_bias")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """A frozen target: ``model`` and ``mtp`` in eval mode without gradients, ``heads`` sharing the model's tensors."""

    model: DeepseekV4ForCausalLM
    mtp: MTPBlock
    heads: TargetHeads
    fingerprint: str
    path: Path


def fingerprint(heads: TargetHeads) -> str:
    """16 hex digits over embedding, LM head, final norm and hc_head, rounded to bf16 (what every shipped form has in common),
    and over the settings of the layers. Layers that were trained without moving any of these would go unnoticed."""
    digest = hashlib.sha256(repr([(name, getattr(heads.config, name, None)) for name in LAYER_SETTINGS]).encode())
    tensors = (heads.embed_tokens.weight, heads.lm_head.weight, heads.norm.weight, *heads.hc_head.parameters())
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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
    """config.json of a target directory; ValueError with the next command where there is none. Milliseconds."""
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(
            f"target.path={path} has no config.json: run `python -m src.pretrain` to make the tiny target, "
            "or give target.path=<directory of a DeepSeek-V4 checkpoint>"
        )
    config = DeepseekV4Config.from_pretrained(path)
    if config.model_type != "deepseek_v4":
        raise ValueError(f"target.path={path} holds a {config.model_type} model, wanted deepseek_v4: give another target.path")
    return config


def read_tensors(path: str | Path, names: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors whose name passes, from one safetensors file or from just the shards that hold them."""
    path = Path(path)
    index = path / "model.safetensors.index.json"
    if index.exists():
        shards: dict[str, list[str]] = {}
        for name, shard in json.loads(index.read_text())["weight_map"].items():
            if names(name):
                shards.setdefault(shard, []).append(name)
    else:
        shards = {"model.safetensors": []}
    found = {}
    for shard, wanted in shards.items():
        if not (path / shard).exists():
            raise ValueError(f"target.path={path} has no {shard}: run `python -m src.pretrain` or complete the checkpoint")
        with safe_open(path / shard, framework="pt") as file:
            for name in wanted or filter(names, file.keys()):
                found[name] = file.get_tensor(name)
    return found


def load_heads(path: str | Path, dtype: str = "fp32") -> TargetHeads:
    """Embedding, hc_head, norm and LM head alone: what training and replay need once the states are cached."""
    config = read_config(path)
    names = {"model.embed_tokens.weight": "embed_tokens.weight", "model.norm.weight": "norm.weight"}
    names |= {"lm_head.weight": "lm_head.weight"}
    names |= {f"model.hc_head.{n}": f"hc_head.{n}" for n in ("hc_fn", "hc_base", "hc_scale")}
    tensors = read_tensors(path, names.__contains__)
    if missing := names.keys() - tensors.keys():
        raise ValueError(f"target.path={path} lacks {', '.join(sorted(missing))}: give a complete DeepSeek-V4 checkpoint")
    with torch.device("meta"):
        heads = TargetHeads(config)
    heads = heads.to_empty(device="cpu").to(DTYPES[dtype])
    heads.load_state_dict({names[name]: tensor for name, tensor in tensors.items()})
    return heads.requires_grad_(False).eval()


def load_mtp(path: str | Path, *, experts: str, dtype: str = "fp32") -> MTPBlock:
    """The native MTP block alone, frozen; its attention is transformers' eager one (chains bring masks of their own)."""
    config = read_config(path)
    config._attn_implementation, config._experts_implementation = "eager", experts
    tensors = read_tensors(path, lambda name: name.startswith(MTP_PREFIX))
    if not tensors:
        raise ValueError(f"target.path={path} has no {MTP_PREFIX}* tensors, so no native MTP block: leave MTP methods out")
    mtp = MTPBlock(config).to(DTYPES[dtype])
    mtp.load_state_dict({name.removeprefix(MTP_PREFIX): tensor for name, tensor in tensors.items()})
    return mtp.requires_grad_(False).eval()


def load_target(*, path: str | Path, dtype: str, attention: str, experts: str, mask_token_id: int | None = None) -> Target:
    """The whole target, frozen. ``mask_token_id`` belongs to the drafter and is only checked here."""
    if dtype not in DTYPES:
        raise ValueError(f"target.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config = read_config(path)
    if mask_token_id is not None and not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(f"target.mask_token_id must be in 0..{config.vocab_size - 1}, got {mask_token_id}")
    model = DeepseekV4ForCausalLM.from_pretrained(path, config=config, dtype=DTYPES[dtype])
    mtp = load_mtp(path, experts=experts, dtype=dtype)
    set_implementations(model, attention=attention, experts=experts)
    for module in (model, mtp):
        module.requires_grad_(False).eval()
    heads = TargetHeads.of(model)
    return Target(model, mtp, heads, fingerprint(heads), Path(path))
