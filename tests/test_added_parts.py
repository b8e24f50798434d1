"""The code that docs/add_a_{head,loss,conditioning}.md shows drafts, learns and agrees with its own loop."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from hyperdflash.contracts import TargetStates
from hyperdflash.decoding.loop import decode, loop_rounds
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.anchors import all_anchors, make_blocks
from hyperdflash.targets.load import load_target
from hyperdflash.targets.session import TargetSession
from hyperdflash.training.components import make_parts

DOCS = Path(__file__).resolve().parents[1] / "docs"
SEARCHPATH = "hydra.searchpath=[file://my_conf]"


@pytest.mark.parametrize("part", ["head", "loss", "conditioning"])
def test_the_shown_part_trains_and_drafts(part, tmp_path, monkeypatch, compose_config, mini_overrides, mini_target):
    text = (DOCS / f"add_a_{part}.md").read_text()
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", text, flags=re.DOTALL):
        name, _, rest = block.partition("\n")
        path = tmp_path / name.removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rest)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (command,) = re.findall(r"^python -m src\.train .*experiment=stage1 (.*)$", text, flags=re.MULTILINE)
    words = [SEARCHPATH, "experiment=stage1", *mini_overrides, *command.split()]
    config = compose_config("train", words)
    parts, target = make_parts(config), load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")
    drafter = parts.build(target.heads, config.target, seed=0)
    prompt = [0, 2, *range(40, 60)]
    proposer = drafter.eval().proposer(target.heads)
    generation = decode(target.model, proposer, prompt, max_new_tokens=20, stop_ids={1})

    ids = torch.tensor([[*prompt, *generation.token_ids]])
    with TargetSession(target.model, drafter.layer_ids) as session:
        step = session.prefill(ids)
    mask, lengths = torch.arange(ids.shape[1])[None] >= len(prompt), torch.tensor([ids.shape[1]])
    states = TargetStates(("a",), ("code",), ids, mask, lengths, step.final.bfloat16())
    replayed = replay(drafter, states, target.heads, 0.0)
    assert torch.equal(replayed.accepted, loop_rounds([generation], drafter.num_slots).accepted)

    blocks = make_blocks(ids, mask, lengths, *all_anchors(mask, lengths), block_size=drafter.num_slots + 1)
    with torch.enable_grad():
        logits = drafter.head.logits(drafter.slots(states, target.heads, blocks.anchors, blocks.anchor_mask), target.heads)
        sums = parts.objective.sums(logits, blocks, states.final, target.heads)
        parts.objective.loss(sums).backward()
    assert not [name for name, p in drafter.named_parameters() if p.grad is None]
    for module in ("my_heads", "my_losses", "my_pairs"):
        sys.modules.pop(module, None)
