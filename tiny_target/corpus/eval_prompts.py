"""Writes the evaluation prompts: held-out conversations cut before their last answer, with the number that solves a math one.

``python -m tiny_target.corpus --write-prompts`` makes the file that hyperdflash.data.prompts reads; half of its math prompts
are from seen and half from unseen templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hyperdflash.contracts import DOMAINS, Conversation
from hyperdflash.data.prompts import eval_prompts_file
from hyperdflash.data.rows import to_row
from hyperdflash.files import whole_file
from tiny_target.corpus.split import heldout_kind

PROMPTS_PER_DOMAIN = 320

_ANSWER = re.compile(r"The answer is (-?\d+)\.")


def final_number(answer: str) -> int | None:
    """Returns the number in "The answer is n."; None where an answer has no such sentence."""
    found = _ANSWER.findall(answer)
    return int(found[-1]) if found else None


def as_prompt(conversation: Conversation) -> Conversation:
    """Cuts a conversation behind its last user turn; ValueError where it has none."""
    turns = conversation.turns
    while turns and turns[-1].role != "user":
        turns = turns[:-1]
    if not turns:
        raise ValueError(f"conversation {conversation.id} has no user turn, which a prompt needs: drop it from the prompts")
    return replace(conversation, turns=turns)


def choose_prompts(heldout: Iterable[Conversation], per_domain: int = PROMPTS_PER_DOMAIN) -> list[Conversation]:
    """Returns the first ``per_domain`` conversations of each domain; math takes half from each kind of template."""
    quota = {"code": per_domain, "chat": per_domain, "seen": per_domain // 2, "unseen": per_domain - per_domain // 2}
    chosen = []
    for conversation in heldout:
        group = heldout_kind(conversation.id) or conversation.domain
        if quota[group]:
            quota[group] -= 1
            chosen.append(conversation)
    if short := {group: left for group, left in quota.items() if left}:
        missing = ", ".join(f"{left} of {group}" for group, left in short.items())
        raise ValueError(
            f"the held-out split lacks prompts ({missing}); wanted {per_domain} per domain; "
            "install the project's dependencies and run `python -m tiny_target.corpus --write-prompts`"
        )
    return sorted(chosen, key=lambda conversation: DOMAINS.index(conversation.domain))


def write_prompts(heldout: Iterable[Conversation], path: Path | None = None, per_domain: int = PROMPTS_PER_DOMAIN) -> int:
    """Writes the file of prompts; returns its number of rows."""
    with whole_file(path or eval_prompts_file()) as file:
        chosen = choose_prompts(heldout, per_domain)
        for conversation in chosen:
            answer = final_number(conversation.turns[-1].content) if conversation.domain == "math" else None
            more = {} if answer is None else {"answer": answer}
            file.write((json.dumps(to_row(as_prompt(conversation), **more), ensure_ascii=False) + "\n").encode())
    return len(chosen)
