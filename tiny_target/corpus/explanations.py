"""Turns definitions and Python's reference topics into short explanations of one to three exchanges, as in EagleChat."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.stable_hash import content_hash, unit_interval
from tiny_target.corpus.definitions import FunctionDefinition, NamespaceDefinition
from tiny_target.corpus.docstrings import clean, sentences
from tiny_target.corpus.words import words

_MAX_ANSWER_CHARS = 320
_MAX_NAME_CHARS = 64  # longer dotted names are left out

_WORDS = words("explanations")
_TOPIC_WORDS = words("topics")
_QUOTED = re.compile(r'"([^"\s]{1,24})"')

Exchange = tuple[str, str]  # question and answer


def explain_function(function: FunctionDefinition) -> Conversation | None:
    """Explains a function or method: its purpose, then its arguments, a call, its module or more of its docstring."""
    owner = f"{function.module}.{function.class_name}" if function.class_name else function.module
    kind, place = ("method", f"a method of the class `{function.class_name}` in") if function.class_name else ("function", "in")
    first, more = _opening(function.sentences)
    follow_ups = [
        ("arguments", _arguments(function.arguments)),
        ("example", _example_call(function)),
        ("module", f"It is {place} the module `{function.module}`."),
        *more,
    ]
    return _explanation(f"{owner}.{function.name}", kind, function.sentences[0], first, follow_ups)


def explain_namespace(item: NamespaceDefinition) -> Conversation | None:
    """Explains a class or a module: its purpose, then its members, bases, place or more; None if too long."""
    first, follow_ups = _opening(item.sentences)
    if item.kind == "class":
        bases = f"It inherits from {_spoken_list(item.bases[:3])}." if item.bases else "It has no base class."
        follow_ups += [("module", f"It is in the module `{item.module}`."), ("bases", bases)]
        members = (("methods", item.members),)
    else:
        members = (("functions", item.members), ("classes", item.classes))
    follow_ups += [(plural, _members(names, plural)) for plural, names in members if names]
    name = f"{item.module}.{item.name}" if item.kind == "class" else item.module
    return _explanation(name, item.kind, item.sentences[0], first, follow_ups)


def explain_topic(name: str, topic: str) -> Iterator[Conversation]:
    """Yields one conversation per prose paragraph that opens with a plain sentence and names something in quotes."""
    for block in re.split(r"\n\s*\n", topic):
        text = re.sub(r"\*(\w[^*]*)\*", r"\1", clean(block))
        subject = _QUOTED.search(text)
        found = sentences(_QUOTED.sub(r"`\1`", text), longest=240)
        if not subject or not found or subject.group(1).count("`"):
            continue
        asked = _drawn(_TOPIC_WORDS["questions"], text, "topic wording")
        exchanges = [(asked.format(subject=f"`{subject.group(1)}`", topic=name.replace("-", " ")), " ".join(found[:2]))]
        if len(found) > 2:
            exchanges.append((_drawn(_TOPIC_WORDS["further"], text, "topic further"), " ".join(found[2:4])))
        yield _conversation(exchanges)


def _explanation(name: str, kind: str, sentence: str, first: str, follow_ups: Sequence[Exchange]) -> Conversation | None:
    """Asks for ``name`` and up to two of ``follow_ups`` (subject of the question, answer), drawn by name and ``sentence``."""
    text = f"{name} {sentence}"
    questions = _WORDS["function_questions" if kind == "method" else f"{kind}_questions"]
    order = sorted(range(len(follow_ups)), key=lambda index: unit_interval(text, salt=f"follow-up {index}"))
    exchanges = [(_drawn(questions, text, "question").format(kind=kind, name=name), first)]
    for index in order[: _drawn((0, 1, 1, 2, 2), text, "exchanges")]:
        subject, answer = follow_ups[index]
        exchanges.append((_drawn(_WORDS[subject], text, subject), answer))
    turns = [turn for exchange in exchanges for turn in exchange]
    if len(name) > _MAX_NAME_CHARS or not all(map(str.isascii, turns)) or max(map(len, turns)) > 400:
        return None
    return _conversation(exchanges)


def _conversation(exchanges: Sequence[Exchange]) -> Conversation:
    turns = tuple(turn for asked, answered in exchanges for turn in (Turn("user", asked), Turn("assistant", answered)))
    text = "\n".join(turn.content for turn in turns)
    return Conversation(f"chat/{content_hash(text)}", "chat", turns)


def _drawn(options: Sequence, text: str, salt: str):
    """Draws one of ``options`` by ``text`` and ``salt``."""
    return options[int(unit_interval(text, salt=salt) * len(options))]


def _opening(sentences: Sequence[str]) -> tuple[str, list[Exchange]]:
    """Returns the first answer and, where there are more sentences, the follow-up "more"; each has at most two sentences."""
    take = 2 if len(sentences) > 1 and len(sentences[0]) + len(sentences[1]) < _MAX_ANSWER_CHARS else 1
    first, rest = " ".join(sentences[:take]), " ".join(sentences[take : take + 2])
    return first, [("more", rest if len(rest) <= _MAX_ANSWER_CHARS else sentences[take])] if rest else []


def _arguments(arguments: Sequence[str]) -> str:
    """Answers "What arguments does it take?" and states at most two defaults."""
    if not arguments:
        return "It takes no arguments."
    split = [argument.partition("=") for argument in arguments]
    names = [name for name, _, _ in split]
    count = "one argument, " if len(names) == 1 else f"{len(names)} arguments: "
    defaults = [f" The default of `{name}` is `{value}`." for name, equals, value in split if equals]
    return f"It takes {count}{_spoken_list(names)}.{''.join(defaults[:2])}"


def _example_call(function: FunctionDefinition) -> str:
    """Returns a call with the required arguments by their names."""
    required = ", ".join(argument for argument in function.arguments if "=" not in argument and not argument.startswith("*"))
    owner = f"{function.class_name.lower().strip('_')}." if function.class_name else ""
    wait = "await " if function.is_async else ""
    return f"For example, `{wait}{owner}{function.name}({required})`."


def _members(names: Sequence[str], plural: str) -> str:
    if len(names) > 5:
        return f"It defines {len(names)} {plural}. The first are {_spoken_list(names[:4])}."
    singular = "class" if plural == "classes" else plural.removesuffix("s")
    return f"It defines the {singular if len(names) == 1 else plural} {_spoken_list(names)}."


def _spoken_list(items: Sequence[str]) -> str:
    """Joins items in prose: `a`, `b` and `c`."""
    quoted = [f"`{item}`" for item in items]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
