"""Observes one drafter on one text along three paths: its inputs and outputs at every anchor.

Shapes: see contracts.py; n <= S slots, D' the drafter's width, N key-value heads, E width of a head.

    loop       ``decode`` writes the texts; its drafter has a context of its own                 ``observe_loop``
    training   the texts as training encodes them, every anchor drawn as a block                 ``observe_training``
    replay     ``replay`` over the same states                                                    ``observe_replay``

Each path is the production code with a drafter that records; checks/parity.py compares the records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Reading:
    """Input of the first draft layer at an anchor: ``block`` [K, D'] embedded tokens, ``angles`` cos and sin [K, E] of their
    positions, ``keys`` and ``values`` [n, N, E] of the n visible context states, oldest first."""

    block: Tensor
    angles: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor


@dataclass
class Drafting:
    """One anchor of one path: ``logits()`` [n, V] fp32 of slots 1..n and, for block drafters, ``reading()``.

    ``labels`` of slots 1.. in training, None in the other paths; ``accepted`` leading slots that the path accepts, None where
    it does not visit the anchor.
    """

    logits: Callable[[], Tensor]
    reading: Callable[[], Reading] | None
    labels: list[int] | None = None
    accepted: int | None = None


@dataclass
class View:
    """Record of one path by document id: ``prompts`` and ``texts`` token ids, ``states`` the first T' positions of
    (final, layers) that the drafter reads, ``draftings`` by anchor; the ``rounds`` of its walk; the ``modules`` that run; the
    drafter's ``num_lead_slots``."""

    path: str
    num_lead_slots: int = 0
    prompts: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, list[int]] = field(default_factory=dict)
    states: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    draftings: dict[str, dict[int, Drafting]] = field(default_factory=dict)
    rounds: Rounds | None = None
    modules: set[str] = field(default_factory=set)

    @property
    def tau(self) -> float:
        return tau_of(self.rounds)

    def add_texts(self, states: TargetStates) -> None:
        """Adds a batch's prompts, texts and states; a second batch of the same documents adds nothing."""
        document, start, _ = answers(states)
        for row, first in zip(document.tolist(), start.tolist(), strict=True):
            name, length = states.ids[row], int(states.lengths[row])
            self.texts[name] = states.input_ids[row, :length].tolist()
            self.prompts[name] = self.texts[name][:first]
            self.states[name] = states.final[row, :length], None if states.layers is None else states.layers[row, :length]
            self.draftings.setdefault(name, {})


@contextmanager
def traced(module: nn.Module, view: View) -> Iterator[list[tuple]]:
    """Adds the names of submodules that run to ``view``; yields a list of the first draft layer's input per forward."""
    reads = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: view.modules.add(name))
        for name, part in module.named_modules()
        if name
    ]
    if hasattr(module, "layers"):
        handles.append(module.layers[0].register_forward_pre_hook(lambda _, args: reads.append(args)))
    try:
        yield reads
    finally:
        for handle in handles:
            handle.remove()


def reading_of(reads: Sequence[tuple], row: int, index: int) -> Callable[[], Reading] | None:
    """Returns the input at anchor ``index`` of all forwards in ``reads``, which split the anchors; None where the drafter has
    no draft layers or masks in a kernel of its own."""
    for x, angles, context, visible in reads:
        if not isinstance(visible, Tensor):
            return None
        if index < x.shape[1]:
            return partial(_read, x[row, index].detach(), angles, context, visible[row, index], row, index)
        index -= x.shape[1]
    return None


