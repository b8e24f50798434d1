"""The committed evaluation prompts: held-out conversations cut before their last answer.

Written by ``python -m tiny_target.corpus --write-prompts`` and read everywhere else, so that an evaluation does not depend on
which packages are installed. Maths prompts are half from seen and half from unseen templates and keep their answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import DOMAINS, Conversation
from hyperdflash.data.chat import Mode
from hyperdflash.data.lengths import fitting_prompts
from hyperdflash.data.rows import from_row
from hyperdflash.files import resource
from hyperdflash.settings import positive_int


def eval_prompts_file() -> Path:
    """Where the committed evaluation prompts lie."""
    return resource("assets") / "eval_prompts.jsonl"


def as_prompt(conversation: Conversation) -> Conversation:
    """The conversation up to its last user turn."""
    turns = conversation.turns
    while turns and turns[-1].role != "user":
        turns = turns[:-1]
    if not turns:
        raise ValueError(f"conversation {conversation.id} has no user turn; a prompt needs one; drop it from the prompts")
    return replace(conversation, turns=turns)


@lru_cache(maxsize=4)
def _rows(path: Path) -> tuple[dict, ...]:
    if not path.is_file():
        raise ValueError(f"no evaluation prompts at {path}; make them with `python -m tiny_target.corpus --write-prompts`")
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def load_eval_prompts(domain: str | None = None, path: Path | None = None) -> list[Conversation]:
    """Held-out prompts, each ending at a user turn; of one domain, or of all."""
    if domain is not None and domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)} or None, got {domain!r}")
    return [from_row(row) for row in _rows(path or eval_prompts_file()) if domain in (None, row["domain"])]


def reference_answers(path: Path | None = None) -> dict[str, int]:
    """Conversation id -> the right final number, for the maths prompts."""
    return {row["id"]: row["answer"] for row in _rows(path or eval_prompts_file()) if "answer" in row}


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What the options of ``benchmarks`` share: ``max_new_tokens`` an answer, ``max_length`` a prompt with all its answers."""

    max_new_tokens: int
    max_length: int

    def __post_init__(self):
        for name in ("max_new_tokens", "max_length"):
            positive_int(f"benchmarks.{name}", getattr(self, name))

    def conversations(self) -> list[Conversation]:
        """The prompts, each ending at a user turn; whatever answers stand in them, the target gives its own."""
        raise NotImplementedError

    def fitting(self, tokenizer: PreTrainedTokenizerBase, mode: Mode) -> list[Conversation]:
        """Those of ``conversations()`` that fit ``max_length`` (data.lengths); the others are logged with their ids."""
        return fitting_prompts(self.conversations(), tokenizer, mode, self.max_length, self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class HeldoutPrompts(Prompts):
    """``per_domain`` of the committed prompts of each domain, maths about half from unseen templates."""

    per_domain: int

    def __post_init__(self):
        super().__post_init__()
        positive_int("benchmarks.per_domain", self.per_domain)

    def conversations(self) -> list[Conversation]:
        """Prompts in file order; ValueError where the file has fewer than asked for."""
        chosen = []
        for domain in DOMAINS:
            prompts = load_eval_prompts(domain)
            if not 1 <= self.per_domain <= len(prompts):
                raise ValueError(f"benchmarks.per_domain must be in 1..{len(prompts)} for {domain}, got {self.per_domain}")
            stride = len(prompts) / self.per_domain
            chosen += [prompts[int(i * stride)] for i in range(self.per_domain)]
        return chosen
