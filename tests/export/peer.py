"""Loads an exported folder into a peer's own class and computes its logits; `.venv-peers/bin/python` runs it as a plain file.

argv: zlab | speculators, the folder, a file of inputs, the file to write logits to. It imports nothing of this project.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def zlab(folder: Path, given: dict[str, Tensor]) -> Tensor:
    """z-lab's ``DFlashDraftModel``, one block after the other, as its ``dflash_generate`` calls it."""
    from dflash.model import DFlashDraftModel

    model = DFlashDraftModel.from_pretrained(folder).eval()
    rows = []
    for anchor in given["anchors"].tolist():
        ids = torch.tensor([given["input_ids"][anchor], *[model.mask_token_id] * (model.block_size - 1)])
        hidden = model(
            target_hidden=given["hidden"][None, :anchor],
            noise_embedding=given["embedding"][ids][None],
            position_ids=torch.arange(anchor + model.block_size)[None],
        )
        rows.append(model.compute_logits(hidden[0, 1:], lambda states: states @ given["lm_head"].T))
    return torch.stack(rows)


def speculators(folder: Path, given: dict[str, Tensor]) -> Tensor:
    """The draft class that speculators finds for the folder: DFlash's logits, or DSpark's with the tokens of the text."""
    from speculators import SpeculatorModel
    from speculators.config import SpeculatorModelConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import core

    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "sdpa"  # FlexAttention, the default, compiles for minutes on a CPU
    model = SpeculatorModel.from_pretrained(folder, config=config).eval()  # with the heads of the target that the folder names
    anchors, seen = given["anchors"], []
    core.select_anchors = lambda *arguments: (anchors, torch.ones_like(anchors, dtype=torch.bool))
    metrics = sys.modules[type(model).__module__]
    measured = metrics.compute_metrics  # the only function that sees the logits of all heads
    metrics.compute_metrics = lambda logits, *rest, **options: seen.append(logits) or measured(logits, *rest, **options)
    length = len(given["input_ids"])
    model(
        given["hidden"][None],
        given["input_ids"][None],
        torch.ones(1, length, dtype=torch.bool),
        torch.zeros(1, length, config.transformer_layer_config.hidden_size),
        torch.zeros(1, length, dtype=torch.long),
        loss_config=resolve_loss_config("ce", "eager"),
        max_anchors=len(anchors),
        **({"tv_loss_fn": resolve_loss_config("tv", "eager")["tv"][0]} if config.speculators_model_type == "dspark" else {}),
    )
    return seen[0].view(len(anchors), model.block_size, -1)[:, 1:]


if __name__ == "__main__":
    peer, folder, inputs, out = sys.argv[1:]
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = {"zlab": zlab, "speculators": speculators}[peer](Path(folder), load_file(inputs))
    save_file({"logits": logits.float().contiguous()}, out)
