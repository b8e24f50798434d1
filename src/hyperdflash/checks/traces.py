"""Observes one drafter on one text along three paths: what it reads, and its logits at every anchor.

Shapes: see contracts.py; n <= S slots.

    loop       ``decode`` writes the texts; its drafter has a context of its own                 ``observe_loop``
    training   the texts as training encodes them, every anchor drawn as a block                 ``observe_training``
    replay     ``replay`` over the same states                                                    ``observe_replay``

Each path is the production code with a drafter that records; checks/parity.py compares the records.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hyperdflash.contracts import Blocks, Conversation, Document, Proposal, Rounds, Slots, TargetStates, Turn
from hyperdflash.data.chat import Mode, encode
from hyperdflash.decoding.loop import decode, loop_rounds
from hyperdflash.decoding.metrics import tau_of
from hyperdflash.decoding.replay import answers, replay, walk
from hyperdflash.drafting.anchors import all_anchors, make_blocks
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.drafting.proposer import Proposer
from hyperdflash.numerics import fast_fp32_products
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import Target
from hyperdflash.targets.sampling import Sampler


@dataclass
class Drafting:
    """One anchor of one path: ``logits()`` [n, V] fp32 of slots 1..n. ``labels`` of slots 1.. in training, None in the other
    paths; ``accepted`` leading slots that the path accepts, None where it does not visit the anchor."""

    logits: Callable[[], Tensor]
    labels: list[int] | None = None
    accepted: int | None = None


@dataclass
class View:
    """Record of one path by document id: ``prompts`` and ``texts`` token ids, ``states`` the first T' positions of
    (residual, layers) that the drafter reads, ``draftings`` by anchor; the ``rounds`` of its walk."""

    path: str
    prompts: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, list[int]] = field(default_factory=dict)
    states: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    draftings: dict[str, dict[int, Drafting]] = field(default_factory=dict)
    rounds: Rounds | None = None

    @property
    def tau(self) -> float:
        return tau_of(self.rounds)


# The loop


@dataclass(frozen=True)
class RecordingSampler(Sampler):
    """Records the logits of every choice, [n, V] each."""

    seen: list[Tensor] = field(default_factory=list)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        self.seen.append(logits)
        return super().choose(logits)


class ObservedLoop:
    """Proposer of the loop that records one text's states and the logits of its drafts."""

    def __init__(self, drafter: Proposer):
        self.drafter = drafter
        self.num_slots, self.layer_ids, self.codec = drafter.num_slots, drafter.layer_ids, drafter.codec
        self.states: list[TargetStates] = []
        self.draftings: dict[int, Drafting] = {}

    def begin(self, states: TargetStates) -> None:
        self.states, self.draftings = [states], {}
        self.drafter.begin(states)

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Proposal:
        recorder = RecordingSampler(sampler.temperature, sampler.top_p, sampler.generator)
        draft = self.drafter.propose(anchor_id, num_slots, recorder)
        logits = torch.cat(recorder.seen)
        self.draftings[sum(states.input_ids.shape[1] for states in self.states)] = Drafting(lambda: logits)
        return draft

    def update(self, states: TargetStates) -> None:
        self.states.append(states)
        self.drafter.update(states)


