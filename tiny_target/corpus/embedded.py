"""The embedded corpus: text that every installation of the project has on its machine; needs no network.

1. files of the standard library and of this project's dependencies  -> definitions        (packages, definitions)
2. definitions -> code tasks and explanations, topics -> explanations, templates -> problems  -> candidates per domain
3. candidates in a stable order by their hash, without near-duplicates                       (near_duplicates)
4. each to train or held-out: whole modules, whole templates, and a share of the rest by content   (split)
5. at most TRAIN_BYTES of training text per domain, written as JSONL under ``runs/corpus``
"""

from __future__ import annotations

import ast
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

from hyperdflash import stable_hash
from hyperdflash.contracts import DOMAINS, Conversation
from hyperdflash.data.corpus import Corpus
from hyperdflash.data.prompts import load_eval_prompts
from hyperdflash.data.rows import from_row, to_row
from hyperdflash.files import whole_file
from hyperdflash.identity import runs_dir
from hyperdflash.settings import natural_int
from hyperdflash.stable_hash import content_hash, fold_text, unit_interval
from tiny_target.corpus.code_tasks import code_task
from tiny_target.corpus.definitions import Definition, FunctionDefinition, default_workers, read_definitions, scan
from tiny_target.corpus.explanations import explain_function, explain_namespace, explain_topic
from tiny_target.corpus.near_duplicates import first_of_each, fold_code
from tiny_target.corpus.packages import SourceFile, corpus_files, installed_versions
from tiny_target.corpus.split import SPLITS, Split, is_heldout_module, is_heldout_text
from tiny_target.corpus.word_problems import Template, as_conversation, problems, templates

log = logging.getLogger(__name__)

PROBLEMS_PER_TEMPLATE = 75
TRAIN_BYTES = {"code": 7_500_000, "chat": 4_500_000, "math": 4_000_000}


@dataclass(frozen=True)
class Candidate:
    """A conversation with its ``folded`` text (for near-duplicates) and its side of the split, ``heldout``."""

    conversation: Conversation
    folded: str
    heldout: bool


def text_bytes(conversation: Conversation) -> int:
    """Returns the UTF-8 bytes of all turns."""
    return sum(len(turn.content.encode()) for turn in conversation.turns)


def code_candidates(definitions: Iterable[Definition]) -> list[Candidate]:
    """Makes tasks of functions. The summary decides the split, so that a function's task and explanation share a side."""
    functions = [item for item in definitions if isinstance(item, FunctionDefinition)]
    return [
        Candidate(conversation, fold_code(item.source), _is_heldout(item.module, item.sentences[0]))
        for item in functions
        if (conversation := code_task(item))
    ]


def chat_candidates(definitions: Iterable[Definition], topics: Mapping[str, str] | None = None) -> list[Candidate]:
    """Makes explanations of functions, classes, modules and topics; the docstring's sentences decide the duplicates."""
    found = []
    for item in definitions:
        explain = explain_function if isinstance(item, FunctionDefinition) else explain_namespace
        if conversation := explain(item):
            folded = fold_text(" ".join(item.sentences[:2]))
            found.append(Candidate(conversation, folded, _is_heldout(item.module, item.sentences[0])))
    for name, topic in (topics or {}).items():
        for conversation in explain_topic(name, topic):
            text = conversation.turns[1].content
            found.append(Candidate(conversation, fold_text(text), _is_heldout(f"pydoc_data.topics.{name}", text)))
    return found


def _candidates_of(file: SourceFile) -> list[Candidate]:
    definitions = read_definitions(file)
    return code_candidates(definitions) + chat_candidates(definitions)


def _is_heldout(module: str, text: str) -> bool:
    return is_heldout_module(module) or is_heldout_text(text)


def math_candidates(sources: Iterable[Template], count: int = PROBLEMS_PER_TEMPLATE) -> list[Candidate]:
    """Makes problems; those of one template with equal numbers are one problem, whatever their names and things."""
    found = []
    for source in sources:
        for problem in problems(source, count):
            heldout = source.is_unseen or unit_interval(problem.key, salt="problem") < 0.04
            found.append(Candidate(as_conversation(problem, unseen_template=source.is_unseen), problem.key, heldout))
    return found


def select(
    candidates: Iterable[Candidate], train_bytes: int | None, *, by_shingles: bool = True
) -> tuple[list[Conversation], list[Conversation]]:
    """Returns (train, held-out) conversations without near-duplicates, in an order that depends on their ids alone.

    ``by_shingles=False`` compares folded texts for equality only (math, whose content is its numbers).
    """
    ordered = sorted(candidates, key=lambda item: (content_hash(item.conversation.id), item.folded))
    if by_shingles:
        ordered = compress(ordered, first_of_each([item.folded for item in ordered]))
    else:
        first: dict[str, Candidate] = {}
        for item in ordered:
            first.setdefault(item.folded, item)
        ordered = first.values()
    train, heldout, total = [], [], 0
    for item in ordered:
        if item.heldout:
            heldout.append(item.conversation)
        elif train_bytes is None or total < train_bytes:
            total += text_bytes(item.conversation)
            train.append(item.conversation)
    return train, heldout


