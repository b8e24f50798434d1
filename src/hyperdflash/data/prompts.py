"""Prompts of evaluations: committed held-out conversations, or the paper's seven benchmarks.

A prompt is a conversation that ends at a user turn; the target writes all answers in it. It fits if its own tokens and all its
answers, each of the largest length, stay within ``max_length``:

    tokens of its user turns with their headers + user turns * max_new_tokens <= max_length, and <= the target's context

So no prompt is cut, no answer ever ends at ``max_length``, and the choice depends on neither the target nor the temperature. A
prompt that does not fit is left out as a whole; the log counts and names it.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import DOMAINS, Conversation, Turn
from hyperdflash.data.benchmark_rows import BENCHMARKS, load_turns
from hyperdflash.data.chat import Mode, encode_rounds
from hyperdflash.data.rows import from_row
from hyperdflash.files import reading, resource
from hyperdflash.settings import natural_int, positive_int
from hyperdflash.stable_hash import content_hash, unit_interval

log = logging.getLogger(__name__)
_NAMED = 20  # ids in one line; the line counts the others


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """An option of ``benchmarks``: ``max_new_tokens`` per answer, ``max_length`` tokens per prompt with all its answers."""

    max_new_tokens: int
    max_length: int

    def __post_init__(self):
        for name in ("max_new_tokens", "max_length"):
            positive_int(f"benchmarks.{name}", getattr(self, name))

    def conversations(self) -> list[Conversation]:
        """Returns the prompts, each ending at a user turn; the target replaces any answers in them."""
        raise NotImplementedError

    def fitting(self, tokenizer: PreTrainedTokenizerBase, mode: Mode, context: int | None = None) -> list[Conversation]:
        """Returns the ``conversations()`` that fit, within the target's ``context`` too; logs those left out per domain,
        ValueError where it loses all."""
        prompts, longest = self.conversations(), min(self.max_length, context or self.max_length)
        needed = {c.id: needed_tokens(encode_rounds(c, tokenizer, mode), self.max_new_tokens) for c in prompts}
        bound = f"max_length={longest}" if longest == self.max_length else f"the target's context of {longest:,}"
        limits = f"{bound} with max_new_tokens={self.max_new_tokens} per answer"
        for domain, asked in Counter(c.domain for c in prompts).items():
            left_out = [c.id for c in prompts if c.domain == domain and needed[c.id] > longest]
            most = max((needed[name] for name in left_out), default=0)
            if len(left_out) == asked:
                raise ValueError(
                    f"none of the {asked} prompts of {domain} fits {limits}; the longest needs {most}: raise "
                    "benchmarks.max_length or lower benchmarks.max_new_tokens"
                )
            if left_out:
                counts = f"benchmark {domain}: {len(left_out)} of {asked} prompts left out"
                log.warning("%s: longer than %s (the longest needs %d): %s", counts, limits, most, named(left_out))
        return [prompt for prompt in prompts if needed[prompt.id] <= longest]


def needed_tokens(rounds: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Returns the most tokens of a prompt with all its answers, from the token ids of its user turns."""
    return sum(map(len, rounds)) + len(rounds) * max_new_tokens


def named(ids: Sequence[str]) -> str:
    """Joins ids for a message: ``a, b, c and 4 more``."""
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(ids[:_NAMED]) + more


def eval_prompts_file() -> Path:
    """Returns the path of the committed evaluation prompts (``python -m tiny_target.corpus --write-prompts`` writes them)."""
    return resource("assets") / "eval_prompts.jsonl"


@lru_cache(maxsize=4)
def _rows(path: Path) -> tuple[Conversation, ...]:
    if not path.is_file():
        raise ValueError(f"no evaluation prompts at {path}; make them with `python -m tiny_target.corpus --write-prompts`")
    with reading(path, "fetch it again"):
        return tuple(from_row(json.loads(line)) for line in path.read_bytes().splitlines())


