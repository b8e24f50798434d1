"""Replaces a corpus's answers by the target's own, once, and stores them.

Training on the target's own answers makes acceptance in training predict acceptance in serving. The conversations alone decide
the batches. A batch is written as a whole, one line per document (answer_file), so that a killed run continues with the
next batch. answer_server requests the answers from a server instead.
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

from hyperdflash.answers.answer_file import AnswerFile
from hyperdflash.answers.exchange import Exchange
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.chat import encode_rounds
from hyperdflash.data.tokenizer import special_ids
from hyperdflash.settings import positive_int
from hyperdflash.targets.generate import generate_batch
from hyperdflash.targets.load import Target


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How the target answers: ``temperature`` 0 is greedy, ``max_new_tokens`` per turn, ``max_length`` tokens per document."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 192
    max_length: int = 512
    mode: str = "non_think"
    seed: int = 0
    dtype: str = "fp32"  # of the target's computation
    batch_rows: int = 128

    def __post_init__(self):
        positive_int("max_new_tokens", self.max_new_tokens)
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def documents(
        self, answers: AnswerFile, conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
    ) -> list[Document]:
        """Returns the documents in the order of ``conversations``; prints the numbers of cut and of absent answers."""
        limits = {"max_new_tokens": self.max_new_tokens, "max_length": self.max_length}
        return answers.ordered(conversations, **limits, eos_id=special_ids(tokenizer, mask_id=0).eos)


def answer_conversations(
    conversations: Sequence[Conversation],
    target: Callable[[], Target],
    fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: AnswerSettings,
    directory: Path,
) -> list[Document]:
    """Returns documents whose assistant turns the target writes, in the order of ``conversations``.

    Calls ``target()`` only if an answer is missing; ValueError where its fingerprint differs from ``fingerprint``. Prints how
    many answers ``max_length`` cut and how many prompts it left out.
    """
    batches = _batches(conversations, tokenizer, settings)
    key = hashlib.sha256(json.dumps([fingerprint, asdict(settings), tokenizer.backend_tokenizer.to_str()]).encode())
    for batch in batches:
        for conversation in batch:
            key.update(repr((conversation.id, conversation.turns)).encode())
    answers = AnswerFile(directory / f"{fingerprint}-{key.hexdigest()[:16]}.jsonl")
    cached = not answers.missing(conversations)
    if cached:
        print(f"target answers: all {len(conversations):,} are in {answers.path}", flush=True)
    with tqdm(total=len(conversations), desc="target answers", unit="doc", disable=cached) as bar:
        loaded = None
        for number, batch in enumerate(batches):
            if answers.missing(batch):
                loaded = loaded or target()
                if loaded.fingerprint != fingerprint:
                    raise ValueError(f"the target has fingerprint {loaded.fingerprint}, these answers need {fingerprint}")
                answers.append(_answer_batch(batch, loaded, tokenizer, settings, settings.seed * 1_000_003 + number))
            bar.update(len(batch))
    return settings.documents(answers, conversations, tokenizer)


def _batches(conversations, tokenizer, settings) -> list[list[Conversation]]:
    def cost(conversation: Conversation) -> tuple[int, int, str]:
        rounds = encode_rounds(conversation, tokenizer, settings.mode)
        return len(rounds), len(rounds[0]), conversation.id

    ordered = sorted(conversations, key=cost)
    return [ordered[i : i + settings.batch_rows] for i in range(0, len(ordered), settings.batch_rows)]


def _answer_batch(batch, target: Target, tokenizer, settings: AnswerSettings, seed: int) -> list[Document]:
    """Answers the conversations of a batch turn by turn, all that have a turn left at a time."""
    eos_id = special_ids(tokenizer, mask_id=0).eos
    generator = torch.Generator(device=target.model.device).manual_seed(seed)
    exchanges = [Exchange(conversation, tokenizer, settings.mode, settings.max_length) for conversation in batch]
    sampling = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "top_p")}
    while asked := [(exchange, prompt) for exchange in exchanges if (prompt := exchange.prompt()) is not None]:
        prompts = [prompt for _, prompt in asked]
        for index, answer in generate_batch(target.model, prompts, eos_id=eos_id, generator=generator, **sampling):
            asked[index][0].add(answer)
    return [document for exchange in exchanges for document in exchange.documents()]
