"""What greedy answers look like: do they end, loop, parse, and is the arithmetic right?"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from tiny_target.corpus.eval_prompts import final_number


@dataclass(frozen=True)
class Answer:
    """A prompt's last answer. ``wanted`` the right final number of a maths prompt, None elsewhere."""

    id: str
    group: str
    question: str
    text: str
    num_tokens: int
    ended: bool
    looped: bool
    wanted: int | None = None


def parses(text: str) -> bool:
    """Whether ``text`` is Python with at least one statement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in strings
        try:
            return bool(ast.parse(text).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False


def answer_figures(answers: Sequence[Answer]) -> dict:
    """Shares over the answers of one group; ``parse*`` for code, ``right`` for maths, None where it does not apply or
    there is nothing to divide by."""
    code = answers and answers[0].group == "code"
    maths = [a for a in answers if a.wanted is not None]
    ended = [a for a in answers if a.ended]
    return {
        "prompts": len(answers),
        "ended": share(answers, lambda a: a.ended),
        "looped": share(answers, lambda a: a.looped),
        "mean_tokens": sum(a.num_tokens for a in answers) / len(answers) if answers else None,
        "parses": share(answers, lambda a: parses(a.text)) if code else None,
        "parses_of_ended": share(ended, lambda a: parses(a.text)) if code else None,
        "right": share(maths, lambda a: final_number(a.text) == a.wanted),
    }


def share(items: Sequence, holds) -> float | None:
    """Share of ``items`` for which ``holds``; None of none."""
    return sum(map(bool, map(holds, items))) / len(items) if items else None
