"""Turns definitions into short explanations of one to three exchanges, as in EagleChat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.stable_hash import content_hash, unit_interval
from tiny_target.corpus.definitions import FunctionDefinition, NamespaceDefinition
from tiny_target.corpus.words import words

_MAX_ANSWER_CHARS = 320
_MAX_NAME_CHARS = 64  # longer dotted names are left out

_WORDS = words("explanations")


def spoken_list(items: Sequence[str]) -> str:
    """Joins items in prose: `a`, `b` and `c`."""
    quoted = [f"`{item}`" for item in items]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def arguments_sentence(arguments: Sequence[str]) -> str:
    """Returns the answer to "What arguments does it take?"; it states at most two defaults."""
    if not arguments:
        return "It takes no arguments."
    names = [argument.partition("=")[0] for argument in arguments]
    text = (
        f"It takes one argument, `{names[0]}`."
        if len(names) == 1
        else f"It takes {len(names)} arguments: {spoken_list(names)}."
    )
    defaults = [argument.partition("=") for argument in arguments if "=" in argument]
    for name, _, value in defaults[:2]:
        text += f" The default of `{name}` is `{value}`."
    return text


def example_call(function: FunctionDefinition) -> str:
    """Returns a call with the required arguments by their names."""
    required = ", ".join(argument for argument in function.arguments if "=" not in argument and not argument.startswith("*"))
    owner = f"{function.class_name.lower().strip('_')}." if function.class_name else ""
    wait = "await " if function.is_async else ""
    return f"For example, `{wait}{owner}{function.name}({required})`."


def _opening(sentences: Sequence[str]) -> tuple[str, str]:
    """Returns (first answer, rest for a follow-up), each of at most two sentences."""
    take = 2 if len(sentences) > 1 and len(sentences[0]) + len(sentences[1]) < _MAX_ANSWER_CHARS else 1
    first, rest = " ".join(sentences[:take]), " ".join(sentences[take : take + 2])
    return first, rest if len(rest) <= _MAX_ANSWER_CHARS else sentences[take]


class _Choices:
    """Draws options by the definition's own text and a salt."""

    def __init__(self, text: str):
        self.text = text

    def one(self, options: Sequence, salt: str):
        return options[int(unit_interval(self.text, salt=salt) * len(options))]

    def follow_ups(self, available: Sequence[Callable[[], tuple[str, str]]]) -> list[tuple[str, str]]:
        """Returns no, one or two (question, answer) pairs in a drawn order."""
        order = sorted(range(len(available)), key=lambda index: unit_interval(self.text, salt=f"follow-up {index}"))
        count = self.one((0, 1, 1, 2, 2), "exchanges")
        return [available[index]() for index in order[:count]]


def _conversation(question: str, answer: str, follow_ups: Sequence[tuple[str, str]]) -> Conversation | None:
    turns = [Turn("user", question), Turn("assistant", answer)]
    for asked, answered in follow_ups:
        turns += [Turn("user", asked), Turn("assistant", answered)]
    text = "\n".join(turn.content for turn in turns)
    if not text.isascii() or max(len(turn.content) for turn in turns) > 400:
        return None
    return Conversation(f"chat/{content_hash(text)}", "chat", tuple(turns))


def explain_function(function: FunctionDefinition) -> Conversation | None:
    """Explains a function or method: its purpose, then its arguments, a call, its module or more of its docstring."""
    owner = f"{function.module}.{function.class_name}" if function.class_name else function.module
    name = f"{owner}.{function.name}"
    if len(name) > _MAX_NAME_CHARS:
        return None
    choices = _Choices(f"{name} {function.sentences[0]}")
    kind = "method" if function.class_name else "function"
    first, rest = _opening(function.sentences)
    where = (
        f"It is a method of the class `{function.class_name}` in the module" if function.class_name else "It is in the module"
    )
    available = [
        lambda: (choices.one(_WORDS["arguments"], "arguments"), arguments_sentence(function.arguments)),
        lambda: (choices.one(_WORDS["example"], "example"), example_call(function)),
        lambda: (choices.one(_WORDS["module"], "module"), f"{where} `{function.module}`."),
    ]
    if rest:
        available.append(lambda: (choices.one(_WORDS["more"], "more"), rest))
    question = choices.one(_WORDS["function_questions"], "question").format(kind=kind, name=name)
    return _conversation(question, first, choices.follow_ups(available))


def explain_namespace(item: NamespaceDefinition) -> Conversation | None:
    """Explains a class or a module: its purpose, then its members, bases, place or more; None if too long."""
    name = f"{item.module}.{item.name}" if item.kind == "class" else item.module
    if len(name) > _MAX_NAME_CHARS:
        return None
    choices = _Choices(f"{name} {item.sentences[0]}")
    first, rest = _opening(item.sentences)
    available = []
    if rest:
        available.append(lambda: (choices.one(_WORDS["more"], "more"), rest))
    if item.kind == "class":
        available.append(lambda: (choices.one(_WORDS["module"], "module"), f"It is in the module `{item.module}`."))
        bases = f"It inherits from {spoken_list(item.bases[:3])}." if item.bases else "It has no base class."
        available.append(lambda: (choices.one(_WORDS["bases"], "bases"), bases))
        if item.members:
            available.append(lambda: (choices.one(_WORDS["methods"], "methods"), _members(item.members, "method")))
    else:
        if item.members:
            available.append(lambda: (choices.one(_WORDS["functions"], "functions"), _members(item.members, "function")))
        if item.classes:
            available.append(lambda: (choices.one(_WORDS["classes"], "classes"), _members(item.classes, "class")))
    questions = _WORDS["class_questions" if item.kind == "class" else "module_questions"]
    return _conversation(choices.one(questions, "question").format(name=name), first, choices.follow_ups(available))


def _members(names: Sequence[str], kind: str) -> str:
    plural = "classes" if kind == "class" else kind + "s"
    if len(names) > 5:
        return f"It defines {len(names)} {plural}. The first are {spoken_list(names[:4])}."
    return f"It defines the {kind if len(names) == 1 else plural} {spoken_list(names)}."
