"""The bars a target must pass, computed from a card's numbers. None (not measured) is never met."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

MAX_PARAMETERS = 3_700_000
MAX_FILE_BYTES = 8_000_000
MAX_MINUTES = 90
MIN_CONTEXT = 2048


@dataclass(frozen=True)
class Bar:
    """``measured`` must stand in ``relation`` to ``asked``; ``digits`` and ``percent`` say how they are written."""

    name: str
    relation: Literal["<", "<=", ">", ">="]
    asked: float | None
    measured: float | None
    percent: bool = False
    digits: int = 3

    @property
    def met(self) -> bool:
        if self.asked is None or self.measured is None:
            return False
        if self.relation == "<":
            return self.measured < self.asked
        if self.relation == "<=":
            return self.measured <= self.asked
        return self.measured > self.asked if self.relation == ">" else self.measured >= self.asked

    def written(self, value: float | None) -> str:
        if value is None:
            return "n/a"
        return f"{value:.1%}" if self.percent else f"{value:,.{self.digits}f}"


def bars(card: dict) -> list[Bar]:
    """Issue 3's bars, in its order; ``card`` as written to model_card.json."""
    text, answers, mtp, target = card["text"], card["answers"], card["mtp"], card["target"]
    found = [Bar("parameters with MTP", "<=", MAX_PARAMETERS, target["parameters"], digits=0)]
    found.append(Bar("file, bytes", "<=", MAX_FILE_BYTES, target["file_bytes"], digits=0))
    found.append(Bar("context, tokens", ">=", MIN_CONTEXT, target["context"], digits=0))
    if card["training"]:
        found.append(Bar("training, minutes", "<=", MAX_MINUTES, card["training"]["minutes"], digits=0))
    for baseline, name in (("xz", "xz"), ("ngram", "the 5-gram")):
        for group, row in text.items():
            found.append(Bar(f"bits per byte below {name}, {group}", "<", row[baseline], row["target"]))
    found.append(Bar("code answers that parse", ">=", 0.6, answers["code"]["parses"], percent=True))
    for group, row in answers.items():
        found.append(Bar(f"answers that end, {group}", ">=", 0.9, row["ended"], percent=True))
    for group, row in answers.items():
        found.append(Bar(f"answers that end in a loop, {group}", "<=", 0.1, row["looped"], percent=True))
    found.append(Bar("arithmetic right, seen templates", ">=", 0.5, answers["math seen"]["right"], percent=True))
    # A loop is easy to draft, so what stands only because of loops is shown.
    for group in ("code", "code, no loops"):
        found.append(Bar(f"MTP first slot, {group}", ">", 0.8, mtp[group]["conditional"][0]))
    # The paper does not say which of the two its Figure 1 shows.
    for kind, group in (("survival", "code"), ("conditional", "code"), ("conditional", "code, no loops")):
        rise = largest_rise(mtp[group][kind])
        found.append(Bar(f"MTP {kind} falls from slot to slot (largest step), {group}", "<", 0.0, rise))
    return found


def largest_rise(values: list[float | None]) -> float | None:
    """The largest step from one position to the next; below 0 where all fall. None with a value missing."""
    if len(values) < 2 or None in values:
        return None
    return max(after - before for before, after in pairwise(values))
