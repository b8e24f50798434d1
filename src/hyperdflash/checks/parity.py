"""Finds where training, replay and the decoding loop first differ for one drafter on the same texts, and by how much.

Shapes: see contracts.py. Checks stand in the order in which causes act: what a path reads, then what it drafts. So states that
agree beside logits that differ point into the drafter: its masks, positions or mask token. A difference is relative to the
largest compared value, for logits to their standard deviation over the vocabulary. Paths round differently, and so do states in
the cache's dtype: paths agree where differences lie within ``tolerance``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from hyperdflash.checks.traces import Drafting, View
from hyperdflash.targets.heads import TargetHeads

TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.3}


class Finding(NamedTuple):
    """One comparison: its relative ``difference``, its place, and both values in ``detail``."""

    difference: float
    document: str
    position: int
    detail: str


@dataclass(frozen=True)
class Check:
    """Result of a check on one or two ``paths``; ``first`` is the first finding beyond the tolerance."""

    name: str
    paths: tuple[str, ...]
    compared: int
    largest: float
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
        _, document, position, detail = check.first
        return f"{check.name}: {who}, first in document {document} at {position}: {detail}"


def compare_views(views: Sequence[View], heads: TargetHeads, tolerance: float | None) -> Parity:
    """Runs every check on every path or pair of paths of the same prompts; ``tolerance`` None takes ``TOLERANCE``."""
    tolerance = TOLERANCE[heads.dtype] if tolerance is None else tolerance
    checks = []
    for name, (num_paths, find) in CHECKS.items():
        for compared in combinations(views, num_paths):
            found = list(find(heads, *compared))
            largest = max((f.difference for f in found), default=0.0)
            first = next((f for f in found if f.difference > tolerance), None)
            checks.append(Check(name, tuple(view.path for view in compared), len(found), largest, first))
    rounds = {view.path: len(view.rounds.accepted) for view in views}
    return Parity(tuple(checks), {view.path: view.tau for view in views}, rounds)


def _chat_encoding(heads: TargetHeads, a: View, b: View) -> Iterator[Finding]:
    """The prompt's token ids."""
    for name, one in a.prompts.items():
        two = b.prompts.get(name, [])
        at = next((i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), min(len(one), len(two)))
        shown = f"the prompt goes on with {one[at : at + 4]} and with {two[at : at + 4]}"
        yield _exact(one == two, name, at, shown)


def _labels(heads: TargetHeads, view: View) -> Iterator[Finding]:
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


def _states(heads: TargetHeads, a: View, b: View) -> Iterator[Finding]:
    """The target's states H[0..a-1] that the drafter reads."""
    for name in a.states.keys() & b.states.keys():
        for what, one, two in zip(("residual", "layer taps"), a.states[name], b.states[name], strict=True):
            if one is None or two is None:
                continue
            shared = min(len(one), len(two))
            one, two = one[:shared].float().flatten(1), two[:shared].float().flatten(1)
            for position, difference in enumerate(((one - two).abs().amax(dim=1) / one.abs().max()).tolist()):
                yield Finding(difference, name, position, f"the {what} there differs by {difference:.1e} of its largest value")


def _logits(heads: TargetHeads, a: View, b: View) -> Iterator[Finding]:
    """The logits of every slot whose earlier slots are the text's."""
    for name, anchor, one, two in _shared(a, b):
        drafted = [d.accepted + 1 for view, d in ((a, one), (b, two)) if view.path == "loop"]  # later slots follow other drafts
        rows = one.logits(), two.logits()
        for slot in range(min(len(rows[0]), len(rows[1]), *drafted)):
            difference = float((rows[0][slot] - rows[1][slot]).abs().max() / rows[0][slot].std())
            yield Finding(difference, name, anchor, f"slot {slot + 1} by {difference:.1%} of the logits' deviation")


@torch.inference_mode()
def _text(heads: TargetHeads, view: View) -> Iterator[Finding]:
    """Every token is the target's argmax by the state before it."""
    for name in (name for name in view.texts if name in view.states):
        text, start = view.texts[name], len(view.prompts[name])
        logits = heads.logits(heads.collapse(view.states[name][0][None, start - 1 : len(text) - 1])[0])
        for position, row in enumerate(logits, start=start):
            label, best = text[position], int(row.argmax())
            gap = 0.0 if best == label else _gap(row, label)
            yield Finding(gap, name, position, f"the text has token {label}, the target's logits prefer {best}")


def _acceptance(heads: TargetHeads, a: View, b: View) -> Iterator[Finding]:
    """The accepted drafts at the anchors that both paths visit."""
    for name, anchor, one, two in _shared(a, b):
        if None in (one.accepted, two.accepted):
            continue
        slot, gap = min(one.accepted, two.accepted), 0.0
        if one.accepted != two.accepted:
            label = a.texts[name][anchor + 1 + slot]
            gap = min(_gap(drafting.logits()[slot], label) for drafting in (one, two))
        yield Finding(gap, name, anchor, f"{a.path} accepts {one.accepted} drafts, {b.path} {two.accepted}")


# Name -> number of paths that the check compares, and its findings in one or two views
CHECKS: dict[str, tuple[int, Callable[..., Iterator[Finding]]]] = {
    "chat encoding": (2, _chat_encoding),
    "labels": (1, _labels),
    "states": (2, _states),
    "logits": (2, _logits),
    "text": (1, _text),
    "acceptance": (2, _acceptance),
}


def _anchors(view: View) -> Iterator[tuple[str, int, Drafting]]:
    for name, draftings in view.draftings.items():
        for anchor in sorted(draftings):
            yield name, anchor, draftings[anchor]


def _shared(a: View, b: View) -> Iterator[tuple[str, int, Drafting, Drafting]]:
    """Yields the anchors that both paths draft from."""
    for name, anchor, drafting in _anchors(a):
        if other := b.draftings.get(name, {}).get(anchor):
            yield name, anchor, drafting, other


def _gap(logits: Tensor, label: int) -> float:
    """Distance at which ``label`` becomes, or stops being, the argmax of ``logits`` [V], in their standard deviations."""
    first, second = logits.topk(2).values
    gap = first - (second if int(logits.argmax()) == label else logits[label])
    return float(gap / logits.std())


def _exact(equal: bool, document: str, position: int, detail: str) -> Finding:
    return Finding(0.0 if equal else float("inf"), document, position, detail)
