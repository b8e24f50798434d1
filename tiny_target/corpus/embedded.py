"""The embedded corpus: text that is on every machine that has installed the project. No network.

1. files of the standard library and of this project's dependencies  -> definitions        (packages, definitions)
2. definitions -> code tasks and explanations, topics -> explanations, templates -> problems  -> candidates a domain
3. candidates in a stable order by their hash, near-duplicates dropped                      (near_duplicates)
4. each to train or held-out: whole modules, whole templates, and a share of the rest by content   (split)
5. train capped in bytes a domain, all of it kept as JSONL under ``runs/corpus``
"""

from __future__ import annotations

import ast
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hyperdflash.contracts import DOMAINS, Conversation, Turn
from hyperdflash.data.near_duplicates import first_of_each, fold_code, fold_text
from hyperdflash.data.split import SPLITS, Split, is_heldout_module, is_heldout_text
from hyperdflash.data.stable_hash import content_hash, unit_interval
from tiny_target.corpus.code_tasks import code_task
from tiny_target.corpus.definitions import Definition, FunctionDefinition, default_workers, scan
from tiny_target.corpus.explanations import explain_function, explain_namespace
from tiny_target.corpus.packages import corpus_files, installed_versions
from tiny_target.corpus.problem_templates_more import CHAINS
from tiny_target.corpus.problem_templates_one import ONE_STEP
from tiny_target.corpus.problem_templates_two import MORE_STEPS
from tiny_target.corpus.topics import Topic, explain_topic, reference_topics
from tiny_target.corpus.word_problems import Template, as_conversation, problems

log = logging.getLogger(__name__)

TEMPLATES: tuple[Template, ...] = ONE_STEP + MORE_STEPS + CHAINS
PROBLEMS_A_TEMPLATE = 75
TRAIN_BYTES = {"code": 7_500_000, "chat": 4_500_000, "math": 4_000_000}

_CONTENT_MODULES_TEXT = """
code_tasks definitions docstrings embedded explanations packages problem_chains
problem_templates_more problem_templates_one problem_templates_two topics word_problems
"""
_CONTENT_MODULES = [f"tiny_target.corpus.{name}" for name in _CONTENT_MODULES_TEXT.split()] + [
    f"hyperdflash.data.{name}" for name in ("near_duplicates", "split", "stable_hash")
]


@dataclass(frozen=True)
class Candidate:
    """A conversation with what decides its fate: ``folded`` (near-duplicates) and ``heldout`` (side of the split)."""

    conversation: Conversation
    folded: str
    heldout: bool


def text_bytes(conversation: Conversation) -> int:
    """UTF-8 bytes of all turns."""
    return sum(len(turn.content.encode()) for turn in conversation.turns)


def code_candidates(definitions: Iterable[Definition]) -> list[Candidate]:
    """Functions as tasks. The split follows the summary, so that a function's task and explanation share a side."""
    found = []
    for item in definitions:
        if isinstance(item, FunctionDefinition) and (conversation := code_task(item)):
            heldout = is_heldout_module(item.module) or is_heldout_text(item.sentences[0])
            found.append(Candidate(conversation, fold_code(item.source), heldout))
    return found


def chat_candidates(definitions: Iterable[Definition], topics: Iterable[Topic] = ()) -> list[Candidate]:
    """Functions, classes, modules and topics as explanations; the docstring's sentences decide what is a duplicate."""
    found = []
    for item in definitions:
        explain = explain_function if isinstance(item, FunctionDefinition) else explain_namespace
        if conversation := explain(item):
            heldout = is_heldout_module(item.module) or is_heldout_text(item.sentences[0])
            found.append(Candidate(conversation, fold_text(" ".join(item.sentences[:2])), heldout))
    for topic in topics:
        for conversation in explain_topic(topic):
            text = conversation.turns[1].content
            heldout = is_heldout_module(f"pydoc_data.topics.{topic.name}") or is_heldout_text(text)
            found.append(Candidate(conversation, fold_text(text), heldout))
    return found


def math_candidates(templates: Iterable[Template], count: int = PROBLEMS_A_TEMPLATE) -> list[Candidate]:
    """Problems; two with the same template and numbers are the same problem, whatever its names and things."""
    found = []
    for source in templates:
        for problem in problems(source, count):
            heldout = source.is_unseen or unit_interval(problem.key, salt="problem") < 0.04
            found.append(Candidate(as_conversation(problem, unseen_template=source.is_unseen), problem.key, heldout))
    return found