def load_eval_prompts(domain: str | None = None, path: Path | None = None) -> list[Conversation]:
    """Returns held-out prompts of one domain or of all, each ending at a user turn."""
    if domain is not None and domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)} or None, got {domain!r}")
    return [prompt for prompt in _rows(path or eval_prompts_file()) if domain in (None, prompt.domain)]


@dataclass(frozen=True, kw_only=True)
class HeldoutPrompts(Prompts):
    """``per_domain`` of the committed prompts of each domain; half of the math prompts are from unseen templates."""

    per_domain: int

    def __post_init__(self):
        super().__post_init__()
        positive_int("benchmarks.per_domain", self.per_domain)

    def conversations(self) -> list[Conversation]:
        """Returns prompts in file order; ValueError where the file has fewer than ``per_domain``."""
        chosen = []
        for domain in DOMAINS:
            prompts = load_eval_prompts(domain)
            if self.per_domain > len(prompts):
                raise ValueError(f"benchmarks.per_domain must be in 1..{len(prompts)} for {domain}, got {self.per_domain}")
            stride = len(prompts) / self.per_domain
            chosen += [prompts[int(i * stride)] for i in range(self.per_domain)]
        return chosen


def benchmark_prompts(name: str, path: str | Path | None = None) -> list[Conversation]:
    """Returns all prompts of one benchmark in file order, with ids ``name``/<hash of the turns>; equal texts get ``-2``, ..."""
    rows = load_turns(name, path)
    if len(rows) != BENCHMARKS[name].rows:
        log.warning("%s has %d prompts here, %d were published", BENCHMARKS[name].title, len(rows), BENCHMARKS[name].rows)
    seen: Counter[str] = Counter()
    found = []
    for turns in rows:
        digest = content_hash("\x00".join(turns))
        seen[digest] += 1
        again = f"-{seen[digest]}" if seen[digest] > 1 else ""
        found.append(Conversation(f"{name}/{digest}{again}", name, tuple(Turn("user", turn) for turn in turns)))
    return found


@dataclass(frozen=True, kw_only=True)
class PaperBenchmarks(Prompts):
    """Prompts of the benchmarks ``names``, in the paper's order; a prompt's domain is its benchmark.

    ``per_benchmark`` limits the prompts of each (None: all); ``seed`` chooses them so that a larger limit only adds prompts.
    ``path`` is a folder of <name>.jsonl, None for the hub.
    """

    names: Sequence[str]
    per_benchmark: int | None
    seed: int
    path: str | Path | None

    def __post_init__(self):
        super().__post_init__()
        known = ", ".join(BENCHMARKS)
        if unknown := [name for name in self.names if name not in BENCHMARKS]:
            raise ValueError(f"benchmarks.names has {unknown[0]!r}; wanted some of {known}")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"benchmarks.names must name at least one benchmark, each once, of {known}; got {[*self.names]}")
        if self.per_benchmark is not None:
            positive_int("benchmarks.per_benchmark", self.per_benchmark)
        natural_int("benchmarks.seed", self.seed)
        if self.path is not None and not Path(self.path).is_dir():
            raise ValueError(
                f"benchmarks.path={self.path} is not a folder: make it with `python -m src.fetch_benchmarks {self.path}`, "
                "or set benchmarks.path=null for the hub"
            )

    @cached_property
    def _chosen(self) -> list[Conversation]:
        chosen = []
        for name in (name for name in BENCHMARKS if name in self.names):
            prompts = benchmark_prompts(name, self.path)
            drawn = sorted(prompts, key=lambda prompt: unit_interval(prompt.id, salt=f"benchmark {self.seed}"))
            ids = {prompt.id for prompt in drawn[: self.per_benchmark]}
            chosen += [prompt for prompt in prompts if prompt.id in ids]
        return chosen

    def conversations(self) -> list[Conversation]:
        """Returns the chosen prompts, benchmark by benchmark, each in file order."""
        return list(self._chosen)
