"""Turns Python's own reference topics (``pydoc_data.topics``) into explanations, one conversation per paragraph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.stable_hash import content_hash, unit_interval
from tiny_target.corpus.docstrings import clean, sentences
from tiny_target.corpus.words import words

_WORDS = words("topics")
_QUOTED = re.compile(r'"([^"\s]{1,24})"')


@dataclass(frozen=True)
class Topic:
    """A topic's name and its plain text."""

    name: str
    text: str


def reference_topics() -> list[Topic]:
    """Returns the topics of the running Python by name."""
    from pydoc_data.topics import topics

    return [Topic(name, text) for name, text in sorted(topics.items())]


def explain_topic(topic: Topic) -> Iterator[Conversation]:
    """Yields one conversation per prose paragraph that opens with a plain sentence and names something in quotes."""
    for block in re.split(r"\n\s*\n", topic.text):
        text = re.sub(r"\*(\w[^*]*)\*", r"\1", clean(block))
        subject = _QUOTED.search(text)
        found = sentences(_QUOTED.sub(r"`\1`", text), longest=240)
        if not subject or not found or subject.group(1).count("`"):
            continue
        asked = _drawn("questions", text, "topic wording").format(
            subject=f"`{subject.group(1)}`", topic=topic.name.replace("-", " ")
        )
        turns = [Turn("user", asked), Turn("assistant", " ".join(found[:2]))]
        if len(found) > 2:
            turns += [Turn("user", _drawn("further", text, "topic further")), Turn("assistant", " ".join(found[2:4]))]
        whole = "\n".join(turn.content for turn in turns)
        yield Conversation(f"chat/{content_hash(whole)}", "chat", tuple(turns))


def _drawn(wordings: str, text: str, salt: str) -> str:
    return _WORDS[wordings][int(unit_interval(text, salt=salt) * len(_WORDS[wordings]))]
