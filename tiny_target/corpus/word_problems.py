"""Generates arithmetic word problems with worked answers from problem_templates.toml, which explains its fields.

1. tables        [templates.NAME] -> ``Template``; [[chains]] -> one ``Template`` per start and chain of events in the family's
                 table, in all wordings of its parts, so that chains share parts; one with ``with`` -> one per row
2. numbers       drawn from the template's ranges; no draw breaks its condition, leaves a remainder or repeats an earlier one
3. text          question and steps with drawn names and things: ``[c = a + b]`` becomes ``3 + 4 = 7``, and the last result is
                 the answer, in "The answer is n."

The generator's seed is the template's name, so that the problems of a template do not depend on other templates.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.stable_hash import content_hash, unit_interval
from tiny_target.corpus.words import words

UNSEEN_TEMPLATES = 0.10  # share of templates without training text
LARGEST_RESULT = 200  # of a chain

_WORDS = words("problems")
_NAME = re.compile(r"[a-z]\w*")
_STEP = re.compile(r"\[(\w+) = ([^\]]+)\]")
_PLACE_HOLDERS = re.compile(r"\{\w+\}|\[[^\]]+\]")
_EVENT_NAME = re.compile(r"\b[kmuvw]\b")


@dataclass(frozen=True)
class Part:
    """A start or an event of a chain. ``numbers`` maps a name to its inclusive range, ``derived`` a name to an expression of
    earlier names."""

    wordings: tuple[str, ...]
    steps: str
    numbers: dict[str, tuple[int, int]]
    derived: dict[str, str]


@dataclass(frozen=True)
class Template:
    """The fields are those of ``Part``, ``wordings`` as ``questions``; ``condition`` is an expression of all names that must
    hold; ``family`` is None outside a chain."""

    name: str
    questions: tuple[str, ...]
    steps: str
    numbers: dict[str, tuple[int, int]]
    derived: dict[str, str]
    condition: str = "True"
    family: str | None = None

    @property
    def is_unseen(self) -> bool:
        """Tells whether the whole template is held out."""
        return unit_interval(self.name, salt="maths template") < UNSEEN_TEMPLATES


@dataclass(frozen=True)
class Problem:
    """Problems that differ only in names, things and wording have equal ``key``."""

    template: str
    key: str
    question: str
    worked: str
    answer: int


@cache
def templates() -> tuple[Template, ...]:
    """Returns all templates in the file's order, single ones first, then chains."""
    tables = tomllib.loads(Path(__file__).with_name("problem_templates.toml").read_text(encoding="utf-8"))
    found = []
    for key, table in tables["templates"].items():
        for name, row in _expanded(key, table):
            part = _part({**row, "wordings": row["questions"]})
            found.append(Template(name, part.wordings, part.steps, part.numbers, part.derived, row.get("when", "True")))
    for table in tables["chains"]:
        for name, family in _expanded(table["family"], table):
            parts = {key: _part(part) for kind in ("starts", "events") for key, part in family[kind].items()}
            for line in family["table"].strip().splitlines():
                start, *rows = line.split()
                for row in rows:
                    events = [parts[key] for key in row.split("+")]
                    found.append(chain(f"{name}_{start}_{row}", parts[start], *events, family=name))
    return tuple(found)


def _expanded(name: str, table: dict) -> Iterator[tuple[str, dict]]:
    """Yields name and table per row of ``with`` with <key> replaced; the table itself without ``with``."""
    for row in table.get("with", [{}]):
        text = json.dumps([name, table])
        for key, value in row.items():
            text = text.replace(f"<{key}>", value)
        yield tuple(json.loads(text))


def _part(table: dict) -> Part:
    numbers = {name: tuple(span) for name, span in table.get("numbers", {}).items()}
    return Part(tuple(table["wordings"]), table.get("steps", ""), numbers, table.get("let", {}))


