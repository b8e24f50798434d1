"""Writes a target for vLLM: DeepSeek's own names, bf16, no quantization."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from hyperdflash.targets.load import load_target
from tests.targets.official_checkpoint import FP32, YARN, official_config, official_names


def write_for_vllm(source: Path, out: Path) -> Path:
    """Copies the target ``source`` of transformers' layout into ``out``, without the MTP block, which vLLM runs on no CPU."""
    target = load_target(path=source, dtype="fp32", attention="eager", experts="dense")
    tensors = {
        name: (tensor if not tensor.is_floating_point() else tensor.float() if keeps_fp32(name) else tensor.bfloat16()).clone()
        for name, tensor in official_names(target.model, target.mtp).items()
        if not name.startswith("mtp.")
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    config = official_config(target.model) | {"topk_method": "noaux_tc", "hidden_act": "silu", "expert_dtype": "bf16"}
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config | {"rope_scaling": YARN}, indent=1))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


def keeps_fp32(name: str) -> bool:
    return any(part in name for part in FP32)
