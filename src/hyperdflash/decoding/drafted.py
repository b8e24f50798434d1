"""Shows a drafter's proposals in the rounds of a replay within the text. Shapes: see contracts.py. Replay returns counts alone;
this module recomputes the drafts of one document's rounds."""

from collections.abc import Sequence
from html import escape

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import Rounds, TargetStates
from hyperdflash.decoding.loop import Round, Seconds
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.drafting.proposer import positions_of
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.sampling import Sampler

# Kind of tokens -> signs around them in text, as in generation/job.py without color, and style in HTML
MARKS = {
    "accepted": ("[", "]", "background:#d7f0e3;color:#00593c"),
    "rejected": ("{-", "-}", "background:#fbe3d9;color:#a33b00;text-decoration:line-through"),
    "own": ("", "", ""),
}


@torch.no_grad()
def drafted_rounds(drafter: DraftModel, states: TargetStates, heads: TargetHeads, rounds: Rounds, row: int) -> list[Round]:
    """Recomputes the greedy drafts of document ``row`` of ``states`` at the anchors of its ``rounds`` (a replay at T = 0), as
    the loop proposes them; ``drafted`` has the tokens of the available slots, ``seconds`` are 0."""
    mine = rounds.document == row
    anchors = rounds.anchor[mine].tolist()
    if not anchors:
        return []
    one, proposer, drafted = states.rows(row, row + 1), drafter.proposer(heads), []
    proposer.begin(positions_of(one, slice(0, anchors[0])))
    for anchor, following in zip(anchors, [*anchors[1:], None], strict=True):
        proposal = proposer.propose(one.input_ids[0, anchor : anchor + 1], drafter.num_slots, Sampler())
        drafted.append(proposal.ids.tolist())  # [S]
        if following is not None:
            proposer.update(positions_of(one, slice(anchor, following)))
    text = one.input_ids[0].tolist()
    kept = zip(rounds.accepted[mine].tolist(), rounds.emitted[mine].tolist(), rounds.available[mine].tolist(), strict=True)
    return [
        Round(a, tuple(draft[:available]), accepted, tuple(text[a + 1 : a + 1 + emitted]), Seconds())
        for a, draft, (accepted, emitted, available) in zip(anchors, drafted, kept, strict=True)
    ]


def marked_tokens(rounds: Sequence[Round]) -> list[tuple[str, tuple[int, ...]]]:
    """Returns ("accepted", "rejected" or "own", token ids) in the order of the text; own tokens are the target's."""
    pieces = []
    for one in rounds:
        pieces.append(("accepted", one.emitted[: one.accepted]))
        pieces.append(("rejected", one.drafted[one.accepted :]))
        pieces.append(("own", one.emitted[one.accepted :]))
    return [(kind, ids) for kind, ids in pieces if ids]


def drafts_html(rounds: Sequence[Round], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text with accepted drafts in green, rejected ones struck through and the target's own tokens plain."""
    spans = [
        f'<span class="{kind}" style="{MARKS[kind][2]}">{escape(tokenizer.decode(list(ids)))}</span>'
        for kind, ids in marked_tokens(rounds)
    ]
    return f'<div style="white-space:pre-wrap;font:13px monospace">{"".join(spans)}</div>'


def drafts_text(rounds: Sequence[Round], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text with signs: [accepted], {-rejected-}."""
    return "".join(MARKS[kind][0] + tokenizer.decode(list(ids)) + MARKS[kind][1] for kind, ids in marked_tokens(rounds))
