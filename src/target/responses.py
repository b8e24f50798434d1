"""Replace a corpus's answers by the target's own, once, and keep them.

Training on what the target itself would say is what makes acceptance in training the acceptance of serving. Answers are kept
as token ids (text would not always encode back to the same ids), one JSON line a document, in batches whose make-up is a
function of the conversations alone; a batch is written whole, so that a killed run goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from src.contracts import Conversation, Document
from src.corpus.chat import encode_rounds, without_reasoning
from src.corpus.lengths import named
from src.corpus.tokenizer import special_ids
from src.target.generate import generate_batch
from src.target.load import Target


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How the target answers: ``temperature`` 0 is greedy; ``max_new_tokens`` a turn; ``max_length`` a document, in tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 192
    max_length: int = 512
    mode: str = "non_think"
    seed: int = 0
    dtype: str = "fp32"  # what the target computes in
    batch_rows: int = 128

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


def answer_conversations(
    conversations: Sequence[Conversation],
    target: Callable[[], Target],
    fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: AnswerSettings,
    directory: Path,
    progress: bool = True,
) -> list[Document]:
    """Every assistant turn written by the target, each on the history it wrote itself; documents in the order given.

    One document a conversation, with its id. In think_high one a turn: reasoning leaves the history, so two turns are not one
    text; the last turn's document has the conversation's id, earlier ones ``<id>#1``, ``<id>#2``, ..., in front of it.
    ``target()`` is called only if an answer is missing. What ``max_length`` cut or left out is counted and printed.
    """
    batches = _batches(conversations, tokenizer, settings)
    key = hashlib.sha256(json.dumps([fingerprint, asdict(settings), tokenizer.backend_tokenizer.to_str()]).encode())
    for batch in batches:
        for conversation in batch:
            key.update(repr((conversation.id, conversation.turns)).encode())
    path = directory / f"{fingerprint}-{key.hexdigest()[:16]}.jsonl"
    done = _read(path)
    loaded = None
    cached = all(conversation.id in done for conversation in conversations)
    if cached:
        print(f"target answers: all {len(conversations):,} are in {path}", flush=True)
    with tqdm(total=len(conversations), desc="target answers", unit="doc", disable=cached or not progress) as bar:
        for number, batch in enumerate(batches):
            if any(conversation.id not in done for conversation in batch):
                loaded = loaded or target()
                if loaded.fingerprint != fingerprint:
                    raise ValueError(f"the target has fingerprint {loaded.fingerprint}, these answers want {fingerprint}")
                documents = _answer_batch(batch, loaded, tokenizer, settings, settings.seed * 1_000_003 + number)
                _append(path, documents)
                done |= {document.id: document for document in documents}
            bar.update(len(batch))
    found = {c.id: [d for d in _documents_of(c, done) if bool(d.loss_mask.any())] for c in conversations}
    _tell_limits(conversations, found, settings, special_ids(tokenizer, mask_id=0).eos)
    return [document for conversation in conversations for document in found[conversation.id]]


def _documents_of(conversation: Conversation, done: dict[str, Document]) -> list[Document]:
    earlier = (f"{conversation.id}#{number}" for number in range(1, len(conversation.turns)))
    return [done[name] for name in (*earlier, conversation.id) if name in done]


def _tell_limits(
    conversations: Sequence[Conversation], found: dict[str, list[Document]], settings: AnswerSettings, eos_id: int
) -> None:
    """One line each for prompts without room and for answers that a limit ended."""
    without = [name for name, documents in found.items() if not documents]
    if without:
        print(
            f"target answers: {len(without)} of {len(conversations)} prompts left out, no room for an answer within "
            f"max_length={settings.max_length}: {named(without)}"
        )
    answers = cut = 0
    for document in (d for documents in found.values() for d in documents):
        after = torch.cat([document.loss_mask[1:], torch.zeros(1, dtype=torch.bool)])
        ends = document.input_ids[document.loss_mask & ~after]
        answers, cut = answers + len(ends), cut + int((ends != eos_id).sum())
    turns = sum(turn.role == "user" for c in conversations if found[c.id] for turn in c.turns)
    if cut or answers < turns:
        print(
            f"target answers: {cut} of {answers} end at max_new_tokens={settings.max_new_tokens} or "
            f"max_length={settings.max_length}, {turns - answers} later turns not asked",
            flush=True,
        )


def _batches(conversations, tokenizer, settings) -> list[list[Conversation]]:
    def cost(conversation: Conversation) -> tuple[int, int, str]:
        rounds = encode_rounds(conversation, tokenizer, settings.mode)
        return len(rounds), len(rounds[0]), conversation.id

    ordered = sorted(conversations, key=cost)
    return [ordered[i : i + settings.batch_rows] for i in range(0, len(ordered), settings.batch_rows)]


def _answer_batch(batch, target: Target, tokenizer, settings: AnswerSettings, seed: int) -> list[Document]:
    """Turn by turn: history + next user turn -> the target's answer, appended to the history with its loss mask."""
    eos_id = special_ids(tokenizer, mask_id=0).eos
    generator = torch.Generator(device=target.model.device).manual_seed(seed)
    # a row's texts are (ids, loss mask); the last one grows, or in think_high is followed by the next turn's
    texts: list[list[tuple[list[int], list[bool]]]] = [[] for _ in batch]
    histories: list[tuple[list[int], list[bool]]] = [([], []) for _ in batch]
    pending = [encode_rounds(conversation, tokenizer, settings.mode) for conversation in batch]
    while any(pending):
        rows, prompts = [], []
        for row, rounds in enumerate(pending):
            if not rounds:
                continue
            prompt = histories[row][0] + rounds.pop(0)
            if len(prompt) + 2 > settings.max_length:
                rounds.clear()
                continue
            rows.append(row)
            prompts.append(prompt)
        if not rows:
            break
        answers = generate_batch(
            target.model,
            prompts,
            eos_id=eos_id,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            generator=generator,
        )
        for index, answer in answers:
            row, prompt = rows[index], prompts[index]
            answer = answer[: settings.max_length - len(prompt)]
            mask = histories[row][1]
            mask = [*mask, *[False] * (len(prompt) - len(mask)), *[True] * len(answer)]
            if settings.mode == "think_high":
                texts[row].append((prompt + answer, mask))
                seen = without_reasoning(prompt, answer, tokenizer)
                histories[row] = seen, [False] * len(seen)
            else:
                texts[row] = [(prompt + answer, mask)]
                histories[row] = texts[row][0]
            if answer[-1] != eos_id:  # cut at a limit: nothing can follow
                pending[row].clear()
    return [document for c, found in zip(batch, texts, strict=True) for document in _as_documents(c, found)]


def _as_documents(conversation: Conversation, texts: Sequence[tuple[list[int], list[bool]]]) -> list[Document]:
    """The last text under the conversation's id, earlier ones numbered; an empty document where nothing was answered."""
    *earlier, last = texts or [([], [])]
    named_texts = [(f"{conversation.id}#{number}", *text) for number, text in enumerate(earlier, start=1)]
    return [
        Document(name, conversation.domain, torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.bool))
        for name, ids, mask in (*named_texts, (conversation.id, *last))
    ]


def _append(path: Path, documents: Sequence[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": d.id, "domain": d.domain, "input_ids": d.input_ids.tolist(), "loss_mask": d.loss_mask.int().tolist()})
        for d in documents
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()


def _read(path: Path) -> dict[str, Document]:
    """Documents by id; a line that was cut by a crash is dropped from the file and made again."""
    if not path.exists():
        return {}
    found, whole = {}, 0
    data = path.read_bytes()
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        whole += len(line)
        found[row["id"]] = Document(
            row["id"], row["domain"], torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"], dtype=torch.bool)
        )
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return found
