"""Turns functions into an instruction and code, as Evol-CodeAlpaca does: one user turn, one answer with only the code."""

from __future__ import annotations

import ast

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.stable_hash import content_hash, unit_interval
from tiny_target.corpus.definitions import FunctionDefinition
from tiny_target.corpus.words import words

MIN_CHARS, MAX_CHARS, MAX_LINE_CHARS = 40, 900, 140
SHORT_CHARS = 220  # takes every function up to this length, and a share SHORT_CHARS / length of longer ones

_WORDS = words("code")
VERBS = frozenset(_WORDS["verbs"])


def third_person(verb: str) -> str:
    """Conjugates a verb: ``return`` -> ``returns``, ``fetch`` -> ``fetches``, ``apply`` -> ``applies``."""
    if verb.endswith(("s", "x", "z", "ch", "sh")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


_THIRD_PERSON = {third_person(verb): verb for verb in VERBS}


def _instruction(function: FunctionDefinition) -> str:
    sentence = function.sentences[0]
    first, _, rest = sentence.rstrip(".").partition(" ")
    word = first.lower()
    verb = word if word in VERBS else _THIRD_PERSON.get(word)
    wordings = _WORDS["with_verb" if verb and rest else "with_description"]
    choice = unit_interval(function.source, salt="instruction wording")
    kind = ("async " if function.is_async else "") + ("method" if function.class_name else "function")
    return wordings[int(choice * len(wordings))].format(
        kind=kind,
        signature=function.signature,
        owner=f" of the class `{function.class_name}`" if function.class_name else "",
        does=f"{third_person(verb)} {rest}" if verb else "",
        do=f"{verb} {rest}" if verb else "",
        sentence=sentence,
    )


def is_taken(function: FunctionDefinition) -> bool:
    """Tells whether a function makes a good answer: short, plain characters, no overlong line."""
    source = function.source
    if not MIN_CHARS <= len(source) <= MAX_CHARS or not source.isascii() or len(function.signature) > 120:
        return False
    if max(map(len, source.splitlines())) > MAX_LINE_CHARS:
        return False
    return unit_interval(source, salt="length") < SHORT_CHARS / len(source)


def code_task(function: FunctionDefinition) -> Conversation | None:
    """Returns the conversation of one function; None where it makes no good answer or does not parse on its own."""
    if not is_taken(function):
        return None
    try:
        ast.parse(function.source)
    except (SyntaxError, ValueError):
        return None
    turns = (Turn("user", _instruction(function)), Turn("assistant", function.source))
    return Conversation(f"code/{content_hash(turns[0].content + turns[1].content)}", "code", turns)