def _read(block: Tensor, angles, context, visible: Tensor, row: int, index: int) -> Reading:
    keys, values = (part[row][visible].detach() for part in context)
    return Reading(block, tuple(part[row, index, :, 0] for part in angles), keys, values)


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

    def __init__(self, drafter: Proposer, reads: list[tuple]):
        self.drafter, self.reads = drafter, reads
        self.num_slots, self.layer_ids, self.codec = drafter.num_slots, drafter.layer_ids, drafter.codec
        self.states: list[TargetStates] = []
        self.draftings: dict[int, Drafting] = {}

    def begin(self, states: TargetStates) -> None:
        self.states, self.draftings = [states], {}
        self.drafter.begin(states)

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Proposal:
        recorder = RecordingSampler(sampler.temperature, sampler.top_p, sampler.generator)
        self.reads.clear()
        draft = self.drafter.propose(anchor_id, num_slots, recorder)
        anchor = sum(states.input_ids.shape[1] for states in self.states)
        read = reading_of(self.reads, 0, 0)
        reading = read and read()  # copied at once: the loop overwrites its buffers
        logits = torch.cat(recorder.seen)
        self.draftings[anchor] = Drafting(lambda: logits, reading and (lambda: reading))
        return draft

    def update(self, states: TargetStates) -> None:
        self.states.append(states)
        self.drafter.update(states)


def observe_loop(
    module: nn.Module,
    drafter: Proposer,
    target: Target,
    prompts: Mapping[str, Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> View:
    """Records the greedy decoding of every prompt; ``drafter`` is the loop's form of ``module``."""
    view, generations = View("loop", module.num_lead_slots), []
    for name, prompt_ids in prompts.items():
        with traced(module, view) as reads:
            observed = ObservedLoop(drafter, reads)
            generation = decode(target.model, observed, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        generations.append(generation)
        view.prompts[name], view.texts[name] = list(prompt_ids), [*prompt_ids, *generation.token_ids]
        if observed.states:
            layers = [states.layers[0] for states in observed.states if states.layers is not None]
            final = torch.cat([states.final[0] for states in observed.states])
            view.states[name] = final, torch.cat(layers) if layers else None
        for r in generation.rounds:
            observed.draftings[r.anchor].accepted = r.accepted
        view.draftings[name] = {r.anchor: observed.draftings[r.anchor] for r in generation.rounds}
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
    """Draft model that records its anchors and logits in ``view``."""

    def __init__(self, drafter: DraftModel, reads: list[tuple], view: View):
        self.drafter, self.reads, self.view = drafter, reads, view
        self.num_slots, self.head = drafter.num_slots, drafter.head

    def slots(self, states: TargetStates, heads: TargetHeads, anchors: Tensor, anchor_mask: Tensor) -> Slots:
        self.reads.clear()
        slots = self.drafter.slots(states, heads, anchors, anchor_mask)
        logits = self.head.logits(slots, heads)  # [B, A, S]
        self.view.add_texts(states)
        for row, index in anchor_mask.nonzero().tolist():
            drafting = Drafting(torch.no_grad()(logits[row, index].dense), reading_of(self.reads, row, index))
            self.view.draftings[states.ids[row]][int(anchors[row, index])] = drafting
        return slots


def every_block(states: TargetStates, num_slots: int) -> Blocks:
    """Returns training's blocks and labels at every eligible anchor."""
    anchors, anchor_mask = all_anchors(states.loss_mask, states.lengths)
    return make_blocks(states.input_ids, states.loss_mask, states.lengths, anchors, anchor_mask, num_slots + 1)


def observe_training(module: DraftModel, states: TargetStates, heads: TargetHeads, blocks: Blocks | None = None) -> View:
    """Records a training step over ``blocks`` (``every_block``), with gradients enabled as there."""
    view, blocks = View("training", module.num_lead_slots), blocks or every_block(states, module.num_slots)
    with traced(module, view) as reads, torch.enable_grad(), fast_fp32_products():
        Observed(module, reads, view).slots(states, heads, blocks.anchors, blocks.anchor_mask)
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
    view = View("replay", module.num_lead_slots)
    with traced(module, view) as reads:
        rounds = view.rounds = replay(Observed(module, reads, view), states, heads, temperature=0.0)
    for row, anchor, accepted in zip(*(x.tolist() for x in (rounds.document, rounds.anchor, rounds.accepted)), strict=True):
        view.draftings[states.ids[row]][anchor].accepted = accepted
    return view