def observe_loop(
    drafter: Proposer,
    target: Target,
    prompts: Mapping[str, Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> View:
    """Records the greedy decoding of every prompt."""
    view, generations, observed = View("loop"), [], ObservedLoop(drafter)
    for name, prompt_ids in prompts.items():
        observed.states, observed.draftings = [], {}
        generation = decode(target.model, observed, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        generations.append(generation)
        view.prompts[name], view.texts[name] = list(prompt_ids), [*prompt_ids, *generation.token_ids]
        if observed.states:
            layers = [states.layers[0] for states in observed.states if states.layers is not None]
            residual = torch.cat([states.residual[0] for states in observed.states])
            view.states[name] = residual, torch.cat(layers) if layers else None
        view.draftings[name] = {r.anchor: replace(observed.draftings[r.anchor], accepted=r.accepted) for r in generation.rounds}
    view.rounds = loop_rounds(generations, drafter.num_slots)
    return view


def training_document(conversation: Conversation, answer_ids: Sequence[int], tokenizer, mode: Mode = "non_think") -> Document:
    """Encodes ``conversation``, which ends at a user turn, as training does, with ``answer_ids`` as its supervised answer."""
    encoded = encode(replace(conversation, turns=(*conversation.turns, Turn("assistant", ""))), tokenizer, mode)
    start = len(encoded.loss_mask) - int(encoded.loss_mask.flip(0).int().cumprod(0).sum())
    input_ids = torch.cat([encoded.input_ids[:start], torch.tensor(answer_ids, dtype=torch.int64)])
    return Document(conversation.id, conversation.domain, input_ids, torch.arange(len(input_ids)) >= start)


# Training and replay


class Observed:
    """Draft model that records its anchors and logits, and what it reads, in ``view``."""

    def __init__(self, drafter: DraftModel, view: View):
        self.drafter, self.view = drafter, view
        self.num_slots, self.head = drafter.num_slots, drafter.head

    def slots(self, states: TargetStates, heads: TargetHeads, anchors: Tensor, anchor_mask: Tensor) -> Slots:
        view, slots = self.view, self.drafter.slots(states, heads, anchors, anchor_mask)
        logits = self.head.drafted(slots, heads)  # [B, A, S]
        document, start, _ = answers(states)
        for row, first in zip(document.tolist(), start.tolist(), strict=True):
            name, length = states.ids[row], int(states.lengths[row])
            view.texts[name] = states.input_ids[row, :length].tolist()
            view.prompts[name] = view.texts[name][:first]
            view.states[name] = states.residual[row, :length], None if states.layers is None else states.layers[row, :length]
        for row, index in anchor_mask.nonzero().tolist():
            drafting = Drafting(torch.no_grad()(logits[row, index].dense))
            view.draftings.setdefault(states.ids[row], {})[int(anchors[row, index])] = drafting
        return slots


def every_block(states: TargetStates, num_slots: int) -> Blocks:
    """Returns training's blocks and labels at every eligible anchor."""
    anchors, anchor_mask = all_anchors(states.loss_mask, states.lengths)
    return make_blocks(states.input_ids, states.loss_mask, states.lengths, anchors, anchor_mask, num_slots + 1)


def observe_training(module: DraftModel, states: TargetStates, heads: TargetHeads, blocks: Blocks | None = None) -> View:
    """Records a training step over ``blocks`` (``every_block``), with gradients enabled as there."""
    view, blocks = View("training"), blocks or every_block(states, module.num_slots)
    with torch.enable_grad(), fast_fp32_products():
        Observed(module, view).slots(states, heads, blocks.anchors, blocks.anchor_mask)
    accept = torch.zeros(*states.input_ids.shape, module.num_slots, dtype=torch.bool)
    for row, index in blocks.anchor_mask.nonzero().tolist():
        anchor, kept = int(blocks.anchors[row, index]), int(blocks.label_mask[row, index].sum())
        drafting, labels = view.draftings[states.ids[row]][anchor], blocks.labels[row, index, :kept]
        accept[row, anchor, :kept] = drafting.logits()[:kept].argmax(dim=-1) == labels
        drafting.labels, drafting.accepted = labels.tolist(), int(accept[row, anchor].int().cumprod(0).sum())
    document, start, end = answers(states)
    view.rounds = walk(accept, start, end, document)
    return view


def observe_replay(module: DraftModel, states: TargetStates, heads: TargetHeads) -> View:
    """Records ``replay`` at temperature 0."""
    view = View("replay")
    rounds = view.rounds = replay(Observed(module, view), states, heads, temperature=0.0)
    for row, anchor, accepted in zip(*(x.tolist() for x in (rounds.document, rounds.anchor, rounds.accepted)), strict=True):
        view.draftings[states.ids[row]][anchor].accepted = accepted
    return view
