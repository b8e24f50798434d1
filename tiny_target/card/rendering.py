"""Computes a card's thresholds, and renders its Markdown from model_card.json by template.md."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, StrictUndefined

RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Threshold:
    """The condition ``measured`` ``relation`` ``asked``; ``form`` formats both numbers."""

    name: str
    relation: str
    asked: float | None
    measured: float | None
    form: str = ",.3f"

    @property
    def met(self) -> bool:
        if self.asked is None or self.measured is None:
            return False
        return RELATIONS[self.relation](self.measured, self.asked)

    def written(self, value: float | None) -> str:
        return "n/a" if value is None else format(value, self.form)


def thresholds(card: dict) -> list[Threshold]:
    """Returns every threshold of a target from a card's numbers; a figure without a measurement (None) misses its threshold."""
    answers, mtp, target = card["answers"], card["mtp"], card["target"]
    found = [
        Threshold("parameters with MTP", "<=", 3_700_000, target["parameters"], ",.0f"),
        Threshold("file, bytes", "<=", 8_000_000, target["file_bytes"], ",.0f"),
        Threshold("context, tokens", ">=", 2048, target["context"], ",.0f"),
    ]
    if card["training"]:
        found.append(Threshold("training, minutes", "<=", 90, card["training"]["minutes"], ",.0f"))
    found.append(Threshold("code answers that parse", ">=", 0.6, answers["code"]["parses"], ".1%"))
    for group, row in answers.items():
        found.append(Threshold(f"answers that end, {group}", ">=", 0.9, row["ended"], ".1%"))
    for group, row in answers.items():
        found.append(Threshold(f"answers that end in a loop, {group}", "<=", 0.1, row["looped"], ".1%"))
    found.append(Threshold("arithmetic right, seen templates", ">=", 0.5, answers["math seen"]["right"], ".1%"))
    # A loop is easy to draft, so the figures without loops stand beside.
    for group in ("code", "code, no loops"):
        found.append(Threshold(f"MTP first slot, {group}", ">", 0.8, mtp[group]["conditional"][0]))
    # The paper does not specify which of the two its Figure 1 shows.
    for kind, group in (("survival", "code"), ("conditional", "code"), ("conditional", "code, no loops")):
        rise = largest_rise(mtp[group][kind])
        found.append(Threshold(f"MTP {kind} falls from slot to slot (largest step), {group}", "<", 0.0, rise))
    return found


def largest_rise(values: list[float | None]) -> float | None:
    """Returns the largest step from one position to the next, below 0 where all fall; None where a value is absent."""
    if len(values) < 2 or None in values:
        return None
    return max(after - before for before, after in pairwise(values))


def markdown(card: dict) -> str:
    """Renders model_card.md."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters |= {"form": lambda value, spec: "" if value is None else format(value, spec), "fenced": fenced}
    template = environment.from_string(Path(__file__).with_name("template.md").read_text(encoding="utf-8"))
    return template.render({**card, "thresholds": thresholds(card)})


def fenced(text: str) -> list[str]:
    """Encloses ``text`` in a fence that it cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}text", text, fence]