def select(candidates: Iterable[Candidate], train_bytes: int | None, *, by_shingles: bool = True, progress: bool = False):
    """(train, held-out) conversations in an order that depends on their ids alone, without near-duplicates.

    ``by_shingles=False`` compares folded texts for equality only (maths, whose numbers are its content).
    """
    ordered = sorted(candidates, key=lambda item: (content_hash(item.conversation.id), item.folded))
    if by_shingles:
        keep = first_of_each((item.folded for item in ordered), progress=progress)
    else:
        seen: set[str] = set()
        keep = [not (item.folded in seen or seen.add(item.folded)) for item in ordered]
    train, heldout, total = [], [], 0
    for item, kept in zip(ordered, keep, strict=True):
        if not kept:
            continue
        if item.heldout:
            heldout.append(item.conversation)
        elif train_bytes is None or total < train_bytes:
            total += text_bytes(item.conversation)
            train.append(item.conversation)
    return train, heldout


def build(*, num_workers: int | None = None, progress: bool = True) -> dict[str, list[Conversation]]:
    """The whole corpus from this machine's files: split -> conversations, domains mixed in a stable order."""
    definitions = scan(corpus_files(), num_workers=num_workers or default_workers(), progress=progress)
    candidates = {
        "math": math_candidates(TEMPLATES),
        "code": code_candidates(definitions),
        "chat": chat_candidates(definitions, reference_topics()),
    }
    result: dict[str, list[Conversation]] = {"train": [], "heldout": []}
    for domain, found in candidates.items():
        train, heldout = select(found, TRAIN_BYTES[domain], by_shingles=domain != "math", progress=progress)
        result["train"] += train
        result["heldout"] += heldout
    for side in result.values():
        side.sort(key=lambda conversation: content_hash(conversation.id))
    return result


def default_cache_dir() -> Path:
    """``$HYPERDFLASH_RUNS/corpus``, or ``runs/corpus``."""
    return Path(os.environ.get("HYPERDFLASH_RUNS", "runs")) / "corpus"


def cache_key() -> str:
    """Hash of the code that decides the content, the Python version and the versions of all distributions read."""
    sources = [Path(find_spec(name).origin).read_text(encoding="utf-8") for name in _CONTENT_MODULES]
    code = [ast.dump(ast.parse(source)) for source in sources]  # comments and layout change nothing
    return content_hash(json.dumps([code, sys.version_info[:3], installed_versions()]))


def load_embedded(
    split: Split,
    domains: Sequence[str] = DOMAINS,
    *,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> list[Conversation]:
    """Conversations of one split, domains mixed in a stable order; built on the first call (about a minute), then read
    from ``cache_dir``."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if unknown := [domain for domain in domains if domain not in DOMAINS]:
        raise ValueError(f"domains must be among {', '.join(DOMAINS)}, got {unknown[0]!r}")
    path = Path(cache_dir or default_cache_dir()) / f"embedded-{cache_key()}.jsonl"
    if not path.is_file():
        missing = [name for name, version in installed_versions().items() if version == "missing"]
        if missing:
            log.warning("embedded corpus: not installed and left out: %s", ", ".join(missing))
        write_rows(path, build(num_workers=num_workers, progress=progress))
    with path.open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        return [from_row(row) for row in rows if row["split"] == split and row["domain"] in domains]


def to_row(conversation: Conversation, **more) -> dict:
    """A conversation as a JSON row."""
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    return {"id": conversation.id, "domain": conversation.domain, **more, "turns": turns}


def from_row(row: dict) -> Conversation:
    """The inverse of ``to_row``."""
    turns = tuple(Turn(turn["role"], turn["content"]) for turn in row["turns"])
    return Conversation(row["id"], row["domain"], turns)


def write_rows(path: Path, corpus: dict[str, list[Conversation]]) -> None:
    """Write all splits to one JSONL file, which appears under its name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # one a process: two may build at the same time
    try:
        with partial.open("w", encoding="utf-8") as file:
            for split, conversations in corpus.items():
                for conversation in conversations:
                    file.write(json.dumps(to_row(conversation, split=split), ensure_ascii=False) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
