"""Exact replay: computes the rounds of a draft-verify loop from a text and its target states, without the loop.

Shapes: see contracts.py. The text is the target's own: greedy at T = 0, otherwise sampled at the same T and top_p.

    1. answers()   the runs of supervised tokens: N answers, each (document, start, end)
    2. drafting    every answer position is an anchor: slots [b, A, S] of a few documents at a time
    3. accepting   logits of a slice of rows, reduced at once to argmax == x, or to q(x) against p(x): accept [B, T, S], slot by
                   slot, since slots after a rejected one do not matter
    4. walk()      steps from start to end by the emitted tokens: Rounds

Index conventions: ``start`` is the position of an answer's first token (the prefill emits it; it is the first anchor),
``end`` that of its last (the end token, or the token at the length limit). A round at s has available = min(S, end - s) slots;
accepted is the leading run of accepted ones among them; emitted = min(accepted + 1, end - s): the last round has no bonus token
if its drafts reach the end. A decoding loop clips in the same way.
"""

import numpy as np
import torch
from torch import Tensor

from hyperdflash.contracts import Rounds, TargetStates
from hyperdflash.decoding.acceptance import sampled_accept
from hyperdflash.drafting.anchors import all_anchors, supervised
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.settings import check_sampling
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.sampling import generator_for


