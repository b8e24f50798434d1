"""Finds where two ways of decoding differ at temperature 0, and whether rounding explains it.

Shapes: see contracts.py. A forward pass over one token and one over seven round differently, so that an argmax can change if
two logits are nearly equal. Such a tie is reported with its gap; any other difference is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hyperdflash.contracts import Rounds, TargetStates
from hyperdflash.decoding.loop import Generation
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.targets.heads import TargetHeads

# Largest gap of two logits that rounding can reverse, by the target's dtype. A drafter's states are also rounded to the cache's
# dtype: a state that rounds the other way moves the drafter's logits further (by 1e-3 on the tiny target).
TEXT_TIE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
DRAFT_TIE = {torch.float32: 1e-2, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class TextDifference:
    """First difference of two texts: ``position`` among new tokens, ``gap`` from the target's best logit to the lower one."""

    position: int
    expected_id: int | None
    got_id: int | None
    gap: float
    tie: bool


@dataclass(frozen=True)
class RoundDifference:
    """A round that loop and replay judge differently; ``gap`` between the drafter's best logit and that of the loop's draft."""

    document: int
    anchor: int
    loop_accepted: int
    replay_accepted: int
    gap: float
    tie: bool


@torch.inference_mode()
def compare_greedy(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    expected: Sequence[int],
    got: Sequence[int],
    tolerance: float | None = None,
) -> TextDifference | None:
    """Compares greedy texts [T], [T']; None if they are equal. ``tolerance`` is a gap of logits, by default ``TEXT_TIE``."""
    if tuple(expected) == tuple(got):
        return None
    tolerance = TEXT_TIE[model.dtype] if tolerance is None else tolerance
    shared = zip(expected, got, strict=False)
    position = next((i for i, (a, b) in enumerate(shared) if a != b), min(len(expected), len(got)))
    a, b = (ids[position] if position < len(ids) else None for ids in (expected, got))
    if a is None or b is None:
        return TextDifference(position, a, b, gap=float("inf"), tie=False)
    text = torch.tensor([[*prompt_ids, *expected[:position]]], device=model.device)
    logits = model(text, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    gap = float(logits.max() - torch.minimum(logits[a], logits[b]))
    return TextDifference(position, a, b, gap=gap, tie=gap <= tolerance)


@torch.inference_mode()
def compare_rounds(
    generations: Sequence[Generation],
    replayed: Rounds,
    drafter: DraftModel,
    states: TargetStates,
    heads: TargetHeads,
    tolerance: float | None = None,
) -> list[RoundDifference]:
    """Returns the greedy rounds of the loop that replay of the same texts accepts differently; empty if all agree.

    Row i of ``states`` and of ``replayed`` = replay(drafter, states, ...) belongs to ``generations[i]``. Rounds are matched by
    anchor; after a difference the two walks diverge, and anchors that only one of them visits are not compared. ``tolerance``
    is a gap of logits, by default ``DRAFT_TIE``. ValueError if the states hold another text.
    """
    tolerance = DRAFT_TIE[heads.dtype] if tolerance is None else tolerance
    accepted = {
        (document, anchor): count
        for document, anchor, count in zip(
            replayed.document.tolist(), replayed.anchor.tolist(), replayed.accepted.tolist(), strict=True
        )
    }
    differences = []
    for document, generation in enumerate(generations):
        for r in generation.rounds:
            text = states.input_ids[document, r.anchor + 1 : r.anchor + 1 + len(r.emitted)].tolist()
            if tuple(text) != r.emitted:
                raise ValueError(f"row {document} of the states holds another text than the loop wrote: capture the loop's own")
            count = accepted.get((document, r.anchor), r.accepted)
            if count == r.accepted:
                continue
            slot = min(count, r.accepted)  # from 0: the first slot that the two judge differently
            row = states.rows(document, document + 1)
            anchor = torch.tensor([[r.anchor]], device=row.input_ids.device)
            slots = drafter.slots(row, heads, anchor, torch.ones_like(anchor, dtype=torch.bool))
            logits = drafter.head.logits(slots, heads)[0, 0, slot].dense()
            gap = float(logits.max() - logits[r.drafted[slot]])
            differences.append(RoundDifference(document, r.anchor, r.accepted, count, gap, tie=gap <= tolerance))
    return differences
