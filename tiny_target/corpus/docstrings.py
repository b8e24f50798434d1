"""Extracts plain sentences from docstrings: complete sentences without markup, one space between words."""

from __future__ import annotations

import re

_ROLE = re.compile(r":[\w:+-]+:`~?\.?([^`<]*?)(?:\s*<[^`]*>)?`_*")
_LITERAL = re.compile(r"``([^`]+)``")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*")
_FIELD = re.compile(r"^\s*(:\w[^:]*:|@\w+|\w[\w ]*:\s*$|[-=~^*]{3,}|>>>|\.\. |\$ |[*+-] |\d+[.)] )")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<!cf\.)(?<!Fig\.)(?<!Eq\.)\s+(?=[A-Z`])")
_MARKUP = re.compile(r"::|>>>|\.\. |\||\\|http|\*\*|[<>]{2}|%\(|\{\{|:\w+:|__doc|TODO|XXX|FIXME|\$|\*\w")


def paragraphs(doc: str) -> list[str]:
    """Returns the prose paragraphs of a docstring in order, up to the first section, list, code block or field."""
    found: list[str] = []
    for block in re.split(r"\n\s*\n", doc.strip()):
        lines = block.splitlines()
        if any(_FIELD.match(line) for line in lines) or "::" in block or (found and block.startswith(("  ", "\t"))):
            break
        found.append(clean(block))
    return found


def clean(text: str) -> str:
    """Reduces markup roles, literals and links to `name`, and collapses white space."""
    text = _ROLE.sub(r"`\1`", text)
    text = _LITERAL.sub(r"`\1`", text)
    text = _LINK.sub(r"\1", text)
    return " ".join(text.split())


def sentences(text: str, *, shortest: int = 12, longest: int = 180) -> list[str]:
    """Returns complete sentences from the start of ``text`` up to the first that is not plain; lengths in characters.

    A sentence is plain if it is ASCII, starts with a capital, ends with a full stop and has no markup left.
    """
    found = []
    for sentence in _SENTENCE_END.split(text):
        sentence = sentence.strip()
        if not found and sentence and sentence[-1].isalnum() and sentence == text:
            sentence += "."  # a summary line without its full stop
        if not found and sentence[:1].islower() and sentence.split(" ")[0].isalpha():
            sentence = sentence[0].upper() + sentence[1:]
        plain = (
            shortest <= len(sentence) <= longest
            and sentence.isascii()
            and sentence.isprintable()
            and sentence.endswith(".")
            and not sentence.endswith("..")
            and sentence[0].isupper()
            and " " in sentence
            and sentence.count("`") % 2 == 0
            and sentence.count("(") == sentence.count(")")
            and not _MARKUP.search(sentence)
        )
        if not plain:
            break
        found.append(sentence)
    return found


def summary_sentences(doc: str | None, *, at_most: int = 4) -> list[str]:
    """Returns the plain sentences that open a docstring; [] if it opens with anything else."""
    if not doc:
        return []
    opening = paragraphs(doc)
    found = sentences(opening[0]) if opening else []
    if not found:
        return []
    for block in opening[1:]:
        if len(found) >= at_most:
            break
        more = sentences(block)
        if not more or more[0] in found:
            break
        found.extend(more)
    return found[:at_most]
