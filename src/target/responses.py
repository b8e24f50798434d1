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
from src.corpus.chat import encode_prompt
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

    ``target()`` is called only if an answer is missing. A prompt with no room for an answer within ``max_length`` is dropped,
    with its count printed.
    """
    if settings.mode == "think_high" and any(len(_user_rounds(c)) > 1 for c in conversations):
        raise ValueError("mode=think_high answers one user turn a conversation, got some with more: use mode=non_think")
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
    kept = [done[conversation.id] for conversation in conversations if conversation.id in done]
    answered = [document for document in kept if bool(document.loss_mask.any())]
    if len(answered) < len(conversations):
        dropped = len(conversations) - len(answered)
        print(f"target answers: {dropped} of {len(conversations)} prompts left no room and were dropped")
    return answered


def _batches(conversations, tokenizer, settings) -> list[list[Conversation]]:
    def cost(conversation: Conversation) -> tuple[int, int, str]:
        first = next(i for i, turn in enumerate(conversation.turns) if turn.role == "user")
        start = Conversation(conversation.id, conversation.domain, conversation.turns[: first + 1])
        turns = sum(turn.role == "user" for turn in conversation.turns)
        return turns, len(encode_prompt(start, tokenizer, settings.mode)), conversation.id

    ordered = sorted(conversations, key=cost)
    return [ordered[i : i + settings.batch_rows] for i in range(0, len(ordered), settings.batch_rows)]


def _answer_batch(batch, target: Target, tokenizer, settings: AnswerSettings, seed: int) -> list[Document]:
    """Turn by turn: history + next user turn -> the target's answer, appended to the history with its loss mask."""
    eos_id = special_ids(tokenizer, mask_id=0).eos
    generator = torch.Generator(device=target.model.device).manual_seed(seed)
    histories: list[list[int]] = [[] for _ in batch]
    masks: list[list[bool]] = [[] for _ in batch]
    pending = [_user_rounds(conversation) for conversation in batch]
    while any(pending):
        rows, prompts = [], []
        for row, rounds in enumerate(pending):
            if not rounds:
                continue
            header = encode_prompt(rounds.pop(0), tokenizer, settings.mode)
            prompt = histories[row] + (header[1:] if histories[row] else header)  # one begin token a document
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
            masks[row] += [False] * (len(prompt) - len(histories[row])) + [True] * len(answer)
            histories[row] = prompt + answer
            if answer[-1] != eos_id:  # cut at a limit: nothing can follow
                pending[row].clear()
    return [
        Document(c.id, c.domain, torch.tensor(h, dtype=torch.long), torch.tensor(m, dtype=torch.bool))
        for c, h, m in zip(batch, histories, masks, strict=True)
    ]


def _user_rounds(conversation: Conversation) -> list[Conversation]:
    """[system +] user turn, user turn, ... each as a conversation of its own; the answers in between are left out."""
    rounds, before = [], []
    for turn in conversation.turns:
        if turn.role == "assistant":
            continue
        before.append(turn)
        if turn.role == "user":
            rounds.append(Conversation(conversation.id, conversation.domain, tuple(before)))
            before = []
    return rounds


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