def answers(states: TargetStates) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the maximal runs of supervised tokens: (document, start, end), int64 [N] each, ``end`` inclusive."""
    mask = supervised(states.loss_mask, states.lengths).to(torch.int8)
    edge = torch.diff(mask, dim=1, prepend=mask.new_zeros(len(mask), 1), append=mask.new_zeros(len(mask), 1))
    document, start = (edge == 1).nonzero(as_tuple=True)
    end = (edge == -1).nonzero(as_tuple=True)[1] - 1
    if (start == 0).any():
        row = int(document[(start == 0).nonzero()[0]])
        raise ValueError(
            f"document {states.ids[row]!r} is supervised from its first token on; replay needs a prompt of at least "
            "one token before each answer, because the anchor's own state is not part of its context"
        )
    return document, start, end


def walk(accept: Tensor, start: Tensor, end: Tensor, document: Tensor | None = None) -> Rounds:
    """Returns the rounds of each answer, on the CPU: accept [B, T, S] bool, start / end / document [N] int64 -> Rounds.

    ``accept[b, a, k - 1]`` says whether slot k from anchor a of row b is accepted if the earlier ones are. ``document`` gives
    each answer's row, by default n for answer n. An answer of one token has no round. Rounds are ordered by document, then
    anchor. All answers step together, so the cost is the rounds of the longest answer, not the number of tokens.
    """
    num_slots = accept.shape[-1]
    run = accept.to(torch.int64).cumprod(dim=-1).sum(dim=-1).cpu().numpy()  # [B, T] leading accepted slots
    position, stop = start.cpu().numpy().copy(), end.cpu().numpy()
    row = np.arange(len(position)) if document is None else document.cpu().numpy()
    empty = np.zeros((5, 0), dtype=np.int64)
    steps = [empty]
    live = np.flatnonzero(position < stop)
    while len(live):
        at, remaining = position[live], stop[live] - position[live]
        available = np.minimum(num_slots, remaining)
        accepted = np.minimum(run[row[live], at], available)
        emitted = np.minimum(accepted + 1, remaining)
        steps.append(np.stack([row[live], at, accepted, emitted, available]))
        position[live] += emitted
        live = live[position[live] < stop[live]]
    table = np.concatenate(steps, axis=1)
    table = table[:, np.lexsort((table[1], table[0]))]
    columns = [torch.from_numpy(np.ascontiguousarray(column)) for column in table]
    return Rounds(*columns, num_slots=num_slots)


@torch.no_grad()
def replay(
    drafter: DraftModel,
    states: TargetStates,
    heads: TargetHeads,
    temperature: float,
    top_p: float = 1.0,
    seed: int = 0,
    logits_bytes: int = 64 << 20,
    hidden_bytes: int = 256 << 20,
) -> Rounds:
    """Returns the rounds of ``drafter`` over every answer in ``states``; ``Rounds.document`` is the row in ``states``.

    At ``temperature`` > 0 uniform draws come from ``position_uniforms(seed, id)``, the same for every drafter. ``logits_bytes``
    bounds one fp32 logits tensor [rows, V] (at temperature 0 there is none), ``hidden_bytes`` the fp32 features of a few
    documents at a time; one document is never divided.
    """
    check_sampling(temperature, top_p)
    document, start, end = answers(states)
    input_ids, device = states.input_ids, states.input_ids.device
    batch, length = input_ids.shape
    num_slots = drafter.num_slots
    accept = torch.zeros(batch, length, num_slots, dtype=torch.bool, device=device)
    if bool((start == end).all()):
        return walk(accept, start, end, document)

    mask = supervised(states.loss_mask, states.lengths)
    if temperature > 0:
        target_p = _target_probabilities(states, heads, mask, temperature, top_p, logits_bytes)  # [B, T] of x[i] at i
        uniform = torch.stack([position_uniforms(seed, id, length) for id in states.ids]).to(device)  # [B, T]

    def is_kept(drafted: FactoredLogits, row: Tensor, at: Tensor) -> Tensor:
        """Returns whether R slots accept the tokens at positions ``at`` [R] of ``row`` [R]: bool [R]."""
        labels = input_ids[row, at]
        if temperature == 0:
            return drafted.is_argmax(labels)
        q = drafted.token_probabilities(labels, temperature, top_p, logits_bytes)
        return sampled_accept(q, target_p[row, at], uniform[row, at])

    answered = torch.nn.functional.pad(mask, (0, num_slots))  # [B, T + S]
    whole, whole_mask = all_anchors(states.loss_mask, states.lengths)  # [B, A]
    whole = torch.where(whole_mask, whole, whole.amax(dim=1, keepdim=True).clamp(min=1))  # padding lies near the row's anchors
    documents = max(1, hidden_bytes // (4 * whole.shape[1] * num_slots * heads.hidden_size))
    for first in range(0, batch, documents):
        anchors, anchor_mask = whole[first : first + documents], whole_mask[first : first + documents]  # [b, A]
        slots = drafter.slots(states.rows(first, first + documents), heads, anchors, anchor_mask)
        assert slots.features.shape[:3] == (*anchors.shape, num_slots), tuple(slots.features.shape)
        logits = drafter.head.drafted(slots, heads)  # [b, A, S]
        row, column = anchor_mask.nonzero(as_tuple=True)  # [R], the blocks whose drafts so far are all accepted
        for slot in range(num_slots):
            at = anchors[row, column] + slot + 1
            inside = answered[first + row, at]
            row, column, at = row[inside], column[inside], at[inside]
            if not len(row):
                break
            kept = is_kept(logits[row, column, slot], first + row, at)
            accept[first + row, at - slot - 1, slot] = kept
            row, column = row[kept], column[kept]
    return walk(accept, start, end, document)


def position_uniforms(seed: int, document_id: str, length: int) -> Tensor:
    """Draws one number in [0, 1) per position of a document: fp32 [T], a function of ``seed``, the id and the position.

    A walk verifies a position at most once (the position after a rejection is the bonus token), so one draw per position serves
    all slots and anchors, and the draws along a walk are independent, as they must be. Every drafter gets the same draw at the
    same position, whatever its number of slots or its batch, which removes noise from paired differences.
    """
    return torch.rand(length, generator=generator_for(f"{seed}:{document_id}"))


def _target_probabilities(
    states: TargetStates, heads: TargetHeads, mask: Tensor, temperature: float, top_p: float, logits_bytes: int
) -> Tensor:
    """Returns p(x[i]), read from H[i - 1], at the answers' positions: fp32 [B, T], 0 elsewhere."""
    row, at = mask.nonzero(as_tuple=True)
    size = max(1, logits_bytes // (4 * heads.config.vocab_size))
    parts = [
        target_logits(heads.collapse(states.residual[i, j - 1].unsqueeze(0)).squeeze(0), heads).token_probabilities(
            states.input_ids[i, j], temperature, top_p, logits_bytes
        )
        for i, j in zip(row.split(size), at.split(size), strict=True)
    ]
    p = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    p[row, at] = torch.cat(parts)
    return p