def chain(name: str, start: Part, *events: Part, family: str | None = None) -> Template:
    """Builds one template: the steps in order, every combination of wordings, all results in 2 .. LARGEST_RESULT."""
    steps, numbers, wordings, quantity = [start.steps], dict(start.numbers), [start.wordings], "a"
    for position, event in enumerate((start, *events)):
        if position:
            is_last = position == len(events)
            halves = [[half.strip() for half in text.split("|")] for text in event.wordings]
            texts = (" ".join(filter(None, both)) if is_last else both[0] for both in halves)
            wordings.append(tuple(_numbered(text, quantity, position) for text in texts))
            steps.append(_numbered(event.steps, quantity, position))
            numbers |= {f"{key}{position}": span for key, span in event.numbers.items()}
        quantity = ([quantity] + [result for result, _ in _STEP.findall(steps[-1])])[-1]
    worked = " ".join(filter(None, steps))
    bounds = " and ".join(f"1 < {result} <= {LARGEST_RESULT}" for result, _ in _STEP.findall(worked))
    questions = tuple(map(" ".join, product(*wordings)))
    return Template(name, questions, worked, numbers, start.derived, bounds, family)


def _numbered(text: str, quantity: str, position: int) -> str:
    """Replaces ``u`` by the current quantity in an event's text, and numbers its other names by the event's position."""

    def rename(name: re.Match) -> str:
        return quantity if name.group() == "u" else f"{name.group()}{position}"

    return _PLACE_HOLDERS.sub(lambda holder: _EVENT_NAME.sub(rename, holder.group()), text)


def problems(source: Template, count: int) -> list[Problem]:
    """Returns up to ``count`` problems with different numbers; fewer where the ranges have fewer."""
    rng = random.Random(f"maths {source.name}")
    found: dict[str, Problem] = {}
    for _ in range(count * 12):
        if len(found) == count:
            break
        numbers = {key: rng.randint(*span) for key, span in source.numbers.items()}
        for key, expression in source.derived.items():
            numbers[key] = _value(expression, numbers)
        first, second = rng.sample(_WORDS["names"], 2)
        thing, other = rng.sample(_WORDS["things"], 2)
        box, place = rng.choice(_WORDS["containers"]), rng.choice(_WORDS["places"])
        given = {"N": first, "M": second, "x": thing, "y": other, "box": box, "place": place, **numbers}
        question = rng.choice(source.questions)
        key = f"{source.name} {sorted(numbers.items())}"
        work = _work(source.steps, numbers)
        if key in found or box in (thing, other) or work is None or not _value(source.condition, work[1]):
            continue
        text, bound = work
        answer = list(bound.values())[-1]
        worked = f"{text.format(**given)} The answer is {answer}."
        found[key] = Problem(source.name, key, question.format(**given), worked, answer)
    return list(found.values())


def _work(steps: str, numbers: dict[str, int]) -> tuple[str, dict[str, int]] | None:
    """Writes out the computations of ``steps``; returns the text and all names with values, the last computed one last.

    None where a division has a remainder or a result is not positive.
    """
    bound = dict(numbers)
    for name, expression in _STEP.findall(steps):
        if "/" in expression and _value(expression.replace("/", "%"), bound):
            return None
        bound[name] = _value(expression, bound)
        if bound[name] < 1:
            return None

    def write(match: re.Match) -> str:
        name, expression = match.groups()
        return f"{_NAME.sub(lambda found: str(bound[found.group()]), expression)} = {bound[name]}"

    return _STEP.sub(write, steps), bound


def _value(expression: str, numbers: dict[str, int]) -> int:
    """Evaluates an expression of the template file (our own constants, never input)."""
    value = eval(expression, {"__builtins__": {}}, numbers)
    assert value == int(value), f"{expression} is not whole with {numbers}"
    return int(value)


def as_conversation(problem: Problem, *, unseen_template: bool) -> Conversation:
    """Returns one user turn and its worked answer; the id tells whether training sees the template."""
    kind = "unseen" if unseen_template else "seen"
    turns = (Turn("user", problem.question), Turn("assistant", problem.worked))
    return Conversation(f"math/{kind}/{content_hash(turns[0].content + turns[1].content)}", "math", turns)