def build() -> dict[str, list[Conversation]]:
    """Builds the whole corpus from this machine's files: conversations by split, domains mixed in a stable order."""
    from pydoc_data.topics import topics  # Python's own reference, a megabyte

    candidates = {"math": math_candidates(templates()), "code": [], "chat": chat_candidates((), dict(sorted(topics.items())))}
    for candidate in scan(corpus_files(), _candidates_of, num_workers=default_workers()):
        candidates[candidate.conversation.domain].append(candidate)
    result: dict[str, list[Conversation]] = {"train": [], "heldout": []}
    for domain, found in candidates.items():
        train, heldout = select(found, TRAIN_BYTES[domain], by_shingles=domain != "math")
        result["train"] += train
        result["heldout"] += heldout
    for side in result.values():
        side.sort(key=lambda conversation: content_hash(conversation.id))
    return result


def cache_key() -> str:
    """Hashes the code and words that decide the content, the Python version and the versions of all packages read."""
    files = [path for path in sorted(Path(__file__).parent.glob("[!_]*.*")) if path.suffix in (".py", ".toml")]
    files.append(Path(stable_hash.__file__))
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    parsed = [ast.dump(ast.parse(text)) if path.suffix == ".py" else text for path, text in texts.items()]
    return content_hash(json.dumps([parsed, sys.version_info[:3], installed_versions()]))


def load_embedded(split: Split, *, cache_dir: str | Path | None = None) -> list[Conversation]:
    """Returns the conversations of one split, domains mixed in a stable order.

    The first call builds the corpus in about a minute; later calls read it from ``cache_dir`` (None: runs/corpus).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(cache_dir or runs_dir() / "corpus") / f"embedded-{cache_key()}.jsonl"
    if not path.is_file():
        if missing := [name for name, version in installed_versions().items() if version == "missing"]:
            log.warning("embedded corpus: not installed and left out: %s", ", ".join(missing))
        write_rows(path, build())
    with path.open(encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        return [from_row(row) for row in rows if row["split"] == split]


def write_rows(path: Path, corpus: dict[str, list[Conversation]]) -> None:
    """Writes all splits to one JSONL file, which appears under its name only when complete."""
    with whole_file(path) as file:
        for split, conversations in corpus.items():
            for conversation in conversations:
                file.write((json.dumps(to_row(conversation, split=split), ensure_ascii=False) + "\n").encode())


@dataclass(frozen=True, kw_only=True)
class EmbeddedCorpus(Corpus):
    """``stage1`` and ``stage2`` give the conversations per domain; each stage has its own half of the train split, so that no
    document is in both."""

    stage1: Mapping[str, int]
    stage2: Mapping[str, int]
    directory: str | Path

    def __post_init__(self):
        super().__post_init__()
        for name, mixture in (("stage1", self.stage1), ("stage2", self.stage2)):
            if unknown := [domain for domain in mixture if domain not in DOMAINS]:
                raise ValueError(f"corpus.{name} names {unknown[0]!r}; the embedded corpus has {', '.join(DOMAINS)}")
            for domain, count in mixture.items():
                natural_int(f"corpus.{name}.{domain}", count)
        if not any(self._mixture.values()):
            raise ValueError(f"corpus.stage{self.stage} asks for no conversation: give at least one domain a number")

    @property
    def _mixture(self) -> Mapping[str, int]:
        return self.stage1 if self.stage == 1 else self.stage2

    def train(self) -> list[Conversation]:
        """Returns the first conversations of each domain in this stage's half, in the corpus's stable order."""
        side = self.stage - 1
        half = (c for c in load_embedded("train", cache_dir=self.directory) if int(content_hash(c.id), 16) % 2 == side)
        return _take(half, self._mixture)

    def validation_conversations(self) -> list[Conversation]:
        """Returns ``validation`` held-out conversations per domain of the mixture, none of them an evaluation prompt."""
        prompts = {prompt.id for prompt in load_eval_prompts()}
        free = (c for c in load_embedded("heldout", cache_dir=self.directory) if c.id not in prompts)
        return _take(free, {name: self.validation for name, count in self._mixture.items() if count})


def _take(conversations: Iterable[Conversation], counts: Mapping[str, int]) -> list[Conversation]:
    left, chosen = Counter(dict(counts)), []
    for conversation in conversations:
        if left[conversation.domain] > 0:
            left[conversation.domain] -= 1
            chosen.append(conversation)
    if short := {name: n for name, n in left.items() if n > 0}:
        name, n = next(iter(short.items()))
        raise ValueError(f"the corpus has only {counts[name] - n} {name} conversations here, the mixture wants {counts[name]}")
    return chosen
