"""The committed evaluation prompts: held-out conversations cut before their last answer.

``python -m tiny_target.corpus --write-prompts`` writes the file, and evaluations read it, so that they do not depend on the
installed packages. Half of the math prompts are from seen and half from unseen templates; each row has the right answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
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
    """Returns the path of the committed evaluation prompts."""
    return resource("assets") / "eval_prompts.jsonl"


@lru_cache(maxsize=4)
def _rows(path: Path) -> tuple[dict, ...]:
    if not path.is_file():
        raise ValueError(f"no evaluation prompts at {path}; make them with `python -m tiny_target.corpus --write-prompts`")
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def load_eval_prompts(domain: str | None = None, path: Path | None = None) -> list[Conversation]:
    """Returns held-out prompts of one domain or of all, each ending at a user turn."""
    if domain is not None and domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)} or None, got {domain!r}")
    return [from_row(row) for row in _rows(path or eval_prompts_file()) if domain in (None, row["domain"])]


def reference_answers(path: Path | None = None) -> dict[str, int]:
    """Returns the right final number of each math prompt by conversation id."""
    return {row["id"]: row["answer"] for row in _rows(path or eval_prompts_file()) if "answer" in row}


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The base of every option of ``benchmarks``: ``max_new_tokens`` per answer, ``max_length`` tokens per prompt with all its
    answers."""

    max_new_tokens: int
    max_length: int

    def __post_init__(self):
        for name in ("max_new_tokens", "max_length"):
            positive_int(f"benchmarks.{name}", getattr(self, name))

    def conversations(self) -> list[Conversation]:
        """Returns the prompts, each ending at a user turn; the target replaces any answers in them."""
        raise NotImplementedError

    def fitting(self, tokenizer: PreTrainedTokenizerBase, mode: Mode) -> list[Conversation]:
        """Returns the ``conversations()`` that fit ``max_length`` (hyperdflash.data.lengths); logs the ids of the others."""
        return fitting_prompts(self.conversations(), tokenizer, mode, self.max_length, self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class HeldoutPrompts(Prompts):
    """``per_domain`` of the committed prompts of each domain; about half of the math prompts are from unseen templates."""

    per_domain: int

    def __post_init__(self):
        super().__post_init__()
        positive_int("benchmarks.per_domain", self.per_domain)

    def conversations(self) -> list[Conversation]:
        """Returns prompts in file order; ValueError where the file has fewer than ``per_domain``."""
        chosen = []
        for domain in DOMAINS:
            prompts = load_eval_prompts(domain)
            if not 1 <= self.per_domain <= len(prompts):
                raise ValueError(f"benchmarks.per_domain must be in 1..{len(prompts)} for {domain}, got {self.per_domain}")
            stride = len(prompts) / self.per_domain
            chosen += [prompts[int(i * stride)] for i in range(self.per_domain)]
        return chosen
