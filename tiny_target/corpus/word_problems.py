"""Arithmetic word problems with worked answers, generated from templates.

A template is a question in two wordings, ranges for its numbers, and worked steps. In the steps ``[c = a + b]``
computes: it is written out as ``3 + 4 = 7`` and binds ``c``; the last name bound is the answer.

1. draw the numbers of a template, skip draws that break its condition, do not divide evenly or were drawn before
2. draw names and things, write question and steps
3. add "The answer is n."

Everything is drawn from a generator seeded by the template's name, so that one template's problems do not depend on
the others.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.stable_hash import content_hash, unit_interval

UNSEEN_TEMPLATES = 0.10  # share of templates that appear in no training text

_NAMES_TEXT = """
Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Wendy Yusuf
Zoe Amir Bella Carlos Diana Ethan Fatima George Hana Ivan Julia Kofi Lena Marco Nina Omar Priya Tom
"""
NAMES = tuple(_NAMES_TEXT.split())
_THINGS_TEXT = """
apples pears oranges lemons plums peaches cookies muffins sandwiches eggs marbles stickers cards coins stamps shells
buttons beads pencils pens crayons notebooks books magazines postcards balloons candles flowers roses tulips blocks
toys puzzles ribbons keys bottles cups plates boxes tickets
"""
THINGS = tuple(_THINGS_TEXT.split())
CONTAINERS = tuple(["boxes", "bags", "baskets", "jars", "trays", "crates", "packs", "drawers"])
PLACES = tuple(["school", "library", "market", "park", "museum", "farm", "shop", "bakery", "garden", "station"])

_NAME = re.compile(r"[a-z]\w*")
_STEP = re.compile(r"\[(\w+) = ([^\]]+)\]")


@dataclass(frozen=True)
class Template:
    """``numbers`` maps a name to its inclusive range, ``derived`` names to expressions of earlier ones (for totals that
    divide evenly), ``condition`` is an expression of all of them and of the computed names that must hold."""

    name: str
    questions: tuple[str, ...]
    steps: str
    numbers: dict[str, tuple[int, int]]
    derived: dict[str, str]
    condition: str

    @property
    def is_unseen(self) -> bool:
        """Whether the whole template is held out."""
        return unit_interval(self.name, salt="maths template") < UNSEEN_TEMPLATES


@dataclass(frozen=True)
class Problem:
    """``key`` is equal for problems that differ in names, things and wording only."""

    template: str
    key: str
    question: str
    worked: str
    answer: int


def template(name: str, *questions: str, steps: str, when: str = "True", let: dict[str, str] | None = None, **numbers):
    """Shorthand of the template files: ``a=(2, 9)`` are ranges, ``let`` the derived numbers."""
    return Template(name, questions, steps, numbers, let or {}, when)


def _value(expression: str, numbers: dict[str, int]) -> int:
    """An expression of the template files (our own constants, never input)."""
    value = eval(expression, {"__builtins__": {}}, numbers)
    assert value == int(value), f"{expression} is not whole with {numbers}"
    return int(value)


def _work(steps: str, numbers: dict[str, int]) -> tuple[str, dict[str, int]] | None:
    """``steps`` with its computations written out, and all names bound, the last computed one last; None where a
    division leaves a rest or a result is not positive."""
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


def problems(source: Template, count: int) -> list[Problem]:
    """Up to ``count`` problems with different numbers; fewer where the ranges hold fewer."""
    rng = random.Random(f"maths {source.name}")
    found: dict[str, Problem] = {}
    for _ in range(count * 12):
        if len(found) == count:
            break
        numbers = {key: rng.randint(*span) for key, span in source.numbers.items()}
        for key, expression in source.derived.items():
            numbers[key] = _value(expression, numbers)
        first, second = rng.sample(NAMES, 2)
        thing, other = rng.sample(THINGS, 2)
        words = dict(N=first, M=second, x=thing, y=other, box=rng.choice(CONTAINERS), place=rng.choice(PLACES))
        question = rng.choice(source.questions)
        key = f"{source.name} {sorted(numbers.items())}"
        work = _work(source.steps, numbers)
        if key in found or words["box"] in (thing, other) or work is None or not _holds(source.condition, work[1]):
            continue
        worked, bound = work
        answer = list(bound.values())[-1]
        text = worked.format(**words, **numbers)
        found[key] = Problem(source.name, key, question.format(**words, **numbers), f"{text} The answer is {answer}.", answer)
    return list(found.values())


def _holds(condition: str, numbers: dict[str, int]) -> bool:
    return bool(eval(condition, {"__builtins__": {}}, numbers))


def as_conversation(problem: Problem, *, unseen_template: bool) -> Conversation:
    """One user turn and its worked answer; the id tells whether training saw the template."""
    kind = "unseen" if unseen_template else "seen"
    turns = (Turn("user", problem.question), Turn("assistant", problem.worked))
    return Conversation(f"math/{kind}/{content_hash(turns[0].content + turns[1].content)}", "math", turns)
