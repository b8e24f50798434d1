"""Finds where training, replay and the decoding loop first differ for one drafter on the same texts, and by how much.

Shapes: see contracts.py. Checks stand in the order in which causes act, so the first that fails names the cause. A difference
is relative to the largest compared value, for logits to their standard deviation over the vocabulary. Paths round differently,
and so do states in the cache's dtype: paths agree where differences lie within ``tolerance``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from hyperdflash.checks.traces import Drafting, Reading, View
from hyperdflash.targets.heads import TargetHeads

TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.3}


class Finding(NamedTuple):
    """One comparison: its relative ``difference``, its place, and both values in ``detail``; ``absolute`` for logits."""

    difference: float
    document: str | None
    position: int | None
    detail: str
    absolute: float | None = None


@dataclass(frozen=True)
class Check:
    """Result of check ``name`` on one or two ``paths``: the number ``compared``, the ``largest`` difference (``absolute`` for
    logits), and the ``first`` finding beyond the tolerance."""

    name: str
    paths: tuple[str, ...]
    compared: int
    largest: float
    absolute: float | None
    first: Finding | None


@dataclass(frozen=True)
class Parity:
    """All checks of a drafter in order, and tau and rounds per path."""

    checks: tuple[Check, ...]
    taus: dict[str, float]
    rounds: dict[str, int]

    @property
    def first_difference(self) -> str | None:
        """One sentence for the first check that fails: the path that differs, where, and how; None where all agree."""
        failed = [check for check in self.checks if check.first is not None]
        if not failed:
            return None
        check = failed[0]
        same = [other for other in failed if other.name == check.name]
        odd = set(check.paths).intersection(*(other.paths for other in same))
        who = f"{' and '.join(check.paths)} differ"
        if len(check.paths) == 1:
            who = f"{check.paths[0]} is wrong"
        elif len(same) > 1 and len(odd) == 1:
            who = f"{odd.pop()} differs from the others"
        _, document, position, detail, _ = check.first
        where = (f", first in document {document}" if document else "") + ("" if position is None else f" at {position}")
        return f"{check.name}: {who}{where}: {detail}"


# Name -> number of paths that the check compares, and its findings in (heads, context window, one or two views)
CHECKS: dict[str, tuple[int, Callable[..., Iterator[Finding]]]] = {}


def check(name: str, num_paths: int = 2):
    """Registers a check; checks run in the order of this file."""
    return lambda find: CHECKS.setdefault(name, (num_paths, find))[1]


def compare_views(views: Sequence[View], heads: TargetHeads, context_window: int | None, tolerance: float | None) -> Parity:
    """Runs every check on every path or pair of paths of the same prompts; ``tolerance`` None takes ``TOLERANCE``."""
    tolerance = TOLERANCE[heads.dtype] if tolerance is None else tolerance
    checks = []
    for name, (num_paths, find) in CHECKS.items():
        for compared in combinations(views, num_paths):
            found = list(find(heads, context_window, *compared))
            largest = max((f.difference for f in found), default=0.0)
            absolute = max((f.absolute for f in found if f.absolute is not None), default=None)
            first = next((f for f in found if f.difference > tolerance), None)
            checks.append(Check(name, tuple(view.path for view in compared), len(found), largest, absolute, first))
    rounds = {view.path: len(view.rounds.accepted) for view in views}
    return Parity(tuple(checks), {view.path: view.tau for view in views}, rounds)


@check("chat encoding")
def _chat_encoding(heads: TargetHeads, window: int | None, a: View, b: View) -> Iterator[Finding]:
    """The prompt's token ids."""
    for name, one in a.prompts.items():
        two = b.prompts.get(name, [])
        at = next((i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), min(len(one), len(two)))
        shown = f"the prompt goes on with {one[at : at + 4]} and with {two[at : at + 4]}"
        yield _exact(one == two, name, at, shown)


