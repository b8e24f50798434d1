"""Loads an exported folder into a peer's own class and computes its logits; `.venv-peers/bin/python` runs it as a plain file.

argv: zlab | speculators | xpress, folder, file of inputs, file to write logits to. It imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def zlab(folder: Path, given: dict[str, Tensor]) -> Tensor:
    """z-lab's ``DFlashDraftModel`` or ``DFlash2DraftModel``, one block after the other, as its ``dflash_generate`` calls it."""
    from dflash import model as dflash

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(dflash, name).from_pretrained(folder).eval()
    rows = []
    for anchor in given["anchors"].tolist():
        ids = torch.tensor([given["input_ids"][anchor], *[model.mask_token_id] * (model.block_size - 1)])
        hidden = model(
            target_hidden=given["hidden"][None, :anchor],
            noise_embedding=given["embedding"][ids][None],
            position_ids=torch.arange(anchor + model.block_size)[None],
        )
        logits = model.compute_logits(hidden[0, 1:], lambda states: states @ given["lm_head"].T)
        if name == "DFlash2DraftModel":  # the distribution that each slot's draft comes from, after the text's token
            previous = given["input_ids"][anchor : anchor + len(logits)].split(1)
            for slot, token in enumerate(previous):
                states = hidden[:, slot + 1 : slot + 2]
                _, candidates, probs = model.candidate_selector.select(states, logits[None, slot : slot + 1], token, 1.0)
                logits[slot] = torch.full_like(logits[slot], -torch.inf).scatter(0, candidates[0, 0], probs[0, 0].log())
        rows.append(logits)
    return torch.stack(rows)


def speculators(folder: Path, given: dict[str, Tensor]) -> Tensor:
    """The draft class that speculators finds for the folder: DFlash's logits, or those after the text's tokens."""
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
    if second := config.speculators_model_type == "dflash2":
        selector, scored = model.candidate_selector, model.candidate_selector.score_candidates
        selector.score_candidates = lambda *given: seen.append(given) or scored(*given)
    else:
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
        **({} if config.speculators_model_type == "dflash" else {"tv_loss_fn": resolve_loss_config("tv", "eager")["tv"][0]}),
    )
    if second:
        candidates, scores = selector.select(*seen[0][:3])
        seen = [torch.full_like(seen[0][0], -torch.inf).scatter(-1, candidates, scores)]
    return seen[0].view(len(anchors), model.block_size, -1)[:, 1:]


def xpress(weights: Path, given: dict[str, Tensor]) -> Tensor:
    """The refiner's logits after given tokens, and after six passes over its own, as the model's forward runs its rounds."""
    from speculators.models.xpress.model_definitions import XPressRefinerHead

    state, (_, block_size, width) = load_file(weights), given["features"].shape
    sizes = {"verifier_vocab_size": len(given["lm_head"]), "draft_vocab_size": len(given["lm_head"]), "hidden_size": width}
    head = XPressRefinerHead(**sizes, block_size=block_size, rank=len(state["mix_l"]))
    head.load_state_dict(state)
    base, previous = given["features"] @ given["lm_head"].T, given["previous"]
    found, refined = [base + head.block_bias(previous, given["features"])], base
    for _ in range(6):
        tokens = torch.cat([previous[:, :1], refined.argmax(dim=-1)[:, :-1]], dim=1)
        refined = base + head.block_bias(tokens, given["features"])
    return torch.stack([*found, refined])


if __name__ == "__main__":
    peer, folder, inputs, out = sys.argv[1:]
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = {"zlab": zlab, "speculators": speculators, "xpress": xpress}[peer](Path(folder), load_file(inputs))
    save_file({"logits": logits.float().contiguous()}, out)
