"""Functions -> instruction and code (Evol-CodeAlpaca's shape: one user turn, one answer that is the code alone)."""

from __future__ import annotations

import ast

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.stable_hash import content_hash, unit_interval
from tiny_target.corpus.definitions import FunctionDefinition

MIN_CHARS, MAX_CHARS, MAX_LINE_CHARS = 40, 900, 140
SHORT_CHARS = 220  # every function up to here is taken; longer ones with a share that falls as SHORT_CHARS / length

_VERBS_TEXT = """
accept add adjust align allocate append apply assemble assert assign attach await bind block broadcast build cache
calculate call cancel cast change check choose clean clear clip clone close collapse collect combine compare compile
complete compute concatenate configure connect construct consume convert copy count create cut debug decide decode
decompose decorate define delete derive deserialize destroy detach detect determine disable disconnect dispatch
display divide download draw drop dump emit enable encode ensure enter enumerate escape estimate evaluate execute
exit expand export extend extract factor fetch fill filter find finish fix flatten flush fold force format forward
gather generate get give group guess handle hash hide identify implement import include increment indicate infer
init initialize insert inspect install instantiate integrate interpolate interpret intersect invert invoke iterate
join keep launch limit list load locate lock log look lower make map mark mask match measure merge modify move
multiply negate normalize notify obtain open order override pack pad parse partition patch perform permute pick plot
poll pop populate prepare prepend preprocess print process produce prune pull push put query quote raise read
rebuild receive record recover redirect reduce refresh register release reload remove rename render repeat replace
report represent request require reset reshape resize resolve restore retrieve return reverse rewrite rotate round
run sample save scale scan schedule search select send separate serialize set show shift shuffle shut signal
simplify skip slice solve sort specify split start stop store strip subtract sum suppress swap switch synchronize
take tell terminate test tokenize trace track train transform translate transpose traverse trigger trim truncate try
turn unpack update upload use validate verify view visit wait walk warn wrap write yield
"""
VERBS = frozenset(_VERBS_TEXT.split())


def third_person(verb: str) -> str:
    """``return`` -> ``returns``, ``fetch`` -> ``fetches``, ``apply`` -> ``applies``."""
    if verb.endswith(("s", "x", "z", "ch", "sh")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


_THIRD_PERSON = {third_person(verb): verb for verb in VERBS}

_WITH_VERB = (
    "Write a Python {kind} `{signature}`{owner} that {does}.",
    "Write a {kind} `{signature}`{owner} that {does}.",
    "Implement the Python {kind} `{signature}`{owner}, which {does}.",
    "Create a Python {kind} `{signature}`{owner} that {does}.",
    "I need a {kind} `{signature}`{owner} that {does}.",
    "Please write the {kind} `{signature}`{owner}. It {does}.",
    "Define a {kind} `{signature}`{owner} to {do}.",
    "How would you write a {kind} `{signature}`{owner} that {does}?",
)
_WITH_DESCRIPTION = (
    "Write a Python {kind} `{signature}`{owner}. Description: {sentence}",
    "Implement the Python {kind} `{signature}`{owner}. This is what it is for: {sentence}",
    "Write the {kind} `{signature}`{owner} from its description. {sentence}",
    "Complete the {kind} `{signature}`{owner}, described as follows. {sentence}",
)


def _instruction(function: FunctionDefinition) -> str:
    sentence = function.sentences[0]
    first, _, rest = sentence.rstrip(".").partition(" ")
    word = first.lower()
    verb = word if word in VERBS else _THIRD_PERSON.get(word)
    wordings = _WITH_VERB if verb and rest else _WITH_DESCRIPTION
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
    """Whether a function makes a good answer: short, plain characters, no overlong line."""
    source = function.source
    if not MIN_CHARS <= len(source) <= MAX_CHARS or not source.isascii() or len(function.signature) > 120:
        return False
    if max(map(len, source.splitlines())) > MAX_LINE_CHARS:
        return False
    return unit_interval(source, salt="length") < SHORT_CHARS / len(source)


def code_task(function: FunctionDefinition) -> Conversation | None:
    """The conversation of one function; None where it makes no good answer or does not parse on its own."""
    if not is_taken(function):
        return None
    try:
        ast.parse(function.source)
    except (SyntaxError, ValueError):
        return None
    turns = (Turn("user", _instruction(function)), Turn("assistant", function.source))
    return Conversation(f"code/{content_hash(turns[0].content + turns[1].content)}", "code", turns)