@check("labels", num_paths=1)
def _labels(heads: TargetHeads, window: int | None, view: View) -> Iterator[Finding]:
    """Training's label of slot k is x[a + k]; a path accepts as many drafts as its logits and the text match."""
    for name, anchor, drafting in _anchors(view):
        text = view.texts[name][anchor + 1 :]
        if drafting.labels is not None:
            wanted = text[: len(drafting.logits())]  # no labels past the answer's end
            shown = f"the slots have the labels {drafting.labels}, the text goes on with {wanted}"
            yield _exact(drafting.labels == wanted, name, anchor, shown)
        if drafting.accepted is not None:
            logits = drafting.logits()
            right = [int(row.argmax()) == label for row, label in zip(logits, text, strict=False)]
            run = right.index(False) if False in right else len(right)
            slot = min(run, drafting.accepted)
            gap = 0.0 if run == drafting.accepted else _gap(logits[slot], text[slot])
            yield Finding(gap, name, anchor, f"it accepts {drafting.accepted} drafts, its own logits and the text give {run}")


@check("states")
def _states(heads: TargetHeads, window: int | None, a: View, b: View) -> Iterator[Finding]:
    """The target's states H[0..a-1] that the drafter reads."""
    for name in a.states.keys() & b.states.keys():
        for what, one, two in zip(("final residual", "layer taps"), a.states[name], b.states[name], strict=True):
            if one is None or two is None:
                continue
            shared = min(len(one), len(two))
            one, two = one[:shared].float().flatten(1), two[:shared].float().flatten(1)
            for position, difference in enumerate(((one - two).abs().amax(dim=1) / one.abs().max()).tolist()):
                yield Finding(difference, name, position, f"the {what} there differs by {difference:.1e} of its largest value")


@check("modules")
def _modules(heads: TargetHeads, window: int | None, a: View, b: View) -> Iterator[Finding]:
    """The submodules of the drafter that run."""
    for one, two in ((a, b), (b, a)):
        missing = sorted(one.modules - two.modules)
        yield _exact(not missing, None, None, f"{two.path} never runs {', '.join(missing[:3])}, {one.path} does")


@check("context mask", num_paths=1)
def _context_mask(heads: TargetHeads, window: int | None, view: View) -> Iterator[Finding]:
    """The states that a block sees: all before its anchor, or the newest of a window."""
    for name, anchor, drafting in _anchors(view):
        if drafting.reading:
            seen, wanted = len(drafting.reading().keys), anchor if window is None else min(anchor, window)
            yield _exact(seen == wanted, name, anchor, f"the block sees {seen} states, {wanted} stand before its anchor")


@check("context")
def _context(heads: TargetHeads, window: int | None, a: View, b: View) -> Iterator[Finding]:
    """The values that the first draft layer computes from the states that the block sees (reducer, norms, projection)."""
    for name, anchor, one, two in _readings(a, b):
        if len(one.values) == len(two.values):
            difference = _relative(one.values, two.values)
            yield Finding(difference, name, anchor, f"values of the context differ by {difference:.1e} of the largest")


@check("RoPE")
def _rope(heads: TargetHeads, window: int | None, a: View, b: View) -> Iterator[Finding]:
    """The angles of the block's own positions, and the context's keys."""
    for name, anchor, one, two in _readings(a, b):
        parts = [torch.cat(reading.angles, dim=-1).float() for reading in (one, two)]  # cos and sin [K, 2 E]
        difference = float((parts[0] - parts[1]).abs().max())
        base = bool(torch.allclose(parts[0][:, 0], parts[1][:, 0], atol=1e-4))  # the first pair turns by the position itself
        what = "another base" if base else "other positions"
        yield Finding(difference, name, anchor, f"the block's tokens are turned by angles of {what}")
        if len(one.keys) == len(two.keys):
            difference = _relative(one.keys, two.keys)
            yield Finding(difference, name, anchor, f"keys of the context differ by {difference:.1e} of the largest")


def _tokens(slots: slice, heads: TargetHeads, window: int | None, a: View, b: View) -> Iterator[Finding]:
    """The embeddings of the block's tokens; a lead's token that the text does not have is the loop's alone."""
    for name, anchor, one, two in _readings(a, b):
        kept = min((v.draftings[name][anchor].accepted for v in (a, b) if v.path == "loop"), default=len(one.block))
        same = [k for k in range(*slots.indices(len(one.block))) if k <= kept or k > a.num_lead_slots]
        rows = one.block[same], two.block[same]
        ids = [_token_of(row[0], heads) for row in rows]
        yield Finding(_relative(*rows), name, anchor, f"{a.path} embeds token {ids[0]}, {b.path} token {ids[1]}")


check("anchor token")(partial(_tokens, slice(0, 1)))
check("mask token")(partial(_tokens, slice(1, None)))


@check("logits")
def _logits(heads: TargetHeads, window: int | None, a: View, b: View) -> Iterator[Finding]:
    """The logits of every slot whose earlier slots are the text's."""
    for name, anchor, one, two in _shared(a, b):
        drafted = [d.accepted + 1 for view, d in ((a, one), (b, two)) if view.path == "loop"]  # later slots follow other drafts
        rows = one.logits(), two.logits()
        for slot in range(min(len(rows[0]), len(rows[1]), *drafted)):
            absolute = float((rows[0][slot] - rows[1][slot]).abs().max())
            difference = absolute / float(rows[0][slot].std())
            shown = f"slot {slot + 1} by {absolute:.1e}, {difference:.1%} of the logits' deviation, with the same input"
            yield Finding(difference, name, anchor, shown, absolute)


@check("text", num_paths=1)
@torch.inference_mode()
def _text(heads: TargetHeads, window: int | None, view: View) -> Iterator[Finding]:
    """Every token is the target's argmax by the state before it."""
    for name in (name for name in view.texts if name in view.states):
        text, start = view.texts[name], len(view.prompts[name])
        logits = heads.logits(heads.collapse(view.states[name][0][None, start - 1 : len(text) - 1])[0])
        for position, row in enumerate(logits, start=start):
            label, best = text[position], int(row.argmax())
            gap = 0.0 if best == label else _gap(row, label)
            yield Finding(gap, name, position, f"the text has token {label}, the target's logits prefer {best}")


@check("acceptance")
def _acceptance(heads: TargetHeads, window: int | None, a: View, b: View) -> Iterator[Finding]:
    """The accepted drafts at the anchors that both paths visit."""
    for name, anchor, one, two in _shared(a, b):
        if None in (one.accepted, two.accepted):
            continue
        slot, gap = min(one.accepted, two.accepted), 0.0
        if one.accepted != two.accepted:
            label = a.texts[name][anchor + 1 + slot]
            gap = min(_gap(drafting.logits()[slot], label) for drafting in (one, two))
        yield Finding(gap, name, anchor, f"{a.path} accepts {one.accepted} drafts, {b.path} {two.accepted}")


def _anchors(view: View) -> Iterator[tuple[str, int, Drafting]]:
    """Yields all anchors in the order of the text."""
    for name, draftings in view.draftings.items():
        for anchor in sorted(draftings):
            yield name, anchor, draftings[anchor]


def _shared(a: View, b: View) -> Iterator[tuple[str, int, Drafting, Drafting]]:
    """Yields the anchors that both paths draft from."""
    for name, anchor, drafting in _anchors(a):
        if other := b.draftings.get(name, {}).get(anchor):
            yield name, anchor, drafting, other


def _readings(a: View, b: View) -> Iterator[tuple[str, int, Reading, Reading]]:
    for name, anchor, one, two in _shared(a, b):
        if one.reading and two.reading:
            yield name, anchor, one.reading(), two.reading()


def _relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |a|; 0 without any element."""
    return float((a.float() - b.float()).abs().max() / a.float().abs().max()) if a.numel() else 0.0


def _gap(logits: Tensor, label: int) -> float:
    """Distance at which ``label`` becomes, or stops being, the argmax of ``logits`` [V], in their standard deviations."""
    first, second = logits.topk(2).values
    gap = first - (second if int(logits.argmax()) == label else logits[label])
    return float(gap / logits.std())


def _exact(equal: bool, document: str | None, position: int | None, detail: str) -> Finding:
    return Finding(0.0 if equal else float("inf"), document, position, detail)


def _token_of(embedded: Tensor, heads: TargetHeads) -> str:
    """Names the token of this embedding; "?" where the drafter projects embeddings to another width."""
    table = heads.embed_tokens.weight
    if embedded.shape[-1] != table.shape[1]:
        return "?"
    return str(int((table.to(embedded.dtype) - embedded).abs().amax(dim=1).argmin()))
